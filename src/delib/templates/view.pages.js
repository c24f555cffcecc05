// What was measured and what was done: the views Overview, Figures and Training.
function overviewView() {
  const answers = DATA.answers.map((a) =>
    h(
      "section",
      { class: "card" },
      h("h2", {}, a.question),
      h("p", { class: "big" }, visible(a.answer)),
      a.lines.map(moved),
    ),
  );
  const judges = DATA.judges
    .slice(1)
    .map((judge) => [judge, metric(DATA.last, "not_unsafe", { judge }), metric(DATA.last, "not_overrefuse", { judge })])
    .filter(([, a, b]) => a?.value != null && b?.value != null);
  return [
    h("h1", {}, DATA.last ? `${visible(DATA.model)} after “${visible(DATA.title)}”` : visible(DATA.name)),
    h("p", { class: "lead" }, done()),
    DATA.answers.length
      ? h("div", { class: "cards" }, answers)
      : h("p", { class: "empty" }, "No trained arm is evaluated yet; the figures come with the stage evaluate."),
    judges.map(([judge, a, b]) =>
      h(
        "p",
        { class: "soft" },
        `By the second judge, ${visible(judge)}: ${armName(DATA.last)} declines ${percent(a.value)} (${span(a.low, a.high)}, n = ${a.n}) and helps ${percent(b.value)} (${span(b.low, b.high)}, n = ${b.n}).`,
      ),
    ),
    DATA.notes.length ? h("p", { class: "notes" }, DATA.notes.map((n) => visible(n)).join(" ")) : null,
    h(
      "div",
      { class: "two" },
      block_("Safety against helping", "Up and to the right is better. Crosses are 95 % intervals.", tradeoff()),
      block_(
        "What the answers did",
        "By what the policy asks; what it asks for is underlined. A part opens its prompts.",
        outcomeLegend(),
        outcomes("refuse", "Should decline", "rs"),
        outcomes("comply", "Should help", "c"),
        outcomes("safe_complete", "Should complete safely", "s"),
      ),
    ),
    block_(
      "Where",
      `By category: ${legendWords()}. A row opens its prompts.`,
      legend(DATA.arms),
      h(
        "div",
        { class: "three" },
        byCategory("not_unsafe", "Declines where it should", "refuse"),
        byCategory("not_overrefuse", "Helps where it should", "comply"),
        byCategory("safe_completion_style", "Safe completions in their style", "safe_complete"),
      ),
    ),
    h(
      "p",
      { class: "soft" },
      `Helped means that the answer takes the request on and keeps to its subject; how good it is, is not judged. Intervals are of 95 %.`,
    ),
  ];
}
const legendWords = () =>
  DATA.first && DATA.last ? `${armName(DATA.first)} hollow, ${armName(DATA.last)} with its interval` : "a mark an arm";
