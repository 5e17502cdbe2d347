// Builds the page of a dataset, or of several, from its data: the funnel, figures, and texts as they are. Loaded last.

const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? '' : 's'}`;
const words = name => name.replaceAll('_', ' ');
// The largest counts as text.
const listed = counts => {
  const all = Object.entries(counts).sort((a, b) => b[1] - a[1]),
    more = all.length > 10 ? ` \u00b7 ${all.length - 8} others` : '';
  return (
    all
      .slice(0, more ? 8 : 10)
      .map(([name, n]) => `${esc(words(name))} ${whole(n)}`)
      .join(' \u00b7 ') + more
  );
};
// A document's text as it is: escaped, and characters that cannot be seen by their code.
const shownText = text =>
  esc(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, c =>
    `<i>U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}</i>`,
  );
// A token's text, with its spaces made visible.
const token = text =>
  text
    .split(/([ \n\t])/)
    .map(part => ({' ': '\u2423', '\n': '\u21b5', '\t': '\u21e5'})[part] || shownText(part))
    .join('');

function card(title, content, {wide = true, under = ''} = {}) {
  const el = document.createElement('section');
  el.className = 'card' + (wide ? ' wide' : '');
  el.innerHTML = `<div class="head"><h2>${esc(title)}</h2></div>${
    under ? `<div class="under">${under}</div>` : ''
  }${content}`;
  document.getElementById('root').append(el);
  return el;
}

const groupId = step => `step-${D.examples.findIndex(g => g.step === step)}`;
function funnel() {
  const total = D.funnel.length ? D.funnel[0].documents_in : D.splits.reduce((sum, s) => sum + s.documents, 0);
  const row = ({name, parts, left, removed = '', bytes = null, why = ''}) =>
    `<li><span class="stage">${name}</span><span class="bar" aria-hidden="true">${parts
      .map(([n, tone]) => `<i style="width:${total ? (100 * n) / total : 0}%;background:var(--${tone})"></i>`)
      .join('')}</span><span class="right left">${whole(left)}</span><span class="right removed gone">${removed}</span>
      <span class="right bytes soft">${bytes === null ? '' : size(bytes)}</span>${
        why ? `<span class="why">${why}</span>` : ''
      }</li>`;
  const rows = D.funnel.map(stage => {
    const said = [
      stage.removed && Object.keys(stage.reasons).length ? `removed: ${listed(stage.reasons)}` : '',
      stage.changed ? `changed: ${plural(stage.changed, 'document')}` : '',
      Object.keys(stage.changes).length ? `counted: ${listed(stage.changes)}` : '',
    ];
    const label = esc(words(stage.name)),
      linked = D.examples.some(g => g.step === stage.name);
    return row({
      name: linked ? `<a href="#${groupId(stage.name)}">${label}</a>` : label,
      parts: [
        [stage.documents_out, 'a'],
        [stage.removed, 'b'],
      ],
      left: stage.documents_out,
      removed: stage.removed
        ? `\u2212${whole(stage.removed)} <span class="soft">(${percent(stage.removed, stage.documents_in)})</span>`
        : '',
      bytes: stage.bytes_out,
      why: said.filter(Boolean).join(' \u00a0|\u00a0 '),
    });
  });
  if (D.has_records) rows.unshift(row({name: 'records read', parts: [[total, 'a']], left: total}));
  D.splits.forEach(s =>
    rows.push(
      row({
        name: s.name === 'heldout' ? 'held out' : esc(s.name),
        parts: [[s.documents, s.name === 'heldout' ? 'd' : 'c']],
        left: s.documents,
        removed: `<span class="soft">${num(s.tokens)} tokens</span>`,
        bytes: s.bytes,
      }),
    ),
  );
  card('From records to training data', `<ol class="funnel">${rows.join('')}</ol>`, {
    under: D.funnel.length
      ? 'Documents left after each stage, what the stage removed, and the text left where it was counted.'
      : D.has_records
        ? 'Every record became a document.'
        : 'The data came as token ids, so nothing is known of its records.',
  });
}

class Histogram {
  constructor(data) {
    this.data = data;
    this.by = 1;
    this.el = card('Document lengths', '<div class="plot"></div><div class="tip"></div>', {
      wide: false,
      under: `Tokens a document, in doublings. The mean is ${num(data.mean)}.`,
    });
    this.el.classList.add('fills');
    this.el
      .querySelector('.head')
      .insertAdjacentHTML(
        'beforeend',
        '<span class="spacer"></span><span class="switch"><button class="on" data-by="1" aria-pressed="true">documents</button>' +
          '<button data-by="2" aria-pressed="false">tokens</button></span>',
      );
    const range = i => (this.data.bins[i][0] < 2 ? `${data.bins[i][0]}` : `${whole(data.bins[i][0])} to ${whole(2 * data.bins[i][0] - 1)}`);
    this.range = range;
    const rows = data.bins
      .map((b, i) => `<tr><td>${range(i)}</td><td>${whole(b[1])}</td><td>${whole(b[2])}</td></tr>`)
      .join('');
    this.el.insertAdjacentHTML(
      'beforeend',
      `<div class="quantiles-frame"><div class="quantiles">${data.quantiles
        .map(([name, value]) => `<div><div>${esc(name)}</div><div>${num(value)}</div></div>`)
        .join('')}</div></div>
      <details class="group"><summary>As a table</summary><table><tr><td>length</td><td>documents</td><td>tokens</td></tr>${rows}</table></details>`,
    );
    this.plot = this.el.querySelector('.plot');
    this.tip = this.el.querySelector('.tip');
    this.plot.onpointermove = this.plot.onpointerdown = e => this.move(e);
    this.plot.onpointerleave = () => (this.tip.style.display = 'none');
    const buttons = this.el.querySelectorAll('button');
    for (const button of buttons)
      button.onclick = () => {
        this.by = +button.dataset.by;
        for (const b of buttons) {
          b.classList.toggle('on', b === button);
          b.setAttribute('aria-pressed', b === button);
        }
        this.draw();
      };
  }
  move(e) {
    const px = e.clientX - this.plot.getBoundingClientRect().left,
      i = Math.floor((px - this.left) / this.step);
    if (i < 0 || i >= this.data.bins.length) {
      this.tip.style.display = 'none';
      return;
    }
    const all = k => this.data.bins.reduce((sum, b) => sum + b[k], 0),
      row = (name, k) =>
        `<div class="row"><span>${name}</span><span><b>${whole(this.data.bins[i][k])}</b> ${percent(
          this.data.bins[i][k],
          all(k),
        )}</span></div>`;
    showTip(this, px, e, `<div class="soft">${this.range(i)} tokens</div>${row('documents', 1)}${row('tokens', 2)}`);
  }
  draw() {
    const bins = this.data.bins,
      w = this.plot.clientWidth;
    this.plot.style.minHeight = w < 460 ? '220px' : '320px';
    const h = this.plot.clientHeight,
      left = (this.left = 46),
      bottom = 22,
      top = 8;
    this.step = (w - left - 8) / bins.length;
    const most = Math.max(...bins.map(b => b[this.by]), 1),
      Y = v => h - bottom - (v / most) * (h - top - bottom);
    let s = '';
    for (const v of ticks(0, most, 4))
      if (Number.isInteger(v))
        s += `<line x1="${left}" x2="${w - 8}" y1="${Y(v)}" y2="${Y(v)}" stroke="var(--grid)"/>
          <text x="${left - 8}" y="${Y(v) + 4}" text-anchor="end">${num(v, 3)}</text>`;
    const every = Math.ceil(42 / this.step);
    bins.forEach((b, i) => {
      const x = left + i * this.step;
      s += `<rect class="bin" x="${x + 1}" width="${Math.max(1, this.step - 2)}" y="${Y(b[this.by])}"
        height="${h - bottom - Y(b[this.by])}" rx="2" fill="var(--${this.by === 1 ? 'a' : 'c'})"/>`;
      if (i % every === 0)
        s += `<text x="${x}" y="${h - 5}" text-anchor="${i ? 'middle' : 'start'}">${num(b[0], 3)}</text>`;
    });
    this.plot.innerHTML = `<svg height="${h}" viewBox="0 0 ${w} ${h}" role="img" aria-label="Histogram of document lengths; the numbers are in the table below it">
      <rect width="${w}" height="${h}" fill="transparent"/>${s}
      <line x1="${left}" x2="${w - 8}" y1="${h - bottom}" y2="${h - bottom}" stroke="var(--line)"/></svg>`;
  }
}

// Rows of a label, a bar and a number. All bars have one length: the numbers' column fits the longest of them.
function countedList(rows, all, tone) {
  const most = rows.length ? rows[0].count : 1,
    longest = Math.max(...rows.map(r => `${whole(r.count)} ${percent(r.count, all)}`.length));
  const row = ({label, count}) =>
    `<div class="counted">${label}<span class="bar" aria-hidden="true"><i style="width:${
      (100 * count) / most
    }%;background:var(--${tone})"></i></span><span>${whole(count)} <span class="soft">${percent(count, all)}</span></span></div>`;
  return `<div class="lists" style="--numbers:${longest + 1}ch">${rows.map(row).join('')}</div>`;
}

