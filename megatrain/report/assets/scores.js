// Scores on tasks and examples: a row a metric, a column a model or a checkpoint. Loaded after page.js.
function scoresSection(table) {
  const best = row => {
    const values = row.cells.filter(c => c !== null).map(c => c.value);
    if (values.length < 2 || row.better === null || Math.min(...values) === Math.max(...values)) return null;
    return row.better ? Math.max(...values) : Math.min(...values);
  };
  const cell = (c, top) =>
    c === null
      ? '<td>–</td>'
      : `<td class="${c.value === top ? 'best' : ''}">${c.value.toFixed(4)} <span>${esc(c.range)}</span></td>`;
  const arrow = {true: ' ↑', false: ' ↓', null: ''};
  const rows = table.rows.map(
    row =>
      `<tr><td>${esc(row.task)}</td><td>${esc(row.metric)}${arrow[row.better]}</td>` +
      `${row.cells.map(c => cell(c, best(row))).join('')}<td>${row.documents ?? '–'}</td></tr>`,
  );
  const heads = ['task', 'metric', ...table.columns, 'documents'];
  return (
    `<section class="card wide"><div class="head"><h2>Scores</h2></div><div class="under">${esc(table.note)}</div>` +
    `<div class="scroll"><table class="scores"><tr>${heads.map(h => `<th>${esc(h)}</th>`).join('')}</tr>` +
    `${rows.join('')}</table></div>${table.notes.map(n => `<div class="under">${esc(n)}</div>`).join('')}</section>`
  );
}
