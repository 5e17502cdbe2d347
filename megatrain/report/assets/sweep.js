// Builds a sweep's page: a table of its points and loss against compute. Loaded after page.js.

const P = D.points,
  charts = [];
P.forEach((p, i) => {
  p.color = `hsl(${Math.round(215 + (360 * i) / P.length) % 360} 68% var(--lightness))`;
  p.label = D.keys
    .map((k, j) => (p.values[j] === null ? null : `${k} ${p.values[j]}`))
    .filter(Boolean)
    .join(', ');
});

class Chart {
  constructor(parent, title, curve) {
    this.title = title;
    this.log = true;
    this.series = P.map((p, i) => ({i, p, at: p[curve].filter(q => q[0] > 0 && q[1] !== null && q[1] > 0)})).filter(
      s => s.at.length,
    );
    this.el = document.createElement('section');
    this.el.className = 'card wide chart';
    const legend = this.series
      .map(s => `<span data-point="${s.i}"><i style="background:${s.p.color}"></i>${esc(s.p.label)}</span>`)
      .join('');
    this.el.innerHTML = `<div class="head"><h2>${esc(title)}</h2><span class="spacer"></span>
      <button class="small on" title="logarithmic loss">log</button></div><div class="legend">${legend}</div>
      <div class="plot"></div><div class="tip"></div>`;
    parent.append(this.el);
    this.plot = this.el.querySelector('.plot');
    this.tip = this.el.querySelector('.tip');
    const button = this.el.querySelector('button');
    button.onclick = () => {
      this.log = !this.log;
      button.classList.toggle('on', this.log);
      this.draw();
    };
    for (const one of this.el.querySelectorAll('.legend span')) {
      one.onpointerenter = () => highlight(+one.dataset.point);
      one.onpointerleave = () => highlight(null);
    }
    this.plot.onpointermove = e => this.move(e);
    this.plot.onpointerleave = () => {
      this.tip.style.display = 'none';
      highlight(null);
    };
    charts.push(this);
  }
  draw() {
    const w = this.plot.clientWidth,
      h = 320,
      left = 52,
      right = 14,
      top = 8,
      bottom = 38;
    const all = this.series.flatMap(s => s.at),
      pad = (lo, hi, log) =>
        log
          ? hi > lo * 1.0001
            ? [lo / (hi / lo) ** 0.03, hi * (hi / lo) ** 0.03]
            : [lo / 2, hi * 2]
          : hi > lo
            ? [lo - (hi - lo) * 0.04, hi + (hi - lo) * 0.04]
            : [lo - 0.5, hi + 0.5];
    const range = c => all.reduce(([lo, hi], q) => [Math.min(lo, q[c]), Math.max(hi, q[c])], [Infinity, -Infinity]);
    const [x0, x1] = pad(...range(0), true),
      [y0, y1] = pad(...range(1), this.log),
      t = this.log ? Math.log : v => v;
    const X = v => left + (Math.log(v / x0) / Math.log(x1 / x0)) * (w - left - right);
    const Y = v => h - bottom - ((t(v) - t(y0)) / (t(y1) - t(y0))) * (h - top - bottom);
    let s = '';
    for (const v of this.log && y1 > 3 * y0 ? logTicks(y0, y1) : ticks(y0, y1, 5))
      s += `<line x1="${left}" x2="${w - right}" y1="${Y(v)}" y2="${Y(v)}" stroke="var(--grid)"/>
      <text x="${left - 8}" y="${Y(v) + 4}" text-anchor="end">${num(v, 3)}</text>`;
    for (const v of logTicks(x0, x1))
      s += `<line x1="${X(v)}" x2="${X(v)}" y1="${top}" y2="${h - bottom}" stroke="var(--grid)"/>
      <text x="${X(v)}" y="${h - 20}" text-anchor="middle">${num(v, 3)}</text>`;
    s += `<line x1="${left}" x2="${w - right}" y1="${h - bottom}" y2="${h - bottom}" stroke="var(--line)"/>
      <text x="${(left + w - right) / 2}" y="${h - 4}" text-anchor="middle">compute (FLOPs)</text>`;
    this.at = [];
    for (const one of this.series) {
      const place = one.at.map(q => [X(q[0]), Y(q[1]), one, q]);
      this.at.push(...place);
      const path = place.map((q, k) => (k ? 'L' : 'M') + q[0].toFixed(1) + ' ' + q[1].toFixed(1)).join('');
      s += `<path class="curve" data-point="${one.i}" fill="none" stroke="${one.p.color}" stroke-width="1.7"
        stroke-linejoin="round" d="${path}"/>`;
      for (const q of place.length <= 12 ? place : place.slice(-1))
        s += `<circle data-point="${one.i}" cx="${q[0].toFixed(1)}" cy="${q[1].toFixed(1)}" r="3"
          fill="${one.p.color}"/>`;
    }
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="${esc(this.title)}">
      <rect width="${w}" height="${h}" fill="transparent"/>${s}<g class="dots"></g></svg>`;
  }
  move(e) {
    const box = this.plot.getBoundingClientRect(),
      x = e.clientX - box.left,
      y = e.clientY - box.top;
    let best = null,
      far = 60;
    for (const q of this.at) {
      const d = Math.hypot(q[0] - x, q[1] - y);
      if (d < far) {
        far = d;
        best = q;
      }
    }
    const dots = this.plot.querySelector('.dots');
    highlight(best && best[2].i);
    if (!best) {
      dots.innerHTML = '';
      this.tip.style.display = 'none';
      return;
    }
    const [px, py, {p}, q] = best;
    dots.innerHTML = `<circle cx="${px}" cy="${py}" r="4.5"
      fill="${p.color}" stroke="var(--card)" stroke-width="1.5"/>`;
    const row = (name, value) => `<div class="row"><span>${name}</span><b>${value}</b></div>`;
    showTip(
      this,
      px,
      e,
      `<div><i style="background:${p.color}"></i><b>${esc(p.label)}</b></div>` +
        row('loss', num(q[1], 5)) +
        row('compute', num(q[0], 4) + ' FLOPs') +
        row('step', num(q[2], 9)),
    );
  }
}
// Highlight one point in the charts and the table; null highlights none.
function highlight(i) {
  for (const one of document.querySelectorAll('path.curve, circle[data-point]'))
    one.classList.toggle('faded', i !== null && +one.dataset.point !== i);
  for (const row of document.querySelectorAll('#points tbody tr'))
    row.classList.toggle('on', i !== null && +row.dataset.point === i);
}

const asNumber = v => (v === null || v === '' || !isFinite(v) ? null : +v);
const columns = [
  ...D.keys.map((k, j) => ({
    name: k,
    of: p => asNumber(p.values[j]) ?? p.values[j],
    show: p => esc(p.values[j] ?? '\u2013'),
  })),
  ...[
    ['parameters', 'parameters', 4],
    ['tokens', 'tokens', 4],
    ['compute (FLOPs)', 'compute', 4],
    ['loss', 'loss', 5],
    ['held-out loss', 'heldout', 5],
  ].map(([name, k, sig]) => ({name, k, number: true, of: p => p[k], show: p => num(p[k], sig)})),
  {name: 'status', of: p => p.status.text, show: p => esc(p.status.text)},
  {
    name: 'run',
    of: p => p.short,
    show: p => (p.page ? `<a href="${esc(p.page)}" title="${esc(p.run)}">${esc(p.short)}</a>` : esc(p.short)),
  },
];
const lowest = k => Math.min(...P.map(p => p[k]).filter(v => v !== null));
let sorted = null,
  down = false;
function fill(table) {
  const order = [...P.keys()];
  if (sorted !== null)
    order.sort((a, b) => {
      const [x, y] = [columns[sorted].of(P[a]), columns[sorted].of(P[b])];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
  const cell = (c, p, first) => {
    const tone = c.name === 'status' ? p.status.tone : '',
      best = ['loss', 'heldout'].includes(c.k) && p[c.k] !== null && p[c.k] === lowest(c.k) ? 'best' : '';
    const swatch = first ? `<i style="background:${p.color}"></i>` : '';
    return `<td class="${c.number ? 'number' : ''} ${tone} ${best}">${swatch}${c.show(p)}</td>`;
  };
  const heading = (c, k) => {
    const classes = `${c.number ? 'number' : ''} ${k === sorted ? 'on' : ''}`;
    return `<th class="${classes}" data-column="${k}">${esc(c.name)}</th>`;
  };
  const row = i => `<tr data-point="${i}">${columns.map((c, k) => cell(c, P[i], !k)).join('')}</tr>`;
  table.innerHTML = `<thead><tr>${columns.map(heading).join('')}</tr></thead>
    <tbody>${order.map(row).join('')}</tbody>`;
  for (const head of table.querySelectorAll('th'))
    head.onclick = () => {
      const k = +head.dataset.column;
      down = sorted === k && !down;
      sorted = k;
      fill(table);
    };
  for (const row of table.querySelectorAll('tbody tr')) {
    row.onpointerenter = () => highlight(+row.dataset.point);
    row.onpointerleave = () => highlight(null);
  }
}

function build() {
  const root = document.getElementById('root'),
    done = P.filter(p => p.status.text === 'done').length;
  document.getElementById('status').innerHTML =
    `<span class="chip ${done === P.length ? 'good' : ''}">${done} of ${P.length} done</span>`;
  showNotices(P.filter(p => p.notice).map(p => `${p.run}: ${p.notice}`));
  const best = P.filter(p => p.heldout !== null).sort((a, b) => a.heldout - b.heldout)[0],
    total = P.reduce((t, p) => t + (p.compute || 0), 0);
  const tiles = [
    ['points', P.length, `${done} done`],
    ['compute', num(total, 3), 'FLOPs over all points'],
  ];
  if (best) tiles.push(['best held-out loss', num(best.heldout, 5), best.label]);
  showTiles(tiles.map(([name, value, note]) => ({name, value, note})));
  root.innerHTML = '<section class="card wide table"><table id="points"></table></section>';
  fill(document.getElementById('points'));
  for (const [title, curve] of [
    ['Training loss against compute', 'train_curve'],
    ['Held-out loss against compute', 'heldout_curve'],
  ])
    if (P.some(p => p[curve].some(q => q[0] > 0 && q[1] > 0))) new Chart(root, title, curve);
  if (!charts.length)
    root.insertAdjacentHTML('beforeend', '<section class="card wide empty">No steps recorded yet.</section>');
  const draw = () => {
    for (const chart of charts) chart.draw();
  };
  drawAtEachWidth(draw);
  document.body.dataset.drawn = document.querySelectorAll('path.curve').length;
}
build();
