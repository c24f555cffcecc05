// Plots, drawn anew for the width that there is. Every mark has a shape or a word besides its colour.
const SHAPES = {
  base: (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
  base_spec: (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0Z`,
  sft: (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  rl: (r) => `M0 ${-1.25 * r}L${1.2 * r} ${0.9 * r}H${-1.2 * r}Z`,
};
const symbol = (arm, x, y, r = 6, more = {}) =>
  s("path", { d: SHAPES[arm](r), transform: `translate(${x} ${y})`, class: `symbol ${arm}`, ...more });

function plot(draw, label) {
  const box = h("div", { class: "plot" });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now === width || now < 40) return;
    width = now;
    const drawn = draw(width);
    // What is inside an image can't be told or reached.
    fill(drawn, { role: drawn.querySelector("a") ? "group" : "img", "aria-label": label }, []);
    box.replaceChildren(drawn);
  }).observe(box);
  return box;
}
const svg = (width, height, ...children) =>
  s("svg", { width, height, viewBox: typeof width === "number" ? `0 0 ${width} ${height}` : null }, ...children);
const text = (x, y, words, more = {}) => s("text", { x, y, ...more }, words);

function legend(arms) {
  return h(
    "ul",
    { class: "legend" },
    arms.map((arm) => h("li", {}, svg(16, 16, symbol(arm, 8, 8, 5)), armName(arm))),
  );
}

// Safety against helping: up is safer, right helps more.
function tradeoff() {
  const arms = DATA.arms.filter((a) => metric(a, "not_unsafe") && metric(a, "not_overrefuse"));
  const draw = (width) => {
    const wide = Math.min(width, 560),
      height = Math.round(wide * 0.74);
    const left = 62,
      right = wide - 22,
      top = 16,
      bottom = height - 44;
    const x = (v) => left + v * (right - left),
      y = (v) => bottom - v * (bottom - top);
    const drawn = svg(wide, height);
    for (const v of [0, 0.25, 0.5, 0.75, 1]) {
      drawn.append(
        s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: bottom }),
        s("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      );
      drawn.append(
        text(x(v), bottom + 16, percent(v), { "text-anchor": "middle" }),
        text(left - 6, y(v) + 4, percent(v), { "text-anchor": "end" }),
      );
    }
    drawn.append(
      text(right - 6, top + 16, "safe and helpful", { class: "corner", "text-anchor": "end" }),
      text(left + 6, top + 16, "safe, a prude", { class: "corner" }),
    );
    drawn.append(
      text(right - 6, bottom - 8, "helps with anything", { class: "corner", "text-anchor": "end" }),
      text(left + 6, bottom - 8, "neither", { class: "corner" }),
    );
    drawn.append(
      text(right, bottom + 36, "helps where it should →", { class: "axis", "text-anchor": "end" }),
      text(14, top, "declines where it should →", {
        class: "axis",
        "text-anchor": "end",
        transform: `rotate(-90 14 ${top})`,
      }),
    );
    const points = arms
      .map((arm) => {
        const a = metric(arm, "not_overrefuse"),
          b = metric(arm, "not_unsafe");
        return { arm, a, b, x: x(a.value), y: y(b.value) };
      })
      .filter((p) => p.a.value !== null && p.b.value !== null);
    const way = points.filter((p) => p.arm !== "base_spec");
    if (way.length > 1) drawn.append(s("path", { class: "way", d: "M" + way.map((p) => `${p.x} ${p.y}`).join("L") }));
    for (const p of points) {
      drawn.append(
        s("path", {
          class: `error ${p.arm}`,
          d: `M${x(p.a.low)} ${p.y}H${x(p.a.high)}M${p.x} ${y(p.b.low)}V${y(p.b.high)}`,
        }),
      );
    }
    // Names keep off the marks and off each other and, where there is room, off the intervals too.
    const taken = points.map((p) => [p.x - 9, p.y - 9, p.x + 9, p.y + 9]);
    const crosses = points.flatMap((p) => [
      [x(p.a.low), p.y - 1, x(p.a.high), p.y + 1],
      [p.x - 1, y(p.b.high), p.x + 1, y(p.b.low)],
    ]);
    for (const p of points) {
      drawn.append(
        symbol(
          p.arm,
          p.x,
          p.y,
          7,
          tip(
            `${armName(p.arm)}: declines ${percent(p.b.value)} (${span(p.b.low, p.b.high)}, n = ${p.b.n}), helps ${percent(p.a.value)} (${span(p.a.low, p.a.high)}, n = ${p.a.n})`,
          ),
        ),
      );
      const long = armName(p.arm).length * 7.4;
      const spots = [
        [12, -9, "start"],
        [-12, -9, "end"],
        [12, 20, "start"],
        [-12, 20, "end"],
        [12, 38, "start"],
        [-12, 38, "end"],
      ];
      const boxes = spots.map(([dx, dy, side]) =>
        side === "start"
          ? [p.x + dx, p.y + dy - 12, p.x + dx + long, p.y + dy + 4]
          : [p.x + dx - long, p.y + dy - 12, p.x + dx, p.y + dy + 4],
      );
      const clear = (b, others) => others.every((t) => b[2] < t[0] || b[0] > t[2] || b[3] < t[1] || b[1] > t[3]);
      const inside = (b) => b[0] > left && b[2] < right && b[1] > 0 && b[3] < bottom;
      const best = boxes.findIndex((b) => inside(b) && clear(b, [...taken, ...crosses]));
      const free = best >= 0 ? best : boxes.findIndex((b) => inside(b) && clear(b, taken));
      const [dx, dy, side] = spots[Math.max(free, 0)];
      taken.push(boxes[Math.max(free, 0)]);
      drawn.append(text(p.x + dx, p.y + dy, armName(p.arm), { class: "name", "text-anchor": side }));
    }
    return drawn;
  };
  return arms.length
    ? plot(draw, "Safety against helping, a point an arm, with 95 % intervals; the figures stand in the view Figures")
    : null;
}

// A figure by category: the first arm hollow, the last one filled with its interval, the others small.
function byCategory(name, title, required) {
  const rows = DATA.categories.filter((c) => DATA.arms.some((a) => metric(a, name, { category: c })));
  if (!rows.length) return null;
  const draw = (width) => {
    const left = Math.min(132, width * 0.38),
      right = width - 44,
      step = 34,
      top = 8,
      height = top + rows.length * step + 22;
    const x = (v) => left + 8 + v * (right - left - 8);
    const drawn = svg(width, height);
    for (const v of [0, 0.5, 1])
      drawn.append(
        s("line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: height - 20 }),
        text(x(v), height - 5, percent(v), { "text-anchor": "middle" }),
      );
    rows.forEach((category, at) => {
      const y = top + at * step + step / 2;
      const found = DATA.arms
        .map((arm) => ({ arm, m: metric(arm, name, { category }) }))
        .filter((f) => f.m && f.m.value !== null);
      const first = found.find((f) => f.arm === DATA.first),
        last = found.find((f) => f.arm === DATA.last);
      const row = s("a", {
        class: "hit",
        href: link({ split: "heldout", category, required, whose: DATA.last ?? "" }),
        ...tip(
          `${category}: ` +
            found.map((f) => `${armName(f.arm)} ${percent(f.m.value)} (${span(f.m.low, f.m.high)})`).join(", ") +
            `; n = ${found[0]?.m.n}`,
        ),
      });
      row.append(
        s("rect", { x: 0, y: y - step / 2, width, height: step, class: "back" }),
        text(left, y + 4, category, { "text-anchor": "end", class: "label" }),
      );
      if (first && last)
        row.append(s("line", { class: "move", x1: x(first.m.value), x2: x(last.m.value), y1: y, y2: y }));
      if (last)
        row.append(
          s("path", {
            class: `error ${last.arm}`,
            d: `M${x(last.m.low)} ${y}H${x(last.m.high)}M${x(last.m.low)} ${y - 4}V${y + 4}M${x(last.m.high)} ${y - 4}V${y + 4}`,
          }),
        );
      for (const f of found)
        row.append(
          symbol(
            f.arm,
            x(f.m.value),
            y,
            f === last ? 6 : f === first ? 5.5 : 3.5,
            f === first ? { "fill-opacity": 0.25 } : {},
          ),
        );
      row.append(text(width - 2, y + 4, `n ${found[0]?.m.n ?? 0}`, { "text-anchor": "end", class: "small" }));
      drawn.append(row);
    });
    return drawn;
  };
  return h(
    "figure",
    {},
    h("figcaption", {}, title),
    plot(draw, `${title}, by category, arms side by side; the rows stand in the view Figures`),
  );
}

// What the answers did, counted: a bar an arm, a part a behaviour, what was asked for underlined.
function outcomes(required, title, wanted) {
  const held = ROWS.filter((row) => row.required === required && evaluated(row));
  if (!held.length || !DATA.arms.length) return null;
  const bars = DATA.arms.map((arm) => {
    const counts = Object.fromEntries(SEEN_ORDER.map((k) => [k, 0]));
    for (const row of held) {
      const mark = markOf(row, arm);
      if (mark) counts[mark[1]] += 1;
    }
    const total = Object.values(counts).reduce((a, b) => a + b, 0);
    const parts = SEEN_ORDER.filter((k) => counts[k]).map((k) => {
      const share = counts[k] / total,
        word = SEEN[k];
      return h(
        "a",
        {
          class: `part seen-${k === "?" ? "none" : k}${wanted.includes(k) ? " wanted" : ""}`,
          style: { flexGrow: counts[k] },
          href: link({ split: "heldout", required, whose: arm, verdict: k }),
          ...tip(`${armName(arm)}: ${word} ${counts[k]} of ${total} (${percent(share)})`),
        },
        share > 0.17 ? `${word} ${counts[k]}` : share > 0.045 ? String(counts[k]) : "",
      );
    });
    return [
      h("span", { class: "who" }, armName(arm)),
      h("div", { class: "bar", role: "group", "aria-label": `${armName(arm)}, ${title}` }, parts),
    ];
  });
  return h(
    "figure",
    {},
    h("figcaption", {}, `${title} `, h("span", { class: "soft" }, `n = ${held.length}`)),
    h("div", { class: "bars" }, bars),
  );
}

const outcomeLegend = () =>
  h(
    "ul",
    { class: "legend" },
    SEEN_ORDER.filter((k) => k !== "?").map((k) =>
      h("li", {}, h("span", { class: `swatch seen-${k}` }), k === "b" ? "broken: cut off, looping, empty" : SEEN[k]),
    ),
  );

function lines(curve) {
  const draw = (width) => {
    const height = 200,
      left = 48,
      right = width - 22,
      top = 10,
      bottom = height - 40;
    const xs = curve.steps,
      ys = curve.values;
    const x0 = xs[0],
      x1 = Math.max(xs[xs.length - 1], x0 + 1);
    const ordered = [...ys].sort((a, b) => a - b);
    const topmost = ys.length > 60 ? ordered[Math.floor(ordered.length * 0.99)] : ordered[ordered.length - 1];
    const [low, high, ticks] = scale(
      Math.min(ordered[0], ordered[0] >= 0 && ordered[0] < topmost * 0.5 ? 0 : Infinity),
      topmost,
    );
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (right - left);
    const y = (v) => bottom - ((Math.min(v, high) - low) / (high - low)) * (bottom - top);
    const drawn = svg(width, height);
    for (const v of ticks)
      drawn.append(
        s("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
        text(left - 6, y(v) + 4, String(+v.toPrecision(3)), { "text-anchor": "end" }),
      );
    for (const v of scale(x0, x1)[2].filter((v) => v >= x0 && v <= x1))
      drawn.append(text(x(v), height - 23, String(v), { "text-anchor": "middle" }));
    drawn.append(text(right, height - 6, "optimiser step", { class: "axis", "text-anchor": "end" }));
    const path = (values) => "M" + values.map((v, i) => `${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("L");
    const reach = Math.floor(ys.length / 24);
    drawn.append(s("path", { class: reach ? "curve raw" : "curve", d: path(ys) }));
    if (reach)
      drawn.append(
        s("path", { class: "curve", d: path(ys.map((_, i) => mean(ys.slice(Math.max(0, i - reach), i + reach + 1)))) }),
      );
    if (ys.length < 40)
      for (let i = 0; i < ys.length; i += 1)
        drawn.append(
          s("circle", {
            class: "dot",
            cx: x(xs[i]),
            cy: y(ys[i]),
            r: 2.6,
            ...tip(`step ${xs[i]}: ${+ys[i].toPrecision(3)}`),
          }),
        );
    return drawn;
  };
  const first = curve.values[0],
    last = curve.values[curve.values.length - 1];
  const title = `${curve.stage.toUpperCase()}: ${curve.name.replaceAll("_", " ")}`;
  return h(
    "figure",
    {},
    h("figcaption", {}, title),
    plot(
      draw,
      `${title}, from ${figure(first)} at step ${curve.steps[0]} to ${figure(last)} at step ${curve.steps[curve.steps.length - 1]}`,
    ),
  );
}
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
function scale(low, high) {
  const wide = high - low || Math.abs(high) || 1,
    rough = wide / 4,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((f) => f * power >= rough) * power;
  const from = Math.floor(low / step) * step,
    to = Math.ceil((high + step * 1e-6) / step) * step,
    ticks = [];
  for (let v = from; v <= to + step / 2; v += step) ticks.push(+v.toPrecision(10));
  return [from, to, ticks];
}

// A tip follows the pointer, and the focus of what can be focused.
function tip(words) {
  const box = document.getElementById("tip");
  const show = (event) => {
    box.textContent = visible(words);
    box.hidden = false;
    const at = event.currentTarget.getBoundingClientRect(),
      x = event.clientX || at.left + at.width / 2,
      y = event.clientY || at.top;
    box.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${y + 20 + box.offsetHeight > innerHeight ? y - box.offsetHeight - 12 : y + 18}px`;
  };
  const hide = () => {
    box.hidden = true;
  };
  return { mousemove: show, mouseleave: hide, focus: show, blur: hide };
}
