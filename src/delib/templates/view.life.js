// One prompt's life: asked, written, judged, kept, trained on, answered by each arm.
function promptView(id) {
  const row = BY_ID.get(id);
  if (!row)
    return h(
      "p",
      { class: "empty" },
      "No prompt of this run has that id. ",
      h("a", { href: "#/samples" }, "To all prompts"),
    );
  browser.opened = row;
  browser.at = Math.max(0, browser.found.indexOf(row));
  const life = lifeOf(row),
    say = (n) => life.texts[n],
    at = browser.found.indexOf(row);
  const whole = (parts) => parts.map((n) => (n < 0 ? SHARED[-1 - n] : say(n))).join("");
  const facts = [
    SPLITS[row.split],
    row.category,
    row.clause ? h("a", { href: `#/spec/${encodeURIComponent(row.clause)}` }, `clause ${visible(row.clause)}`) : null,
    row.required
      ? h("b", { class: `asks ${row.required}` }, `the policy asks: ${NAMES[row.required]}`)
      : "nobody said what is asked",
    `source ${visible(row.source)}`,
    life.group ? `group ${visible(life.group)}` : null,
    life.expected ? `right: ${visible(life.expected.join(" / "))}` : null,
    ...life.checks.map((check) => `by rule: ${visible(check)}`),
  ];
  const view = h(
    "article",
    { class: "life" },
    h(
      "div",
      { class: "bar-top" },
      h("a", { href: back(), class: "button" }, "← All prompts"),
      h("span", { class: "soft" }, at >= 0 ? `${count(at + 1)} of ${count(browser.found.length)}` : ""),
      h("span", { class: "grow" }),
      h("button", { type: "button", disabled: at <= 0, click: () => step(-1, row) }, "← Previous"),
      h(
        "button",
        { type: "button", disabled: at < 0 || at + 1 >= browser.found.length, click: () => step(1, row) },
        "Next →",
      ),
    ),
    h("h1", {}, visible(row.id)),
    h(
      "p",
      { class: "facts" },
      facts.filter(Boolean).map((f) => h("span", {}, f)),
    ),
    part(
      "Asked",
      life.messages.map(([role, n]) => h("div", { class: `turn ${role}` }, h("b", {}, role), shown(say(n)))),
    ),
  );
  for (const sample of life.made)
    view.append(
      part(
        `Written by the teacher${life.made.length > 1 ? `, completion ${sample.index}` : ""}`,
        answer(sample, say, whole),
        fate(sample),
      ),
    );
  for (const [reasoning, text_] of life.examples)
    view.append(
      part(
        "Trained on",
        h("p", { class: "soft" }, "The example, without the policy."),
        shown(say(reasoning), "text reasoning"),
        shown(say(text_)),
      ),
    );
  if (life.rollouts.length)
    view.append(
      part(
        "Tried during RL",
        h(
          "div",
          { class: "arms" },
          life.rollouts.map((sample) => h("section", { class: "arm" }, answer(sample, say, whole))),
        ),
      ),
    );
  if (life.arms.length) view.append(part("Answered by each arm", compared(life.arms, say, whole)));
  return view;
}
const part = (title, ...inside) => h("section", { class: "part" }, h("h2", {}, title), inside);
const back = () => {
  const set = Object.entries(browser.filters).filter(([name, v]) => v !== EMPTY[name]);
  return "#/samples" + (set.length ? "?" + new URLSearchParams(set) : "");
};
function fate(sample) {
  if (sample.kept === undefined) return null;
  return h(
    "p",
    { class: `fate ${sample.kept ? "good" : "bad"}` },
    sample.kept ? "✓ Kept by the filter" : `✕ Dropped by the filter: ${visible(sample.drop ?? "no reason told")}`,
  );
}
function compared(arms, say, whole) {
  const columns = h("div", { class: "arms", id: "arms" });
  const lay = () =>
    columns.replaceChildren(
      ...arms
        .filter(([arm]) => !browser.hidden.has(arm))
        .map(([arm, sample]) =>
          h(
            "section",
            { class: "arm", "data-arm": arm },
            h("h3", {}, svg(16, 16, symbol(arm, 8, 8, 5)), armName(arm)),
            answer(sample, say, whole),
          ),
        ),
    );
  const toggles = arms.map(([arm]) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": String(!browser.hidden.has(arm)),
        "data-arm": arm,
        click: (event) => {
          if (!browser.hidden.delete(arm)) browser.hidden.add(arm);
          event.target.setAttribute("aria-pressed", String(!browser.hidden.has(arm)));
          lay();
        },
      },
      armName(arm),
    ),
  );
  lay();
  return [h("div", { class: "toggles", role: "group", "aria-label": "Arms shown" }, toggles), columns];
}
function answer(sample, say, whole) {
  const made = sample.made;
  if (!made) return h("p", { class: "fate bad" }, `! Never written: ${visible(sample.failure ?? "no cause told")}`);
  const words = [SEEN[sample.mark[1]], SIDE[sample.mark[0]][1]];
  const about = [
    made.finish === "stop" ? "ended by itself" : made.finish === "length" ? "cut off" : "malformed",
    made.tokens ? `${made.tokens} tokens` : null,
    visible(made.model),
  ];
  return [
    h("p", { class: "verdict" }, badge(sample.mark), ` ${words.join(", ")}`),
    sample.fault ? h("p", { class: "soft" }, `flawed on purpose: ${visible(sample.fault)}`) : null,
    made.reasoning === undefined
      ? null
      : h(
          "div",
          { class: "thought" },
          h("span", { class: "tag" }, "reasoning"),
          shown(say(made.reasoning), "text reasoning"),
        ),
    h("span", { class: "tag" }, "answer"),
    say(made.answer) ? shown(say(made.answer), "text answer") : h("p", { class: "soft" }, "no answer"),
    h("p", { class: "soft" }, about.filter(Boolean).join(" · ")),
    (sample.verdicts ?? []).map((v) => verdict(v, say, whole)),
    made.text === undefined ? null : fold("Received, as it came", () => shown(say(made.text))),
    fold("Sent", () => (made.sent ? shown(whole(made.sent)) : h("p", { class: "soft" }, "nothing: recorded"))),
  ];
}
function verdict([judge, view, score, behaviour, criteria, why, sent], say, whole) {
  const seen = behaviour ? SEEN[{ comply: "c", refuse: "r", partial: "p", safe_complete: "s" }[behaviour]] : "ungraded";
  return h(
    "details",
    { class: "judged" },
    h(
      "summary",
      {},
      h("b", {}, visible(judge)),
      ` saw: ${seen}`,
      h("span", { class: "score" }, score === null ? "ungraded" : figure(score)),
    ),
    h("p", {}, visible(say(why))),
    h(
      "p",
      { class: "soft" },
      `shown ${view === "full" ? "reasoning and answer" : "the answer alone"}`,
      Object.entries(criteria).map(([name, value]) => ` · ${visible(name)} ${figure(value)}`),
    ),
    fold("What the judge was shown", () => shown(whole(sent))),
  );
}
// What is folded is made when it is opened.
function fold(title, make) {
  const box = h("details", { class: "fold" }, h("summary", {}, title));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) box.append(make());
  });
  return box;
}
