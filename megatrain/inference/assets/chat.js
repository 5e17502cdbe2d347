'use strict';
const WORDS = {
  en: {
    new: 'New chat', settings: 'Settings', system: 'System message', temperature: 'Temperature', topP: 'Top p',
    maxTokens: 'Longest reply (tokens)', seed: 'Seed', key: 'API key', send: 'Send', stop: 'Stop', message: 'Message',
    language: 'Language', user: 'You', assistant: 'Model', again: 'Regenerate', copy: 'Copy', log: 'Conversation',
    stopped: 'stopped', length: 'cut off: longest reply reached', content_filter: 'cut off by the content filter',
    needKey: 'This server asks for an API key: open the settings.', offline: 'The server cannot be reached.',
    broken: 'The connection broke off.', noTemplate: 'This model was not tuned on conversations: it continues your text.',
    empty: 'Enter sends, Shift+Enter begins a line, Esc stops.', begin: 'Type a message below to begin.',
  },
  zh: {
    new: '新对话', settings: '设置', system: '系统消息', temperature: '温度', topP: 'Top p',
    maxTokens: '回复上限（词元）', seed: '随机种子', key: 'API 密钥', send: '发送', stop: '停止', message: '消息',
    language: '语言', user: '你', assistant: '模型', again: '重新生成', copy: '复制', log: '对话',
    stopped: '已停止', length: '已达到回复上限', content_filter: '被内容过滤器截断',
    needKey: '此服务器需要 API 密钥：请打开设置。', offline: '无法连接服务器。',
    broken: '连接中断。', noTemplate: '此模型未经对话训练：它会续写你的文字。',
    empty: '回车发送，Shift+回车换行，Esc 停止。', begin: '在下方输入消息，开始对话。',
  },
};
// How a reply may have ended besides by itself.
const ENDS = ['stopped', 'length', 'content_filter'];
const data = JSON.parse(document.getElementById('data').textContent);
const at = id => document.getElementById(id);
const messages = [];
let language = 'en';
let running = null;

function say(name) { return WORDS[language][name]; }

function setLanguage(name) {
  language = name in WORDS ? name : 'en';
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const element of document.querySelectorAll('[data-text]')) element.textContent = say(element.dataset.text);
  at('message').setAttribute('aria-label', say('message'));
  at('message').placeholder = say('empty');
  at('language').setAttribute('aria-label', say('language'));
  at('language').value = language;
  at('log').setAttribute('aria-label', say('log'));
  draw();
}

function notice(text) {
  at('notice').textContent = text;
  at('notice').hidden = !text;
}

// Text is only ever set as textContent: what a model or a user writes is never markup.
function draw() {
  const log = at('log');
  log.replaceChildren(...messages.map((message, number) => {
    const turn = document.createElement('article');
    turn.className = `turn ${message.role}`;
    turn.setAttribute('aria-label', say(message.role));
    const text = document.createElement('div');
    text.className = 'text';
    text.dir = 'auto';
    text.textContent = message.content;
    turn.append(text);
    const isLast = number === messages.length - 1;
    if (message.role === 'assistant' && !(isLast && running)) turn.append(tools(message, isLast));
    return turn;
  }));
  if (!messages.length) {
    const hint = document.createElement('p');
    hint.className = 'hint';
    hint.textContent = say(data.hasTemplate ? 'begin' : 'noTemplate');
    log.append(hint);
  }
  log.scrollTop = log.scrollHeight;
}

function tools(message, isLast) {
  const row = document.createElement('div');
  row.className = 'tools';
  const button = (name, act) => {
    const made = document.createElement('button');
    made.type = 'button';
    made.textContent = say(name);
    made.onclick = act;
    row.append(made);
  };
  if (isLast) button('again', regenerate);
  if (navigator.clipboard) button('copy', () => navigator.clipboard.writeText(message.content));
  if (ENDS.includes(message.note)) {
    const note = document.createElement('span');
    note.className = 'note';
    note.textContent = say(message.note);
    row.append(note);
  }
  return row;
}

