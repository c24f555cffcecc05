// The sample browser: filters, and a list that holds only the rows in sight.
const EMPTY = {
  q: "",
  split: "",
  category: "",
  clause: "",
  required: "",
  whose: "",
  verdict: "",
  dropped: "",
  from: DATA.first ?? "",
  to: DATA.last ?? "",
  changed: "",
};
const browser = { filters: { ...EMPTY }, found: ROWS, at: 0, top: 0, hidden: new Set(), answers: null, read: 0 };

// Prompts are searched at once; what was written is read page by page while the browser is idle.
const later = globalThis.requestIdleCallback ?? ((work) => setTimeout(work, 20));
function readAnswers(number = 0) {
  browser.answers ??= new Array(ROWS.length).fill("");
  if (number >= STARTS.length) {
    browser.read = 1;
    if (browser.filters.q) refilter();
    return;
  }
  const { texts, lives } = block(`page-${number}`);
  lives.forEach((life, i) => {
    const wrote = [...life.made, ...life.rollouts, ...life.arms.map(([, sample]) => sample)]
      .map((sample) => sample.made)
      .filter(Boolean);
    const numbers = new Set(
      wrote.flatMap((made) => [made.reasoning, made.answer, made.text]).filter((n) => n !== undefined),
    );
    browser.answers[STARTS[number] + i] = [...life.messages.map(([, n]) => n), ...numbers]
      .map((n) => texts[n])
      .join("\n")
      .toLowerCase();
  });
  browser.read = (number + 1) / STARTS.length;
  const state = document.getElementById("reading");
  if (state) state.textContent = reading();
  later(() => readAnswers(number + 1));
}
const reading = () => (browser.read < 1 ? `answers are being read, ${Math.round(browser.read * 100)} %` : "");

function pairs(marks) {
  const made = [];
  for (let i = 0; i < (marks ?? "").length; i += 2) made.push(marks.slice(i, i + 2));
  return made;
}
function passes(row, f, words) {
  if (f.split && row.split !== f.split) return false;
  if (f.category && row.category !== f.category) return false;
  if (f.clause && row.clause !== f.clause) return false;
  if (f.required && (row.required ?? "none") !== f.required) return false;
  if (f.dropped === "kept" && !row.drops.includes(null)) return false;
  if (f.dropped === "any" && !row.drops.some((d) => d !== null)) return false;
  if (f.dropped && f.dropped !== "kept" && f.dropped !== "any" && !row.drops.includes(f.dropped)) return false;
  if (f.verdict || f.whose) {
    const marks = (f.whose ? [f.whose] : DATA.authors).flatMap((a) => pairs(row.marks[a]));
    if (!marks.some((m) => !f.verdict || (f.verdict in SIDE && f.verdict !== "?" ? m[0] : m[1]) === f.verdict))
      return false;
  }
  if (f.changed) {
    const [one, two] = [markOf(row, f.from)[0], markOf(row, f.to)[0]];
    if (!("+-".includes(one ?? "x") && "+-".includes(two ?? "x")) || one === two) return false;
    if (f.changed === "better" && two !== "+") return false;
    if (f.changed === "worse" && two !== "-") return false;
  }
  return words.every((w) => row.find.includes(w) || browser.answers?.[row.at]?.includes(w));
}
function refilter() {
  const words = browser.filters.q.toLowerCase().split(/\s+/).filter(Boolean);
  browser.found = ROWS.filter((row) => passes(row, browser.filters, words));
  browser.at = Math.min(browser.at, Math.max(0, browser.found.length - 1));
  browser.changed?.();
}

const CHOICES = {
  split: ["Stage", () => DATA.splits.map((v) => [v, SPLITS[v]])],
  category: ["Category", () => [...DATA.categories, EVERYDAY].map((v) => [v, v])],
  clause: ["Clause", () => DATA.sections.flatMap((part) => part.clauses.map((c) => [c.id, `${c.id} ${c.title}`]))],
  required: ["The policy asks", () => [...Object.entries(NAMES), ["none", "nothing"]]],
  whose: ["Whose answer", () => DATA.authors.map((a) => [a, armName(a)])],
  verdict: [
    "Verdict",
    () => [["+", "as asked"], ["-", "not as asked"], ...SEEN_ORDER.map((k) => [k, SEEN[k]]), ["!", "never written"]],
  ],
  dropped: [
    "Filter",
    () => [
      ["kept", "kept"],
      ["any", "dropped, any reason"],
      ...Object.keys(DATA.drops).map((v) => [v, `dropped: ${v}`]),
    ],
  ],
  changed: [
    "Changed sides",
    () => [
      ["any", "either way"],
      ["better", "for the better"],
      ["worse", "for the worse"],
    ],
  ],
};
const COMPARED = { from: "from", to: "to" };

