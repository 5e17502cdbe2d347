"""The report's page: style and script around the data that report.py puts in. Nothing here knows about runs' files.

The script draws SVG by hand. It loads nothing, and the page's own policy forbids it to.
"""

STYLE = """
:root { color-scheme: light dark; --bg:#f6f6f4; --card:#ffffff; --ink:#1d1c1a; --soft:#75716b; --line:#e6e4df;
  --grid:#eeece8; --a:#2563eb; --b:#e2590c; --c:#0d9488; --d:#8b46d8; --good:#15803d; --bad:#c22626; --shade:#0000000d; }
@media (prefers-color-scheme: dark) { :root { --bg:#131416; --card:#1b1d20; --ink:#ebeae7; --soft:#9a9791;
  --line:#2d3034; --grid:#26292d; --a:#74a7ff; --b:#ff9552; --c:#3ed0bd; --d:#c08bff; --good:#4ec27a; --bad:#ff7a70;
  --shade:#ffffff12; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:14px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric:tabular-nums }
main { max-width:1240px; margin:0 auto; padding:28px 24px 48px }
header { display:flex; flex-wrap:wrap; align-items:center; gap:10px 14px; margin-bottom:18px }
h1 { font-size:24px; font-weight:650; letter-spacing:-.01em; margin:0; overflow-wrap:anywhere }
h2 { font-size:13.5px; font-weight:600; margin:0 }
.chip { font-size:12px; font-weight:600; padding:2px 10px; border-radius:99px; border:1px solid var(--line);
  color:var(--soft); background:var(--card) }
.chip.good { color:var(--good) } .chip.bad { color:var(--bad) }
.spacer { flex:1 }
.switch { display:inline-flex; border:1px solid var(--line); border-radius:8px; overflow:hidden; background:var(--card) }
button { font:inherit; font-size:12.5px; border:0; background:none; color:var(--soft); padding:4px 11px; cursor:pointer }
button:hover { color:var(--ink) } button.on { background:var(--shade); color:var(--ink); font-weight:600 }
button:focus-visible { outline:2px solid var(--a); outline-offset:-2px }
.small { font-size:11.5px; padding:0 7px; border:1px solid var(--line); border-radius:6px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(132px, 1fr)); gap:12px; margin-bottom:14px }
.tile, .card { background:var(--card); border:1px solid var(--line); border-radius:12px }
.tile { padding:11px 14px 10px } .tile .name, .tile .note { color:var(--soft); font-size:12px }
.tile .value { font-size:22px; font-weight:620; letter-spacing:-.015em; line-height:1.25; white-space:nowrap } .tile .note { min-height:17px }
.grid { display:grid; grid-template-columns:1fr 1fr; gap:14px } .wide { grid-column:1 / -1 }
@media (max-width:820px) { .grid { grid-template-columns:1fr } main { padding:18px 12px } }
.card { padding:12px 14px 8px; position:relative; min-width:0 }
.head { display:flex; align-items:center; gap:14px; min-height:22px; margin-bottom:2px; flex-wrap:wrap }
.legend { display:flex; gap:12px; color:var(--soft); font-size:12px; flex-wrap:wrap }
.legend i { display:inline-block; width:14px; height:3px; border-radius:2px; margin-right:5px; vertical-align:middle }
.legend i.box { width:10px; height:10px; border-radius:3px; vertical-align:-1px }
svg { display:block; width:100%; overflow:visible; touch-action:pan-y } svg text { fill:var(--soft); font-size:11px }
.plot { cursor:crosshair; user-select:none }
.tip { position:absolute; pointer-events:none; z-index:5; background:var(--card); border:1px solid var(--line);
  border-radius:8px; padding:6px 10px; font-size:12px; box-shadow:0 4px 16px #0003; white-space:nowrap; display:none;
  max-width:420px }
.tip b { font-weight:600 } .tip .row { display:flex; justify-content:space-between; gap:16px }
.tip .wrap { white-space:normal; color:var(--soft) } .tip i { display:inline-block; width:8px; height:8px;
  border-radius:2px; margin-right:6px }
.share { display:flex; height:14px; border-radius:5px; overflow:hidden; gap:2px; margin:6px 0 8px }
.facts { display:flex; flex-wrap:wrap; gap:0 40px } .facts table { flex:1 1 340px; width:auto; align-self:flex-start }
table { border-collapse:collapse; width:100%; font-size:13px } td { padding:4px 12px 4px 0; vertical-align:top;
  border-top:1px solid var(--grid); overflow-wrap:anywhere } tr:first-child td { border-top:0 }
td:first-child { color:var(--soft); white-space:nowrap; width:1% } td.nowrap { white-space:nowrap; width:1% }
details.card { padding:10px 14px } summary { cursor:pointer; font-weight:600; font-size:13.5px }
pre { font:12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x:auto; margin:10px 0 4px }
.notice { border-left:3px solid var(--b); padding:8px 12px; margin-bottom:14px }
.under { color:var(--soft); font-size:12px; margin-bottom:8px }
.empty { color:var(--soft); padding:48px 0; text-align:center }
footer { color:var(--soft); font-size:12px; margin-top:16px }
"""

