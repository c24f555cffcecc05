"""Labels and look-alikes by a model: what a person would otherwise write beside each prompt.

In: a Prompt, a model, the spec. Out: the Prompt with category, clause and behaviour, or a benign look-alike of it.
The labeller is shown the policy as the teacher is (arXiv 2412.16339, 2.3.1): first the summaries, to find the category,
then the excerpt of that category, to find the clause. What others wrote is delimited by a nonce that is a hash of that
very text, which it therefore cannot hold. A reply that cannot be read is asked for again, in bounds.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import jinja2
from pydantic import BaseModel, ConfigDict, ValidationError

from delib.errors import StageError
from delib.judges.prompted import Model, shown, unfenced
from delib.models.calls import Spread, Told, Working
from delib.progress import bar
from delib.records import Behaviour, Message, Prompt, Record
from delib.run import StageFolder
from delib.spec import Spec

LABEL = Path(__file__).parent / "prompts" / "label.md"
LOOKALIKE = Path(__file__).parent / "prompts" / "lookalike.md"
READINGS = 3
"""Calls until a reply can be read. The first is greedy, for the likeliest label; the others must be able to differ."""
TEMPERATURE = 0.7
Opened = Callable[[], AbstractAsyncContextManager[Model]]


class Ask(NamedTuple):
    """Where prompts are labelled and look-alikes written, by `working`. `lookalikes` None: none are."""

    label: Spread
    lookalikes: Spread | None = None
    max_failure_rate: float = 0.1


class Asked(Record):
    """What came of asking about one prompt (`id`): the new Prompt, None when there is none, or a call's failure."""

    id: str
    prompt: Prompt | None = None
    failure: str | None = None


class _Reply(BaseModel):
    """A model's reply, strictly: no key more or less."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Category(_Reply):
    reason: str
    category: str | None


class _Label(_Reply):
    reason: str
    clause: str | None
    behaviour: Behaviour


class _Request(_Reply):
    request: str


R = TypeVar("R", bound=_Reply)


async def label(prompt: Prompt, model: Model, spec: Spec, *, max_tokens: int, seed: int = 0) -> Prompt:
    """The prompt with the labels that it lacked; what was given stays. Where no reply could be read it is as it was.

    Raises what the model raises for a call that failed.
    """
    category = prompt.category
    if category is None:
        names = [c.name for c in spec.categories]
        first = await _ask(
            model,
            _Category,
            lambda reply: reply.category is None or reply.category in names,
            _text(LABEL, prompt, excerpt=f"{spec.summary()}\n\n{spec.principles}", categories=names),
            max_tokens=max_tokens,
            seed=seed,
        )
        if first is None:
            return prompt
        category = first.category
    allowed = {i: c.behaviour for i, c in spec.clauses.items() if c.category in (None, category)}
    second = await _ask(
        model,
        _Label,
        lambda reply: reply.clause is None or allowed.get(reply.clause) == reply.behaviour,
        _text(LABEL, prompt, excerpt=spec.excerpt(category), categories=None),
        max_tokens=max_tokens,
        seed=seed,
    )
    if second is None:
        return prompt
    behaviour = prompt.behaviour or second.behaviour
    clause = prompt.clause or (second.clause if behaviour == second.behaviour else None)
    return prompt.model_copy(update={"category": category, "clause": clause, "behaviour": behaviour})


async def lookalike(
    prompt: Prompt, model: Model, spec: Spec, judge_model: Model, *, max_tokens: int, seed: int = 0
) -> Prompt | None:
    """A benign prompt that looks like one to refuse, written by `model`; None unless `judge_model`, which labels it,
    finds that the policy complies with it. Raises what the models raise for a call that failed."""
    written = await _ask(
        model,
        _Request,
        lambda reply: bool(reply.request.strip()),
        _text(LOOKALIKE, prompt, excerpt=spec.excerpt(prompt.category)),
        max_tokens=max_tokens,
        seed=seed,
    )
    if written is None:
        return None
    made = Prompt(
        id=f"{prompt.id}-lookalike",
        messages=[Message(role="user", content=written.request.strip())],
        category=prompt.category,
        source="lookalike",
        split=prompt.split,
        group=prompt.group or prompt.id,
    )
    labelled = await label(made, judge_model, spec, max_tokens=max_tokens, seed=seed)
    return labelled if labelled.behaviour == "comply" else None


@lru_cache(maxsize=2)
def _template(path: Path) -> jinja2.Template:
    made: jinja2.Template = jinja2.Template(path.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return made


def _text(path: Path, prompt: Prompt, **values: object) -> str:
    material = json.dumps([m.model_dump() for m in prompt.messages])
    nonce = hashlib.sha256(material.encode()).hexdigest()[:20]
    messages = [m.model_copy(update={"content": shown(m.content)}) for m in prompt.messages]
    return _template(path).render(nonce=nonce, messages=messages, **values)


async def _ask(
    model: Model, kind: type[R], fits: Callable[[R], bool], text: str, *, max_tokens: int, seed: int
) -> R | None:
    """A reply of this kind that fits the spec: one JSON object, alone or in a code fence. None: no reading gave one."""
    for reading in range(READINGS):
        made = await model.complete(
            [Message(role="user", content=text)],
            max_tokens=max_tokens,
            temperature=TEMPERATURE if reading else 0.0,
            seed=seed * 100_003 + reading,
            index=reading,
        )
        try:
            reply = kind.model_validate_json(unfenced(made.answer))
        except ValidationError:
            continue
        if fits(reply):
            return reply
    return None


@asynccontextmanager
async def working(
    labeller: Opened, writer: Opened | None, spec: Spec, *, max_tokens: int, seed: int
) -> AsyncIterator[Working]:
    """Models at work on prompts: each is labelled or, with a `writer`, which may be the labeller itself, has a benign
    look-alike written. They tell of an Asked."""
    async with AsyncExitStack() as stack:
        judge = await stack.enter_async_context(labeller())
        model = judge if writer in (None, labeller) else await stack.enter_async_context(writer())

        async def ask(prompt: Prompt) -> Prompt | None:
            if writer is None:
                return await label(prompt, judge, spec, max_tokens=max_tokens, seed=seed)
            return await lookalike(prompt, model, spec, judge, max_tokens=max_tokens, seed=seed)

        async def work(prompt: Prompt, told: Told) -> None:
            try:
                answer = Asked(id=prompt.id, prompt=await ask(prompt))
            except (OSError, ValueError) as error:
                answer = Asked(id=prompt.id, failure=f"{type(error).__name__}: {error}")
            told(answer)

        yield work


def ask_all(
    what: str, prompts: list[Prompt], spread: Spread, folder: StageFolder, max_failure_rate: float
) -> dict[str, Asked]:
    """What came of each prompt. Each is on disk as it comes, and only failed calls are made again by a later try.
    Raises StageError when too many failed."""
    folder.path.mkdir(parents=True, exist_ok=True)
    answers = {a.id: a for a in folder.stream(Asked) if a.failure is None}
    folder.replace(answers.values())
    todo = [p for p in prompts if p.id not in answers]
    if todo:
        with bar(what, len(prompts), len(answers)) as ticker:

            def told(answer: Asked) -> None:
                folder.append(answer)
                answers[answer.id] = answer
                ticker.step()

            spread(todo, told)
        folder.leave()
    failed = [a for a in answers.values() if a.failure is not None]
    if len(failed) > max_failure_rate * len(prompts):
        causes = "; ".join(f"{a.id}: {a.failure}" for a in failed[:3])
        raise StageError(f"prompts: {len(failed)} of {len(prompts)} calls to {what} failed, first {causes}")
    return answers
