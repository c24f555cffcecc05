"""Stage 2, generate: the teacher writes reasoning and answer with the excerpt of the prompt's category in its context.

In: training prompts. Out: Samples with a completion each, or with a failure. A recorded teacher replays what it has;
a live one is given `prompts/teacher.md`. A finished sample is on disk at once and is never made again, and is handed
on at once, so that judging need not wait for the last one.
"""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import jinja2

from delib.errors import StageError
from delib.models import recorded
from delib.models.calls import Spread, Told, Working
from delib.progress import bar
from delib.records import Completion, Manifest, Message, Prompt, Sample
from delib.run import StageFolder
from delib.spec import Spec

ENOUGH = 50
"""Failures after which a stage need not wait for its end to see that there are too many."""
TEMPLATE = Path(__file__).parent.parent / "prompts" / "teacher.md"


HandOn = Callable[[Sample], Awaitable[None]]


class Teacher(Protocol):
    async def complete(
        self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int, index: int
    ) -> Completion: ...


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def teacher_messages(prompt: Prompt, excerpt: str) -> list[Message]:
    """What a live teacher is asked: the template with the excerpt and the conversation."""
    return [Message(role="user", content=_template().render(excerpt=excerpt, messages=prompt.messages))]


def replay(
    prompts: list[Prompt], recordings: dict[str, list[recorded.Recording]], spec: Spec, folder: StageFolder
) -> Manifest:
    """Samples from recorded completions. A prompt without a recording is a failure of that sample."""
    done = {s.key for s in folder.stream(Sample)}
    samples: list[Sample] = []
    for prompt in prompts:
        excerpt_id = spec.excerpt_id(prompt.category)
        rows = recordings.get(prompt.id, [])
        if not rows:
            missing = Sample(prompt=prompt, excerpt_id=excerpt_id, completion=None, failure="nothing was recorded")
            samples.append(missing)
        for index, row in enumerate(rows):
            sample = Sample(
                prompt=prompt, index=index, excerpt_id=excerpt_id, completion=row.completion(), fault=row.fault
            )
            samples.append(sample)
    with bar("generate (recorded)", len(samples), len(done)) as ticker:
        for sample in samples:
            if sample.key not in done:
                folder.append(sample)
                ticker.step()
    return close(folder, len(prompts), 1.0)


@asynccontextmanager
async def working(
    opened: Callable[[], AbstractAsyncContextManager[tuple[Teacher, HandOn]]],
    spec: Spec,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> AsyncIterator[Working]:
    """A teacher at work: it writes a sample that has no completion yet, tells of it and hands it on. One of an earlier
    try is handed on alone. `opened` gives the teacher, and what each finished sample is handed to."""
    async with opened() as (teacher, hand_on):

        async def work(sample: Sample, told: Told) -> None:
            if sample.completion is None:
                sample = await write(sample, teacher)
                told(sample)
            if sample.failure is None:
                await hand_on(sample)

        async def write(sample: Sample, teacher: Teacher) -> Sample:
            messages = teacher_messages(sample.prompt, spec.excerpt(sample.prompt.category))
            index = sample.index
            try:
                made = await teacher.complete(
                    messages, max_tokens=max_tokens, temperature=temperature, seed=seed * 100_003 + index, index=index
                )
            except (OSError, KeyError, ValueError) as error:
                return sample.model_copy(update={"failure": f"{type(error).__name__}: {error}"})
            return sample.model_copy(update={"completion": made})

        yield work


def live(
    prompts: list[Prompt], spread: Spread, spec: Spec, folder: StageFolder, *, samples: int, max_failure_rate: float
) -> Manifest:
    """Samples from a live teacher, `samples` a prompt, each with its own seed.

    `spread` has each worked on as in `working`, those of an earlier try first.
    """
    earlier, done = 0, set()
    for sample in folder.stream(Sample):
        earlier += 1
        if sample.failure is None:
            done.add(sample.key)
    order = [f"{p.id}#{i}" for p in prompts for i in range(samples)]
    failures: list[str] = []
    succeeded = 0

    def items() -> Iterator[Sample]:
        yield from (s for s in itertools.islice(folder.stream(Sample), earlier) if s.failure is None)
        # Those of one category together: servers keep what calls begin with alike, the excerpt.
        for prompt in sorted(prompts, key=lambda p: p.category or ""):
            new = Sample(prompt=prompt, excerpt_id=spec.excerpt_id(prompt.category), completion=None)
            yield from (new.model_copy(update={"index": i}) for i in range(samples) if f"{prompt.id}#{i}" not in done)

    if len(done) < len(order):
        with bar("generate", len(order), len(done)) as ticker:

            def told(sample: Sample) -> None:
                nonlocal succeeded
                folder.append(sample)
                ticker.step()
                if sample.failure is None:
                    succeeded += 1
                    return
                failures.append(f"{sample.key}: {sample.failure}")
                tried = len(failures) + len(done) + succeeded
                if len(failures) >= ENOUGH and len(failures) > max_failure_rate * tried:
                    raise StageError(too_many(failures, tried))

            spread(items(), told)
    folder.rewrite(order, Sample)
    return close(folder, len(prompts), max_failure_rate)


def too_many(failed: list[str], of: int) -> str:
    return f"generate: {len(failed)} of {of} samples failed, first {'; '.join(failed[:3])}"


def close(folder: StageFolder, prompts: int, max_failure_rate: float) -> Manifest:
    """Count, and stop when too many failed."""
    made = tokens = 0
    failed: list[str] = []
    for sample in folder.stream(Sample):
        made += 1
        if sample.failure is not None:
            failed.append(f"{sample.prompt.id}: {sample.failure}")
        elif sample.completion is not None:
            tokens += sample.completion.usage.get("completion", 0)
    if (made and len(failed) / made > max_failure_rate) or len(failed) == made:
        raise StageError(too_many(failed, made))
    counts = {"in": prompts, "out": made - len(failed), "failed": len(failed)}
    return Manifest(stage="generate", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens)
