// The strips of a run's page: where its time went, and its events. Loaded after run_charts.js.

// The goodput ledger along wall time: how each start of the ranks, and each pause between starts, spent its time.
const lifeTone = {
  compute: ['a', 0.9],
  communication: ['d', 0.85],
  data: ['b', 0.9],
  evaluation: ['c', 0.9],
  save: ['good', 0.75],
  'start-up': ['soft', 0.75],
  load: ['soft', 0.5],
  end: ['soft', 0.3],
  'lost work': ['bad', 0.85],
  downtime: ['ink', 0.14],
  idle: ['ink', 0.04],
};
const tint = name => `background:var(--${lifeTone[name][0]});opacity:${lifeTone[name][1]}`;
class Life {
  constructor(parent, life) {
    this.life = life;
    this.el = document.createElement('section');
    this.el.className = 'card wide chart';
    const percent = v => trim(((100 * v) / life.wall).toFixed(1)) + '%',
      used = life.categories.map((n, i) => [n, life.seconds[i]]).filter(p => p[1] > 0);
    const legend = used
      .map(([n, v]) => `<span><i class="box" style="${tint(n)}"></i>${esc(n)} ${percent(v)}</span>`)
      .join('');
    const shares = used
      .map(([n, v]) => `<span title="${esc(n)} ${esc(span(v))}" style="${tint(n)};flex:${v / life.wall} 0 0"></span>`)
      .join('');
    this.el.innerHTML = `<div class="head"><h2>Where the run's time went</h2><span class="legend">${legend}</span></div>
      <div class="under">${esc(life.text)}${life.unbooked ? ' · unaccounted: ' + esc(span(life.unbooked)) : ''}</div>
      <div class="share life">${shares}</div>
      <div class="plot" style="cursor:default"></div><div class="tip"></div>`;
    parent.append(this.el);
    this.plot = this.el.querySelector('.plot');
    this.tip = this.el.querySelector('.tip');
    this.plot.onpointermove = e => this.move(e);
    this.plot.onpointerleave = () => {
      this.tip.style.display = 'none';
    };
    charts.push(this);
  }
  draw() {
    const w = this.plot.clientWidth,
      left = 4,
      right = 10,
      h = 76,
      X = (this.X = v => left + (v / this.life.wall) * (w - left - right));
    let s = '';
    for (const p of this.life.spans) {
      const high = p.steps ? 30 : 10,
        y = 44 - high;
      let at = p.from;
      for (const [name, v] of p.parts) {
        const wide = X(at + v) - X(at);
        at += v;
        if (wide > 0.05)
          s += `<rect class="${p.steps ? 'start' : 'between'}" x="${X(at - v).toFixed(2)}" y="${y}"
            width="${wide.toFixed(2)}" height="${high}"
            fill="var(--${lifeTone[name][0]})" opacity="${lifeTone[name][1]}"/>`;
      }
      if (p.failed)
        s +=
          `<path class="failure" d="M${X(p.to).toFixed(1)} 12l-5 -8h10z" fill="var(--bad)"/>` +
          `<line x1="${X(p.to).toFixed(1)}" x2="${X(p.to).toFixed(1)}" y1="12" y2="44" stroke="var(--bad)"/>`;
    }
    for (const v of timeTicks(0, this.life.wall, Math.max(3, Math.floor(w / 95))))
      s += `<text x="${X(v)}" y="${h - 8}" text-anchor="${v ? 'middle' : 'start'}">${span(v)}</text>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img"
      aria-label="Where the run's time went, along wall time">
      <rect width="${w}" height="${h}" fill="transparent"/><line
        x1="${left}" x2="${w - right}" y1="44.5" y2="44.5" stroke="var(--line)"/>${s}</svg>`;
  }
  move(e) {
    const x = e.clientX - this.plot.getBoundingClientRect().left,
      p = this.life.spans.find(q => this.X(q.from) <= x && x <= this.X(q.to));
    if (!p) {
      this.tip.style.display = 'none';
      return;
    }
    const nth = this.life.spans.filter(q => q.steps).indexOf(p) + 1;
    const title = p.steps
      ? `start ${nth}${p.steps[0] ? `, steps ${p.steps[0]} to ${p.steps[1]}` : ''}${p.ended ? ': ' + p.ended : ''}`
      : p.ended === 'done'
        ? 'nothing left to do'
        : p.ended
          ? `refused: ${p.ended}`
          : 'between starts';
    const rows = p.parts
      .map(([n, v]) => `<div class="row"><span><i style="${tint(n)}"></i>${esc(n)}</span><b>${esc(span(v))}</b></div>`)
      .join('');
    showTip(
      this,
      x,
      e,
      `<div><b>${esc(title)}</b> · ${esc(span(p.to - p.from))} starting at ${esc(span(p.from))}</div>${rows}`,
    );
  }
}

class Lanes {
  constructor(parent) {
    this.kinds = [...new Set(D.events.map(e => e.kind))];
    this.el = document.createElement('section');
    this.el.className = 'card wide chart';
    this.el.innerHTML =
      '<div class="head"><h2>Events</h2></div><div class="plot" style="cursor:default"></div><div class="tip"></div>';
    parent.append(this.el);
    this.plot = this.el.querySelector('.plot');
    this.tip = this.el.querySelector('.tip');
    this.plot.onpointermove = e => this.move(e);
    this.plot.onpointerleave = () => {
      this.tip.style.display = 'none';
    };
    charts.push(this);
  }
  draw() {
    const w = this.plot.clientWidth,
      left = 78,
      right = 10,
      row = 24,
      h = this.kinds.length * row + 28;
    const [x0, x1] = xRange(),
      X = v => left + ((v - x0) / (x1 - x0)) * (w - left - right);
    let s = '';
    this.kinds.forEach((kind, r) => {
      const y = 14 + r * row;
      s +=
        `<line x1="${left}" x2="${w - right}" y1="${y}" y2="${y}" stroke="var(--grid)"/>` +
        `<text x="${left - 12}" y="${y + 4}" text-anchor="end">${esc(kind)}</text>`;
    });
    this.marks = [];
    for (const e of D.events) {
      const v = where(e);
      if (v === null || v < x0 || v > x1) continue;
      const x = X(v),
        y = 14 + this.kinds.indexOf(e.kind) * row;
      this.marks.push([x, y, e]);
      s += `<circle class="mark" cx="${x.toFixed(1)}" cy="${y}" r="5"
        fill="var(--${eventTone(e.kind)})" stroke="var(--card)" stroke-width="1.5"/>`;
    }
    const at = (view.axis === 'time' ? timeTicks : ticks)(x0, x1, Math.max(3, Math.floor(w / 95)));
    for (const v of at)
      if (view.axis !== 'step' || Number.isInteger(v))
        s += `<text x="${X(v)}" y="${h - 4}" text-anchor="middle">${axes[view.axis][1](v)}</text>`;
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="Events">${s}</svg>`;
  }
  move(e) {
    const box = this.plot.getBoundingClientRect(),
      x = e.clientX - box.left,
      y = e.clientY - box.top;
    let best = null,
      far = 14;
    for (const m of this.marks) {
      const d = Math.hypot(m[0] - x, m[1] - y);
      if (d < far) {
        far = d;
        best = m;
      }
    }
    if (!best) {
      this.tip.style.display = 'none';
      return;
    }
    const ev = best[2];
    showTip(
      this,
      best[0],
      e,
      `<div><b>${esc(ev.kind)}</b> at step ${ev.step} · ${ev.time === null ? '' : span(ev.time)}</div>` +
        `<div class="wrap">${esc(ev.detail)}</div>`,
    );
  }
}
