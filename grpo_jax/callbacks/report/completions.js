// The browser of completions. Numbers are columns, read at once; texts come in blocks, opened when they are shown.
const PAGE = { groups: 8, completions: 24 };
const LONGEST = 600; // tokens shown before one asks for more
const KEPT = 24; // blocks kept open
const view = { query: "", from: -Infinity, to: Infinity, finish: "", unit: "groups", sort: "step", down: true, page: 0, prompt: null };
let index, columns, groupOf, groups, hits = null, units = [], searching = 0, drawing = 0;
const blocks = new Map();
const haystacks = [];

async function startCompletions(described) {
  index = described;
  const all = new Float32Array(await inflate("index"));
  columns = {};
  index.columns.forEach((name, i) => { columns[name] = all.subarray(i * index.count, (i + 1) * index.count); });
  findGroups();
  fillTools();
  bindTools();
  select();
}

function findGroups() {
  const { step, group } = columns;
  groups = [];
  groupOf = new Uint32Array(index.count);
  for (let n = 0; n < index.count; n++) {
    if (n === 0 || step[n] !== step[n - 1] || group[n] !== group[n - 1]) groups.push([]);
    groups[groups.length - 1].push(n);
    groupOf[n] = groups.length - 1;
  }
}

function fillTools() {
  const own = new Set(["group", "sample", "prompt", "cut"]);
  for (const name of index.columns) {
    if (!own.has(name)) $("sort").append(element("option", { value: name, textContent: name }));
  }
  $("sort").append(element("option", { value: SPREAD, textContent: "spread of reward in the group" }));
  const steps = columns.step;
  for (const [id, value] of [["from", steps[0]], ["to", steps[steps.length - 1]]]) $(id).placeholder = value ?? "";
}

const SPREAD = "\u0000spread";

function bindTools() {
  const bind = (id, event, take) => $(id).addEventListener(event, () => { take($(id)); view.page = 0; select(); });
  bind("from", "input", (input) => { view.from = input.value === "" ? -Infinity : Number(input.value); });
  bind("to", "input", (input) => { view.to = input.value === "" ? Infinity : Number(input.value); });
  bind("finish", "change", (input) => { view.finish = input.value; });
  bind("unit", "change", (input) => { view.unit = input.value; });
  bind("sort", "change", (input) => { view.sort = input.value; });
  bind("direction", "click", () => { view.down = !view.down; });
  bind("all-prompts", "click", () => { view.prompt = null; });
  $("coloured").onchange = () => $("list").classList.toggle("plain", !$("coloured").checked);
  const turn = (page) => { view.page = Math.min(Math.max(page, 0), pageCount() - 1); show(); };
  $("previous").onclick = () => turn(view.page - 1);
  $("next").onclick = () => turn(view.page + 1);
  $("page").onchange = () => turn(Number($("page").value) - 1);
  let waiting;
  $("query").oninput = () => { clearTimeout(waiting); waiting = setTimeout(search, 200); };
  document.addEventListener("tab", (event) => { if (event.detail === "completions") show(); });
}

function showStep(step) {
  step -= (step - 1) % index.every; // the nearest before it that is here
  for (const id of ["from", "to"]) {
    $(id).value = step;
    $(id).dispatchEvent(new Event("input"));
  }
  openTab("completions");
}

// Selecting, sorting, paging

function passes(n) {
  const { step, cut, prompt } = columns;
  return step[n] >= view.from && step[n] <= view.to && (view.finish === "" || cut[n] === Number(view.finish))
    && (view.prompt === null || prompt[n] === view.prompt) && (hits === null || hits[n] === 1);
}

function meanOf(rows, values) {
  let sum = 0, count = 0;
  for (const n of rows) if (!Number.isNaN(values[n])) { sum += values[n]; count++; }
  return count ? sum / count : NaN;
}

function spreadOf(rows) {
  const rewards = rows.map((n) => columns.reward[n]);
  return Math.max(...rewards) - Math.min(...rewards);
}

function select() {
  const rows = [];
  for (let n = 0; n < index.count; n++) if (passes(n)) rows.push(n);
  const value = new Map();
  if (view.unit === "groups") {
    units = [...new Set(rows.map((n) => groupOf[n]))];
    for (const g of units) value.set(g, view.sort === SPREAD ? spreadOf(groups[g]) : meanOf(groups[g], columns[view.sort]));
  } else {
    units = rows;
    for (const n of units) value.set(n, view.sort === SPREAD ? spreadOf(groups[groupOf[n]]) : columns[view.sort][n]);
  }
  const sign = view.down ? -1 : 1;
  units.sort((a, b) => {
    const x = value.get(a), y = value.get(b);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b; // no value: last
    return sign * (x - y) || a - b;
  });
  const what = view.unit === "groups" ? `${units.length.toLocaleString("en")} groups, ` : "";
  const sample = index.every > 1 ? `, of one step in ${index.every}: completions.jsonl holds all` : "";
  $("count").textContent =
    `${what}${rows.length.toLocaleString("en")} of ${index.count.toLocaleString("en")} completions${sample}`;
  $("direction").textContent = view.down ? "↓" : "↑";
  $("all-prompts").hidden = view.prompt === null;
  show();
}

const pageCount = () => Math.max(1, Math.ceil(units.length / PAGE[view.unit]));

// Searching: every block is opened once, then its lower-case text stays

