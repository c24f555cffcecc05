"""Stage 7, evaluate: the arms answer the held-out prompts, greedily, with one `max_tokens` for all; the judge grades.

In: held-out prompts and a model an arm. Out: a folder an arm with graded Samples, and `metrics.json`. Finished
samples are on disk at once and are not made again. The judge sees the answer only; reasoning is read by rule.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, Protocol

from delib.errors import StageError
from delib.evals.scoring import by_judge, metrics
from delib.models.calls import Spread, Told, Working, side_by_side
from delib.progress import bar
from delib.records import Completion, Manifest, Message, Metric, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.spec import Spec, digest

MAX_FAILURE_RATE = 0.1
AT_ONCE = 128
"""Answers that are waited for side by side; the model's own limits say how many are made so."""


class Model(Protocol):
    async def complete(
        self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int, index: int = 0
    ) -> Completion: ...


class Judge(Protocol):
    name: str

    async def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]: ...


OpenedJudges = Callable[[], AbstractAsyncContextManager[Sequence[Judge]]]


def balanced(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most `limit` prompts, each pile (source, category, with or without an expected answer, and checks) cut in
    proportion.

    Which of a pile stay is drawn by the hash of their ids, so that no end of the file is preferred. The file's order is
    kept.
    """
    if limit is None or limit >= len(prompts):
        return prompts
    piles: dict[tuple[str, str, bool, bool], list[Prompt]] = {}
    for prompt in prompts:
        kind = (prompt.source, str(prompt.category), prompt.expected is not None, prompt.checks is not None)
        piles.setdefault(kind, []).append(prompt)
    for pile in piles.values():
        pile.sort(key=lambda p: digest(p.id))
    ranked = [((place + 0.5) / len(pile), p.id) for pile in piles.values() for place, p in enumerate(pile)]
    taken = {prompt_id for _, prompt_id in sorted(ranked, key=lambda pair: pair[0])[:limit]}
    return [p for p in prompts if p.id in taken]


def with_spec(messages: list[Message], spec: Spec) -> list[Message]:
    """The conversation with the summarised spec in its system message: the paper's fifth arm."""
    policy = f"Follow this policy in your answers.\n{spec.summary()}"
    if messages[0].role == "system":
        return [Message(role="system", content=f"{policy}\n\n{messages[0].content}"), *messages[1:]]
    return [Message(role="system", content=policy), *messages]


@asynccontextmanager
async def working(
    opened: Callable[[], AbstractAsyncContextManager[Model]], spec: Spec, *, in_context: bool, max_tokens: int
) -> AsyncIterator[Working]:
    """A model at work: it answers a sample's prompt, greedily, and tells of it. `in_context`: with the spec."""
    async with opened() as model:

        async def work(sample: Sample, told: Told) -> None:
            given = sample.prompt.messages
            messages = with_spec(given, spec) if in_context else given
            try:
                made = await model.complete(messages, max_tokens=max_tokens, temperature=0.0, seed=0)
                sample = sample.model_copy(update={"completion": made})
            except (OSError, KeyError, ValueError) as error:
                sample = sample.model_copy(update={"failure": f"{type(error).__name__}: {error}"})
            told(sample)

        yield work


def answer_all(prompts: list[Prompt], spread: Spread, spec: Spec, folder: StageFolder, what: str) -> list[Sample]:
    """Ungraded Samples of one model in the order of `prompts`; those already on disk are kept. `spread` has each worked
    on as in `working`."""
    folder.path.mkdir(parents=True, exist_ok=True)
    have = {s.prompt.id: s for s in folder.records(Sample) if s.failure is None}
    todo = [
        Sample(prompt=p, excerpt_id=spec.excerpt_id(p.category), completion=None) for p in prompts if p.id not in have
    ]
    if todo:
        with bar(what, len(prompts), len(have)) as ticker:

            def told(sample: Sample) -> None:
                folder.append(sample)
                have[sample.prompt.id] = sample
                ticker.step()

            spread(todo, told)
        folder.leave()
    failed = [s for s in have.values() if s.failure is not None]
    if prompts and len(failed) / len(prompts) > MAX_FAILURE_RATE:
        raise StageError(f"{what}: {len(failed)} of {len(prompts)} prompts failed, first {failed[0].failure}")
    return [have[p.id] for p in prompts]


def grade(samples: list[Sample], opened: OpenedJudges, at_once: int) -> list[Sample]:
    """The samples with one verdict of each judge on the answer; what failed to generate stays without."""
    graded = {s.key: s for s in samples}

    async def work() -> None:
        async with opened() as judges:

            async def one(sample: Sample) -> None:
                made = sample.completion
                assert made is not None
                found = [v for j in judges for v in await j.grade(sample.prompt, made, "answer", 1)]
                graded[sample.key] = sample.model_copy(update={"verdicts": found})

            await side_by_side((s for s in samples if s.completion is not None), one, at_once)

    asyncio.run(work())
    return [graded[s.key] for s in samples]


def run_arm(
    arm: str,
    prompts: list[Prompt],
    spread: Spread,
    judges: OpenedJudges,
    names: Sequence[str],
    spec: Spec,
    folder: StageFolder,
    *,
    at_once: int,
) -> list[Metric]:
    """One arm: answers, verdicts, figures; the first judge's, and beside them the judged ones by each other judge.

    `names`: the judges', the first one first. `at_once`: answers that are graded side by side.
    """
    place = folder.sub(arm)
    answered = answer_all(prompts, spread, spec, place, f"evaluate {arm}")
    graded = grade(answered, judges, at_once)
    place.replace(graded)
    return metrics(graded, spec, arm) + [m for other in names[1:] for m in by_judge(graded, spec, arm, other)]


def close(found: list[Metric], samples: int, tokens: int, judges: list[str]) -> Manifest:
    ungraded = sum(m.n_ungraded for m in found if m.by is None and m.name in ("not_unsafe", "not_overrefuse"))
    counts = {"in": samples, "out": samples, "ungraded": ungraded}
    return Manifest(
        stage="evaluate", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens, detail={"judges": judges}
    )
