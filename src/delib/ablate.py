"""`delib ablate RECIPE`: none, SFT only, RL only and both, and the spec in context, over seeds, in one report.

In: a recipe. Out: `ablate.md` and `ablate.json` in the run folder. The recipe's own seed has the plain run folder,
which `delib run` may have begun; each further seed is a run in `seed-K/`, with the first one's records up to distill.
What is finished is not made again, whatever ended the command. The limits hold for all seeds together, but for RL under
`accelerate` (docs/cost.md).
"""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from delib import export, made_with, pipeline
from delib.errors import UserError
from delib.evals.scoring import JUDGED, values
from delib.order import CLAIMS, PAIRS, Arms, Difference, Row, differences, level, mean_and_range, verdict
from delib.pipeline import Pipeline
from delib.recipe import Recipe
from delib.records import Metric
from delib.run import RECORDS, disk_error, write_whole
from delib.stages.report import HEADLINE, shown
from delib.training import fitting
from delib.wiring import ABLATION, ARMS, RECORD_STAGES

ORDERED = (
    "not_unsafe",
    "hard_refusal_style",
    "safe_completion",
    "safe_completion_style",
    "not_overrefuse_lookalike",
    "not_overrefuse_plain",
    "policy_retrieval_refuse",
    "policy_retrieval_safe_complete",
    "policy_retrieval_comply",
    "clause_accuracy",
)
"""Figures of which the paper's order is told; higher is better in each."""
MEANINGS = dict(HEADLINE) | {"safe_completion": "safe completions, whatever their style"}
RULE = "by rule"
"""Stands in a judge's place for figures that rest on no verdict."""
FEW = 5
"""Steps at either end of RL whose mean reward is told."""


def run(recipe: Recipe, out: Path, seeds: int) -> str:
    """Train and measure what is not done yet, and write the report; what became of the paper's order, a line a figure.

    Raises UserError and StageError as the stages do.
    """
    every = recipe.evaluate.model_copy(update={"arms": ("base", "base_spec", "sft", "rl")})
    if problems := fitting.template(recipe.model_copy(update={"evaluate": every}), ()):
        raise UserError(problems)
    first = pipeline.start_run(recipe, out)
    runs = [first]
    pipeline.run_all(first, ABLATION)
    for seed in range(recipe.seed + 1, recipe.seed + seeds):
        further = recipe.model_copy(update={"seed": seed, "data_seed": recipe.record_seed})
        runs.append(pipeline.start_run(further, out / f"seed-{seed}", first.opener.ledger, first.spec_path))
        share(first, runs[-1])
        pipeline.run_all(runs[-1], ABLATION)
    told = figures(runs)
    write_whole(out / "ablate.json", json.dumps(plain(told), indent=1) + "\n")
    write_whole(out / "ablate.md", page(told))
    return "".join(f"{row['figure']:32} {row['judge']:12} {row['verdict']}\n" for row in told["order"])


def page(told: dict[str, Any]) -> str:
    """What `figures` tells, in markdown."""
    return export.card("ablate.md", **told, arms=ARMS, meanings=MEANINGS, pairs=PAIRS, few=FEW, shown=shown)


def share(first: Pipeline, other: Pipeline) -> None:
    """Copy the finished record stages of one run to another, each one's manifest last, as long as the other would make
    the same."""
    for stage in RECORD_STAGES:
        source, target, key = first.folder(stage), other.folder(stage), other.key(stage)
        made = source.manifest()
        if made is None or not source.done(key):
            return
        if target.done(key):
            continue
        target.begin(key)
        made_with.keep(other.recipe, other.spec_path, target.path)
        try:
            shutil.copyfile(source.records_path, target.records_path)
        except OSError as error:
            raise disk_error(target.records_path, error) from error
        target.finish(made, [RECORDS])


