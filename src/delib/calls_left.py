"""Which of a run's calls to models are in the cache already, and how many are left to make.

In: a pipeline, the stages that are about to run, and the arms whose answers stand. Out: a line a stage and model. What
the stages would ask is asked of the cache alone, by the stages' own code and with the very messages, so that an edited
clause counts for the prompts whose excerpt holds it. Judging is counted as if no call failed; a verdict on a completion
that is still to be written counts as left. RL writes completions of its own, whose verdicts are all left. The cache of
a model that runs here is found by what its server says it is, so that without opening it only the most is told.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from delib import labelling, plan, progress
from delib import recipe as recipes
from delib.judges import agreement
from delib.labelling import Ask
from delib.models import opened, recorded
from delib.models.calls import Backend, Caller, CallError, FinalError, Ledger, Reply, Spread, here
from delib.models.endpoint import address_of
from delib.opener import FITTED, called
from delib.pipeline import ASKED, Pipeline
from delib.preflight import prompt_files
from delib.recipe import LimitsSection
from delib.records import Manifest, Message, Prompt, Sample
from delib.run import StageFolder
from delib.stages import evaluate, filter, generate
from delib.stages import prompts as prompts_stage


class Left(NamedTuple):
    """The calls of one stage to one model. `cached` None: what the cache holds can't be told before it runs."""

    stage: str
    model: str
    left: int
    cached: int | None


class Unmade:
    """A backend that makes no call: what the cache does not hold is counted, and fails."""

    def __init__(self, real: Backend) -> None:
        self.name, self.identity, self._real = real.name, real.identity, real
        self.asked = self.left = 0

    def sent(self, messages: list[Message]) -> str:
        self.asked += 1  # once a call, before the cache is looked at
        return self._real.sent(messages)

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        self.left += 1
        raise FinalError(f"{self.name}: not made yet")

    async def close(self) -> None: ...


def of(pipeline: Pipeline, todo: Iterable[str], standing: Iterable[str]) -> list[Left]:
    """The calls of the stages `todo`; `standing`: the arms whose answers will be those of before."""
    stages, recipe = set(todo), pipeline.recipe
    if not called(recipe):
        return []
    if "generate" in stages and "filter" not in stages and recipe.generate.teacher != "recorded":
        return _judged_early(of(pipeline, stages | {"filter"}, standing))
    most = [Left(c.stage, c.model, c.calls, None) for c in plan.made(recipe) if c.stage in stages]
    asked = {c.model for c in most if c.stage == "prompts"}
    if not all(map(_looked_up, asked)):
        return most  # without their labels nothing can be told of what comes after
    found: list[Left] = []
    with TemporaryDirectory() as scratch, _quiet():
        rows, unknown = pipeline.run.finished("prompts", Prompt) if "prompts" not in stages else [], 0
        if "prompts" in stages:
            rows, unknown, labelled = _foreseen(pipeline, Path(scratch))
            found += [_labels(c, sum(m.left for m in most if m[:2] == c[:2])) for c in labelled]
        found += asyncio.run(_written(pipeline, stages, rows, unknown))
        found += [c for c in most if c.stage == "rl"]
        found += asyncio.run(_evaluated(pipeline, stages, rows, set(standing)))
    told = {(c.stage, c.model) for c in found}
    return found + [c for c in most if (c.stage, c.model) not in told]


def _judged_early(rows: list[Left]) -> list[Left]:
    """The filter's calls as generate's own: a live teacher's samples are judged as they come, whether or not the filter
    is to follow."""
    both = [row for row in rows if row.stage in ("generate", "filter")]
    found = [row for row in rows if row not in both]
    for model in dict.fromkeys(row.model for row in both):
        own = [row for row in both if row.model == model]
        known = [row.cached for row in own if row.cached is not None]
        cached = sum(known) if len(known) == len(own) else None
        found.append(Left("generate", model, sum(row.left for row in own), cached))
    return found


