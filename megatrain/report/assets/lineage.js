// Where a model came from: a column of boxes for each generation, with arrows between the columns.
function lineageSection(boxes) {
  const figures = box =>
    box.figures.map(([name, value]) => `<div><span>${esc(name)}</span><b>${esc(value)}</b></div>`).join('');
  const one = box =>
    `<div class="artifact"><em>${esc(box.by)}</em><h3>${esc(box.name)}</h3>` +
    `${box.from ? `<p>from ${esc(box.from)}</p>` : ''}${figures(box)}</div>`;
  const last = Math.max(...boxes.map(box => box.generation));
  const columns = [];
  for (let i = 0; i <= last; i++) {
    const found = boxes.filter(box => box.generation === i);
    if (found.length) columns.push(`<div class="generation">${found.map(one).join('')}</div>`);
  }
  return (
    `<section class="card wide"><div class="head"><h2>Where this model came from</h2></div>` +
    `<div class="lineage">${columns.join('')}</div></section>`
  );
}
