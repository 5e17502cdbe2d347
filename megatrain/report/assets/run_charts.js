// The charts of a run's page: one shared x axis, zoom and crosshair. Loaded after page.js.

const N = D.x.step.length,
  charts = [],
  view = {axis: 'step', from: null, to: null};
const axes = {step: ['step', v => num(v, 6)], time: ['time', span], tokens: ['tokens', v => num(v, 4)]};
const xs = () => D.x[view.axis];
function xRange() {
  if (view.from !== null) return [view.from, view.to];
  const all = xs().filter(v => v !== null),
    more = view.axis === 'tokens' ? [] : D.events.map(e => e[view.axis]).filter(v => v !== null && v >= 0);
  const lo = Math.min(...all.slice(0, 1), ...more),
    hi = Math.max(...all.slice(-1), ...more);
  return hi > lo ? [lo, hi] : [lo - 0.5, lo + 0.5];
}
function nearest(value) {
  const x = xs();
  let lo = 0,
    hi = N - 1;
  while (hi - lo > 1) {
    const mid = (lo + hi) >> 1;
    if (x[mid] < value) lo = mid;
    else hi = mid;
  }
  return Math.abs(x[lo] - value) <= Math.abs(x[hi] - value) ? lo : hi;
}
const eventTone = kind =>
  ({
    save: 'c',
    evaluate: 'b',
    start: 'a',
    resume: 'a',
    stop: 'soft',
    skip: 'bad',
    rollback: 'bad',
    hang: 'bad',
    failure: 'bad',
    slow_rank: 'bad',
    signal: 'd',
    interrupt: 'd',
    requeue: 'd',
    set_aside: 'soft',
  })[kind] || 'soft';
const marked = D.events.filter(e => ['resume', 'rollback', 'skip', 'hang'].includes(e.kind)).slice(0, 60);
const where = e => (view.axis === 'tokens' ? (N ? D.x.tokens[nearestStep(e.step)] : null) : e[view.axis]);
// For each point: when the run resumed between the previous point and this one, else null.
// On the time axis such a pause is drawn as a gap.
const restarts = D.x.time.map((t, i) => {
  const found = D.events.filter(
    e => e.kind === 'resume' && e.time !== null && i && e.time > D.x.time[i - 1] && e.time < t,
  );
  return found.length ? found[found.length - 1].time : null;
});
const restart = i => (view.axis === 'time' ? restarts[i] : null);
function nearestStep(step) {
  const i = D.x.step.findIndex(s => s >= step);
  return i < 0 ? N - 1 : i;
}