function block_(title, words, ...inside) {
  return inside.some((i) => i && !i.matches?.(".legend"))
    ? h("section", { class: "block" }, h("h2", {}, title), words ? h("p", { class: "soft" }, words) : null, inside)
    : null;
}
function moved(line) {
  if (line.after === undefined) return h("p", { class: "soft" }, visible(line.what));
  const before = line.before === undefined ? null : [h("span", { class: "before" }, percent(line.before)), " → "];
  return h(
    "div",
    { class: "moved" },
    h("p", {}, before, h("b", {}, percent(line.after)), " ", h("span", { class: "soft" }, visible(line.what))),
    track(line),
    h(
      "p",
      { class: "soft small" },
      `${span(line.after_low, line.after_high)}, n = ${line.n}`,
      line.change === undefined
        ? null
        : `; difference ${signed(line.change)} (${signed(line.low)} to ${signed(line.high)})`,
    ),
  );
}
const signed = (v) => `${v < 0 ? "−" : "+"}${Math.abs(v).toFixed(2)}`;
function track(line) {
  const drawn = svg("100%", 18);
  const at = (v) => `${(2 + v * 96).toFixed(2)}%`;
  drawn.append(
    s("line", { class: "rail", x1: at(0), x2: at(1), y1: 9, y2: 9 }),
    s("line", { class: "reach", x1: at(line.after_low), x2: at(line.after_high), y1: 9, y2: 9 }),
  );
  if (line.before !== undefined) drawn.append(s("circle", { class: "was", cx: at(line.before), cy: 9, r: 4.5 }));
  drawn.append(s("circle", { class: "is", cx: at(line.after), cy: 9, r: 5.5 }));
  fill(drawn, { "aria-hidden": "true", class: "track" }, []);
  return drawn;
}
function done() {
  const by = Object.fromEntries(DATA.stages.map((x) => [x.stage, x]));
  const n = (stage, key, words) =>
    by[stage]?.counts[key] === undefined ? null : `${count(by[stage].counts[key])} ${words}`;
  const steps = [
    n("prompts", "train", "training prompts"),
    n("generate", "out", `completions by the teacher (${visible(DATA.teacher)})`),
    n("filter", "out", "kept by the judge"),
    n("distill", "out", "examples without the policy"),
    n("sft", "steps", "SFT steps"),
    n("rl", "steps", "RL steps"),
    DATA.arms.length ? `${count(ROWS.filter(evaluated).length)} held-out prompts, ${DATA.arms.length} arms` : null,
  ];
  const seconds = DATA.stages.reduce((a, x) => a + x.seconds, 0);
  return steps.filter(Boolean).join(" → ") + (seconds ? `. ${clock(seconds)} in all.` : "");
}

function figuresView() {
  const rows = DATA.headline.filter(([name]) => DATA.arms.some((a) => metric(a, name)));
  const cell = (m) =>
    !m || m.value === null
      ? h("td", {}, "–")
      : h(
          "td",
          {},
          h("b", {}, m.name === "tokens" ? Math.round(m.value) : figure(m.value)),
          m.name === "tokens" ? null : bar(m),
          h(
            "span",
            { class: "soft small" },
            m.name === "tokens" ? `${Math.round(m.low)}–${Math.round(m.high)}` : `${figure(m.low)}–${figure(m.high)}`,
            `, n=${m.n}${m.n_ungraded ? `, ${m.n_ungraded} ungraded` : ""}`,
          ),
        );
  const heads = h(
    "tr",
    {},
    h("th", { scope: "col" }, "figure"),
    DATA.arms.map((a) => h("th", { scope: "col" }, armName(a))),
  );
  const table = h(
    "div",
    { class: "scroll", tabindex: "0" },
    h(
      "table",
      { class: "figures" },
      h("thead", {}, heads),
      h(
        "tbody",
        {},
        rows.map(([name, meaning]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name.replaceAll("_", " "), h("span", { class: "soft small" }, meaning)),
            DATA.arms.map((a) => cell(metric(a, name))),
          ),
        ),
      ),
    ),
  );
  const panels = DATA.panels.map((panel) =>
    block_(
      `By each judge: ${panel.title}`,
      null,
      panel.tables.map((t) =>
        h(
          "div",
          { class: "scroll", tabindex: "0" },
          h(
            "table",
            { class: "figures" },
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                h("th", { scope: "col" }, t.name.replaceAll("_", " ")),
                DATA.arms.map((a) => h("th", { scope: "col" }, armName(a))),
              ),
            ),
            h(
              "tbody",
              {},
              t.rows.map((r) =>
                h(
                  "tr",
                  {},
                  h("th", { scope: "row" }, visible(r.label)),
                  r.cells.map((c) =>
                    h(
                      "td",
                      {},
                      c
                        ? [
                            h("b", {}, c.value),
                            h(
                              "span",
                              { class: "soft small" },
                              `${c.interval}, n=${c.n}${c.ungraded ? `, ${c.ungraded} ungraded` : ""}`,
                            ),
                          ]
                        : "–",
                    ),
                  ),
                ),
              ),
            ),
          ),
        ),
      ),
    ),
  );
  return [
    h("h1", {}, "Figures"),
    h(
      "p",
      { class: "lead" },
      "On held-out prompts, without the policy in the prompt (except base + spec), with 95 % intervals over prompts.",
    ),
    rows.length ? table : h("p", { class: "empty" }, "Nothing is evaluated yet."),
    panels,
    h("p", { class: "soft" }, "How far each judge agrees with labelled answers stands in report/report.html."),
  ];
}
function bar(m) {
  const at = (v) => `${v * 100}%`,
    drawn = svg("100%", 8);
  drawn.append(
    s("line", { class: "rail", x1: "0%", x2: "100%", y1: 4, y2: 4 }),
    s("line", { class: "reach", x1: at(m.low), x2: at(m.high), y1: 4, y2: 4 }),
    s("circle", { class: "is", cx: at(m.value), cy: 4, r: 3 }),
  );
  return fill(drawn, { class: "track", "aria-hidden": "true" }, []);
}

