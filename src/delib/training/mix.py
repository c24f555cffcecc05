"""Ordinary chat that SFT mixes in among the examples, so that the student keeps what it could do.

In: conversations that end in one turn of the assistant's, each row with `messages` (or `conversations`, of `from` and
`value`). Its reasoning is optional: in think tags, or as `reasoning` or `reasoning_content` of the turn or the row.
Out: Examples; where there is no reasoning it is empty.
"""

import json
from typing import Any

from delib import chat, overlap, sources
from delib.errors import UserError
from delib.records import Example, Message, Prompt

APART = ("reasoning_content", "reasoning")


def load(name: str) -> tuple[list[Example], int]:
    """The examples of a set, and how many of its rows are none. In JSON lines such a row is a mistake.

    Raises UserError that lists all of them, or when the set can't be read.
    """
    found: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(sources.table(name)):
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            found.append(_example(f"mix:{number}", row.data))
        except ValueError as error:
            problems.append(f"{row.place}: {error}")
    if problems and not sources.foreign(name):
        raise UserError(problems)
    if not found:
        raise UserError(f"sft.mix.data: {name} holds no conversation that ends in the assistant's turn")
    return found, len(problems)


def _example(ident: str, data: dict[str, Any]) -> Example:
    """One row. Raises ValueError when it is no conversation that ends in one answer."""
    value = next((data[c] for c in sources.CONVERSATIONS if data.get(c) is not None), None)
    opening = sources.conversation(value)
    turns = json.loads(value) if isinstance(value, str) else value or []
    if not opening or opening[-1]["role"] != "user" or len(turns) != len(opening) + 1:
        raise ValueError("messages: not a conversation that ends in a user's turn and one of the assistant's")
    turn = turns[-1]
    text = turn.get("content") or turn.get("value") or ""
    apart = next((place[c] for place in (turn, data) for c in APART if place.get(c)), None)
    if not isinstance(text, str) or not isinstance(apart, str | None):
        raise ValueError("messages: the assistant's answer or reasoning is no text")
    if apart and (chat.OPEN in apart or chat.CLOSE in apart):
        raise ValueError("messages: the assistant's reasoning has think tags in it")
    parts = chat.split(text)
    if parts.malformed or not parts.answer or (parts.reasoning and apart):
        raise ValueError("messages: the assistant's turn has no answer, or astray or doubled reasoning")
    return Example(
        prompt_id=ident,
        messages=[Message.model_validate(turn) for turn in opening],
        reasoning=parts.reasoning or apart or "",
        answer=parts.answer,
    )


def clean(examples: list[Example], heldout: list[Prompt]) -> list[Example]:
    """Those that hold no held-out prompt."""
    asked = [Prompt(id=e.prompt_id, messages=e.messages) for e in examples]
    near = overlap.contaminated(asked, heldout)
    return [e for e in examples if e.prompt_id not in near]