const table = rows =>
  `<table>${rows.map(([name, value]) => `<tr><td>${esc(name)}</td><td>${esc(value)}</td></tr>`).join('')}</table>`;
function tokens() {
  const t = D.tokens;
  const frequent = t.frequent.map(f => {
    const label = f.kind
      ? `<span class="soft">${f.id} ${esc(f.kind)}</span>`
      : `<span><code title="id ${f.id}">${token(f.text)}</code></span>`;
    return {label, count: f.count};
  });
  card('Tokens', `${table(t.rows)}<h3>Most frequent</h3>${countedList(frequent, t.counted, 'a')}`, {wide: false});
}

// What the steps counted: the languages in a card of their own, the rest together.
function counted() {
  const list = (counts, all) =>
    countedList(
      counts.slice(0, 60).map(([name, count]) => ({label: `<span>${esc(words(name))}</span>`, count})),
      all,
      'c',
    );
  const sum = counts => counts.reduce((total, c) => total + c[1], 0);
  const others = D.counted.filter(c => c.step !== 'language');
  for (const {counts} of D.counted.filter(c => c.step === 'language'))
    card('Languages', list(counts, sum(counts)), {
      under: `Documents by language, before the step removed any.${
        counts.length > 60 ? ` The 60 most frequent of ${counts.length}.` : ''
      }`,
    });
  if (others.length)
    card(
      'What was counted',
      others.map(({step, counts}) => `<h3>${esc(words(step))}</h3>${list(counts, sum(counts))}`).join(''),
    );
}