SHARED = r"""
'use strict';
const D = JSON.parse(document.getElementById('data').textContent);
const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const trim = s => s.includes('.') ? s.replace(/\.?0+$/, '') : s;
function num(v, sig = 4) {
  if (v === null || v === undefined) return '\u2013';
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e15)) return v.toExponential(Math.max(0, sig - 2)).replace(/\.?0+e/, 'e').replace('e+', 'e');
  for (const [size, unit] of [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e4, 'k']])
    if (a >= size) return trim((v / (unit === 'k' ? 1e3 : size)).toPrecision(sig)) + unit;
  return trim(v.toPrecision(Math.max(sig, Math.ceil(Math.log10(a + 1)))));
}
function span(s) {
  if (s < 100) return trim(s.toFixed(1)) + ' s';
  const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60, r = Math.round(s) % 60, two = x => String(x).padStart(2, '0');
  return h >= 48 ? `${trim((h / 24).toFixed(1))} d` : h ? `${h}:${two(m)}:${two(r)}` : `${m}:${two(r)}`;
}
function ticks(lo, hi, want) {
  const raw = (hi - lo) / want, unit = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find(k => k * unit >= raw * .999) * unit, out = [];
  for (let k = Math.ceil(lo / size - 1e-9); k * size <= hi + size * 1e-9; k++) out.push(k * size);
  return out;
}
function timeTicks(lo, hi, want) {
  const size = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]
    .find(k => k >= (hi - lo) / want);
  if (!size || hi - lo < 4) return ticks(lo, hi, want);
  const out = [];
  for (let k = Math.ceil(lo / size); k * size <= hi; k++) out.push(k * size);
  return out;
}
function logTicks(lo, hi) {
  const out = [], decades = Math.log10(hi / lo), steps = decades > 4 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e++)
    for (const k of steps) { const v = k * 10 ** e; if (v >= lo * .999 && v <= hi * 1.001) out.push(v); }
  const every = Math.ceil(out.length / 7);
  return out.filter((_, i) => i % every === 0);
}
function place(chart, px, e, content) {
  chart.tip.innerHTML = content; chart.tip.style.display = 'block';
  const box = chart.el.getBoundingClientRect(), own = chart.tip.getBoundingClientRect(), off = chart.plot.offsetLeft;
  const x = px + off + 14 + own.width > box.width ? px + off - own.width - 14 : px + off + 14;
  chart.tip.style.left = Math.max(4, x) + 'px'; chart.tip.style.top = Math.max(30, e.clientY - box.top - own.height - 10) + 'px';
}
"""
"""What every page's script begins with: the data as `D`, numbers and axis ticks in words, where a tip stands."""

