"""Stage 8, report: what was done, what it cost, what changed, and how far to believe it.

In: the manifests and records of the run. Out: `report.html` (self-contained; model output escaped by Jinja),
`report.md`, `metrics.json` (every figure) and `summary.txt` (what the terminal shows).
"""

import io
import json
from collections.abc import Mapping
from typing import Any

from delib import coverage
from delib.evals import labels
from delib.evals.scoring import JUDGED, by_judge, verdict_of
from delib.judges import agreement
from delib.judges.agreement import Seen, covers, figures
from delib.judges.data import EVERYDAY
from delib.recipe import Arm, Recipe
from delib.records import Manifest, Metric, Prompt, Sample
from delib.rendering import environment
from delib.run import Run, StageFolder, write_whole
from delib.spec import Spec

HEADLINE = (
    ("not_unsafe", "refuse prompts answered safely"),
    ("not_overrefuse", "comply prompts taken on and kept to; how good the answer is, is not judged"),
    ("not_overrefuse_lookalike", "of these, look-alikes and other policy topics"),
    ("not_overrefuse_plain", "of these, everyday requests"),
    ("safe_completion_style", "safe completions in the clause's style"),
    ("hard_refusal_style", "refusals in the hard-refusal style"),
    ("plain_helpfulness_expected", "everyday requests with a known answer, right"),
    ("plain_helpfulness_open", "other everyday requests, on topic and not refused"),
    ("checks_passed", "requests with checks, all of them held, by rule"),
    ("policy_retrieval_refuse", "reasoning concludes on the right category, refuse"),
    ("policy_retrieval_safe_complete", "the same, safe completion"),
    ("policy_retrieval_comply", "the same, comply (policy topics)"),
    ("clause_accuracy", "reasoning cites the deciding clause"),
    ("reasoning_matches_answer", "the answer does what the reasoning concludes"),
    ("judge_score", "the judge's score of an answer, 0 where it is broken"),
    ("well_formed", "closed reasoning and an answer, ended by itself"),
    ("truncated", "cut at max_tokens (lower is better)"),
    ("tokens", "tokens a completion"),
)
PAPER = {
    "policy_retrieval_refuse": 0.75,
    "policy_retrieval_safe_complete": 0.91,
    "policy_retrieval_comply": 0.54,
}
"""The paper's figures after full training, on other prompts and models (arXiv 2412.16339v2, policy retrieval)."""


PANEL = ("not_unsafe", "not_overrefuse", "not_overrefuse_lookalike", "not_overrefuse_plain", "safe_completion")
"""Figures that the report shows by each judge, and by blind labels: those that rest on the observed behaviour."""


def run(
    recipe: Recipe,
    run: Run,
    spec: Spec,
    folder: StageFolder,
    stages: list[str],
    judges: list[str],
    agreements: list[dict[str, Any]],
    blind: labels.Blind,
    spent: Mapping[str, Mapping[str, int]],
) -> Manifest:
    """Write the report. `stages`: the recipe's, with rl where it is not left out. `judges`: those of the
    evaluation, the one that also filtered and rewarded first, and in `agreements` how far each agrees with labelled
    answers that it was not fitted on. `blind`: the blind labels of this run's own answers. `spent`: what the run's
    calls to models took, by model (`models/calls.py`)."""
    manifests = {m.stage: m for m in run.manifests(s for s in stages if s != "report")}
    found = [
        Metric.model_validate(row)
        for row in json.loads((run.stage("evaluate").path / "metrics.json").read_text(encoding="utf-8"))
    ]
    arms = recipe.evaluate.arms
    for arm, rows in blind.samples.items():
        for judge in (*judges, labels.JUDGE):
            found += by_judge(rows, spec, arm, judge, on=labels.JUDGE)
    samples = {arm: StageFolder(run.stage("evaluate").path / arm).records(Sample) for arm in arms}
    whole = {(m.arm, m.name): m for m in found if m.by is None}
    table = [
        {
            "name": name,
            "meaning": meaning,
            "judged": name in JUDGED,
            "paper": PAPER.get(name),
            "cells": [shown(whole.get((arm, name))) for arm in arms],
        }
        for name, meaning in HEADLINE
        if any((arm, name) in whole for arm in arms)
    ]
    context: dict[str, Any] = {
        "recipe": recipe,
        "spec": spec,
        "arms": arms,
        "table": table,
        "agreements": agreements,
        "covered": covers(spec),
        "judges": judges,
        "panels": panels(found, list(arms), judges),
        "blind_agreements": blind_agreements([s for rows in blind.samples.values() for s in rows], judges),
        "left_out": blind.left_out,
        "manifests": manifests,
        "total_seconds": sum(m.seconds for m in manifests.values()),
        "funnel": {"agreement": None} | manifests["filter"].detail,
        "spent": spent,
        "by": breakdown(found, arms),
        "coverage": coverage.of(spec, run.stage("prompts").stream(Prompt), (), {}),
        "scatter": scatter(whole, list(arms)),
        "curves": curves(manifests),
        "groups": side_by_side(samples, recipe.report.samples),
        "rewarded": "rl" in stages,
        "rl_note": "rl" in stages and recipe.rl.steps < 50,
    }
    templates = environment()
    templates.filters |= {"cell": markdown_cell, "kappa": agreement.shown, "by_category": agreement.by_category}
    for name in ("report.html", "report.md", "summary.txt"):
        write_whole(folder.path / name, templates.get_template(name).render(context))
    write_whole(folder.path / "metrics.json", json.dumps([m.model_dump() for m in found], indent=1) + "\n")
    kept = {"agreements": [{key: value for key, value in row.items() if key != "rows"} for row in agreements]}
    counts = {"in": len(found), "out": len(table)}
    return Manifest(stage="report", recipe="", inputs={}, outputs={}, counts=counts, detail=kept)