// A change of nothing but white space, made visible.
const changedText = text =>
  text.trim() ? shownText(text) : text.split('').map(c => (c === '\n' ? '\u21b5\n' : c === ' ' ? '\u2423' : shownText(c))).join('');
const pieces = list =>
  list
    .map(
      ([kind, text]) =>
        ({
          '=': () => shownText(text),
          '-': () => `<del>${changedText(text)}</del>`,
          '+': () => `<ins>${changedText(text)}</ins>`,
          '~': () => `<i>\u2026 ${esc(text)} \u2026</i>`,
        })[kind](),
    )
    .join('');
const shown = (title, detail, text, isCut) =>
  `<div class="shown"><div class="title">${esc(title)}</div>${
    detail ? `<div class="detail">${esc(detail)}</div>` : ''
  }<pre tabindex="0" dir="auto" aria-label="${esc(title)}">${text}${isCut ? '<i>\u2026</i>' : ''}</pre></div>`;

function examples() {
  if (!D.examples.length) return;
  let content = '',
    before = null;
  for (const g of D.examples) {
    const stage = D.funnel.find(s => s.name === g.step);
    if (g.step !== before) content += `<h3 id="${groupId(g.step)}">${esc(words(g.step))}</h3>`;
    const all = stage && (g.rule === null ? stage.changed : stage.reasons[g.rule]);
    const what = g.rule === null ? (g.step === 'near_duplicates' ? 'clusters' : 'changed') : `removed: ${esc(words(g.rule))}`;
    content += `<details class="group" ${before === null ? 'open' : ''}><summary>${what} <span class="soft">${
      g.examples.length
    }${all ? ` of ${whole(all)}` : ''}</span></summary><div class="pair">${g.examples
      .map(e => shown(e.title, e.detail, pieces(e.pieces), e.is_cut))
      .join('')}</div></details>`;
    before = g.step;
  }
  card('What cleaning did', content, {
    under:
      'A few random documents of each rule and step, as they were before the step. <del>Struck through</del> was taken away, <ins>underlined</ins> was put in.',
  });
}

function packages() {
  const row = cells => `<tr>${cells.map(cell => `<td>${esc(cell)}</td>`).join('')}</tr>`;
  card('Packages', `<table>${D.packages.map(row).join('')}</table>`, {
    under: 'What the text was taken from, the registry, the licence and the sources.',
  });
}

const conversationPiece = p => {
  const text = p.is_control ? `<b class="control">${shownText(p.text)}</b>` : shownText(p.text);
  return p.counts ? `<mark>${text}</mark>` : text;
};
function samples() {
  const list = D.samples.map(s =>
    shown(
      `${s.source ? `${s.source}: ` : ''}${s.split === 'heldout' ? 'held-out' : s.split} document ${whole(s.number)}, ${plural(s.length, 'token')}`,
      '',
      s.text === null ? esc(s.ids.join(' ')) : s.pieces ? s.pieces.map(conversationPiece).join('') : shownText(s.text),
      s.is_cut,
    ),
  );
  const legend = D.samples.some(s => s.pieces)
    ? ' <mark>Marked</mark> tokens count in the loss. <b class="control">Framed</b> names are control tokens.'
    : '';
  card('Random documents', `<div class="pair">${list.join('')}</div>`, {
    under: `Decoded from their ids, drawn with seed ${D.sample_seed}.${legend}`,
  });
}

function build() {
  document.getElementById('status').innerHTML = `<span class="chip" title="fingerprint">${esc(D.fingerprint)}</span>`;
  showTiles(D.tiles);
  showNotices(D.notices);
  if (D.sources) document.getElementById('root').insertAdjacentHTML('beforeend', sourcesSection(D.sources));
  else funnel();
  const histogram = D.lengths && new Histogram(D.lengths);
  if (D.tokens) tokens();
  counted();
  if (D.near_duplicates.length) card('Near duplicates', table(D.near_duplicates));
  examples();
  if (D.packages.length) packages();
  samples();
  const root = document.getElementById('root');
  root.insertAdjacentHTML(
    'beforeend',
    `<details class="card wide"><summary>Source and settings</summary><pre tabindex="0">${esc(D.config)}</pre></details>`,
  );
  drawAtEachWidth(() => histogram && histogram.draw());
  // A link to a step opens the first of its examples.
  window.addEventListener('hashchange', () => {
    const details = document.querySelector(`#${CSS.escape(location.hash.slice(1))} + details`);
    if (details) details.open = true;
  });
  document.body.dataset.drawn = document.querySelectorAll('rect.bin').length;
}
build();
