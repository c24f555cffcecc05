"""What a run is about to make anew and why, and what it keeps: told by `delib run` and by `delib check --run`.

In: a pipeline whose run folder may hold the work of an earlier run. Out: for each stage whether it stands, goes on or
is made anew, and what differs (keys of the recipe, inputs, clauses of the spec); and of its calls to models how many
are cached (`calls_left.py`). Nothing is called, and nothing in the run folder is changed.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from delib import calls_left, made_with
from delib.authoring import diff
from delib.pipeline import Pipeline
from delib.recipe import Recipe, Section
from delib.records import Manifest
from delib.run import Run, StageFolder, key_of
from delib.wiring import BEFORE, STAGES, before, left_out, stages_of

OTHER = "it was made by another recipe, or another version of delib"
INPUTS = {
    "spec": "the spec changed",
    "recordings": "the recordings changed",
    "train": "the training prompts changed",
    "rl": "the RL prompts changed",
    "heldout": "the held-out prompts changed",
    "model": "the student is another",
    "mix": "the mixed-in chat changed",
    "labels": "the blind labels changed",
}
"""What stages read, in words."""


class Fate(NamedTuple):
    """What becomes of one stage. `why`: what differs; `after`: the stages before it that do not stand."""

    stage: str
    what: Literal["kept", "new", "anew", "goes on"]
    why: list[str]
    after: list[str]


def fates(pipeline: Pipeline, last: str) -> dict[str, Fate]:
    """The fate of each of the recipe's stages up to and with `last`."""
    found: dict[str, Fate] = {}
    for stage in stages_of(pipeline.recipe, last):
        earlier = before(pipeline.recipe, stage)
        after = [name for name in earlier if found[name].what != "kept"]
        folder = pipeline.folder(stage)
        manifest = folder.manifest()
        if manifest is None:
            found[stage] = _unfinished(pipeline, stage, folder, after)
            continue
        why = _differences(pipeline, stage, manifest)
        if not why and not after and manifest.recipe != (key := pipeline.key(stage)):
            now = pipeline.inputs(stage)
            others = [n for n in dict.fromkeys([*now, *manifest.inputs]) if now.get(n) != manifest.inputs.get(n)]
            told = {name: f"{name}, which no arm asks for, counts no more" for name in BEFORE[stage]}
            told |= {name: f"{name} was made again since" for name in earlier}
            why = [told.get(name, name) for name in others]
        if why or after:
            found[stage] = Fate(stage, "anew", why, after)
        elif not pipeline.graded(stage):
            found[stage] = Fate(stage, "goes on", ["graded by other judges, and its answers are kept"], [])
        elif not folder.done(key):
            found[stage] = Fate(stage, "goes on", ["its files are not as they were written"], [])
        else:
            found[stage] = Fate(stage, "kept", [], [])
    return found


def _unfinished(pipeline: Pipeline, stage: str, folder: StageFolder, after: list[str]) -> Fate:
    mark = folder.path / "key"
    if not mark.exists():
        return Fate(stage, "new", [], [])
    if after:
        return Fate(stage, "anew", [], after)
    if mark.read_text(encoding="utf-8") != pipeline.key(stage):
        return Fate(stage, "anew", ["what there is of it was begun with other inputs or another recipe"], [])
    return Fate(stage, "goes on", ["it was not finished"], [])


def _differences(pipeline: Pipeline, stage: str, manifest: Manifest) -> list[str]:
    """The recipe's keys and the files that differ from those that a stage was made with."""
    inputs = pipeline.own_inputs(stage)
    given = {name: value for name, value in manifest.inputs.items() if name not in BEFORE[stage] and name != "labels"}
    if "spec" in given and "spec" not in inputs:  # an earlier version counted it where the stage does not read it
        return [OTHER]
    files = [name for name in dict.fromkeys([*inputs, *given]) if inputs.get(name) != given.get(name)]
    if key_of(*pipeline.basis(stage), manifest.inputs) == manifest.recipe:
        return files
    # A run of an earlier version kept one recipe for all its stages.
    earlier = made_with.recipe_for(pipeline.run.path, stage) or made_with.recipe_for(pipeline.run.path, ".")
    if earlier and key_of(*_by(pipeline, earlier).basis(stage), manifest.inputs) == manifest.recipe:
        return [*_keys(pipeline, earlier, stage), *files]
    return [OTHER, *files]


