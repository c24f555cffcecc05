// The views and the way between them, the keyboard, light and dark.
const VIEWS = {
  overview: ["Overview", overviewView],
  figures: ["Figures", figuresView],
  training: ["Training", trainingView],
  samples: ["Samples", samplesView],
  spec: ["Spec", specView],
};
const main = document.getElementById("main");

const KEYS = [
  ["1 – 5", "the views"],
  ["/", "search"],
  ["↑ ↓, j k", "move in the list"],
  ["Page ↑ ↓, Home, End", "move further"],
  ["Enter", "open the prompt"],
  ["← →, h l", "previous and next prompt"],
  ["Esc", "back; clear the search; close"],
  ["t", "light, dark, as the system"],
  ["?", "these keys"],
];
const help = document.getElementById("help");
help.append(
  h("h2", {}, "Keyboard"),
  h(
    "dl",
    {},
    KEYS.map(([keys, words]) => [h("dt", {}, h("kbd", {}, keys)), h("dd", {}, words)]),
  ),
  h("button", { type: "button", click: () => help.close() }, "Close"),
);
document.getElementById("keys").addEventListener("click", () => help.showModal());

const THEMES = { "": "◐ auto", light: "○ light", dark: "● dark" };
const themeButton = document.getElementById("theme");
const stored = () => {
  try {
    return localStorage.getItem("delib-theme") ?? "";
  } catch {
    return "";
  }
}; // a browser may forbid it to files
let theme = Object.hasOwn(THEMES, stored()) ? stored() : "";
function setTheme(to) {
  theme = to;
  document.documentElement.dataset.theme = to;
  themeButton.textContent = THEMES[to];
  themeButton.setAttribute("aria-label", `Colours: ${THEMES[to].slice(2)}`);
  try {
    localStorage.setItem("delib-theme", to);
  } catch {
    /* then it holds for this page alone */
  }
}
const nextTheme = () => {
  const all = Object.keys(THEMES);
  setTheme(all[(all.indexOf(theme) + 1) % all.length]);
};
themeButton.addEventListener("click", nextTheme);

let current = "";
function route() {
  const [path, query = ""] = location.hash.slice(2).split("?");
  const [name, ...rest] = path.split("/");
  let given = "";
  try {
    given = decodeURIComponent(rest.join("/"));
  } catch {
    given = rest.join("/");
  }
  current = name === "prompt" ? "prompt" : Object.hasOwn(VIEWS, name) ? name : "overview";
  const view = current === "prompt" ? promptView(given) : VIEWS[current][1](current === "samples" ? query : given);
  document.getElementById("tip").hidden = true;
  main.replaceChildren(...[view].flat().filter(Boolean).flat());
  main.dataset.view = current;
  for (const a of document.querySelectorAll("nav a")) {
    const here = a.dataset.view === (current === "prompt" ? "samples" : current);
    if (here) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  document.title = `delib: ${DATA.name} · ${current === "prompt" ? visible(given) : VIEWS[current][0]}`;
  if (current !== "samples" && !(current === "spec" && given)) scrollTo(0, 0);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const typing = event.target.matches?.("input"),
    choosing = event.target.matches?.("select"),
    key = event.key;
  const act = (work) => {
    event.preventDefault();
    work();
  };
  if (key === "Escape") return act(escape_);
  if (typing) {
    if (key === "ArrowDown") act(() => browser.move(0));
    if (key === "Enter") act(() => openRow(browser.found[browser.at]));
    return;
  }
  if (choosing) return;
  if (key === "/")
    return act(() => {
      if (current !== "samples") location.hash = back();
      setTimeout(() => document.getElementById("search")?.select(), 30);
    });
  if (key === "?") return act(() => help.showModal());
  if (key === "t") return act(nextTheme);
  const view = Object.keys(VIEWS)[Number(key) - 1];
  if (view)
    return act(() => {
      location.hash = view === "samples" ? back() : `#/${view}`;
    });
  if (current === "samples") {
    const by = {
      ArrowDown: 1,
      j: 1,
      ArrowUp: -1,
      k: -1,
      PageDown: browser.pageLength(),
      PageUp: -browser.pageLength(),
      Home: -ROWS.length,
      End: ROWS.length,
    }[key];
    if (by !== undefined) return act(() => browser.move(by));
    if (key === "Enter" && event.target.matches("body, main, .rows"))
      return act(() => openRow(browser.found[browser.at]));
  }
  if (current === "prompt" && event.target.matches("body, main, a, button, summary")) {
    const by = { ArrowRight: 1, l: 1, ArrowLeft: -1, h: -1 }[key];
    if (by) act(() => step(by, browser.opened));
  }
});
function escape_() {
  const search = document.getElementById("search");
  if (current === "prompt") location.hash = back();
  else if (search && browser.filters.q) {
    search.value = "";
    browser.filters.q = "";
    refilter();
    remember();
  } else document.activeElement?.blur();
}

document
  .querySelector("nav")
  .append(...Object.entries(VIEWS).map(([name, [words]]) => h("a", { href: `#/${name}`, "data-view": name }, words)));
document.querySelector('nav a[data-view="samples"]').addEventListener("click", (event) => {
  event.preventDefault();
  location.hash = back();
});
// Its own address would be taken for a view's.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
setTheme(theme);
addEventListener("hashchange", route);
route();
later(() => readAnswers());
