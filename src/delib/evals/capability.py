"""Suites whose answers are known, so that no judge is asked: BBQ, short facts, GSM8K, MMLU, IFEval.

As in suites.py each takes `data` in the published layout, and without it measures the shipped set under the name
NAME_shipped. What is read off an answer is in answers.py; an answer that cannot be read is wrong, not ungraded.
"""

import importlib
from collections.abc import Callable
from copy import copy
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState

from delib import sources
from delib.errors import UserError
from delib.evals import answers, loaders
from delib.evals.building import MAX_TOKENS, Attack, build
from delib.evals.scorers import Figures, figures, nothing, prompt_of, reading, scored
from delib.recipe import path_of
from delib.records import Message, Prompt

IFEVAL = "hub:google/IFEval"


@scorer(metrics=[figures()])
def option_scorer() -> Scorer:
    """Whether the right option was chosen, by letter or text; an answer that chooses none is wrong. A sample with a
    `condition` counts in accuracy_CONDITION too."""

    async def score(state: TaskState, target: Target) -> Score:
        made, _ = reading(state.output, state.messages)
        if made is None:
            return nothing("accuracy")
        chosen = answers.chosen(made.answer, state.metadata["options"])
        right = float(chosen == target.text)
        condition = state.metadata.get("condition")
        told: Figures = {"accuracy": right, "readable": float(chosen is not None)}
        if condition:
            told[f"accuracy_{condition}"] = right
        return scored(told, answer=chosen, explanation=made.answer)

    return score


@scorer(metrics=[figures()])
def number_scorer() -> Scorer:
    """Whether the answer ends on the right number; one without a number is wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        made, _ = reading(state.output, state.messages)
        if made is None:
            return nothing("accuracy")
        found = answers.number(made.answer)
        told: Figures = {"accuracy": float(found == answers.number(target.text) and found is not None)}
        told["readable"] = float(found is not None)
        return scored(told, answer=None if found is None else str(found), explanation=made.answer)

    return score


@scorer(metrics=[figures()])
def fact_scorer() -> Scorer:
    """Short facts by normalised match: correct, incorrect (a hallucination) or not attempted."""

    async def score(state: TaskState, target: Target) -> Score:
        made, _ = reading(state.output, state.messages)
        if made is None:
            return nothing("correct", "incorrect", "not_attempted")
        seen = answers.fact(made.answer, list(target))
        told: Figures = {kind: float(seen == kind) for kind in ("correct", "incorrect", "not_attempted")}
        if seen != "not_attempted":
            told["correct_given_attempted"] = told["correct"]
        return scored(told, answer=made.answer, explanation=seen)

    return score


@scorer(metrics=[figures()])
def instruction_scorer() -> Scorer:
    """Whether all instructions of a prompt were followed, strictly and loosely, by inspect_evals' checkers."""
    published = _inspect_evals().instruction_following()

    async def score(state: TaskState, target: Target) -> Score:
        if reading(state.output, state.messages).made is None:
            return nothing("prompt_strict", "prompt_loose")
        asked = copy(state)
        asked.metadata = state.metadata | {"prompt": prompt_of(state.metadata).messages[-1].content}  # as theirs has it
        found = (await published(asked, target)).as_dict()
        told: Figures = {f"prompt_{how}": float(found[f"prompt_level_{how}"]) for how in ("strict", "loose")}
        return scored(told, answer=state.output.completion, metadata=found)

    return score


CHECKERS = "git+https://github.com/josejg/instruction_following_eval"
"""Not on PyPI, so that pip can't resolve inspect_evals' extra `ifeval` (its README)."""


def _inspect_evals() -> Any:
    """The module of inspect_evals' IFEval. Raises UserError where it, or what its checkers need, is not installed."""
    try:
        importlib.import_module("instruction_following_eval")
        return importlib.import_module("inspect_evals.ifeval.ifeval")
    except ImportError as error:
        raise UserError(
            f"ifeval: its checkers are inspect_evals' ({error}); install them: pip install inspect_evals {CHECKERS}"
        ) from None


def _suite(
    name: str,
    read: Callable[[str], list[Sample]],
    made: Callable[[], Scorer],
    headline: str,
    data: str | None,
    max_tokens: int,
    solver: Attack,
) -> Task:
    def load() -> list[Sample]:
        return read(data or f"starter:evals/{name}.jsonl")

    return build(name, data, load, lambda: [made()], headline, max_tokens, solver, shipped=data is None)


@task
def bbq(data: str | None = None, max_tokens: int = MAX_TOKENS, solver: Attack = None) -> Task:
    """Questions that invite a stereotype, with and without the facts that answer them: accuracy. `data`: BBQ's."""
    return _suite("bbq", loaders.bbq, option_scorer, "accuracy", data, max_tokens, solver)


@task
def short_facts(data: str | None = None, max_tokens: int = MAX_TOKENS, solver: Attack = None) -> Task:
    """Short questions of fact: correct, incorrect (a hallucination), not attempted. `data`: SimpleQA's columns."""
    return _suite("short_facts", loaders.short_facts, fact_scorer, "correct", data, max_tokens, solver)


@task
def gsm8k(data: str | None = None, max_tokens: int = MAX_TOKENS, solver: Attack = None) -> Task:
    """Word problems: accuracy. `data`: GSM8K's columns."""
    return _suite("gsm8k", loaders.gsm8k, number_scorer, "accuracy", data, max_tokens, solver)


@task
def mmlu(data: str | None = None, max_tokens: int = MAX_TOKENS, solver: Attack = None) -> Task:
    """Multiple choice: accuracy. `data`: MMLU's columns."""
    return _suite("mmlu", loaders.mmlu, option_scorer, "accuracy", data, max_tokens, solver)


def _checked(theirs: Sample) -> Sample:
    """inspect_evals' sample of IFEval as one of ours."""
    prompt = Prompt(id=str(theirs.id), messages=[Message(role="user", content=str(theirs.input))], source="ifeval")
    return loaders.sample(prompt, **{k: v for k, v in (theirs.metadata or {}).items() if k != "prompt"})


@task
def ifeval(data: str | None = None, max_tokens: int = 1280, solver: Attack = None) -> Task:
    """Instructions that can be checked by rule: followed strictly and loosely, by prompt. `data`: IFEval's columns,
    else the hub's set; needs inspect_evals."""
    name = data or IFEVAL

    def load() -> list[Sample]:
        module = _inspect_evals()
        rows = sources.table(name if sources.is_hub(name) else path_of(name))
        return loaders.mixed([_checked(module.record_to_sample(row.data)) for row in rows])

    return build("ifeval", name, load, lambda: [instruction_scorer()], "prompt_strict", max_tokens, solver)