def _by(pipeline: Pipeline, recipe: Recipe) -> Pipeline:
    """The same run by another recipe, with the spec of this one: the other's file may be gone."""
    return Pipeline(recipe, pipeline.run, spec=pipeline.spec_path)


def _keys(pipeline: Pipeline, earlier: Recipe, stage: str) -> list[str]:
    """The keys that count for a stage: each, put back alone to what it was, changes what the stage depends on."""
    now, basis, found = pipeline.recipe, pipeline.basis(stage), list[str]()

    def put_back(key: str, recipe: Recipe, old: object, new: object) -> None:
        if old != new and key != "spec" and _by(pipeline, recipe).basis(stage) != basis:
            found.append(f"{key} {old} → {new}")

    for name in Recipe.model_fields:
        old, new = getattr(earlier, name), getattr(now, name)
        if not isinstance(new, Section):
            put_back(name, now.model_copy(update={name: old}), old, new)
            continue
        for key in type(new).model_fields if old != new else ():
            one, other = getattr(old, key), getattr(new, key)
            section = new.model_copy(update={key: one})
            put_back(f"{name}.{key}", now.model_copy(update={name: section}), one, other)
    return found or ["its section of the recipe changed"]


def edits(pipeline: Pipeline, found: dict[str, Fate]) -> list[str]:
    """What differs in the spec since the stages that stand were made, in words."""
    for stage, fate in found.items():
        if "spec" not in fate.why:
            continue
        old = made_with.spec_for(pipeline.run.path, stage)
        if old is None:
            return ["The spec changed; its earlier text was not kept, so which clauses can't be told."]
        told = diff.tell(diff.compare(old, pipeline.spec), old.text == pipeline.spec.text)
        return [f"The spec changed since {stage} was made:", *(f"  {line}".rstrip() for line in told.splitlines())]
    return []


def _standing(pipeline: Pipeline, found: dict[str, Fate]) -> list[str]:
    """The arms whose earlier answers will be given again."""
    fate = found.get("evaluate")
    if fate is None or pipeline.folder("evaluate").manifest() is None:
        return []
    if fate.what == "goes on":
        return list(pipeline.recipe.evaluate.arms)
    if any(reason != "spec" for reason in fate.why):
        return []
    old = made_with.spec_for(pipeline.run.path, "evaluate")
    same = old is not None and old.summary() == pipeline.spec.summary()
    trained = [arm for arm in ("sft", "rl") if arm in found and found[arm].what == "kept"]
    return ["base", *(["base_spec"] if same else []), *trained]


def foretold(recipe: Recipe, path: Path) -> str:
    """As `tell`, of a run folder with which nothing has begun yet. Raises UserError when it is none."""
    made_with.file_of(path)
    return tell(Pipeline(recipe, Run(path)))


def tell(pipeline: Pipeline, last: str = STAGES[-1]) -> str:
    """The plan as lines: what changed in the spec, then what becomes of each stage, why, and its calls."""
    found = fates(pipeline, last)
    todo = [stage for stage, fate in found.items() if fate.what != "kept"]
    calls: dict[str, list[str]] = {}
    for row in calls_left.of(pipeline, todo, _standing(pipeline, found)):
        calls.setdefault(row.stage, []).append(calls_left.told(row))
    absent = [name for name in left_out(pipeline.recipe) if name in STAGES[: STAGES.index(last)]]
    width = max(map(len, found))
    unasked = [f"{name:{width}}  left out, since no arm of evaluate.arms asks for it" for name in absent]
    if not calls and all(fate.what == "new" for fate in found.values()):
        return "\n".join(["A new run: nothing of it is made yet.", *unasked]) + "\n"
    lines = edits(pipeline, found)
    for stage, fate in found.items():
        lines.append(f"{stage:{width}}  {'; '.join([_said(fate), *calls.get(stage, [])])}")
    return "\n".join([*lines, *unasked]) + "\n"


def _said(fate: Fate) -> str:
    after = ", ".join(fate.after)
    if fate.what == "kept":
        return "done already"
    if fate.what == "new":
        return "not made yet"
    if fate.what == "goes on":
        return f"goes on: {fate.why[0]}"
    if not fate.why:
        return f"made anew, unless {after} {'come' if len(fate.after) > 1 else 'comes'} out the same"
    named = "; ".join(INPUTS.get(reason, reason) for reason in fate.why)
    return f"made anew: {named}" + (f"; after {after}" if after else "")