SCRIPT = r"""
const N = D.x.step.length, charts = [], view = {axis: 'step', from: null, to: null};
const axes = { step: ['step', v => num(v, 6)], time: ['time', span], tokens: ['tokens', v => num(v, 4)] };
const xs = () => D.x[view.axis];
function xRange() {
  if (view.from !== null) return [view.from, view.to];
  const all = xs().filter(v => v !== null), more = view.axis === 'tokens' ? [] : D.events.map(e => e[view.axis]).filter(v => v !== null && v >= 0);
  const lo = Math.min(...all.slice(0, 1), ...more), hi = Math.max(...all.slice(-1), ...more);
  return hi > lo ? [lo, hi] : [lo - .5, lo + .5];
}
function nearest(value) {
  const x = xs(); let lo = 0, hi = N - 1;
  while (hi - lo > 1) { const mid = (lo + hi) >> 1; if (x[mid] < value) lo = mid; else hi = mid; }
  return Math.abs(x[lo] - value) <= Math.abs(x[hi] - value) ? lo : hi;
}
const eventTone = kind => ({save: 'c', evaluate: 'b', start: 'a', resume: 'a', stop: 'soft', skip: 'bad', rollback: 'bad',
  hang: 'bad', failure: 'bad', slow_rank: 'bad', signal: 'd', requeue: 'd', set_aside: 'soft'})[kind] || 'soft';
const marked = D.events.filter(e => ['resume', 'rollback', 'skip', 'hang'].includes(e.kind)).slice(0, 60);
const where = e => view.axis === 'tokens' ? (N ? D.x.tokens[nearestStep(e.step)] : null) : e[view.axis];
// On the time axis a pause before a resume is a gap: the moment of the resume that lies before point i, else null.
const restarts = D.x.time.map((t, i) => {
  const found = D.events.filter(e => e.kind === 'resume' && e.time !== null && i && e.time > D.x.time[i - 1] && e.time < t);
  return found.length ? found[found.length - 1].time : null;
});
const restart = i => view.axis === 'time' ? restarts[i] : null;
function nearestStep(step) { const i = D.x.step.findIndex(s => s >= step); return i < 0 ? N - 1 : i; }

class Chart {
  constructor(parent, spec) {
    this.spec = spec; this.log = !!spec.log;
    this.el = document.createElement('section');
    this.el.className = 'card chart' + (spec.wide ? ' wide' : '');
    const legend = spec.series.length > 1 || spec.legend ? spec.series.map(s =>
      `<span><i class="${spec.stacked ? 'box' : ''}" style="background:var(--${s.tone})"></i>${esc(s.name)}</span>`).join('') : '';
    const toggle = spec.noLog ? '' : `<button class="small ${this.log ? 'on' : ''}" title="logarithmic scale">log</button>`;
    this.el.innerHTML = `<div class="head"><h2>${esc(spec.title)}</h2><span class="legend">${legend}</span>
      <span class="spacer"></span>${toggle}</div>${spec.above || ''}<div class="plot"></div><div class="tip"></div>`;
    parent.append(this.el);
    this.plot = this.el.querySelector('.plot'); this.tip = this.el.querySelector('.tip');
    const button = this.el.querySelector('button');
    if (button) button.onclick = () => { this.log = !this.log; button.classList.toggle('on', this.log); this.draw(); };
    this.plot.onpointermove = e => this.move(e);
    this.plot.onpointerleave = () => { if (this.drag === undefined) hover(null, this); };
    this.plot.onpointerdown = e => { if (e.pointerType === 'mouse' && !e.button) this.drag = this.at(e); };
    this.plot.onpointerup = e => this.drop(e);
    this.plot.ondblclick = () => zoom(null, null);
    charts.push(this);
  }
  at(e) { return Math.min(this.w - this.right, Math.max(this.left, e.clientX - this.plot.getBoundingClientRect().left)); }
  value(px) { const [lo, hi] = this.range; return lo + (px - this.left) / (this.w - this.left - this.right) * (hi - lo); }
  move(e) {
    const px = this.at(e);
    if (this.drag !== undefined && Math.abs(px - this.drag) > 4) {
      const band = this.plot.querySelector('.band');
      band.setAttribute('x', Math.min(px, this.drag)); band.setAttribute('width', Math.abs(px - this.drag));
    }
    hover(this.value(px), this, e);
  }
  drop(e) {
    const from = this.drag, to = this.at(e); this.drag = undefined;
    if (from !== undefined && Math.abs(to - from) > 8) zoom(this.value(Math.min(from, to)), this.value(Math.max(from, to)));
    else this.plot.querySelector('.band').setAttribute('width', 0);
  }
  domain() {
    const x = xs(), [from, to] = this.range; let values = [];
    const inside = v => v !== null && v >= from && v <= to;
    if (this.spec.stacked) for (let i = 0; i < N; i++) { if (inside(x[i])) values.push(this.spec.series.reduce((t, s) => t + (s.mean[i] || 0), 0)); }
    else for (const s of this.spec.series) {
      if (s.points) for (const p of s.points) { if (inside(p[this.column()])) values.push(p[3]); }
      else for (let i = 0; i < N; i++) if (inside(x[i]) && s.mean[i] !== null) values.push(s.mean[i]);
    }
    for (const s of this.spec.stacked ? [] : this.spec.series) if (s.min && !s.points) {
      const sorted = list => list.filter((v, i) => v !== null && inside(x[i])).sort((a, b) => a - b);
      const lows = sorted(s.min), highs = sorted(s.max);  // the band, but for its most extreme fiftieth
      if (lows.length) values.push(lows[Math.floor(lows.length * .02)], highs[Math.ceil(highs.length * .98) - 1]);
    }
    if (this.log) values = values.filter(v => v > 0);
    if (!values.length) return this.log ? [1, 10] : [0, 1];
    let lo = values[0], hi = values[0];
    for (const v of values) { if (v < lo) lo = v; if (v > hi) hi = v; }
    if (this.log) return hi > lo * 1.0001 ? [lo / (hi / lo) ** .04, hi * (hi / lo) ** .04] : [lo / 2, hi * 2];
    if (this.spec.zero) lo = Math.min(0, lo);
    if (hi === lo) { const d = Math.abs(hi) * .1 || 1; return this.spec.zero ? [lo, hi + d] : [lo - d, hi + d]; }
    return [this.spec.zero ? lo : lo - (hi - lo) * .05, hi + (hi - lo) * .06];
  }
  column() { return {step: 0, time: 1, tokens: 2}[view.axis]; }
  draw() {
    const w = this.w = this.plot.clientWidth, h = this.spec.height || 208;
    const left = this.left = 52, right = this.right = 10, top = 8, bottom = 24;
    this.range = xRange(); const [x0, x1] = this.range, [y0, y1] = this.domain();
    const X = this.X = v => left + (v - x0) / (x1 - x0) * (w - left - right);
    const t = this.log ? v => Math.log(Math.max(v, 1e-300)) : v => v;
    const Y = this.Y = v => h - bottom - (t(v) - t(y0)) / (t(y1) - t(y0)) * (h - top - bottom);
    const xt = (view.axis === 'time' ? timeTicks : ticks)(x0, x1, Math.max(3, Math.floor(w / 95)));
    const yt = this.log ? logTicks(y0, y1) : ticks(y0, y1, 4), id = 'c' + charts.indexOf(this);
    let s = `<defs><clipPath id="${id}"><rect x="${left - 4}" y="0" width="${w - left - right + 8}" height="${h - bottom + 4}"/></clipPath></defs>`;
    for (const v of yt) s += `<line x1="${left}" x2="${w - right}" y1="${Y(v)}" y2="${Y(v)}" stroke="var(--grid)"/>
      <text x="${left - 8}" y="${Y(v) + 4}" text-anchor="end">${this.spec.format ? this.spec.format(v) : num(v, 3)}</text>`;
    for (const v of xt) if (view.axis !== 'step' || Number.isInteger(v)) s += `<text x="${X(v)}" y="${h - 6}" text-anchor="middle">${axes[view.axis][1](v)}</text>`;
    s += `<line x1="${left}" x2="${w - right}" y1="${h - bottom}" y2="${h - bottom}" stroke="var(--line)"/><g clip-path="url(#${id})">`;
    for (const e of marked) { const v = where(e); if (v !== null) s += `<line x1="${X(v)}" x2="${X(v)}" y1="${top}" y2="${h - bottom}"
      stroke="var(--${eventTone(e.kind)})" stroke-dasharray="3 4" opacity=".55"/>`; }
    s += this.spec.stacked ? this.areas() : this.spec.series.map(v => this.line(v)).join('');
    s += `</g><rect class="band" y="${top}" height="${h - top - bottom}" fill="var(--shade)" width="0"/>
      <line class="cross" y1="${top}" y2="${h - bottom}" stroke="var(--soft)" opacity=".6" visibility="hidden"/><g class="dots"></g>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="${esc(this.spec.title)}">
      <rect width="${w}" height="${h}" fill="transparent"/>${s}</svg>`;
  }
  path(x, y, whole) {
    let d = '', pen = 'M';
    for (let i = 0; i < x.length; i++) {
      if (y[i] === null || x[i] === null || (this.log && y[i] <= 0)) { pen = 'M'; continue; }
      if (whole && restart(i) !== null) pen = 'M';
      d += pen + this.X(x[i]).toFixed(1) + ' ' + this.Y(y[i]).toFixed(1); pen = 'L';
    }
    return d;
  }
  line(s) {
    const color = `var(--${s.tone})`, c = this.column();
    const x = s.points ? s.points.map(p => p[c]) : xs(), y = s.points ? s.points.map(p => p[3]) : s.mean;
    let out = '';
    if (s.min && !s.points) {
      const there = [...Array(N).keys()].filter(i => s.min[i] !== null && (!this.log || s.min[i] > 0));
      out += `<path class="range" fill="${color}" opacity=".18" d="M${there.map(i => this.X(x[i]).toFixed(1) + ' ' + this.Y(s.max[i]).toFixed(1))
        .concat(there.reverse().map(i => this.X(x[i]).toFixed(1) + ' ' + this.Y(s.min[i]).toFixed(1))).join('L')}Z"/>`;
    }
    out += `<path class="curve" fill="none" stroke="${color}" stroke-width="${s.points ? 2 : 1.6}" stroke-linejoin="round" d="${this.path(x, y, !s.points)}"/>`;
    const few = x.length <= 40;
    if (few) for (let i = 0; i < x.length; i++) if (y[i] !== null && x[i] !== null && !(this.log && y[i] <= 0))
      out += `<circle cx="${this.X(x[i])}" cy="${this.Y(y[i])}" r="${s.points ? 3 : 2.2}" fill="${color}"/>`;
    return out;
  }
  areas() {
    const x = xs(), base = new Array(N).fill(0); let out = '';
    const half = i => i <= 0 ? (N > 1 ? x[0] - (x[1] - x[0]) : x[0] - .5) : restart(i) !== null ? restart(i) : x[i - 1];
    for (const s of this.spec.series) {
      let shape = '', up = '', down = '';
      for (let i = 0; i < N; i++) {
        const a = this.X(half(i)).toFixed(1), b = this.X(x[i]).toFixed(1), v = s.mean[i] || 0;
        const lo = this.Y(base[i]).toFixed(1); base[i] += v; const hi = this.Y(base[i]).toFixed(1);
        if (i && restart(i) !== null) { shape += up + down + 'Z'; up = down = ''; }
        up += `${up ? 'L' : 'M'}${a} ${hi}L${b} ${hi}`; down = `L${b} ${lo}L${a} ${lo}` + down;
      }
      out += `<path class="curve" fill="var(--${s.tone})" opacity=".85" d="${shape}${up}${down}Z"/>`;
    }
    return out;
  }
  cross(i, showTip, e) {
    const cross = this.plot.querySelector('.cross'), dots = this.plot.querySelector('.dots');
    if (!cross) return;
    if (i === null) { cross.setAttribute('visibility', 'hidden'); dots.innerHTML = ''; this.tip.style.display = 'none'; return; }
    const px = this.X(xs()[i]); cross.setAttribute('x1', px); cross.setAttribute('x2', px); cross.setAttribute('visibility', 'visible');
    let rows = '', marks = '', base = 0; const c = this.column(), format = this.spec.exact || (v => num(v, 5));
    for (const s of this.spec.series) {
      let v = null, label = s.name;
      if (s.points) {
        let best = null;
        for (const p of s.points) if (p[0] <= D.x.step[i]) best = p;
        if (best) { v = best[3]; label += best[0] === D.x.step[i] ? '' : ` (step ${num(best[0], 9)})`; }
      } else {
        v = s.mean[i];
        const y = this.spec.stacked ? (base += v || 0) : v;
        if (v !== null && v !== undefined && !(this.log && y <= 0) && !this.spec.stacked)
          marks += `<circle cx="${px}" cy="${this.Y(y)}" r="3.5" fill="var(--${s.tone})" stroke="var(--card)" stroke-width="1.5"/>`;
      }
      const band = s.min && s.min[i] !== s.max[i] && s.min[i] !== null ? ` <span style="color:var(--soft)">${format(s.min[i])} … ${format(s.max[i])}</span>` : '';
      rows += `<div class="row"><span><i style="background:var(--${s.tone})"></i>${esc(label)}</span><span><b>${v === null ? '\u2013' : format(v)}</b>${band}</span></div>`;
    }
    dots.innerHTML = marks; this.tip.style.display = 'none';
    if (!showTip) return;
    const tokens = D.x.tokens[i] === null ? '' : ` · ${num(D.x.tokens[i])} tokens`;
    place(this, px, e, `<div style="color:var(--soft)">step ${num(D.x.step[i], 9)}${tokens} · ${span(D.x.time[i] || 0)}</div>${rows}`);
  }
}
function hover(value, source, e) {
  const i = value === null || !N ? null : nearest(value);
  for (const chart of charts) chart.cross && chart.cross(i, chart === source && e, e);
}
function zoom(from, to) { view.from = from; view.to = to; document.getElementById('reset').hidden = from === null; drawAll(); }
function drawAll() { for (const chart of charts) chart.draw(); }

// The run's life along wall time: each start of the ranks with what its time went to, and what lies between.
const lifeTone = {compute: ['a', .9], communication: ['d', .85], data: ['b', .9], evaluation: ['c', .9], save: ['good', .75],
  'start-up': ['soft', .75], load: ['soft', .5], end: ['soft', .3], 'lost work': ['bad', .85], downtime: ['ink', .14]};
const tint = name => `background:var(--${lifeTone[name][0]});opacity:${lifeTone[name][1]}`;
class Life {
  constructor(parent, life) {
    this.life = life; this.el = document.createElement('section'); this.el.className = 'card wide chart';
    const percent = v => trim((100 * v / life.wall).toFixed(1)) + '%', used = life.categories.map((n, i) => [n, life.seconds[i]]).filter(p => p[1] > 0);
    this.el.innerHTML = `<div class="head"><h2>Where the run's life went</h2><span class="legend">${used.map(([n, v]) =>
      `<span><i class="box" style="${tint(n)}"></i>${esc(n)} ${percent(v)}</span>`).join('')}</span></div>
      <div class="under">${esc(life.text)}${life.unbooked ? ' · not booked: ' + esc(span(life.unbooked)) : ''}</div>
      <div class="share life">${used.map(([n, v]) => `<span title="${esc(n)} ${esc(span(v))}" style="${tint(n)};flex:${v / life.wall} 0 0"></span>`).join('')}</div>
      <div class="plot" style="cursor:default"></div><div class="tip"></div>`;
    parent.append(this.el); this.plot = this.el.querySelector('.plot'); this.tip = this.el.querySelector('.tip');
    this.plot.onpointermove = e => this.move(e); this.plot.onpointerleave = () => { this.tip.style.display = 'none'; };
    charts.push(this);
  }
  draw() {
    const w = this.plot.clientWidth, left = 4, right = 10, h = 76, X = this.X = v => left + v / this.life.wall * (w - left - right);
    let s = '';
    for (const p of this.life.spans) {
      const high = p.steps ? 30 : 10, y = 44 - high; let at = p.from;
      for (const [name, v] of p.parts) {
        const wide = X(at + v) - X(at); at += v;
        if (wide > .05) s += `<rect class="${p.steps ? 'start' : 'between'}" x="${X(at - v).toFixed(2)}" y="${y}" width="${wide.toFixed(2)}" height="${high}"
          fill="var(--${lifeTone[name][0]})" opacity="${lifeTone[name][1]}"/>`;
      }
      if (p.failed) s += `<path class="failure" d="M${X(p.to).toFixed(1)} 12l-5 -8h10z" fill="var(--bad)"/><line x1="${X(p.to).toFixed(1)}" x2="${X(p.to).toFixed(1)}" y1="12" y2="44" stroke="var(--bad)"/>`;
    }
    for (const v of timeTicks(0, this.life.wall, Math.max(3, Math.floor(w / 95)))) s += `<text x="${X(v)}" y="${h - 8}" text-anchor="${v ? 'middle' : 'start'}">${span(v)}</text>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="Where the run's life went, along wall time">
      <rect width="${w}" height="${h}" fill="transparent"/><line x1="${left}" x2="${w - right}" y1="44.5" y2="44.5" stroke="var(--line)"/>${s}</svg>`;
  }
  move(e) {
    const x = e.clientX - this.plot.getBoundingClientRect().left, p = this.life.spans.find(q => this.X(q.from) <= x && x <= this.X(q.to));
    if (!p) { this.tip.style.display = 'none'; return; }
    const nth = this.life.spans.filter(q => q.steps).indexOf(p) + 1;
    const title = p.steps ? `start ${nth}${p.steps[0] ? `, steps ${p.steps[0]} to ${p.steps[1]}` : ''}${p.ended ? ': ' + p.ended : ''}` : 'between starts';
    const rows = p.parts.map(([n, v]) => `<div class="row"><span><i style="${tint(n)}"></i>${esc(n)}</span><b>${esc(span(v))}</b></div>`).join('');
    place(this, x, e, `<div><b>${esc(title)}</b> · ${esc(span(p.to - p.from))} from ${esc(span(p.from))} on</div>${rows}`);
  }
}

class Lanes {
  constructor(parent) {
    this.kinds = [...new Set(D.events.map(e => e.kind))];
    this.el = document.createElement('section'); this.el.className = 'card wide chart';
    this.el.innerHTML = '<div class="head"><h2>Events</h2></div><div class="plot" style="cursor:default"></div><div class="tip"></div>';
    parent.append(this.el); this.plot = this.el.querySelector('.plot'); this.tip = this.el.querySelector('.tip');
    this.plot.onpointermove = e => this.move(e); this.plot.onpointerleave = () => { this.tip.style.display = 'none'; };
    charts.push(this);
  }
  draw() {
    const w = this.plot.clientWidth, left = 78, right = 10, row = 24, h = this.kinds.length * row + 28;
    const [x0, x1] = xRange(), X = v => left + (v - x0) / (x1 - x0) * (w - left - right);
    let s = '';
    this.kinds.forEach((kind, r) => {
      const y = 14 + r * row;
      s += `<line x1="${left}" x2="${w - right}" y1="${y}" y2="${y}" stroke="var(--grid)"/><text x="${left - 12}" y="${y + 4}" text-anchor="end">${esc(kind)}</text>`;
    });
    this.marks = [];
    for (const e of D.events) {
      const v = where(e); if (v === null || v < x0 || v > x1) continue;
      const x = X(v), y = 14 + this.kinds.indexOf(e.kind) * row; this.marks.push([x, y, e]);
      s += `<circle class="mark" cx="${x.toFixed(1)}" cy="${y}" r="5" fill="var(--${eventTone(e.kind)})" stroke="var(--card)" stroke-width="1.5"/>`;
    }
    const at = (view.axis === 'time' ? timeTicks : ticks)(x0, x1, Math.max(3, Math.floor(w / 95)));
    for (const v of at) if (view.axis !== 'step' || Number.isInteger(v)) s += `<text x="${X(v)}" y="${h - 4}" text-anchor="middle">${axes[view.axis][1](v)}</text>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="Events">${s}</svg>`;
  }
  move(e) {
    const box = this.plot.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
    let best = null, far = 14;
    for (const m of this.marks) { const d = Math.hypot(m[0] - x, m[1] - y); if (d < far) { far = d; best = m; } }
    if (!best) { this.tip.style.display = 'none'; return; }
    const ev = best[2];
    place(this, best[0], e, `<div><b>${esc(ev.kind)}</b> at step ${ev.step} · ${ev.time === null ? '' : span(ev.time)}</div><div class="wrap">${esc(ev.detail)}</div>`);
  }
}

function build() {
  const root = document.getElementById('root'), curve = (name, label, tone) => D.curves[name] && {name: label, tone, ...D.curves[name]};
  document.getElementById('status').innerHTML = `<span class="chip ${D.status.tone}">${esc(D.status.text)}</span>`;
  document.getElementById('tiles').innerHTML = D.tiles.map(t => `<div class="tile"><div class="name">${esc(t.name)}</div>
    <div class="value">${esc(t.value)}</div><div class="note">${esc(t.note)}</div></div>`).join('');
  document.getElementById('notices').innerHTML = D.notices.map(n => `<div class="card notice">${esc(n)}</div>`).join('');
  const add = (spec) => { spec.series = spec.series.filter(Boolean); if (spec.series.length) new Chart(root, spec); };
  const wideRange = name => { const v = ((D.curves[name] || {}).mean || []).filter(x => x > 0); return v.length > 1 && Math.max(...v) > 50 * Math.min(...v); };
  if (N) {
    const heldout = D.heldout.length && {name: 'held-out', tone: 'b', points: D.heldout};
    add({title: 'Loss', wide: true, height: 300, legend: true, series: [curve('loss', 'training', 'a'), heldout]});
    add({title: 'Learning rate', zero: true, series: [curve('lr', 'learning rate', 'c')]});
    add({title: 'Gradient norm', log: wideRange('grad_norm'), series: [curve('grad_norm', 'gradient norm', 'd')]});
    add({title: 'Tokens per second', zero: true, noLog: true, height: D.curves.mfu ? 208 : 233, series: [curve('tokens_per_s', 'tokens/s', 'a')]});
    if (D.curves.mfu) add({title: 'Model FLOPs utilisation', zero: true, noLog: true, format: v => trim((v * 100).toFixed(1)) + '%',
      exact: v => (v * 100).toFixed(2) + '%', series: [curve('mfu', 'MFU', 'c')]});
    if (D.curves.loss_scale) add({title: 'Loss scale', log: true, series: [curve('loss_scale', 'loss scale', 'd')]});
    const mean = name => (D.curves[name] || {}).mean || new Array(N).fill(0), total = mean('step_time_s');
    if (D.curves.step_time_s) {
      const parts = {data: mean('data_time_s'), eval: mean('eval_time_s'), save: mean('save_time_s')};
      const compute = total.map((t, i) => Math.max(0, (t || 0) - (parts.data[i] || 0)));
      const labels = [['compute', 'computing', 'a'], ['data', 'waiting for data', 'b'], ['eval', 'evaluating', 'c'], ['save', 'saving', 'd']];
      const sum = Object.values(D.time_spent).reduce((a, b) => a + b, 0) || 1;
      const share = labels.map(([k, , tone]) => `<span style="background:var(--${tone});flex:${D.time_spent[k] / sum} 0 0"></span>`).join('');
      add({title: 'Where time went (seconds a step)', wide: Boolean(D.curves.mfu), zero: true, noLog: true, stacked: true, height: D.curves.mfu ? 208 : 178,
        above: `<div class="share">${share}</div>`, exact: v => num(v, 3) + ' s',
        series: labels.map(([k, label, tone]) => ({name: `${label} ${trim((100 * D.time_spent[k] / sum).toFixed(1))}%`, tone, mean: k === 'compute' ? compute : parts[k]}))});
    }
  } else root.innerHTML = '<section class="card wide empty">No step has been written yet.</section>';
  if (D.life) new Life(root, D.life);
  if (D.events.length) new Lanes(root);
  if (D.pipeline) root.insertAdjacentHTML('beforeend', `<section class="card wide"><div class="head"><h2>Pipeline schedule</h2></div>
    <div class="under">${esc(D.pipeline.text)}</div>${D.pipeline.svg}</section>`);
  const rows = (list, cls) => `<table>${list.map(r => `<tr>${r.map((c, i) => `<td class="${i < cls ? 'nowrap' : ''}">${esc(c)}</td>`).join('')}</tr>`).join('')}</table>`;
  const half = Math.ceil(D.facts.length / 2);
  root.insertAdjacentHTML('beforeend', `<section class="card wide"><div class="head"><h2>Run</h2></div><div class="facts">${rows(D.facts.slice(0, half), 1)}${rows(D.facts.slice(half), 1)}</div></section>`);
  const last = D.events.slice(-300).map(e => [e.time === null ? '' : span(e.time), e.kind, `step ${e.step}`, e.detail]);
  if (last.length) root.insertAdjacentHTML('beforeend', `<details class="card wide"><summary>All events</summary>${rows(last, 3)}</details>`);
  if (D.config) root.insertAdjacentHTML('beforeend', `<details class="card wide"><summary>Configuration</summary><pre>${esc(D.config)}</pre></details>`);
  const usable = Object.keys(axes).filter(a => N > 1 && D.x[a].every(v => v !== null));
  const pick = document.getElementById('axis');
  pick.innerHTML = usable.length > 1 ? usable.map(a => `<button data-axis="${a}" class="${a === view.axis ? 'on' : ''}">${axes[a][0]}</button>`).join('') : '';
  pick.hidden = usable.length < 2;
  pick.onclick = e => {
    if (!e.target.dataset.axis) return;
    view.axis = e.target.dataset.axis;
    for (const b of pick.children) b.classList.toggle('on', b === e.target);
    zoom(null, null);
  };
  document.getElementById('reset').onclick = () => zoom(null, null);
  drawAll();
  let width = root.clientWidth;
  new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; drawAll(); } }).observe(root);
  document.body.dataset.drawn = document.querySelectorAll('path.curve').length;
}
build();
"""

RUN = """<header><h1>{{title}}</h1><span id="status"></span><span class="spacer"></span>
<button id="reset" class="small" hidden>reset zoom</button><span id="axis" class="switch"></span></header>
<div id="notices"></div><div id="tiles" class="tiles"></div><div id="root" class="grid"></div>
<footer>Drag across a chart to zoom, double-click to reset. Dashed lines mark resumes and skipped steps.</footer>"""


def page(body: str, script: str, style: str = "") -> str:
    """A whole page that needs nothing else, with what it adds to the shared style and script; `{{title}}` and `{{data}}` are still to be put in."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{{{title}}}} · megatrain</title><style>{STYLE}{style}</style></head>
<body><main>
{body}
<noscript>The charts need JavaScript; the numbers are in metrics.jsonl.</noscript>
</main><script type="application/json" id="data">{{{{data}}}}</script><script>{SHARED}{script}</script></body></html>
"""


PAGE = page(RUN, SCRIPT)