async function search() {
  const run = ++searching, query = $("query").value.toLowerCase();
  view.page = 0;
  if (!query) {
    hits = null;
    select();
    return;
  }
  const found = new Uint8Array(index.count);
  for (let i = 0; i < index.starts.length; i++) {
    if (!haystacks[i]) {
      const { prompts, rows } = await inflateJson(`block-${i}`);
      haystacks[i] = rows.map(([p, text]) => `${prompts[p]}\n${Array.isArray(text) ? text.join("") : text}`.toLowerCase());
      if (run !== searching) return; // another query has been typed
      if (i % 8 === 0) $("count").textContent = `searching, ${Math.round(100 * i / index.starts.length)} %`;
    }
    haystacks[i].forEach((text, k) => { if (text.includes(query)) found[index.starts[i] + k] = 1; });
  }
  hits = found;
  select();
}

// Showing

async function rowOf(n) {
  let low = 0, high = index.starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (index.starts[middle] <= n) low = middle; else high = middle - 1;
  }
  if (!blocks.has(low)) {
    blocks.set(low, inflateJson(`block-${low}`));
    if (blocks.size > KEPT) blocks.delete(blocks.keys().next().value);
  }
  const { prompts, rows } = await blocks.get(low);
  const [prompt, text, logp, extra] = rows[n - index.starts[low]];
  return { prompt: prompts[prompt], text, logp, extra };
}

async function show() {
  $("page").value = view.page + 1;
  $("pages").textContent = pageCount().toLocaleString("en");
  $("previous").disabled = view.page === 0;
  $("next").disabled = view.page >= pageCount() - 1;
  if ($("completions").hidden) return;
  const run = ++drawing;
  const first = view.page * PAGE[view.unit];
  const shown = units.slice(first, first + PAGE[view.unit]);
  const cards = await Promise.all(shown.map((unit) => (view.unit === "groups" ? card(groups[unit]) : card([unit]))));
  if (run !== drawing) return; // another page was asked for meanwhile
  $("list").replaceChildren(...cards);
  if (!cards.length) $("list").append(element("p", { className: "quiet", textContent: "Nothing matches." }));
}

async function card(rows) {
  const data = await Promise.all(rows.map(rowOf));
  const first = rows[0], whole = groups[groupOf[first]];
  const title = element("h2", { textContent: `Step ${columns.step[first]}, prompt ${columns.group[first] + 1}` });
  const mean = meanOf(whole, columns.reward), spread = spreadOf(whole);
  const facts = `reward ${format(mean)} in the mean` + (spread > 0 ? "" : ", the same for all: nothing to learn from");
  title.append(element("span", { className: "quiet", textContent: facts }));
  if (rows.length < whole.length) title.append(element("button", { textContent: "whole group", onclick: () => showGroup(first) }));
  title.append(element("button", { textContent: "this prompt through the run", onclick: () => showPrompt(first) }));
  const samples = element("div", { className: "samples" }, ...rows.map((n, i) => sample(n, data[i])));
  return element("article", { className: "group" }, title, element("div", { className: "prompt", textContent: data[0].prompt }), samples);
}

function showGroup(n) {
  $("unit").value = view.unit = "groups";
  view.prompt = columns.prompt[n];
  showStep(columns.step[n]);
}

function showPrompt(n) {
  view.prompt = columns.prompt[n];
  $("unit").value = view.unit = "groups";
  $("sort").value = view.sort = "step";
  view.down = false;
  for (const id of ["from", "to"]) $(id).value = "";
  Object.assign(view, { from: -Infinity, to: Infinity, page: 0 });
  select();
}

const format = (value, digits = 4) => (Number.isNaN(value) ? "no answer" : Number(value.toPrecision(digits)).toString());

function sample(n, { text, logp, extra }) {
  const advantage = columns.advantage[n];
  const top = element("div", { className: "top" },
    element("span", { className: "reward", textContent: format(columns.reward[n]), title: "reward" }),
    element("span", { className: advantage > 0 ? "plus" : advantage < 0 ? "minus" : "quiet",
      title: "above 0 the completion is made likelier, below 0 less likely",
      textContent: `advantage ${advantage > 0 ? "+" : ""}${format(advantage, 3)}` }),
    element("span", { className: "quiet", textContent: `${columns.length[n]} tokens` }));
  if (columns.cut[n]) top.append(element("span", { className: "cut", textContent: "cut" }));
  const chips = element("div", { className: "chips" });
  for (const name of index.functions) {
    chips.append(element("span", { textContent: `${name} ${format(columns[`rewards/${name}`][n])}` }));
  }
  for (const [name, value] of Object.entries(extra)) chips.append(element("span", { textContent: `${name}: ${value}` }));
  const other = hits !== null && hits[n] === 0;
  return element("div", { className: other ? "sample other" : "sample" }, top, chips, ...tokens(text, logp));
}

function tokens(text, logp) {
  const body = element("div", { className: "text" });
  if (!Array.isArray(text)) {
    body.textContent = text;
    return [body];
  }
  const add = (from, to) => {
    const part = document.createDocumentFragment();
    for (let t = from; t < Math.min(to, text.length); t++) {
      const value = (logp[t] ?? 0) / 100;
      const span = element("span", { textContent: text[t], title: `log-prob ${value.toFixed(2)}, probability ${Math.exp(value).toPrecision(2)}` });
      // 5 nat and more are as hot as it gets
      if (value < -0.05) span.style.setProperty("--heat", `${Math.min(85, Math.round(-17 * value))}%`);
      part.append(span);
    }
    body.append(part);
  };
  add(0, LONGEST);
  if (text.length <= LONGEST) return [body];
  const more = element("button", { className: "more", textContent: `${text.length - LONGEST} more tokens` });
  more.onclick = () => { add(LONGEST, text.length); more.remove(); };
  return [body, more];
}
