"""Stage 2, generate: the teacher writes reasoning and answer with the excerpt of the prompt's category in its context.

In: training prompts. Out: Samples with a completion each, or with a failure. A recorded teacher replays what it has;
a live one is given `prompts/teacher.md`. A finished sample is on disk at once and is never made again.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import jinja2

from delib.errors import StageError
from delib.models import recorded
from delib.progress import bar
from delib.records import Completion, Manifest, Message, Prompt, Sample
from delib.run import StageFolder
from delib.spec import Spec

TEMPLATE = Path(__file__).parent.parent / "prompts" / "teacher.md"


class Teacher(Protocol):
    async def complete(
        self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Completion: ...


def teacher_messages(prompt: Prompt, excerpt: str) -> list[Message]:
    """What a live teacher is asked: the template with the excerpt and the conversation."""
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return [Message(role="user", content=template.render(excerpt=excerpt, messages=prompt.messages))]


def replay(
    prompts: list[Prompt], recordings: dict[str, list[recorded.Recording]], spec: Spec, folder: StageFolder
) -> Manifest:
    """Samples from recorded completions. A prompt without a recording is a failure of that sample."""
    done = {s.key for s in folder.records(Sample)}
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


def live(
    prompts: list[Prompt],
    opened: Callable[[], AbstractAsyncContextManager[Teacher]],
    spec: Spec,
    folder: StageFolder,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    max_failure_rate: float,
) -> Manifest:
    """Samples from a live teacher, `samples` a prompt, each with its own seed."""
    done = {s.key for s in folder.records(Sample) if s.failure is None}
    folder.replace([s for s in folder.records(Sample) if s.failure is None])
    todo = [(p, i) for p in prompts for i in range(samples) if f"{p.id}#{i}" not in done]

    async def one(teacher: Teacher, prompt: Prompt, index: int) -> None:
        sample = Sample(prompt=prompt, index=index, excerpt_id=spec.excerpt_id(prompt.category), completion=None)
        messages = teacher_messages(prompt, spec.excerpt(prompt.category))
        try:
            made = await teacher.complete(
                messages, max_tokens=max_tokens, temperature=temperature, seed=seed * 100_003 + index
            )
            folder.append(sample.model_copy(update={"completion": made}))
        except (OSError, KeyError, ValueError) as error:
            folder.append(sample.model_copy(update={"failure": f"{type(error).__name__}: {error}"}))

    async def all_of_them() -> None:
        with bar("generate", len(todo) + len(done), len(done)) as ticker:
            async with opened() as teacher:
                limit = asyncio.Semaphore(64)

                async def bounded(prompt: Prompt, index: int) -> None:
                    async with limit:
                        await one(teacher, prompt, index)
                        ticker.step()

                await asyncio.gather(*(bounded(p, i) for p, i in todo))

    if todo:
        asyncio.run(all_of_them())
    order = {p.id: n for n, p in enumerate(prompts)}
    made: list[Sample] = folder.records(Sample)
    made.sort(key=lambda s: (order[s.prompt.id], s.index))
    folder.replace(made)
    return close(folder, len(prompts), max_failure_rate)


def close(folder: StageFolder, prompts: int, max_failure_rate: float) -> Manifest:
    """Count, and stop when too many failed."""
    made = folder.records(Sample)
    failed = [s for s in made if s.failure is not None]
    if (made and len(failed) / len(made) > max_failure_rate) or len(failed) == len(made):
        causes = "; ".join(f"{s.prompt.id}: {s.failure}" for s in failed[:3])
        raise StageError(f"generate: {len(failed)} of {len(made)} samples failed, first {causes}")
    tokens = sum(s.completion.usage.get("completion", 0) for s in made if s.completion)
    counts = {"in": prompts, "out": len(made) - len(failed), "failed": len(failed)}
    return Manifest(stage="generate", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens)
