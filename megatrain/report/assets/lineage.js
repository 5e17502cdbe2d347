// Where a model came from: a box for each artifact, with arrows between them.
function lineageSection(boxes) {
  const figures = box =>
    box.figures.map(([name, value]) => `<div><span>${esc(name)}</span><b>${esc(value)}</b></div>`).join('');
  const one = (box, i) =>
    `${i ? '<i aria-hidden="true">→</i>' : ''}<div class="artifact"><em>${esc(box.by)}</em><h3>${esc(box.name)}</h3>` +
    `${box.from ? `<p>from ${esc(box.from)}</p>` : ''}${figures(box)}</div>`;
  return (
    `<section class="card wide"><div class="head"><h2>Where this model came from</h2></div>` +
    `<div class="lineage">${boxes.map(one).join('')}</div></section>`
  );
}
