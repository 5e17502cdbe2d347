// Builds a run's page from its data. Loaded last.

function build() {
  const root = document.getElementById('root'),
    curve = (name, label, tone) => D.curves[name] && {name: label, tone, ...D.curves[name]};
  document.getElementById('status').innerHTML = `<span class="chip ${D.status.tone}">${esc(D.status.text)}</span>`;
  showTiles(D.tiles);
  showNotices(D.notices);
  const specs = [];
  const add = spec => {
    spec.series = spec.series.filter(Boolean);
    if (spec.series.length) specs.push(spec);
  };
  const wideRange = name => {
    const v = ((D.curves[name] || {}).mean || []).filter(x => x > 0);
    return v.length > 1 && Math.max(...v) > 50 * Math.min(...v);
  };
  if (N) {
    const heldout = D.heldout.length && {name: 'held-out', tone: 'b', points: D.heldout};
    add({title: 'Loss', wide: true, height: 300, legend: true, series: [curve('loss', 'training', 'a'), heldout]});
    const tones = ['a', 'b', 'c', 'd', 'e', 'f'];
    add({
      title: 'Held-out loss by source',
      legend: true,
      series: Object.entries(D.heldout_by_source).map(([name, points], i) => ({name, tone: tones[i % tones.length], points})),
    });
    add({
      title: 'Reward',
      wide: true,
      legend: true,
      series: [curve('reward', 'sampled replies', 'a'), curve('heldout_reward', 'greedy replies, held-out prompts', 'b')],
    });
    add({title: 'Tokens of a reply', zero: true, series: [curve('reply_tokens', 'tokens', 'a')]});
    add({
      title: 'Replies that ended, and prompts without signal',
      zero: true,
      legend: true,
      series: [
        curve('stop_rate', 'ended by themselves', 'a'),
        curve('groups_without_signal', 'prompts whose replies got equal rewards', 'c'),
      ],
    });
    add({title: 'Entropy of a token, in nats', zero: true, series: [curve('entropy', 'entropy', 'd')]});
    add({title: 'Divergence from the reference, in nats', zero: true, series: [curve('kl', 'KL', 'c')]});
    add({title: 'Loss of the values', zero: true, series: [curve('value_loss', 'loss', 'a')]});
    add({title: 'Share of the returns that values explain', series: [curve('explained_variance', 'share', 'b')]});
    add({title: `Learning rate ${D.schedule}`.trim(), zero: true, series: [curve('lr', 'learning rate', 'c')]});
    add({title: 'Gradient norm', log: wideRange('grad_norm'), series: [curve('grad_norm', 'gradient norm', 'd')]});
    add({
      title: `Tokens per second ${D.in_loss}`.trim(),
      zero: true,
      noLog: true,
      series: [curve('tokens_per_s', 'tokens/s', 'a')],
    });
    if (D.curves.mfu)
      add({
        title: 'Model FLOPs utilisation',
        zero: true,
        noLog: true,
        format: v => trim((v * 100).toFixed(1)) + '%',
        exact: v => (v * 100).toFixed(2) + '%',
        series: [curve('mfu', 'MFU', 'c')],
      });
    if (D.curves.loss_scale) add({title: 'Loss scale', log: true, series: [curve('loss_scale', 'loss scale', 'd')]});
    const mean = name => (D.curves[name] || {}).mean || new Array(N).fill(0),
      total = mean('step_time_s');
    if (D.curves.step_time_s) {
      const parts = {data: mean('data_time_s'), eval: mean('eval_time_s'), save: mean('save_time_s')};
      const compute = total.map((t, i) => Math.max(0, (t || 0) - (parts.data[i] || 0)));
      const labels = [
        ['compute', 'computing and communicating', 'a'],
        ['data', 'waiting for data', 'b'],
        ['eval', 'evaluation', 'c'],
        ['save', 'saving', 'd'],
      ];
      const sum = Object.values(D.time_spent).reduce((a, b) => a + b, 0) || 1;
      const share = labels
        .map(([k, , tone]) => `<span style="background:var(--${tone});flex:${D.time_spent[k] / sum} 0 0"></span>`)
        .join('');
      add({
        title: 'Time per step (seconds)',
        zero: true,
        noLog: true,
        stacked: true,
        height: 178,
        above: `<div class="share">${share}</div>`,
        exact: v => num(v, 3) + ' s',
        series: labels.map(([k, label, tone]) => ({
          name: `${label} ${trim(((100 * D.time_spent[k]) / sum).toFixed(1))}%`,
          tone,
          mean: k === 'compute' ? compute : parts[k],
        })),
      });
    }
    // The last chart takes a whole row where it would be alone in one.
    if (specs.filter(spec => !spec.wide).length % 2) specs.at(-1).wide = true;
    for (const spec of specs) new Chart(root, spec);
  } else root.innerHTML = '<section class="card wide empty">No steps recorded yet.</section>';
  if (D.lineage.length) root.insertAdjacentHTML('beforeend', lineageSection(D.lineage));
  if (D.scores) root.insertAdjacentHTML('beforeend', scoresSection(D.scores));
  if (D.sources.length) root.insertAdjacentHTML('beforeend', sourcesSection(D.sources));
  if (D.life) new Life(root, D.life);
  if (D.events.length) new Lanes(root);
  if (D.pipeline)
    root.insertAdjacentHTML(
      'beforeend',
      `<section class="card wide"><div class="head"><h2>Pipeline schedule</h2></div>
    <div class="under">${esc(D.pipeline.text)}</div>${D.pipeline.svg}</section>`,
    );
  const cells = (row, numNarrow) =>
    row.map((cell, i) => `<td class="${i < numNarrow ? 'nowrap' : ''}">${esc(cell)}</td>`).join('');
  const table = (rows, numNarrow) => `<table>${rows.map(row => `<tr>${cells(row, numNarrow)}</tr>`).join('')}</table>`;
  const half = Math.ceil(D.facts.length / 2);
  root.insertAdjacentHTML(
    'beforeend',
    `<section class="card wide"><div class="head"><h2>Run</h2></div><div class="facts">` +
      `${table(D.facts.slice(0, half), 1)}${table(D.facts.slice(half), 1)}</div></section>`,
  );
  const last = D.events.slice(-300).map(e => [e.time === null ? '' : span(e.time), e.kind, `step ${e.step}`, e.detail]);
  if (last.length)
    root.insertAdjacentHTML(
      'beforeend',
      `<details class="card wide"><summary>All events</summary>${table(last, 3)}</details>`,
    );
  if (D.config)
    root.insertAdjacentHTML(
      'beforeend',
      `<details class="card wide"><summary>Configuration</summary><pre>${esc(D.config)}</pre></details>`,
    );
  const usable = Object.keys(axes).filter(a => N > 1 && D.x[a].every(v => v !== null));
  const pick = document.getElementById('axis');
  pick.innerHTML =
    usable.length > 1
      ? usable
          .map(a => `<button data-axis="${a}" class="${a === view.axis ? 'on' : ''}">${axes[a][0]}</button>`)
          .join('')
      : '';
  pick.hidden = usable.length < 2;
  pick.onclick = e => {
    if (!e.target.dataset.axis) return;
    view.axis = e.target.dataset.axis;
    for (const b of pick.children) b.classList.toggle('on', b === e.target);
    zoom(null, null);
  };
  document.getElementById('reset').onclick = () => zoom(null, null);
  drawAtEachWidth(drawAll);
  document.body.dataset.drawn = document.querySelectorAll('path.curve').length;
}
build();
