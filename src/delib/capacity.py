"""What a recipe takes on a cluster: calls, tokens, hours and money of each stage, and what limits it.

In: a recipe, a number of prompts, and a file of rates that a person fills in (`Cluster`). Out: a table. Calls and
tokens are those of `plan.made`, scaled to the number of prompts: every prompt stays and nothing is cached. To them come
what the run's own model writes in RL and evaluate, and the tokens that SFT and RL train on. docs/capacity.md has the
formulae, and how far they were from measured runs. Not in it: judges that are fitted here, starting and closing.
"""

from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from delib import plan
from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.plan import Calls, processes_of
from delib.preflight import prompt_files
from delib.recipe import Price, Recipe, Section
from delib.records import Prompt
from delib.spec import read_text
from delib.stages import evaluate, prompts
from delib.training.footprint import PROMPT_TOKENS
from delib.wiring import STAGES, stages_of

CPU_SECONDS_A_CALL = 1 / 821
"""Fitted, the only constant that is: of one core, for a call with its retries, cache and records. It is the data
engine's rate with 256 calls at once (docs/results.md), where the core is the limit; its other rows are predicted."""
SCALED = ("prompts", "generate", "filter")
"""The stages whose calls grow with the training prompts; RL has its steps, evaluate its held-out prompts."""
BESIDE = ("generate", "filter")
"""The stages that run side by side: verdicts are asked for while completions are still written."""


class Served(Section):
    """A model that is called. Rates are those of one replica while it has as many calls at once as it takes."""

    replicas: int = Field(default=1, ge=1)
    """How many servers of it there are."""
    concurrency: int = Field(ge=1)
    """Calls at once that one replica takes."""
    latency_seconds: float | None = Field(default=None, gt=0)
    """How long a call takes from its sending to its last token; null where the tokens are what limits."""
    read_tokens_per_second: float | None = Field(default=None, gt=0)
    """Tokens of prompts that a replica reads in a second in which it does nothing else."""
    written_tokens_per_second: float | None = Field(default=None, gt=0)
    """Tokens that a replica writes in a second in which it does nothing else, over all its calls."""
    failure_rate: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tries that fail and are made again; each is counted as dear as one that succeeds."""
    price: Price | None = None
    """For a million tokens."""
    cost_per_hour: float | None = Field(default=None, ge=0)
    """Of one replica, while it is used."""

    @model_validator(mode="after")
    def _whole(self) -> "Served":
        rates = (self.read_tokens_per_second is None, self.written_tokens_per_second is None)
        if rates[0] != rates[1]:
            raise ValueError("give both read_tokens_per_second and written_tokens_per_second, or neither")
        if all(rates) and self.latency_seconds is None:
            raise ValueError("give latency_seconds, or the tokens read and written a second")
        if self.price is not None and self.cost_per_hour is not None:
            raise ValueError("give price or cost_per_hour, not both")
        return self


class Training(Section):
    """The devices that train."""

    devices: int = Field(default=1, ge=1)
    """GPUs, or machines that train on their cores."""
    tokens_per_second: float = Field(gt=0)
    """Tokens that one of them trains on in a second, forward, backward and the optimiser's part."""
    cost_per_hour: float | None = Field(default=None, ge=0)
    """Of one device."""


class Cluster(Section):
    """All rates in one place. A model's key is its name in the recipe; the student is `model`."""

    models: dict[str, Served]
    """By name: every model that the recipe calls, and the student."""
    training: Training
    """What SFT and RL train on."""
    length: float = Field(default=1.0, gt=0, le=1)
    """How long completions and examples are, as a share of the most tokens that the recipe allows them."""


class Row(NamedTuple):
    """One stage's work at one place. `cost` None: no price was given."""

    stage: str
    calls: int
    tokens: int
    hours: float
    cost: float | None
    limit: str
    by: str
    core_hours: float = 0.0


def load(path: Path) -> Cluster:
    """Read and check a cluster file. Raises UserError with all that is wrong."""
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: broken YAML; mend it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a cluster file is a mapping of keys: {', '.join(Cluster.model_fields)}")
    try:
        return Cluster.model_validate(data)
    except ValidationError as error:
        raise UserError([_explain(path, item) for item in error.errors()]) from None


