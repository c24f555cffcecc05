// The spec, with coverage beside each clause.
function specView(clause) {
  if (clause)
    requestAnimationFrame(() => document.getElementById(`clause-${clause}`)?.scrollIntoView({ block: "center" }));
  const { untested, untrained, unevaluated } = DATA.coverage;
  const told = (ids, words) =>
    ids.length
      ? h(
          "p",
          { class: "gap" },
          h("b", {}, `! ${words}: `),
          ids.map((id, i) => [i ? ", " : "", h("a", { href: `#/spec/${encodeURIComponent(id)}` }, visible(id))]),
        )
      : null;
  return [
    h("h1", {}, visible(DATA.title)),
    h(
      "p",
      { class: "lead" },
      "Each clause with what exercises it in this run, how often the reasoning cites it, and how the arms do on it.",
    ),
    told(untested, "No held-out prompt tests"),
    told(unevaluated, "Held-out prompts, none of them evaluated, of"),
    told(untrained, "No training or RL prompt teaches"),
    DATA.sections
      .filter((part) => part.clauses.length || part.category)
      .map((part) =>
        h(
          "section",
          { class: "block" },
          h("h2", {}, part.category ? visible(part.category) : "Principles"),
          part.summary ? h("p", { class: "soft" }, visible(part.summary)) : null,
          Object.keys(part.terms).length
            ? h(
                "details",
                { class: "fold" },
                h("summary", {}, "Definitions"),
                h(
                  "dl",
                  {},
                  Object.entries(part.terms).map(([term, words]) => [
                    h("dt", {}, visible(term)),
                    h("dd", {}, visible(words)),
                  ]),
                ),
              )
            : null,
          part.clauses.map((c) => clauseCard(c, c.id === clause)),
        ),
      ),
  ];
}
function clauseCard(clause, picked) {
  const cover = DATA.coverage.rows[clause.id],
    follows = { refuse: "not_unsafe", comply: "not_overrefuse", safe_complete: "safe_completion" }[clause.behaviour];
  const counts = Object.keys(SPLITS)
    .filter((k) => DATA.splits.includes(k))
    .map((k) =>
      h(
        "a",
        { class: `count${cover.prompts[k] ? "" : " zero"}`, href: link({ split: k, clause: clause.id }) },
        h("b", {}, count(cover.prompts[k] ?? 0)),
        ` ${SPLITS[k]}`,
      ),
    );
  const cell = (told) =>
    told && told[0] !== null
      ? h("td", { title: `95 % interval ${span(told[1], told[2])}` }, `${Math.round(told[0] * told[3])} of ${told[3]}`)
      : h("td", {}, "–");
  const lines_ = ["teacher", ...DATA.coverage.arms]
    .filter((arm) => Object.keys(cover.figures).some((key) => key.startsWith(`${arm} `)))
    .map((arm) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, armName(arm)),
        [follows, "citation_recall", "citation_precision"].map((name) => cell(cover.figures[`${arm} ${name}`])),
      ),
    );
  return h(
    "article",
    { class: `clause ${clause.behaviour}${picked ? " picked" : ""}`, id: `clause-${clause.id}` },
    h(
      "div",
      {},
      h(
        "h3",
        {},
        h("a", { href: `#/spec/${encodeURIComponent(clause.id)}` }, visible(clause.id)),
        ` ${visible(clause.title)}`,
      ),
      h(
        "p",
        {},
        h("b", { class: `asks ${clause.behaviour}` }, NAMES[clause.behaviour]),
        clause.style ? h("span", { class: "soft" }, ` in the style ${visible(clause.style)}`) : null,
      ),
      shown(clause.text),
    ),
    h(
      "div",
      { class: "cover" },
      h("p", { class: "counts" }, counts),
      lines_.length
        ? h(
            "div",
            { class: "scroll" },
            h(
              "table",
              {},
              h(
                "thead",
                {},
                h(
                  "tr",
                  {},
                  ["", "as asked", "cited where it decides", "right when cited"].map((w) =>
                    h("th", { scope: "col" }, w),
                  ),
                ),
              ),
              h("tbody", {}, lines_),
            ),
          )
        : null,
    ),
  );
}