def figures(runs: list[Pipeline]) -> dict[str, Any]:
    """All that the report tells, of the runs of one recipe, a seed each."""
    first = runs[0]
    recipe, judges = first.recipe, first.opener.judge_names()[::-1]  # the one that took no part comes first
    levels: dict[tuple[str, str], list[Metric | None]] = {}
    order: list[dict[str, Any]] = []
    for judge in (*judges, RULE):
        arms = _rows(runs, judges[0] if judge == RULE else judge)
        ours = [name for name in MEANINGS if (name in JUDGED) == (judge != RULE)]
        found = {name: _levels(name, judge, arms, runs) for name in ours}
        levels |= {(name, judge): cells for name, cells in found.items() if any(c and c.n for c in cells)}
        made = differences([name for name in ORDERED if (name, judge) in levels], arms)
        order += _order(judge, made)
    agreements = [{k: v for k, v in row.items() if k != "rows"} for row in first.agreements()]
    return {
        "recipe": recipe,
        "model": export.public_name(recipe.model, first.run.path),
        "spec": first.spec.title,
        "seeds": [r.recipe.seed for r in runs],
        "judges": judges,
        "tables": [
            {"figure": name, "judge": judge, "cells": _by_arm(cells, len(runs))}
            for (name, judge), cells in sorted(levels.items(), key=lambda item: list(MEANINGS).index(item[0][0]))
        ],
        "order": order,
        "signal": [signal(r, stage) for stage in ("rl_only", "rl") for r in runs],
        "agreements": agreements,
    }


def _rows(runs: list[Pipeline], judge: str) -> Arms:
    """The figures of each prompt by one judge, by arm, one a seed."""
    answers = [r.answers() for r in runs]
    return {
        arm: [
            {s.prompt.id: Row(s.prompt.group or s.prompt.id, values(s, r.spec, judge)) for s in given[arm]}
            for r, given in zip(runs, answers, strict=True)
        ]
        for arm in ARMS
    }


def _levels(name: str, judge: str, arms: Arms, runs: list[Pipeline]) -> list[Metric | None]:
    """One figure of every arm and seed, an arm's seeds together."""
    return [
        level(name, arm, rows, {"judge": judge, "seed": str(r.recipe.seed)})
        for arm in ARMS
        for r, rows in zip(runs, arms[arm], strict=True)
    ]


def _by_arm(cells: list[Metric | None], seeds: int) -> list[dict[str, Any]]:
    """By arm: each seed's figure, and their mean and range."""
    parts = [cells[place : place + seeds] for place in range(0, len(cells), seeds)]
    return [
        {"arm": arm, "seeds": part, "over": mean_and_range([c.value if c else None for c in part])}
        for arm, part in zip(ARMS, parts, strict=True)
    ]


def _order(judge: str, made: list[Difference]) -> list[dict[str, Any]]:
    """The figures of one judge: their differences, and what became of the paper's order."""
    by = {(d.figure, (d.first, d.second)): d for d in made}
    return [
        {
            "figure": name,
            "judge": judge,
            "verdict": verdict([by.get((name, pair)) for pair in CLAIMS], ARMS),
            "differences": [by.get((name, pair)) for pair in PAIRS],
            "tests": len(made),
        }
        for name in dict.fromkeys(d.figure for d in made)
    ]


def signal(opened: Pipeline, stage: str) -> dict[str, Any]:
    """What RL had to learn from: where no group's rewards differ there is nothing."""
    manifest = opened.folder(stage).manifest()
    assert manifest is not None
    rewards = [row["reward"] for row in manifest.detail["curve"] if row["reward"] is not None]  # else all was ungraded
    return {
        "arm": stage,
        "seed": opened.recipe.seed,
        "first": fmean(rewards[:FEW]) if rewards else None,
        "last": fmean(rewards[-FEW:]) if rewards else None,
        "groups": opened.recipe.rl.steps * opened.recipe.rl.prompts,
        "groups_without_variance": manifest.detail["groups_without_variance"],
        "completions": manifest.counts["out"],
        "malformed": manifest.counts["malformed"],
    }


def plain(told: Any) -> Any:
    """The same as JSON takes it."""
    if isinstance(told, Difference):
        return told._asdict() | {"shown": told.shown}
    if isinstance(told, Recipe | Metric):
        return told.model_dump()
    if isinstance(told, dict):
        return {key: plain(value) for key, value in told.items()}
    return [plain(value) for value in told] if isinstance(told, list | tuple) else told
