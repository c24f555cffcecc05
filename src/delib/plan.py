"""What a recipe is about to ask of models, before anything is spent: calls, tokens, time, money; and of GPUs' memory.

Every prompt stays, every completion is as long as it may be, nothing is cached. What comes on top is what goes wrong:
tries of failed calls, and verdicts or labels that are asked for again because they could not be read. Tokens are
estimated at three characters each, which is too few for other scripts than Latin. Training and the run's own models
cost nothing and are not in it.
"""

from typing import NamedTuple

from delib import recipe as recipes
from delib import spec as specs
from delib.models import opened, recorded
from delib.models.calls import estimated_tokens
from delib.opener import FITTED
from delib.pipeline import ASKED
from delib.preflight import prompt_files
from delib.recipe import Recipe
from delib.records import Prompt
from delib.spec import Spec
from delib.stages import evaluate, prompts
from delib.training import footprint
from delib.wiring import left_out

SECONDS_A_CALL = 10
"""An assumption, said in the table: what a call of some hundred tokens takes at today's hosted models."""
JUDGE_TEXT, TEACHER_TEXT = 900, 400
"""Tokens, as estimated, of the judge's and the teacher's own instructions around what they are shown; label.md has
fewer than the judge's."""

OVER_RAY = ("prompts", "generate", "filter")
"""Stages whose calls are made by each of a Ray cluster's workers."""


class Calls(NamedTuple):
    """What one stage asks of one model, at most. Tokens are for all its calls."""

    stage: str
    model: str
    calls: int
    sent: int
    written: int


def made(recipe: Recipe) -> list[Calls]:
    """The calls of each stage, in order; RL's too where `delib run` leaves it out.

    Raises UserError where prompts, recordings or spec can't be read.
    """
    spec = specs.load(recipes.path_of(recipe.spec))
    sets = {split: prompts.load(path, spec, split, recipe.prompts.text) for split, path in prompt_files(recipe).items()}
    found = _labels(recipe, [p for part in sets.values() for p in part], spec)
    if recipe.prompts.lookalikes is not None:
        # Each may become one prompt more, of about the same length.
        for split in ("train", "rl"):
            if split in sets:
                sets[split] = sets[split] + [p for p in sets[split] if _may_be_refused(p)]
    train, heldout = sets["train"], evaluate.balanced(sets["heldout"], recipe.evaluate.limit)
    per_prompt = {p.id: recipe.generate.samples for p in train}
    if recipe.generate.teacher == "recorded":
        recordings = recorded.load(recipes.path_of(recipe.generate.recordings))
        per_prompt = {p.id: len(recordings.get(p.id, [])) for p in train}
    else:
        section = recipe.generate
        sent = sum(_excerpt(p, recipe, spec) + TEACHER_TEXT + _length(p) for p in train)
        calls = len(train) * section.samples
        found.append(Calls("generate", section.teacher, calls, sent * section.samples, calls * section.max_tokens))
    if recipe.judge not in FITTED:
        samples = [p for p in train for _ in range(per_prompt[p.id])]
        found.append(
            _judged("filter", recipe, recipe.judge, samples, recipe.filter.runs, recipe.generate.max_tokens, spec)
        )
        steps = recipe.rl.steps * recipe.rl.prompts
        pool = sets.get("rl", train)
        longest = max(pool, key=lambda p: _excerpt(p, recipe, spec) + _length(p))
        found.append(
            _judged("rl", recipe, recipe.judge, [longest] * steps, recipe.rl.group, recipe.rl.max_tokens, spec)
        )
    for name in [recipe.judge, recipe.evaluate.second_judge]:
        if name is not None and name not in FITTED:
            arms = len(recipe.evaluate.arms)
            found.append(_judged("evaluate", recipe, name, heldout, arms, recipe.evaluate.max_tokens, spec))
            general = estimated_tokens(spec.excerpt(None)) + JUDGE_TEXT + recipe.evaluate.max_tokens
            found.append(Calls("report", name, ASKED, ASKED * general, ASKED * recipe.filter.max_tokens))
    return found