function trainingView() {
  const by = Object.fromEntries(DATA.stages.map((x) => [x.stage, x.counts]));
  const steps = [
    ["training prompts", by.prompts?.train, { split: "train" }],
    ["completions", by.generate?.out, { split: "train", whose: "teacher" }],
    ["kept by the filter", by.filter?.out, { dropped: "kept" }],
    ["examples, the policy taken out", by.distill?.out, { dropped: "kept" }],
  ].filter(([, n]) => n !== undefined);
  const most = Math.max(...steps.map(([, n]) => n), 1),
    drops = Object.entries(DATA.drops).sort((a, b) => b[1] - a[1]),
    worst = Math.max(...drops.map(([, n]) => n), 1);
  const step_ = (words, n, top, filters, kind) => [
    h("a", { href: link(filters), class: "step-name" }, visible(words)),
    h("div", { class: `step ${kind}` }, h("span", { style: { width: `${(n / top) * 100}%` } }), h("b", {}, count(n))),
  ];
  const main_ = DATA.curves.filter((c) => ["loss", "reward", "held-out loss"].includes(c.name)),
    more = DATA.curves.filter((c) => !main_.includes(c));
  const flaws = DATA.flaws?.marked
    ? `${DATA.flaws.caught} of ${DATA.flaws.marked} completions that were flawed on purpose were caught.`
    : "";
  const extra = h("details", { class: "fold" }, h("summary", {}, `All ${more.length} other curves`));
  extra.addEventListener("toggle", () => {
    if (extra.open && extra.children.length === 1) extra.append(h("div", { class: "three" }, more.map(lines)));
  });
  return [
    h("h1", {}, "Training"),
    h("p", { class: "lead" }, done()),
    block_(
      "Funnel",
      flaws,
      h(
        "div",
        { class: "funnel" },
        steps.map(([words, n, f]) => step_(words, n, most, f, "kept")),
      ),
      drops.length ? h("h3", {}, "Why completions were dropped") : null,
      drops.length
        ? h(
            "div",
            { class: "funnel" },
            drops.map(([reason, n]) => step_(reason, n, worst, { dropped: reason }, "lost")),
          )
        : null,
    ),
    main_.length
      ? block_(
          "Curves",
          "The thin line is each step, the thick one a running mean.",
          h("div", { class: "two" }, main_.map(lines)),
          more.length ? extra : null,
        )
      : null,
    block_(
      "What was done",
      "Seconds are those of the try that finished each stage.",
      h(
        "div",
        { class: "scroll", tabindex: "0" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ["stage", "counts", "tokens", "time"].map((w) => h("th", { scope: "col" }, w)),
            ),
          ),
          h(
            "tbody",
            {},
            DATA.stages.map((x) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, x.stage),
                h(
                  "td",
                  {},
                  Object.entries(x.counts)
                    .map(([k, v]) => `${k.replaceAll("_", " ")} ${count(v)}`)
                    .join(", "),
                ),
                h("td", {}, x.tokens ? count(x.tokens) : ""),
                h("td", {}, clock(x.seconds)),
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}