def _looked_up(name: str) -> bool:
    """Whether a model can be asked for without loading it or starting its server."""
    return opened.is_hosted(name) and (address_of(name) is not None or name.partition("/")[0] not in opened.RUN_HERE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the stages' own bars and notes, which would tell of work that is not done."""
    before, progress.console.quiet = progress.console.quiet, True
    try:
        yield
    finally:
        progress.console.quiet = before


@asynccontextmanager
async def _from_cache(pipeline: Pipeline, name: str, counted: dict[str, Unmade]) -> AsyncIterator[Caller]:
    """A model that only gives back what the cache holds; what was asked of it is in `counted`."""
    async with pipeline.opener.model(name) as real:
        seen = counted.setdefault(name, Unmade(real.backend))
        yield Caller(seen, real.cache, Ledger(LimitsSection()))


def _lines(stage: str, counted: dict[str, Unmade]) -> list[Left]:
    return [Left(stage, name, seen.left, seen.asked - seen.left) for name, seen in counted.items()]


def _labels(seen: Left, most: int) -> Left:
    """What a label that is not there leads to can't be seen: its clause, a look-alike and the labels of that."""
    return seen._replace(left=max(seen.left, most - (seen.cached or 0))) if seen.left else seen


def _foreseen(pipeline: Pipeline, scratch: Path) -> tuple[list[Prompt], int, list[Left]]:
    """The prompts that the stage will give, as far as the cache knows their labels; how many more may come to be
    trained on; and the calls for labels and look-alikes."""
    recipe, counted = pipeline.recipe, dict[str, Unmade]()
    section, ask = recipe.prompts, None
    if section.labeller is not None:
        labeller = partial(_from_cache, pipeline, section.labeller, counted)
        writer = partial(_from_cache, pipeline, section.lookalikes, counted) if section.lookalikes else None

        def asked(writer: labelling.Opened | None) -> Spread:
            how = {"max_tokens": recipe.filter.max_tokens, "seed": recipe.record_seed}
            return here(partial(labelling.working, labeller, writer, pipeline.spec, **how), 1)

        ask = Ask(asked(None), asked(writer) if writer else None, max_failure_rate=1.0)
    folder = StageFolder(scratch)
    made: Manifest = prompts_stage.run(
        prompt_files(recipe), pipeline.spec, folder, text=section.text, near_duplicates=section.near_duplicates, ask=ask
    )
    unknown = sum(len(made.detail.get(reason, {})) for reason in ("unlabelled", "no_lookalike"))
    return folder.records(Prompt), unknown, _lines("prompts", counted)


async def _written(pipeline: Pipeline, stages: set[str], rows: list[Prompt], unknown: int) -> list[Left]:
    """The calls of generate and filter. `unknown`: prompts that may come on top."""
    recipe, found = pipeline.recipe, list[Left]()
    if "filter" not in stages:
        return found
    live = "generate" in stages and recipe.generate.teacher != "recorded"
    if live and not _looked_up(recipe.generate.teacher):
        return found
    of_teacher, of_judge = dict[str, Unmade](), dict[str, Unmade]()
    judged = recipe.judge not in FITTED and _looked_up(recipe.judge)
    more = unknown * (recipe.generate.samples if live else 1)
    verdicts = more * recipe.filter.runs

    async def look(samples: AsyncIterator[Sample]) -> int:
        """Ask the judge about those that are there; how many are not."""
        missing = 0
        if not judged:
            async for _ in samples:
                pass
            return 0
        async with _from_cache(pipeline, recipe.judge, of_judge) as model:
            judge = pipeline.opener.prompted(recipe.judge, model, recipe.filter.side_information)
            async for sample in samples:
                missing += sample.completion is None
                await filter.grade(sample, judge, recipe.filter.runs, 0.0)
        return missing

    train = [p for p in rows if p.split == "train"]
    if live:
        async with _from_cache(pipeline, recipe.generate.teacher, of_teacher) as teacher:
            verdicts += recipe.filter.runs * await look(_of_teacher(pipeline, train, teacher))
        found += [c._replace(left=c.left + more) for c in _lines("generate", of_teacher)]
    else:
        await look(_there(pipeline, train, "generate" in stages))
    return found + [c._replace(left=c.left + verdicts) for c in _lines("filter", of_judge)]


async def _of_teacher(pipeline: Pipeline, train: list[Prompt], teacher: Caller) -> AsyncIterator[Sample]:
    section = pipeline.recipe.generate
    for prompt in train:
        messages = generate.teacher_messages(prompt, pipeline.spec.excerpt(prompt.category))
        for index in range(section.samples):
            seed, made = pipeline.recipe.record_seed * 100_003 + index, None
            with suppress(CallError):
                made = await teacher.complete(
                    messages, max_tokens=section.max_tokens, temperature=section.temperature, seed=seed, index=index
                )
            yield Sample(prompt=prompt, index=index, excerpt_id="", completion=made)


async def _there(pipeline: Pipeline, train: list[Prompt], replayed: bool) -> AsyncIterator[Sample]:
    """The samples that were recorded or that generate has made."""
    if not replayed:
        for sample in pipeline.folder("generate").stream(Sample):
            yield sample
        return
    recordings = recorded.load(recipes.path_of(pipeline.recipe.generate.recordings))
    for prompt in train:
        for index, row in enumerate(recordings.get(prompt.id, [])):
            yield Sample(prompt=prompt, index=index, excerpt_id="", completion=row.completion())


async def _evaluated(pipeline: Pipeline, stages: set[str], rows: list[Prompt], standing: set[str]) -> list[Left]:
    """The calls of the evaluation's judges, and of the report's measure of them."""
    recipe, found = pipeline.recipe, list[Left]()
    held = evaluate.balanced([p for p in rows if p.split == "heldout"], recipe.evaluate.limit)
    for name in (n for n in pipeline.opener.judge_names() if n not in FITTED and _looked_up(n)):
        if "evaluate" in stages:
            unknown, counted = 0, dict[str, Unmade]()
            async with _from_cache(pipeline, name, counted) as model:
                judge = pipeline.opener.prompted(name, model, False)
                for arm in recipe.evaluate.arms:
                    place = StageFolder(pipeline.folder("evaluate").path / arm)
                    answers = {prompts_stage.content_id(s.prompt): s.completion for s in place.stream(Sample)}
                    for prompt in held:
                        made = answers.get(prompts_stage.content_id(prompt)) if arm in standing else None
                        if made is None:
                            unknown += 1
                        else:
                            await judge.grade(prompt, made, "answer", 1)
            found += [c._replace(left=c.left + unknown) for c in _lines("evaluate", counted)]
        if "report" in stages:
            counted = {}
            async with _from_cache(pipeline, name, counted) as model:
                judge = pipeline.opener.prompted(name, model, False)
                await agreement.ask(judge, agreement.drawn(agreement.shipped(), ASKED), 1)
            found += _lines("report", counted)
    return found


def told(calls: Left) -> str:
    """The calls of one line in words."""
    one = "call" if calls.left == 1 else "calls"
    if calls.cached is None:
        return f"{calls.left:,} {one} to {calls.model} at most"
    if not calls.left:
        return f"no call to {calls.model}, all {calls.cached:,} are cached"
    return f"{calls.left:,} {one} to {calls.model} at most" + (f", {calls.cached:,} are cached" if calls.cached else "")
