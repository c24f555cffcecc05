"""The card of a model that leaves: what it is, what it was made from, what was measured, and what was never run.

In: the run and stage that made it, where they are known. Out: markdown with the hub's front matter. It names no place
on this machine.
"""

import json
from pathlib import Path
from typing import Any

from delib import export, made_with, pipeline
from delib.errors import UserError
from delib.evals.scoring import JUDGED
from delib.models import weights
from delib.opener import called
from delib.pipeline import CHECKPOINT
from delib.recipe import Recipe
from delib.records import Metric, Sample
from delib.run import sha256
from delib.stages.report import HEADLINE, shown

KNOWN = {weights.SMOLLM2: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""By a recipe's `model`, its name on the hub and its licence."""
BEFORE = {"sft": (*export.STAGES, "sft"), "rl": (*export.STAGES, "sft", "rl")}
"""What must be finished for a stage's model, that stage last."""
WRITERS = ("generate.teacher", "prompts.labeller", "prompts.lookalikes")
"""The keys of a recipe whose models had a part in the data that was trained on."""


def base_name(model: str, beside: Path) -> str:
    """`beside`: the run or folder that names it."""
    return KNOWN[model][0] if model in KNOWN else export.public_name(model, beside)


def render(
    run: pipeline.Pipeline | None, stage: str | None, name: str, form: str, quantisation: str | None, base: str
) -> str:
    """`quantisation`: of a GGUF file. `base`: the public name of the model that was trained, empty if unknown."""
    told: dict[str, Any] = {"name": name, "form": form, "quantisation": quantisation, "base": base, "run": None}
    told["hub_base"] = base if base.count("/") == 1 else None
    told["licence"] = None
    if run is not None and stage is not None:
        told |= {
            "run": _of_run(run, stage, form, quantisation),
            "licence": licence(made_with.recipe_of(run.run.path, stage)),
        }
    return export.card("model_card.md", **told)


def licence(recipe: Recipe) -> str | None:
    """The licence of what is made of a base and data whose licences are known; None where a person must say."""
    own = (recipe.spec, recipe.prompts.train, recipe.prompts.rl or "starter:", recipe.generate.recordings)
    shipped = recipe.generate.teacher == "recorded" and all(name.startswith("starter:") for name in own)
    shipped = shipped and recipe.sft.mix is None
    return KNOWN[recipe.model][1] if shipped and recipe.model in KNOWN else None


def _of_run(run: pipeline.Pipeline, stage: str, form: str, quantisation: str | None) -> dict[str, Any]:
    path = run.run.path
    made = {name: made_with.recipe_of(path, name) for name in (*BEFORE[stage], "evaluate")}
    manifests = {name: run.folder(name).manifest() for name in BEFORE[stage]}
    asked = made["evaluate"]
    measured = f"transformers in {asked.dtype}"
    if asked.engine == "llamacpp" and weights.can_serve(run.folder(stage).path / CHECKPOINT):
        measured = f"llama.cpp with weights in {asked.evaluate.quantisation}"
    same = quantisation == asked.evaluate.quantisation and measured.startswith("llama.cpp")
    apart = asked.dtype != "float32" and (run.folder(stage).path / CHECKPOINT / weights.ADAPTER).exists()
    return {
        "recipe": made[stage],
        "filter": made["filter"].filter,
        "reasons": made["sft"].sft.reasoning,
        "max_tokens": asked.evaluate.max_tokens,
        "stage": stage,
        "spec": run.spec,
        "spec_hash": sha256(run.spec_path),
        "manifests": manifests,
        "writers": export.writers(run.run.finished("filter", Sample), path),
        "judge": export.public_name(made["filter"].judge, path),
        "agreed": export.agreed(run),
        "settings": {
            name: settings(getattr(made[name], name).model_dump()) for name in BEFORE[stage][len(export.STAGES) :]
        },
        "table": figures(run, stage),
        "measured": measured,
        "same_form": same or (form == "safetensors" and measured.startswith("transformers") and not apart),
    }


def settings(section: dict[str, Any]) -> str:
    """A recipe's section in one line, local files by their names."""
    parts = []
    for key, value in section.items():
        if isinstance(value, dict):
            parts.append(f"{key} ({settings(value)})")
        elif value is not None:
            parts.append(f"{key} {export.public_name(value) if isinstance(value, str) else value}")
    return ", ".join(parts)


def figures(run: pipeline.Pipeline, stage: str) -> list[dict[str, Any]]:
    """Base's and the model's held-out figures side by side, those of a judge that took no part before those of the one
    that filtered and rewarded; none when this checkpoint was not evaluated."""
    folder = run.folder("evaluate")
    manifest = folder.manifest()
    try:
        current = manifest is not None and manifest.inputs == run.inputs("evaluate")
    except UserError:  # a later stage, which evaluate needs, was never run
        current = False
    if not current:
        return []
    rows = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    recipe = made_with.recipe_of(run.run.path, "evaluate")
    second, wrote = recipe.evaluate.second_judge, called(recipe)
    apart = second is not None and second not in (wrote.get(key) for key in WRITERS)
    parts: dict[str | None, dict[str, str] | None] = {None: None} | ({second: {"judge": second}} if second else {})
    whole = {
        (m.arm, m.name, judge): m for m in map(Metric.model_validate, rows) for judge in parts if m.by == parts[judge]
    }
    return [
        {
            "name": name,
            "judge": export.public_name(judge or recipe.judge, run.run.path) if name in JUDGED else None,
            "apart": judge is not None and apart,
            "meaning": meaning,
            "cells": [shown(whole.get((arm, name, judge))) for arm in ("base", stage)],
        }
        for name, meaning in HEADLINE
        for judge in reversed(parts)
        if (stage, name, judge) in whole
    ]
