// What all views share: the data, elements, and texts made safe to look at.
const block = (id) => JSON.parse(document.getElementById(id).textContent);
const DATA = block("overview");
const { starts: STARTS, rows: PACKED } = block("rows");
const SHARED = block("shared");
const NAMES = { comply: "comply", refuse: "refuse", safe_complete: "safe completion" };
const SEEN = { c: "helped", r: "declined", p: "partly helped", s: "safe completion", b: "broken", "?": "ungraded" };
const SEEN_ORDER = ["r", "s", "p", "c", "b", "?"];
const SIDE = {
  "+": ["✓", "as asked"],
  "-": ["✕", "not as asked"],
  "?": ["?", "ungraded"],
  "!": ["!", "never written"],
  ".": ["·", "nothing asked"],
};
const SPLITS = { train: "training", rl: "RL", heldout: "held-out" };
const EVERYDAY = "no category";

// One prompt as the list knows it. `marks` is, by author, two letters a completion.
const ROWS = PACKED.map((p, at) => ({
  at,
  id: p[0],
  split: p[1],
  category: p[2] ?? EVERYDAY,
  clause: p[3],
  required: p[4],
  source: p[5],
  text: p[6],
  marks: Object.fromEntries(DATA.authors.map((a, i) => [a, p[7][i]])),
  drops: p[8],
  find: `${p[0]}\n${p[3] ?? ""}\n${p[6]}`.toLowerCase(),
}));
const BY_ID = new Map(ROWS.map((row) => [row.id, row]));

const kept = new Map();
const PAGES_KEPT = 6;
function page(number) {
  if (!kept.has(number)) {
    if (kept.size >= PAGES_KEPT) kept.delete(kept.keys().next().value);
    kept.set(number, block(`page-${number}`));
  }
  return kept.get(number);
}
function pageOf(at) {
  let low = 0,
    high = STARTS.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (STARTS[middle] <= at) low = middle;
    else high = middle - 1;
  }
  return low;
}
function lifeOf(row) {
  const number = pageOf(row.at),
    found = page(number);
  return { ...found.lives[row.at - STARTS[number]], texts: found.texts };
}

// Marks that would hide, reorder or break text are shown by name, so that what is read is what is there.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;
function visible(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "\u2421" : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}
// Children that are strings become text nodes: nothing on this page is ever read as markup.
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const LONG = 12000;
function shown(text, kind = "text") {
  const body = h("div", { class: kind, dir: "auto" });
  const safe = visible(text);
  body.append(safe.slice(0, LONG));
  if (safe.length > LONG) {
    const rest = h(
      "button",
      {
        type: "button",
        class: "more",
        click: () => {
          rest.remove();
          body.append(safe.slice(LONG));
        },
      },
      `and ${count(safe.length - LONG)} characters more`,
    );
    body.append(rest);
  }
  return body;
}

const count = (n) => n.toLocaleString("en-GB");
const figure = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => `${Math.round(value * 100)} %`;
const span = (low, high) => `${percent(low).replace(" %", "")}–${percent(high)}`;
const clock = (seconds) =>
  seconds < 90
    ? `${Math.round(seconds)} s`
    : seconds < 5400
      ? `${Math.round(seconds / 60)} min`
      : `${(seconds / 3600).toFixed(1)} h`;
const armName = (arm) => DATA.names[arm] ?? arm;
const metric = (arm, name, by) => DATA.metrics.find((m) => m.arm === arm && m.name === name && same(m.by, by));
function same(one, two) {
  const a = Object.entries(one ?? {}),
    b = two ?? {};
  return a.length === Object.keys(b).length && a.every(([key, value]) => b[key] === value);
}
const evaluated = (row) => DATA.arms.some((arm) => row.marks[arm]);
const markOf = (row, arm) => (row.marks[arm] ?? "").slice(0, 2);
const link = (filters) => "#/samples?" + new URLSearchParams(filters);

const kindOf = (mark) => ({ "+": "good", "-": "bad" })[mark[0]] ?? "none";
function badge(mark) {
  const [sign, word] = SIDE[mark[0]] ?? SIDE["."];
  return h(
    "span",
    { class: `badge ${kindOf(mark)}`, title: `${word}: ${SEEN[mark[1]]}` },
    h("i", { "aria-hidden": "true" }, sign),
    h("span", { class: "hidden" }, word),
  );
}