function control(name, label, choices, any = true) {
  const set = (event) => {
    browser.filters[name] = event.target.value;
    browser.at = 0;
    refilter();
    remember();
  };
  const options = [any ? ["", "any"] : null, ...choices].filter(Boolean);
  return h(
    "label",
    {},
    h("span", {}, label),
    h(
      "select",
      { name, change: set },
      options.map(([v, words]) => h("option", { value: v, selected: browser.filters[name] === v }, visible(words))),
    ),
  );
}
function remember() {
  const set = Object.entries(browser.filters).filter(([name, v]) => v !== EMPTY[name]);
  history.replaceState(null, "", "#/samples" + (set.length ? "?" + new URLSearchParams(set) : ""));
}

function samplesView(query) {
  const given = { ...EMPTY, ...Object.fromEntries(new URLSearchParams(query)) };
  if (JSON.stringify(given) !== JSON.stringify(browser.filters)) {
    browser.filters = given;
    browser.at = 0;
    browser.top = 0;
  }
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "Search prompts, answers, ids",
    "aria-label": "Search",
    autocomplete: "off",
    spellcheck: "false",
    value: browser.filters.q,
  });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      browser.filters.q = search.value;
      browser.at = 0;
      refilter();
      remember();
    }, 80);
  });
  const many = h("p", { id: "many", role: "status" });
  const clear = h(
    "button",
    {
      type: "button",
      click: () => {
        browser.filters = { ...EMPTY };
        refilter();
        remember();
        route();
      },
    },
    "Clear",
  );
  const filters = h(
    "details",
    { class: "filters", open: innerWidth > 860 },
    h("summary", {}, "Filters"),
    Object.entries(CHOICES)
      .filter(
        ([name]) =>
          (name !== "changed" || DATA.arms.length > 1) && (name !== "dropped" || Object.keys(DATA.drops).length),
      )
      .map(([name, [label, choices]]) => control(name, label, choices())),
    DATA.arms.length > 1
      ? h(
          "div",
          { class: "pair" },
          Object.entries(COMPARED).map(([name, label]) =>
            control(
              name,
              label,
              DATA.arms.map((a) => [a, armName(a)]),
              false,
            ),
          ),
        )
      : null,
  );
  const list = makeList();
  browser.changed = () => {
    many.textContent = `${count(browser.found.length)} of ${count(ROWS.length)} prompts`;
    clear.hidden = back() === "#/samples";
    list.renew();
  };
  const view = h(
    "section",
    { class: "browser" },
    h(
      "div",
      { class: "side" },
      h("div", { class: "search" }, search, h("kbd", { "aria-hidden": "true" }, "/")),
      h("div", { class: "state" }, many, h("span", { id: "reading", class: "soft" }, reading()), clear),
      filters,
    ),
    list.box,
  );
  refilter();
  requestAnimationFrame(() => list.restore());
  return view;
}

