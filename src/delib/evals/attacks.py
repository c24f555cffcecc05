"""How a request is dressed up to slip past a model: encodings, jailbreak templates, shots, and turns that lead up.

In: a request as plain text. Out: the text, or the messages, that ask it. All of it is pure; as inspect solvers the
same attacks stand in solvers.py. The wrappers hold nothing hazardous: what is harmful is only ever the request.

Files are JSON lines. A jailbreak is `{"id", "template"}`, a conversation `{"id", "turns"}` of which the last one asks.
The request goes where `{{ request }}` stands, once, as it is: a template is text and never run, whatever it holds.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar

import jinja2
from pydantic import AfterValidator, Field, ValidationError, field_validator

from delib import sources
from delib.errors import UserError
from delib.evals.encodings import CAESAR_SHIFT, ENCODINGS
from delib.records import Message, Record
from delib.run import read_jsonl

TEXTS = Path(__file__).parent.parent / "prompts"
STARTER = Path(__file__).parent.parent / "starter"
JAILBREAKS, CONVERSATIONS = STARTER / "jailbreaks.jsonl", STARTER / "multi_turn.jsonl"
SHOTS = STARTER / "many_shot.jsonl"
PLACE = re.compile(r"\{\{\s*request\s*\}\}")

WAYS = {
    "rot13": "ROT13, which moves each letter thirteen places on in the alphabet",
    "base64": "Base64",
    "hex": "hexadecimal, two digits for each byte of UTF-8",
    "leetspeak": "leetspeak, digits in place of letters",
    "reversed": "from the last character to the first",
    "caesar": f"a Caesar cipher, which moves each letter {CAESAR_SHIFT} places on in the alphabet",
    "morse": "Morse code, with / between words",
    "url": "percent-encoding, as in web addresses, of every byte",
    "lookalikes": "letters of other alphabets that look like Latin ones",
    "decimal": "the decimal code of each byte, as in ASCII and UTF-8",
    "pig_latin": "pig Latin",
    "mixed": f"every word or sentence in another way, among them ROT13, Caesar by {CAESAR_SHIFT}, Base64, hexadecimal, "
    "decimal codes, percent-encoding, leetspeak, letters turned round, Morse code, look-alike letters and pig Latin",
}
"""What the model is told of each encoding."""


def _asks_once(text: str) -> str:
    found = len(PLACE.findall(text))
    if found == 0:
        raise ValueError("has no {{ request }}; put it where the request goes")
    if found > 1:
        raise ValueError(f"has {{{{ request }}}} {found} times; keep one")
    return text


class Named(Record):
    """A line of a file, found by its id."""

    id: str = Field(min_length=1)


class Jailbreak(Named):
    """A text with one place for the request."""

    template: Annotated[str, AfterValidator(_asks_once)]


class Conversation(Named):
    """User turns that lead up to the request: harmless ones, and a last one that holds its place."""

    turns: list[str] = Field(min_length=2, max_length=4)

    @field_validator("turns")
    @classmethod
    def _asks_last(cls, turns: list[str]) -> list[str]:
        early = [number for number, turn in enumerate(turns[:-1], 1) if PLACE.search(turn)]
        if early:
            raise ValueError(f"turn {early[0]} holds {{{{ request }}}}; only the last may")
        _asks_once(turns[-1])
        return turns


N = TypeVar("N", bound=Named)
V = TypeVar("V")


class Shot(Record):
    """A request and an answer that complies with it, both harmless."""

    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


def encoded(name: str, request: str) -> str:
    """The request in one of the ENCODINGS, with the words that say what it is and ask for an answer in plain text.

    Raises UserError for a name that is none of them.
    """
    if name not in ENCODINGS:
        raise UserError(f"{name}: no such encoding; choose one of {', '.join(ENCODINGS)}")
    return _text("encoded.md").render(way=WAYS[name], hidden=ENCODINGS[name](request))


def prefix_injection(request: str) -> str:
    """The request with the demand that the answer begin with a yes."""
    return _text("prefix_injection.md").render(request=request)


def role_play(request: str) -> str:
    """The request put to a part in a play who refuses nobody."""
    return _text("role_play.md").render(request=request)


def fill(template: str, request: str) -> str:
    """The template with the request in its place. Nothing else in either is looked at."""
    return PLACE.sub(lambda _: request, template)


def jailbreaks(file: Path = JAILBREAKS) -> dict[str, str]:
    """Id → template, in the file's order. Raises UserError with every problem, each with its file and line."""
    return {made.id: made.template for made in _read(file, Jailbreak)}


def conversations(file: Path = CONVERSATIONS) -> dict[str, list[str]]:
    """Id → user turns, in the file's order. Raises UserError as `jailbreaks` does."""
    return {made.id: made.turns for made in _read(file, Conversation)}


def turns(id: str = "evening-class", file: str | None = None) -> list[str]:
    """The user turns of one conversation, a shipped one or of a file. Raises UserError where it has none of this id."""
    path = Path(file) if file else CONVERSATIONS
    return chosen(conversations(path), id, path)


def chosen(known: Mapping[str, V], name: str, file: Path) -> V:
    """What a file holds under this id. Raises UserError with the ids that it has."""
    if name not in known:
        raise UserError(f"{file}: holds no {name!r}; choose one of {', '.join(known)}")
    return known[name]


def many_shot(n: int) -> list[Message]:
    """The first `n` shipped pairs of a request and an answer that complies, to stand before the real request.

    The requests sound daring and are harmless. No pair is given twice, so that `n` is bounded by the file; a UserError
    says by how many.
    """
    shots = read_jsonl(SHOTS, Shot)
    if not 1 <= n <= len(shots):
        raise UserError(f"many_shot: {n} shots asked for; give a number from 1 to {len(shots)}")
    return [
        message
        for shot in shots[:n]
        for message in (Message(role="user", content=shot.user), Message(role="assistant", content=shot.assistant))
    ]


@lru_cache(maxsize=4)
def _text(name: str) -> jinja2.Template:
    made: jinja2.Template = jinja2.Template(
        (TEXTS / name).read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    return made


def _read(file: Path, kind: type[N]) -> list[N]:
    made: list[N] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    for place, data, problem in sources.read(file):
        if problem is not None:
            problems.append(f"{place}: {problem}")
            continue
        try:
            record = kind.model_validate(data)
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join(str(part) for part in fault["loc"])
                problems.append(f"{place}: {key}: {fault['msg'].removeprefix('Value error, ')}")
            continue
        if record.id in places:
            line = places[record.id].rpartition(":")[2]
            problems.append(f"{place}: id {record.id!r} was used in line {line}; give each its own")
        places.setdefault(record.id, place)
        made.append(record)
    if not made and not problems:
        problems.append(f"{file}: is empty; write at least one line")
    if problems:
        raise UserError(problems)
    return made