def _explain(path: Path, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{path}: {key}: no such key; keys here are {', '.join(_section(item['loc'][:-1]).model_fields)}"
    if item["type"] == "missing":
        return f"{path}: {key}: not given, and has no default; add it"
    return f"{path}: {key}: {item['msg']} (got {item['input']!r})"


def _section(places: tuple[Any, ...]) -> type[Section]:
    """The section at a place: models.NAME, models.NAME.price, training or the file itself."""
    if not places:
        return Cluster
    if places[0] == "training":
        return Training
    return Served if len(places) == 2 else Price


def foretell(recipe: Recipe, cluster: Cluster, count: int | None = None) -> list[Row]:
    """The rows of each stage, for so many training prompts (as many as the recipe has where None).

    Raises UserError where the prompts can't be read, or a model has no rates.
    """
    found = _sets(recipe)
    own = len(found["train"])
    wanted = own if count is None else count
    asked = stages_of(recipe)
    made = [c for c in plan.made(recipe) if c.stage in asked]
    calls = [_scaled(c, wanted, own) if c.stage in SCALED else c for c in made]
    student = [c for c in _student(recipe, len(found["heldout"])) if c.stage in asked]
    missing = sorted({c.model for c in [*calls, *student]} - set(cluster.models))
    if missing:
        raise UserError([f"models: no rates of {name}, which the recipe names; add them" for name in missing])
    rows = [_served(c, cluster, processes_of(recipe, c.stage), recipe.limits.concurrency) for c in calls]
    rows += [_served(c, cluster, 1, None) for c in student]
    rows += [_trained(stage, tokens, cluster) for stage, tokens in _lessons(recipe, wanted).items() if stage in asked]
    return sorted(rows, key=lambda row: STAGES.index(row.stage))


def _sets(recipe: Recipe) -> dict[str, list[Prompt]]:
    spec, files = specs.load(recipes.path_of(recipe.spec)), prompt_files(recipe)
    made = {split: prompts.load(files[split], spec, split, recipe.prompts.text) for split in ("train", "heldout")}
    return made | {"heldout": evaluate.balanced(made["heldout"], recipe.evaluate.limit)}


def _scaled(calls: Calls, wanted: int, own: int) -> Calls:
    counts = {name: ceil(getattr(calls, name) * wanted / own) for name in ("calls", "sent", "written")}
    return calls._replace(**counts)


def _student(recipe: Recipe, heldout: int) -> list[Calls]:
    """What the run's own model writes."""
    rollouts, answers = _rollouts(recipe), len(recipe.evaluate.arms) * heldout
    return [
        Calls("rl", recipe.model, rollouts, rollouts * PROMPT_TOKENS, rollouts * recipe.rl.max_tokens),
        Calls("evaluate", recipe.model, answers, answers * PROMPT_TOKENS, answers * recipe.evaluate.max_tokens),
    ]


def _rollouts(recipe: Recipe) -> int:
    return recipe.rl.steps * recipe.rl.prompts * recipe.rl.group


def _lessons(recipe: Recipe, wanted: int) -> dict[str, int]:
    """The most tokens that SFT and RL train on."""
    section = recipe.sft
    examples = wanted * min(recipe.filter.best_of, recipe.generate.samples)
    for most in (recipe.filter.limit, section.limit):
        examples = min(examples, most or examples)
    shown = examples * section.epochs
    if section.mix is not None:  # each shown once
        shown += ceil(examples * section.epochs * section.mix.share / (1 - section.mix.share))
    longest = min(section.max_tokens, PROMPT_TOKENS + recipe.generate.max_tokens)
    return {"sft": shown * longest, "rl": _rollouts(recipe) * (PROMPT_TOKENS + recipe.rl.max_tokens)}


def _served(calls: Calls, cluster: Cluster, processes: int, most: int | None) -> Row:
    """One stage's calls to one model. `most`: how many one process has under way at once; None for no limit."""
    model = cluster.models[calls.model]
    again = 1 / (1 - model.failure_rate)
    tries, sent, written = ceil(calls.calls * again), calls.sent * again, calls.written * cluster.length * again
    room = model.replicas * model.concurrency
    at_once = room if most is None else min(room, most * processes)
    seconds = {"cores": tries * CPU_SECONDS_A_CALL / processes}
    if model.latency_seconds is not None:
        seconds["latency"] = tries * model.latency_seconds / at_once
    if model.read_tokens_per_second is not None and model.written_tokens_per_second is not None:
        work = sent / model.read_tokens_per_second + written / model.written_tokens_per_second
        seconds["tokens/s"] = work * model.concurrency / at_once  # so many replicas have all the calls that they take
    limit = max(seconds, key=lambda name: seconds[name])
    hours = seconds[limit] / 3600
    cost = None if model.cost_per_hour is None else hours * model.replicas * model.cost_per_hour
    if model.price is not None:
        cost = (sent * model.price.prompt + written * model.price.completion) / 1e6
    return Row(
        calls.stage, tries, ceil(sent + written), hours, cost, limit, calls.model, core_hours=seconds["cores"] / 3600
    )


def _trained(stage: str, most: int, cluster: Cluster) -> Row:
    given, tokens = cluster.training, ceil(most * cluster.length)
    hours = tokens / given.tokens_per_second / given.devices / 3600
    cost = None if given.cost_per_hour is None else hours * given.devices * given.cost_per_hour
    return Row(stage, 0, tokens, hours, cost, "tokens/s", f"training on {given.devices}")


def hours(rows: Iterable[Row]) -> float:
    """How long all of it takes: one stage after the other, but generate and filter side by side."""
    rows = list(rows)
    beside = [row for row in rows if row.stage in BESIDE]
    by_model: dict[str, float] = {}
    for row in beside:
        by_model[row.by] = by_model.get(row.by, 0.0) + row.hours
    both = max([*by_model.values(), sum(row.core_hours for row in beside)])
    return both + sum(row.hours for row in rows if row.stage not in BESIDE)


def table(recipe: Recipe, cluster: Cluster, count: int | None = None) -> str:
    """The rows as lines, their sum, and what of the recipe keeps the cluster from being busy."""
    rows = foretell(recipe, cluster, count)
    lines = [f"{'stage':10} {'calls':>13} {'tokens':>19} {'hours':>11} {'cost':>12}  {'limit':9} by"]
    for row in rows:
        calls, cost = f"{row.calls:,}" if row.calls else "", "no price" if row.cost is None else f"{row.cost:,.2f}"
        lines.append(
            f"{row.stage:10} {calls:>13} {row.tokens:>19,} {row.hours:>11,.2f} {cost:>12}  {row.limit:9} {row.by}"
        )
    priced = [row.cost for row in rows if row.cost is not None]
    money = f"{sum(priced):,.2f}" if priced else "no price"
    partly = "; cost of the rows with a price" if 0 < len(priced) < len(rows) else ""
    lines.append(
        f"{'together':10} {sum(row.calls for row in rows):>13,} {sum(row.tokens for row in rows):>19,} "
        f"{hours(rows):>11,.2f} {money:>12}  (generate and filter run side by side{partly})"
    )
    lines += _idle(recipe, cluster, rows)
    return "\n".join(lines) + "\n"


def _idle(recipe: Recipe, cluster: Cluster, rows: list[Row]) -> list[str]:
    """Where the recipe has fewer calls under way than a model takes, while the cores could make more."""
    told = []
    for name in sorted({row.by for row in rows if row.stage in BESIDE and row.limit != "cores"}):
        model, processes = cluster.models[name], processes_of(recipe, "generate")
        room = model.replicas * model.concurrency
        if recipe.limits.concurrency * processes < room:
            told.append(
                f"limits.concurrency: {recipe.limits.concurrency * processes:,} calls at once to {name}, which takes "
                f"{room:,}; set it to {ceil(room / processes):,}"
            )
    return told