def _judged(stage: str, recipe: Recipe, name: str, about: list[Prompt], times: int, tokens: int, spec: Spec) -> Calls:
    """`times` verdicts on a completion of at most `tokens` tokens for each prompt."""
    sent = sum(_excerpt(p, recipe, spec) + JUDGE_TEXT + _length(p) + tokens for p in about)
    calls = len(about) * times
    return Calls(stage, name, calls, sent * times, calls * recipe.filter.max_tokens)


def _length(prompt: Prompt) -> int:
    return sum(estimated_tokens(m.content) for m in prompt.messages)


def _excerpt(prompt: Prompt, recipe: Recipe, spec: Spec) -> int:
    """Tokens of the prompt's excerpt, of the longest where a labeller may still find any category."""
    if prompt.category is None and recipe.prompts.labeller is not None:
        return max(estimated_tokens(spec.excerpt(c.name)) for c in spec.categories)
    return estimated_tokens(spec.excerpt(prompt.category))


def _may_be_refused(prompt: Prompt) -> bool:
    return prompt.split != "heldout" and prompt.behaviour in (None, "refuse")


def _labels(recipe: Recipe, rows: list[Prompt], spec: Spec) -> list[Calls]:
    """Two calls a prompt without labels (category, then clause); a look-alike is one to write and two to label."""
    section, most = recipe.prompts, recipe.filter.max_tokens
    if section.labeller is None:
        return []
    longest = max(estimated_tokens(spec.excerpt(c.name)) for c in spec.categories) + JUDGE_TEXT
    refused = [p for p in rows if _may_be_refused(p)] if section.lookalikes else []
    labelled = [p for p in rows if prompts.unlabelled(p)] + refused
    calls = 2 * len(labelled)
    found = [Calls("prompts", section.labeller, calls, calls * longest + 2 * sum(map(_length, labelled)), calls * most)]
    if section.lookalikes is not None:
        count = len(refused)
        sent = count * longest + sum(map(_length, refused))
        found.append(Calls("prompts", section.lookalikes, count, sent, count * most))
    return [c for c in found if c.calls]


def processes_of(recipe: Recipe, stage: str) -> int:
    """How many processes make a stage's calls, each on a core of its own."""
    return recipe.ray.workers if recipe.ray is not None and stage in OVER_RAY else 1


def _minutes(row: Calls, recipe: Recipe) -> str:
    """`here` for a GGUF file or a model folder, which take as long as they take."""
    if not opened.is_hosted(row.model):
        return "here"
    at_once = recipe.limits.concurrency * processes_of(recipe, row.stage)
    return f"{row.calls * SECONDS_A_CALL / at_once / 60:.1f}"


def table(recipe: Recipe) -> str:
    """The plan as lines; empty when no model is called and one process trains on a CPU."""
    absent = left_out(recipe)
    found = [row for row in made(recipe) if row.stage not in absent]
    memory = "".join(line + "\n" for line in footprint.lines(recipe, absent))
    if not found:
        return memory
    lines = [f"{'stage':10} {'calls':>9} {'tokens sent':>13} {'written':>11} {'minutes':>8} {'cost':>9}  model"]
    total = 0.0
    for row in found:
        price = recipe.limits.prices.get(row.model)
        cost = (row.sent * price.prompt + row.written * price.completion) / 1e6 if price else None
        total += cost or 0.0
        minutes = _minutes(row, recipe)
        told = "no price" if cost is None else f"{cost:.2f}"
        lines.append(
            f"{row.stage:10} {row.calls:>9,} {row.sent:>13,} {row.written:>11,} {minutes:>8} {told:>9}  {row.model}"
        )
    at_most = f"{sum(r.calls for r in found):,} calls, {sum(r.sent + r.written for r in found):,} tokens"
    each = {row.stage: processes_of(recipe, row.stage) for row in found}
    more = "".join(f", {count} times that in {stage}" for stage, count in each.items() if count > 1)
    money = f", {total:.2f} where a price is given" if recipe.limits.prices else ""
    lines.append(
        f"At most {at_most}{money}; minutes at {SECONDS_A_CALL} s a call and {recipe.limits.concurrency} at once{more}."
        " Finished calls are cached and cost nothing again; what fails or can't be read is asked for again."
    )
    return "\n".join(lines) + "\n" + memory
