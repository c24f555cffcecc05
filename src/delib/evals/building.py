"""What all suites share: how a task is made of samples, scorers and an attack, and how mistakes are told."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from inspect_ai import Task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Solver, generate
from rich.markup import escape

from delib import recipe as recipes
from delib import sources
from delib.errors import StageError, UserError
from delib.evals import solvers
from delib.evals.scorers import figures
from delib.stages.evaluate import MAX_FAILURE_RATE
from delib.stats import RESAMPLES

MAX_TOKENS = 512
"""The most tokens of one completion, reasoning included."""
Attack = Solver | list[Solver] | str | None
"""Solvers that stand before the call to the model. As a text their names and arguments, from the inside out, as
metadata tells them too: `encoding(rot13)+role_play`."""


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
    resamples: int = RESAMPLES,
    shipped: bool = False,
    about: dict[str, Any] | None = None,
) -> Task:
    """A task of this name. `data`: where the samples come from; None, and then `shipped`, for the set that ships.
    `headline`: the figure that the suite is about. `about`: what else the log keeps of how it was measured. A sample
    that failed is left out and told; past a tenth of them the task stops."""
    with told():
        samples = load()
        place = data if data is None or sources.is_hub(data) else recipes.path_of(data)
        identity = sources.identity(place) if place is not None else "shipped"
        graded, attacks = scorers(), attacks_of(solver)
    suffix = "_shipped" if shipped else ""
    kept = {"suite": name, "headline": headline + suffix, "data": data or "shipped", "identity": identity}
    return Task(
        dataset=MemoryDataset(samples, name=name + suffix, location=data),
        solver=[*attacks, generate()],
        scorer=graded,
        metrics=[figures(resamples, suffix)],
        config=GenerateConfig(temperature=0.0, max_tokens=max_tokens),
        fail_on_error=MAX_FAILURE_RATE,
        name=name + suffix,
        metadata=kept | (about or {}),
    )


def attacks_of(solver: Attack) -> list[Solver]:
    """The solvers of an attack. Raises UserError for a text that names none of `delib.evals.solvers`."""
    if not isinstance(solver, str):
        return solver if isinstance(solver, list) else [solver] if solver is not None else []
    found, problems = [], []
    for part in solver.split("+"):
        call = re.fullmatch(r"\s*([a-z_]+)(?:\(([^()]*)\))?\s*", part)
        make = getattr(solvers, call.group(1), None) if call and not call.group(1).startswith("_") else None
        if make is None or call is None:
            problems.append(f"solver: no attack {part.strip()!r}; write such as encoding(rot13)+role_play")
            continue
        given = [word.strip() for word in (call.group(2) or "").split(",") if word.strip()]
        try:
            found.append(make(*(int(word) if word.isdecimal() else word for word in given)))
        except UserError as error:
            problems += error.problems
        except TypeError as error:
            problems.append(f"solver: {part.strip()}: {error}")
    if problems:
        raise UserError(problems)
    return found