function makeList() {
  const tall = matchMedia("(max-width: 860px)").matches ? 92 : 62;
  const inner = h("div", { class: "inner" });
  const scroller = h(
    "div",
    { class: "rows", id: "rows", tabindex: "0", role: "listbox", "aria-label": "Prompts" },
    inner,
  );
  const none = h("p", { class: "empty", hidden: true }, "No prompt passes these filters. Esc clears the search.");
  const heads = h(
    "div",
    { class: "heads", "aria-hidden": "true" },
    h("span", {}, "prompt"),
    h(
      "span",
      { class: "marks" },
      DATA.arms.map((a) => h("b", {}, armName(a))),
    ),
  );
  const pool = [];
  const render = () => {
    browser.top = scroller.scrollTop;
    const from = Math.max(0, Math.floor(scroller.scrollTop / tall) - 4);
    const to = Math.min(browser.found.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / tall) + 4);
    while (pool.length < to - from) {
      const line = newLine();
      pool.push(line);
      inner.append(line.box);
    }
    pool.forEach((line, i) => {
      // A row keeps its element while it is in sight: the one whose turn it is by its number.
      const number = from + ((i - (from % pool.length) + pool.length) % pool.length);
      if (number >= to) {
        line.box.hidden = true;
        line.number = -1;
        return;
      }
      const row = browser.found[number],
        picked = number === browser.at;
      if (line.number === number && line.row === row && line.picked === picked) return;
      Object.assign(line, { number, picked });
      line.box.hidden = false;
      line.box.style.transform = `translateY(${number * tall}px)`;
      line.box.setAttribute("aria-selected", picked);
      line.box.id = `row-${number}`;
      if (line.row !== row) {
        line.row = row;
        fillLine(line, row);
      }
    });
    scroller.setAttribute("aria-activedescendant", `row-${browser.at}`);
  };
  const renew = () => {
    inner.style.height = `${browser.found.length * tall}px`;
    none.hidden = browser.found.length > 0;
    pool.forEach((line) => {
      line.row = null;
    });
    render();
  };
  const see = () => {
    const y = browser.at * tall;
    if (y < scroller.scrollTop) scroller.scrollTop = y;
    else if (y + tall > scroller.scrollTop + scroller.clientHeight)
      scroller.scrollTop = y + tall - scroller.clientHeight;
    render();
  };
  scroller.addEventListener("scroll", render, { passive: true });
  new ResizeObserver(render).observe(scroller);
  browser.move = (steps) => {
    browser.at = Math.max(0, Math.min(browser.found.length - 1, browser.at + steps));
    see();
    scroller.focus({ preventScroll: true });
  };
  browser.pageLength = () => Math.max(1, Math.floor(scroller.clientHeight / tall) - 1);
  const restore = () => {
    scroller.scrollTop = browser.top;
    see();
  };
  inner.style.setProperty("--tall", `${tall}px`);
  return { box: h("div", { class: "list" }, heads, scroller, none), renew, restore };
}
function newLine() {
  const words = h("span", { class: "words", dir: "auto" }),
    about = h("span", { class: "about" }),
    badges = DATA.arms.map((arm) => ({ arm, box: badge("?"), sign: null, word: null })),
    marks = h("span", { class: "marks" });
  for (const one of badges) {
    [one.sign, one.word] = one.box.children;
    one.box.append(h("em", {}, armName(one.arm)));
    marks.append(one.box);
  }
  const line = { number: -1, row: null, picked: false, words, about, marks, badges };
  line.box = h(
    "div",
    {
      class: "row",
      role: "option",
      click: () => {
        browser.at = line.number;
        openRow(line.row);
      },
    },
    h("span", { class: "what" }, words, about),
    marks,
  );
  return line;
}
function fillLine(line, row) {
  line.words.textContent = visible(row.text.slice(0, 240));
  const fate = row.drops.length ? (row.drops.includes(null) ? "kept" : `dropped: ${row.drops[0]}`) : "";
  const parts = [
    row.id,
    SPLITS[row.split],
    row.category,
    row.clause,
    row.required ? `asks to ${NAMES[row.required].replace("safe completion", "complete safely")}` : null,
    fate,
  ];
  line.about.textContent = visible(parts.filter(Boolean).join(" · "));
  line.marks.hidden = !evaluated(row);
  if (!line.marks.hidden) for (const one of line.badges) fillBadge(one, markOf(row, one.arm));
}
function fillBadge({ arm, box, sign, word }, mark) {
  const [shape, means] = SIDE[mark[0]] ?? ["", "not asked"];
  box.className = `badge ${kindOf(mark)}`;
  box.title = `${armName(arm)}: ${SEEN[mark[1]] ?? means}`;
  sign.textContent = shape;
  word.textContent = means;
}
const openRow = (row) => {
  if (row) location.hash = `#/prompt/${encodeURIComponent(row.id)}`;
};
function step(steps, row) {
  const at = browser.found.indexOf(row),
    next = browser.found[at + steps];
  if (at >= 0 && next) {
    browser.at = at + steps;
    browser.opened = next; // at once: the next key may come before the view
    openRow(next);
  }
}