class Chart {
  constructor(parent, spec) {
    this.spec = spec;
    this.log = !!spec.log;
    this.el = document.createElement('section');
    this.el.className = 'card chart fills' + (spec.wide ? ' wide' : '');
    const legend =
      spec.series.length > 1 || spec.legend
        ? spec.series
            .map(
              s =>
                `<span><i class="${spec.stacked ? 'box' : ''}" style="background:var(--${s.tone})"></i>${esc(
                  s.name,
                )}</span>`,
            )
            .join('')
        : '';
    const toggle = spec.noLog
      ? ''
      : `<button class="small ${this.log ? 'on' : ''}" title="logarithmic scale">log</button>`;
    this.el.innerHTML = `<div class="head"><h2>${esc(spec.title)}</h2><span class="legend">${legend}</span>
      <span class="spacer"></span>${toggle}</div>${spec.above || ''}<div class="plot"></div><div class="tip"></div>`;
    parent.append(this.el);
    this.plot = this.el.querySelector('.plot');
    this.plot.style.minHeight = `${spec.height || 208}px`; // it grows with the other card of its row
    this.tip = this.el.querySelector('.tip');
    const button = this.el.querySelector('button');
    if (button)
      button.onclick = () => {
        this.log = !this.log;
        button.classList.toggle('on', this.log);
        this.draw();
      };
    this.plot.onpointermove = e => this.move(e);
    this.plot.onpointerleave = () => {
      if (this.drag === undefined) hover(null, this);
    };
    this.plot.onpointerdown = e => {
      if (e.pointerType === 'mouse' && !e.button) this.drag = this.at(e);
    };
    this.plot.onpointerup = e => this.drop(e);
    this.plot.ondblclick = () => zoom(null, null);
    charts.push(this);
  }
  at(e) {
    return Math.min(this.w - this.right, Math.max(this.left, e.clientX - this.plot.getBoundingClientRect().left));
  }
  value(px) {
    const [lo, hi] = this.range;
    return lo + ((px - this.left) / (this.w - this.left - this.right)) * (hi - lo);
  }
  move(e) {
    const px = this.at(e);
    if (this.drag !== undefined && Math.abs(px - this.drag) > 4) {
      const band = this.plot.querySelector('.band');
      band.setAttribute('x', Math.min(px, this.drag));
      band.setAttribute('width', Math.abs(px - this.drag));
    }
    hover(this.value(px), this, e);
  }
  drop(e) {
    const from = this.drag,
      to = this.at(e);
    this.drag = undefined;
    if (from !== undefined && Math.abs(to - from) > 8)
      zoom(this.value(Math.min(from, to)), this.value(Math.max(from, to)));
    else this.plot.querySelector('.band').setAttribute('width', 0);
  }
  domain() {
    const x = xs(),
      [from, to] = this.range;
    let values = [];
    const inside = v => v !== null && v >= from && v <= to;
    if (this.spec.stacked)
      for (let i = 0; i < N; i++) {
        if (inside(x[i])) values.push(this.spec.series.reduce((t, s) => t + (s.mean[i] || 0), 0));
      }
    else
      for (const s of this.spec.series) {
        if (s.points)
          for (const p of s.points) {
            if (inside(p[this.column()])) values.push(p[3]);
          }
        else for (let i = 0; i < N; i++) if (inside(x[i]) && s.mean[i] !== null) values.push(s.mean[i]);
      }
    for (const s of this.spec.stacked ? [] : this.spec.series)
      if (s.min && !s.points) {
        const sorted = list => list.filter((v, i) => v !== null && inside(x[i])).sort((a, b) => a - b);
        const lows = sorted(s.min),
          highs = sorted(s.max); // leaves out the most extreme 2% of the band
        if (lows.length) values.push(lows[Math.floor(lows.length * 0.02)], highs[Math.ceil(highs.length * 0.98) - 1]);
      }
    if (this.log) values = values.filter(v => v > 0);
    if (!values.length) return this.log ? [1, 10] : [0, 1];
    let lo = values[0],
      hi = values[0];
    for (const v of values) {
      if (v < lo) lo = v;
      if (v > hi) hi = v;
    }
    if (this.log) return hi > lo * 1.0001 ? [lo / (hi / lo) ** 0.04, hi * (hi / lo) ** 0.04] : [lo / 2, hi * 2];
    if (this.spec.zero) lo = Math.min(0, lo);
    if (hi === lo) {
      const d = Math.abs(hi) * 0.1 || 1;
      return this.spec.zero ? [lo, hi + d] : [lo - d, hi + d];
    }
    return [this.spec.zero ? lo : lo - (hi - lo) * 0.05, hi + (hi - lo) * 0.06];
  }
  column() {
    return {step: 0, time: 1, tokens: 2}[view.axis];
  }
  draw() {
    const w = (this.w = this.plot.clientWidth),
      h = this.plot.clientHeight;
    const left = (this.left = 52),
      right = (this.right = 10),
      top = 8,
      bottom = 24;
    this.range = xRange();
    const [x0, x1] = this.range,
      [y0, y1] = this.domain();
    const X = (this.X = v => left + ((v - x0) / (x1 - x0)) * (w - left - right));
    const t = this.log ? v => Math.log(Math.max(v, 1e-300)) : v => v;
    const Y = (this.Y = v => h - bottom - ((t(v) - t(y0)) / (t(y1) - t(y0))) * (h - top - bottom));
    const xt = (view.axis === 'time' ? timeTicks : ticks)(x0, x1, Math.max(3, Math.floor(w / 95)));
    const yt = this.log ? logTicks(y0, y1) : ticks(y0, y1, 4),
      yText = this.spec.format || (v => num(v, 3)),
      id = 'c' + charts.indexOf(this);
    let s = `<defs><clipPath id="${id}"><rect x="${left - 4}" y="0"
      width="${w - left - right + 8}" height="${h - bottom + 4}"/></clipPath></defs>`;
    for (const v of yt)
      s += `<line x1="${left}" x2="${w - right}" y1="${Y(v)}" y2="${Y(v)}" stroke="var(--grid)"/>
      <text x="${left - 8}" y="${Y(v) + 4}" text-anchor="end">${yText(v)}</text>`;
    for (const v of xt)
      if (view.axis !== 'step' || Number.isInteger(v))
        s += `<text x="${X(v)}" y="${h - 6}" text-anchor="middle">${axes[view.axis][1](v)}</text>`;
    s +=
      `<line x1="${left}" x2="${w - right}" y1="${h - bottom}" y2="${h - bottom}" stroke="var(--line)"/>` +
      `<g clip-path="url(#${id})">`;
    for (const e of marked) {
      const v = where(e);
      if (v !== null)
        s += `<line x1="${X(v)}" x2="${X(v)}" y1="${top}" y2="${h - bottom}"
      stroke="var(--${eventTone(e.kind)})" stroke-dasharray="3 4" opacity=".55"/>`;
    }
    s += this.spec.stacked ? this.areas() : this.spec.series.map(v => this.line(v)).join('');
    s += `</g><rect class="band" y="${top}" height="${h - top - bottom}" fill="var(--shade)" width="0"/>
      <line class="cross" y1="${top}" y2="${h - bottom}" stroke="var(--soft)" opacity=".6"
        visibility="hidden"/><g class="dots"></g>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="${esc(this.spec.title)}">
      <rect width="${w}" height="${h}" fill="transparent"/>${s}</svg>`;
  }
  path(x, y, whole) {
    let d = '',
      pen = 'M';
    for (let i = 0; i < x.length; i++) {
      if (y[i] === null || x[i] === null || (this.log && y[i] <= 0)) {
        pen = 'M';
        continue;
      }
      if (whole && restart(i) !== null) pen = 'M';
      d += pen + this.X(x[i]).toFixed(1) + ' ' + this.Y(y[i]).toFixed(1);
      pen = 'L';
    }
    return d;
  }
  line(s) {
    const color = `var(--${s.tone})`,
      c = this.column();
    const x = s.points ? s.points.map(p => p[c]) : xs(),
      y = s.points ? s.points.map(p => p[3]) : s.mean;
    let out = '';
    if (s.min && !s.points) {
      const shown = [...Array(N).keys()].filter(i => s.min[i] !== null && (!this.log || s.min[i] > 0));
      out += `<path class="range" fill="${color}" opacity=".18" d="M${shown
        .map(i => this.X(x[i]).toFixed(1) + ' ' + this.Y(s.max[i]).toFixed(1))
        .concat(shown.reverse().map(i => this.X(x[i]).toFixed(1) + ' ' + this.Y(s.min[i]).toFixed(1)))
        .join('L')}Z"/>`;
    }
    out += `<path class="curve" fill="none" stroke="${color}" stroke-width="${s.points ? 2 : 1.6}"
      stroke-linejoin="round" d="${this.path(x, y, !s.points)}"/>`;
    const few = x.length <= 40;
    if (few)
      for (let i = 0; i < x.length; i++)
        if (y[i] !== null && x[i] !== null && !(this.log && y[i] <= 0))
          out += `<circle cx="${this.X(x[i])}" cy="${this.Y(y[i])}" r="${s.points ? 3 : 2.2}" fill="${color}"/>`;
    return out;
  }
  areas() {
    const x = xs(),
      base = new Array(N).fill(0);
    let out = '';
    const half = i =>
      i <= 0 ? (N > 1 ? x[0] - (x[1] - x[0]) : x[0] - 0.5) : restart(i) !== null ? restart(i) : x[i - 1];
    for (const s of this.spec.series) {
      let shape = '',
        up = '',
        down = '';
      for (let i = 0; i < N; i++) {
        const a = this.X(half(i)).toFixed(1),
          b = this.X(x[i]).toFixed(1),
          v = s.mean[i] || 0;
        const lo = this.Y(base[i]).toFixed(1);
        base[i] += v;
        const hi = this.Y(base[i]).toFixed(1);
        if (i && restart(i) !== null) {
          shape += up + down + 'Z';
          up = down = '';
        }
        up += `${up ? 'L' : 'M'}${a} ${hi}L${b} ${hi}`;
        down = `L${b} ${lo}L${a} ${lo}` + down;
      }
      out += `<path class="curve" fill="var(--${s.tone})" opacity=".85" d="${shape}${up}${down}Z"/>`;
    }
    return out;
  }
  cross(i, showTip, e) {
    const cross = this.plot.querySelector('.cross'),
      dots = this.plot.querySelector('.dots');
    if (!cross) return;
    if (i === null) {
      cross.setAttribute('visibility', 'hidden');
      dots.innerHTML = '';
      this.tip.style.display = 'none';
      return;
    }
    const px = this.X(xs()[i]);
    cross.setAttribute('x1', px);
    cross.setAttribute('x2', px);
    cross.setAttribute('visibility', 'visible');
    let rows = '',
      marks = '',
      base = 0;
    const c = this.column(),
      format = this.spec.exact || (v => num(v, 5));
    for (const s of this.spec.series) {
      let v = null,
        label = s.name;
      if (s.points) {
        let best = null;
        for (const p of s.points) if (p[0] <= D.x.step[i]) best = p;
        if (best) {
          v = best[3];
          label += best[0] === D.x.step[i] ? '' : ` (step ${num(best[0], 9)})`;
        }
      } else {
        v = s.mean[i];
        const y = this.spec.stacked ? (base += v || 0) : v;
        if (v !== null && v !== undefined && !(this.log && y <= 0) && !this.spec.stacked)
          marks += `<circle cx="${px}" cy="${this.Y(y)}" r="3.5"
            fill="var(--${s.tone})" stroke="var(--card)" stroke-width="1.5"/>`;
      }
      const band =
        s.min && s.min[i] !== s.max[i] && s.min[i] !== null
          ? ` <span style="color:var(--soft)">${format(s.min[i])} … ${format(s.max[i])}</span>`
          : '';
      rows +=
        `<div class="row"><span><i style="background:var(--${s.tone})"></i>${esc(label)}</span>` +
        `<span><b>${v === null ? '\u2013' : format(v)}</b>${band}</span></div>`;
    }
    dots.innerHTML = marks;
    this.tip.style.display = 'none';
    if (!showTip) return;
    const tokens = D.x.tokens[i] === null ? '' : ` · ${num(D.x.tokens[i])} tokens`;
    showTip(
      this,
      px,
      e,
      `<div style="color:var(--soft)">step ${num(D.x.step[i], 9)}${tokens} · ${span(D.x.time[i] || 0)}</div>${rows}`,
    );
  }
}
function hover(value, source, e) {
  const i = value === null || !N ? null : nearest(value);
  for (const chart of charts) chart.cross && chart.cross(i, chart === source && e, e);
}
function zoom(from, to) {
  view.from = from;
  view.to = to;
  document.getElementById('reset').hidden = from === null;
  drawAll();
}
function drawAll() {
  for (const chart of charts) chart.draw();
}
