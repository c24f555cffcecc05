"""What the shell offers at Tab: stages, suites, shipped recipes, a recipe's keys, arms.

Out: names, some with a line about them; typer keeps those that begin as typed. Where nothing fits the shell offers
files. Only what is quick is imported, since a person waits for it.
"""

from collections.abc import Iterator
from pathlib import Path

import typer

STAGES = ("prompts", "generate", "filter", "distill", "sft", "rl", "evaluate", "report")
SUITES = (
    "challenging_refusal",
    "toxic_conversations",
    "hard_refusal_style",
    "self_harm_style",
    "regulated_advice_style",
    "strong_reject",
    "encodings",
    "xstest",
    "policy_overrefusal",
    "transformation",
    "policy_retrieval",
    "multilingual",
    "bbq",
    "short_facts",
    "gsm8k",
    "mmlu",
    "ifeval",
    "policy",
)
"""As the pipeline's and the registry's (a test holds that), whose imports take seconds."""


def stages() -> list[str]:
    return list(STAGES)


def suites() -> list[str]:
    return list(SUITES)


def recipes() -> list[tuple[str, str]]:
    from delib import reference

    return reference.shipped()


def keys() -> list[tuple[str, str]]:
    from delib import reference

    return [(key.name, key.about) for part in reference.parts() for key in part.keys]


def sections() -> list[tuple[str, str]]:
    from delib import reference

    return [(part.name, part.about) for part in reference.parts() if part.name]


def arms() -> list[str]:
    from delib.recipe import ARMS

    return list(ARMS)


def run_arms(context: typer.Context, incomplete: str) -> Iterator[str]:
    """RUN:ARM of the runs below `runs/`, or of the one that is typed. Bash takes the colon for a word of its own."""
    run, colon, _ = incomplete.rpartition(":")
    if incomplete == ":":
        return  # bash would put a colon more
    if ":" in (context.params.get("sources") or [])[-1:]:
        yield from arms()
        return
    found = [run] if colon else [str(file.parent) for file in sorted(Path("runs").glob("*/recipe.yaml"))]
    for folder in found:
        yield from (f"{folder}:{arm}" for arm in arms())
