"""What all suites share: how a task is made of samples, scorers and an attack, and how mistakes are told."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from inspect_ai import Task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver
from rich.markup import escape

from delib import recipe as recipes
from delib import sources
from delib.errors import StageError, UserError
from delib.evals import attacks as texts
from delib.evals import solvers
from delib.evals.encodings import ENCODINGS
from delib.evals.scorers import by_prompt, figures
from delib.stages.evaluate import MAX_FAILURE_RATE
from delib.stats import RESAMPLES

MAX_TOKENS = 512
"""The most tokens of one completion, reasoning included."""
Attack = Solver | list[Solver] | str | None
"""Solvers that stand before the call to the model. As a text their names and arguments, from the inside out, as
metadata tells them too: `encoding(rot13)+role_play`."""
Attacks = str | list[str] | None
"""Attacks under each of which every prompt is asked: texts as above, or names of GROUPS, with commas between."""
SHOTS = 8
GROUPS: dict[str, Callable[[], list[str]]] = {
    "none": lambda: ["none"],
    "jailbreaks": lambda: [f"jailbreak({name})" for name in texts.jailbreaks()],
    "encodings": lambda: [f"encoding({name})" for name in ENCODINGS],
    "multi_turns": lambda: [f"multi_turn({name})" for name in texts.conversations()],
    "all": lambda: [
        *(name for group in ("jailbreaks", "encodings", "multi_turns") for name in GROUPS[group]()),
        "prefix_injection",
        "role_play",
        f"many_shot({SHOTS})",
    ],
}
"""`none` is the plain request; `all` are the shipped ones."""


_ended: ContextVar[Callable[[], None] | None] = ContextVar("ended", default=None)


@contextmanager
def at_end(step: Callable[[], None]) -> Iterator[None]:
    """Within it `step` is called after each sample of a task, also of one that inspect_ai makes anew to go on with."""
    token = _ended.set(step)
    try:
        yield
    finally:
        _ended.reset(token)


async def _step(_: TaskState) -> None:
    if (step := _ended.get()) is not None:
        step()


@contextmanager
def told() -> Iterator[None]:
    """A person's mistake in inspect's own way: its message without a traceback."""
    try:
        yield
    except (UserError, StageError) as error:
        raise PrerequisiteError(escape(f"error: {error}")) from error


def build(
    name: str,
    data: str | None,
    load: Callable[[], list[Sample]],
    scorers: Callable[[], list[Scorer]],
    headline: str,
    max_tokens: int,
    solver: Attack,
    *,
    attacks: Attacks = None,
    resamples: int = RESAMPLES,
    shipped: bool = False,
    about: dict[str, Any] | None = None,
) -> Task:
    """A task of this name. `data`: where the samples come from; None, and then `shipped`, for the set that ships.
    `headline`: the figure that the suite is about. `attacks`: every prompt is asked under each of them, as samples of
    its own that stand together; `solver` comes after them. `about`: what else the log keeps of how it was measured. A
    sample that failed is left out and told; past a tenth of them the task stops."""
    with told():
        samples = load()
        place = data if data is None or sources.is_hub(data) else recipes.path_of(data)
        identity = sources.identity(place) if place is not None else "shipped"
        graded, before = scorers(), attacks_of(solver)
        named = named_attacks(attacks)
        if named:
            samples, before = under_each(samples, named), [attacked(named), *before]
    suffix = "_shipped" if shipped else ""
    kept: dict[str, Any] = {"suite": name, "headline": headline + suffix, "data": data or "shipped"}
    kept |= {"identity": identity, "resamples": resamples} | ({"attacks": named} if named else {})
    return Task(
        dataset=MemoryDataset(samples, name=name + suffix, location=data),
        solver=[*before, generate()],
        scorer=graded,
        metrics=[figures(resamples, suffix), *([by_prompt(resamples, suffix)] if named else [])],
        config=GenerateConfig(temperature=0.0, max_tokens=max_tokens),
        fail_on_error=MAX_FAILURE_RATE,
        cleanup=_step,
        name=name + suffix,
        metadata=kept | (about or {}),
    )


def attacks_of(given: Attack) -> list[Solver]:
    """The solvers of an attack. Raises UserError for a text that names none of `delib.evals.solvers`."""
    if not isinstance(given, str):
        return given if isinstance(given, list) else [given] if given is not None else []
    found, problems = [], []
    for part in given.split("+"):
        name, words = _call(part)
        make = None if name.startswith("_") else getattr(solvers, name, None)
        if make is None:
            problems.append(f"solver: no attack {part.strip()!r}; write such as encoding(rot13)+role_play")
            continue
        try:
            found.append(make(*(int(word) if word.isdecimal() else word for word in words)))
        except UserError as error:
            problems += error.problems
        except TypeError as error:
            problems.append(f"solver: {part.strip()}: {error}")
    if problems:
        raise UserError(problems)
    return found


def turns(attack: str) -> int:
    """How many completions the model writes under an attack, as text: its last one, and those to turns that lead up."""
    calls = map(_call, attack.split("+"))
    return 1 + sum(len(texts.turns(*words)) - 1 for name, words in calls if name == "multi_turn")


def _call(part: str) -> tuple[str, list[str]]:
    """The name and the arguments of one attack; an empty name for what is none."""
    call = re.fullmatch(r"\s*([a-z_]+)(?:\(([^()]*)\))?\s*", part)
    return (call[1], [word.strip() for word in (call[2] or "").split(",") if word.strip()]) if call else ("", [])


def named_attacks(attacks: Attacks) -> list[str]:
    """The attacks in a text such as `jailbreaks,role_play`, groups written out, each once. Raises UserError for those
    that are none."""
    text = ",".join(attacks) if isinstance(attacks, list) else attacks or ""
    given = [name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip()]
    named = list(dict.fromkeys(one for name in given for one in (GROUPS[name]() if name in GROUPS else [name])))
    problems = []
    for name in named:
        try:
            _steps(name)
        except UserError as error:
            problems += [f"attacks: {problem.removeprefix('solver: ')}" for problem in error.problems]
    if problems:
        raise UserError([*problems, f"attacks: a comma parts them; {', '.join(GROUPS)} name several"])
    return named


def under_each(samples: list[Sample], attacks: list[str]) -> list[Sample]:
    """Each sample under each attack, as PROMPT@ATTACK; `request` and `under` in the metadata tell both. Samples and not
    epochs, so that the log names the attack and a failed one is told apart; a prompt's stand together."""
    made = []
    for one in samples:
        for name in attacks:
            kept = (one.metadata or {}) | {"request": str(one.id), "under": name}
            made.append(one.model_copy(update={"id": f"{one.id}@{name}", "metadata": kept}))
    return made


@solver
def attacked(attacks: list[str]) -> Solver:
    """The attack that the sample's `under` names."""
    known = {name: _steps(name) for name in attacks}

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        for step in known[state.metadata["under"]]:
            state = await step(state, generate)
            if state.completed:
                break
        return state

    return solve


def _steps(attack: str) -> list[Solver]:
    return [] if attack == "none" else attacks_of(attack)
