// What every report page shares: the data as `D`, number formats, tiles, notices, axis ticks and tooltips.

'use strict';
const D = JSON.parse(document.getElementById('data').textContent);
const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const trim = s => (s.includes('.') ? s.replace(/\.?0+$/, '') : s);
// A number in few characters: 1234 -> 1234, 12345 -> 12.35k.
function num(v, sig = 4) {
  if (v === null || v === undefined) return '\u2013';
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e15))
    return v
      .toExponential(Math.max(0, sig - 2))
      .replace(/\.?0+e/, 'e')
      .replace('e+', 'e');
  for (const [size, unit] of [
    [1e12, 'T'],
    [1e9, 'B'],
    [1e6, 'M'],
    [1e4, 'k'],
  ])
    if (a >= size) return trim((v / (unit === 'k' ? 1e3 : size)).toPrecision(sig)) + unit;
  return trim(v.toPrecision(Math.max(sig, Math.ceil(Math.log10(a + 1)))));
}
// Seconds as text: 12.5 s, 3:04, 1:02:03, 2.5 d.
function span(s) {
  if (s < 100) return trim(s.toFixed(1)) + ' s';
  const h = Math.floor(s / 3600),
    m = Math.floor(s / 60) % 60,
    r = Math.round(s) % 60,
    two = x => String(x).padStart(2, '0');
  return h >= 48 ? `${trim((h / 24).toFixed(1))} d` : h ? `${h}:${two(m)}:${two(r)}` : `${m}:${two(r)}`;
}
function ticks(lo, hi, want) {
  const raw = (hi - lo) / want,
    unit = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find(k => k * unit >= raw * 0.999) * unit,
    out = [];
  for (let k = Math.ceil(lo / size - 1e-9); k * size <= hi + size * 1e-9; k++) out.push(k * size);
  return out;
}
function timeTicks(lo, hi, want) {
  const size = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400].find(
    k => k >= (hi - lo) / want,
  );
  if (!size || hi - lo < 4) return ticks(lo, hi, want);
  const out = [];
  for (let k = Math.ceil(lo / size); k * size <= hi; k++) out.push(k * size);
  return out;
}
function logTicks(lo, hi) {
  const out = [],
    decades = Math.log10(hi / lo),
    steps = decades > 4 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e++)
    for (const k of steps) {
      const v = k * 10 ** e;
      if (v >= lo * 0.999 && v <= hi * 1.001) out.push(v);
    }
  const every = Math.ceil(out.length / 7);
  return out.filter((_, i) => i % every === 0);
}
const showNotices = texts => {
  document.getElementById('notices').innerHTML = texts.map(n => `<div class="card notice">${esc(n)}</div>`).join('');
};
// The numbers at the top of a page, in rows of almost the same number of tiles.
function showTiles(tiles) {
  document.getElementById('tiles').innerHTML = tiles
    .map(
      t => `<div class="tile"><div class="name">${esc(t.name)}</div>
    <div class="value">${esc(t.value)}</div><div class="note">${esc(t.note)}</div></div>`,
    )
    .join('');
  placeTiles();
}
function placeTiles() {
  const parent = document.getElementById('tiles'),
    n = parent.children.length,
    gap = 12,
    most = Math.max(1, Math.floor((parent.clientWidth + gap) / (112 + gap))),
    rows = Math.ceil(n / most);
  let at = 0;
  for (let row = 0; row < rows; row++)
    for (let left = Math.floor(n / rows) + (row < n % rows), inRow = left; left; left--)
      parent.children[at++].style.flexBasis = `calc((100% - ${(inRow - 1) * gap}px) / ${inRow} - 0.02px)`;
}
// Draw now, and again when the page gets another width.
function drawAtEachWidth(draw) {
  const root = document.getElementById('root');
  let width = root.clientWidth;
  draw();
  new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    placeTiles();
    draw();
  }).observe(root);
}
// Show a chart's tooltip beside the pointer, inside the card.
function showTip(chart, px, e, content) {
  chart.tip.innerHTML = content;
  chart.tip.style.display = 'block';
  const box = chart.el.getBoundingClientRect(),
    own = chart.tip.getBoundingClientRect(),
    off = chart.plot.offsetLeft;
  const x = px + off + 14 + own.width > box.width ? px + off - own.width - 14 : px + off + 14;
  chart.tip.style.left = Math.max(4, x) + 'px';
  chart.tip.style.top = Math.max(30, e.clientY - box.top - own.height - 10) + 'px';
}
