// The sources of a corpus or a mixture, for the pages of datasets and runs. Loaded after page.js.

const whole = n => n.toLocaleString('en-US');
const percent = (part, all) => {
  const share = all ? (100 * part) / all : 0;
  return (share && share < 0.01 ? '<0.01' : trim(share.toFixed(share < 1 ? 2 : 1))) + '%';
};
const size = n => {
  for (const [unit, name] of [
    [1e12, 'TB'],
    [1e9, 'GB'],
    [1e6, 'MB'],
    [1e3, 'kB'],
  ])
    if (n >= 0.9995 * unit) return `${trim((n / unit).toPrecision(3))} ${name}`;
  return `${n} B`;
};

// A section with a row for each source; columns of which nothing is known are left out.
function sourcesSection(rows) {
  const share = tone => v =>
    `<span class="level"><i style="width:${Math.min(100, 100 * v)}%;background:var(--${tone})"></i></span><span class="share-number">${percent(v, 1)}</span>`;
  const columns = [
    ['documents', 'documents', whole],
    ['text', 'bytes', size],
    ['tokens', 'tokens', whole],
    ['held out', 'heldout', whole],
    ['share of tokens', 'share', share('a')],
    ['mixture', 'target', share('c')],
    ['share read', 'read', share('d')],
    ['epochs read', 'epochs', v => num(v, 3)],
  ].filter(([, key]) => rows.some(row => row[key] !== null));
  const cell = (value, show) => `<td>${value === null ? '\u2013' : show(value)}</td>`;
  return `<section class="card wide"><div class="head"><h2>Sources</h2></div>
    <div class="under">Tokens of all splits${rows.some(r => r.target !== null) ? '; mixture is the share that each source is meant to have' : ''}.</div>
    <div class="scroll"><table class="sources"><tr><th>source</th>${columns.map(([title]) => `<th>${title}</th>`).join('')}</tr>${rows
      .map(row => `<tr><td>${esc(row.name)}</td>${columns.map(([, key, show]) => cell(row[key], show)).join('')}</tr>`)
      .join('')}</table></div></section>`;
}