function request() {
  const number = id => at(id).value === '' || !Number.isFinite(at(id).valueAsNumber) ? undefined : at(id).valueAsNumber;
  const body = { model: data.model, stream: true };
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) if (number(name) !== undefined) body[name] = number(name);
  if (!data.hasTemplate) return { ...body, prompt: messages.map(message => message.content).join('') };
  const system = at('system').value.trim();
  const said = messages.map(({ role, content }) => ({ role, content }));
  return { ...body, messages: [...(system ? [{ role: 'system', content: system }] : []), ...said] };
}

async function answer() {
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  notice('');
  const body = JSON.stringify(request());
  const reply = { role: 'assistant', content: '', note: '' };
  messages.push(reply);
  draw();
  const text = at('log').lastElementChild.querySelector('.text');
  try {
    const headers = { 'content-type': 'application/json' };
    if (at('key').value) headers.authorization = `Bearer ${at('key').value}`;
    const path = data.hasTemplate ? 'v1/chat/completions' : 'v1/completions';
    const response = await fetch(path, { method: 'POST', headers, body, signal: controller.signal });
    if (!response.ok) throw Object.assign(new Error(await reason(response)), { isShown: true });
    await read(response.body, piece => {
      reply.content += piece.text;
      if (piece.finish) reply.note = piece.finish;
      if (piece.text) text.append(piece.text);
      at('log').scrollTop = at('log').scrollHeight;
    });
    if (!reply.note) throw Object.assign(new Error(say('broken')), { isShown: true });
  } catch (error) {
    if (controller.signal.aborted) reply.note = 'stopped';
    else notice(error.isShown ? error.message : say('offline'));
  } finally {
    if (running === controller) {
      running = null;
      if (!reply.content && !reply.note) giveBack();
      setBusy(false);
      draw();
    }
  }
}

// After a failure without a reply, the question goes back to where it was typed.
function giveBack() {
  messages.pop();
  const asked = messages.pop();
  if (!at('message').value) at('message').value = asked.content;
  grow();
}

async function reason(response) {
  if (response.status === 401) {
    at('settings').hidden = false;
    return say('needKey');
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function read(stream, take) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split('\n\n');
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith('data: ') || event === 'data: [DONE]') continue;
      const found = JSON.parse(event.slice(6));
      if (found.error) throw Object.assign(new Error(found.error.message), { isShown: true });
      const choice = found.choices[0];
      if (choice) take({ text: choice.text ?? choice.delta?.content ?? '', finish: choice.finish_reason });
    }
  }
}

function setBusy(isBusy) {
  at('stop').hidden = !isBusy;
  at('send').hidden = isBusy;
  at('log').setAttribute('aria-busy', String(isBusy));
}

function send() {
  const text = at('message').value.trim();
  if (!text || running) return;
  messages.push({ role: 'user', content: text });
  at('message').value = '';
  grow();
  answer();
}

function regenerate() {
  if (running) return;
  messages.pop();
  answer();
}

function stop() {
  if (running) running.abort();
}

function begin() {
  stop();
  running = null;
  setBusy(false);
  messages.length = 0;
  notice('');
  draw();
  at('message').focus();
}

function grow() {
  at('message').style.height = 'auto';
  at('message').style.height = `${at('message').scrollHeight + 2}px`;
}

at('model').textContent = data.model;
at('max_tokens').max = data.maxNewTokens;
at('composer').onsubmit = event => { event.preventDefault(); send(); };
at('settings').onsubmit = event => event.preventDefault();
at('message').oninput = grow;
at('message').onkeydown = event => {
  // while an input method composes Chinese, Enter chooses a character
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
document.onkeydown = event => { if (event.key === 'Escape') stop(); };
at('stop').onclick = stop;
at('new').onclick = begin;
at('toggle').onclick = () => {
  at('settings').hidden = !at('settings').hidden;
  at('toggle').setAttribute('aria-expanded', String(!at('settings').hidden));
};
at('language').onchange = () => setLanguage(at('language').value);
setLanguage(navigator.language.startsWith('zh') ? 'zh' : 'en');