def shown(metric: Metric | None) -> dict[str, Any] | None:
    """A figure as text with its interval and n; None where there is none, so that nothing is printed as a number."""
    if metric is None or metric.value is None or metric.low is None or metric.high is None:
        return None
    form = "{:.0f}" if metric.name == "tokens" else "{:.2f}"
    return {
        "value": form.format(metric.value),
        "interval": f"{form.format(metric.low)}–{form.format(metric.high)}",
        "n": metric.n,
        "ungraded": metric.n_ungraded,
    }


def panels(found: list[Metric], arms: list[str], judges: list[str]) -> list[dict[str, Any]]:
    """The headline figures by each judge: over all prompts where there is a second judge, and over the prompts that
    were drawn for blind labels, with these."""
    whole = [(judge, {"judge": judge} if place else None) for place, judge in enumerate(judges)]
    drawn = [(judge, {"judge": judge, "on": labels.JUDGE}) for judge in (*judges, labels.JUDGE)]
    made = []
    for title, rows in (("all prompts", whole), ("the prompts with blind labels", drawn)):
        if len(rows) < 2 or not any(m.by == rows[-1][1] for m in found):
            continue
        tables = []
        for name in PANEL:
            by = {(str(m.by), m.arm): m for m in found if m.name == name}
            lines = [{"label": who, "cells": [shown(by.get((str(key), arm))) for arm in arms]} for who, key in rows]
            if any(cell for line in lines for cell in line["cells"]):
                tables.append({"name": name, "rows": lines})
        made.append({"title": title, "tables": tables})
    return made


def blind_agreements(samples: list[Sample], judges: list[str]) -> list[dict[str, Any]]:
    """Each judge against the blind labels of this run's own answers, and how many of them it left ungraded."""
    made = []
    for judge in judges:
        rows = [
            Seen(label.behaviour, verdict.behaviour if verdict else None, s.prompt.group or s.prompt.id, _category(s))
            for s in samples
            for label, verdict in [(verdict_of(s, labels.JUDGE), verdict_of(s, judge))]
            if label is not None and label.behaviour
        ]
        if any(row.predicted is not None for row in rows):
            made.append(figures(judge, rows))
    return made


def _category(sample: Sample) -> str:
    return sample.prompt.category or EVERYDAY


def breakdown(found: list[Metric], arms: list[Any]) -> list[dict[str, Any]]:
    """Main figures by category, an entry a figure."""
    tables = []
    for name in ("not_unsafe", "not_overrefuse", "safe_completion_style"):
        labels = sorted({m.by["category"] for m in found if m.name == name and m.by and "category" in m.by})
        rows = []
        for label in labels:
            by = {(m.arm, m.name): m for m in found if m.by == {"category": label}}
            rows.append({"label": label, "cells": [shown(by.get((arm, name))) for arm in arms]})
        if rows:
            tables.append({"name": name, "rows": rows})
    return tables


def side_by_side(samples: Mapping[Arm, list[Sample]], count: int) -> list[dict[str, Any]]:
    """The first `count` prompts of each category and behaviour, with every arm's reasoning and answer."""
    arms = list(samples)
    seen: dict[tuple[str, str], int] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for place, first in enumerate(samples[arms[0]]):
        category = _category(first)
        kind = (category, str(first.prompt.behaviour))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= count:
            row = {"prompt": first.prompt, "arms": [(arm, samples[arm][place]) for arm in arms]}
            groups.setdefault(category, []).append(row)
    return [{"category": name, "rows": rows} for name, rows in sorted(groups.items())]


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "delib"
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]


def scatter(whole: dict[tuple[str, str], Metric], arms: list[str]) -> str:
    """Safety against over-refusal, a point an arm with both intervals, as SVG."""
    figure, axes = _figure()
    for arm, marker in zip(arms, "osD^", strict=False):
        x, y = whole.get((arm, "not_overrefuse")), whole.get((arm, "not_unsafe"))
        if x is None or y is None or x.value is None or y.value is None:
            continue
        assert x.low is not None and x.high is not None and y.low is not None and y.high is not None
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
            yerr=[[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]],
            marker=marker,
            markersize=8,
            capsize=3,
            label=arm,
        )
    axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.05), xlabel="not_overrefuse (helps where it should)")
    axes.set_ylabel("not_unsafe (declines where it should)")
    axes.legend(frameon=False, loc="lower left")
    return _svg(figure)


def curves(manifests: dict[str, Manifest]) -> list[dict[str, str]]:
    """Training curves as SVG."""
    made = []
    for stage, name in (("sft", "loss"), ("rl", "reward")):
        rows = manifests[stage].detail.get("curve", []) if stage in manifests else []
        if rows:
            figure, axes = _figure()
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], marker="." if len(rows) < 30 else None)
            axes.set(xlabel="optimiser step", ylabel=name)
            made.append({"title": f"{stage}: {name}", "svg": _svg(figure)})
    return made


def markdown_cell(text: object) -> str:
    """Model output inside a markdown table or list: no line break, no markup, no HTML."""
    flat = " ".join(str(text).split())
    for char, safe in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("[", "\\["),
        ("!", "\\!"),
    ):
        flat = flat.replace(char, safe)
    return flat
