"""A spec from the parts that an importer found, and the account of where each heading of the source went.

In: categories with rules. Out: a spec's text. What the source's words did not decide is written as comply, with a
TODO beside it that `delib spec check` lists.
"""

import re
from typing import NamedTuple

from delib.authoring.draft import heading, whole
from delib.authoring.reading import Guess
from delib.records import Behaviour

UNDECIDED: Behaviour = "comply"
_TODO = "TODO: say whether this is refused, answered or answered with care."


class Row(NamedTuple):
    """The account of a heading: `became` says as what it was taken, or why it was left out."""

    line: int
    title: str
    taken: bool
    became: str


class Imported(NamedTuple):
    """A spec's text, the account of every heading of the source, and the lines of what else was left out, by kind."""

    text: str
    rows: list[Row]
    left_out: dict[str, list[int]]


class Rule(NamedTuple):
    """A clause to be written."""

    title: str
    text: str
    guess: Guess | None

    @property
    def behaviour(self) -> Behaviour | None:
        """None while it is to be decided."""
        return self.guess.behaviour if self.guess else None

    @property
    def decided(self) -> str:
        """For the account: the behaviour and the words that it was taken from."""
        return f"{self.behaviour} by {self.guess.words!r}" if self.guess and self.behaviour else "to be decided"


class Part(NamedTuple):
    """A category to be written. `letters` begin its clauses' IDs."""

    name: str
    letters: str
    summary: str
    opening: list[str]
    rules: list[Rule]


def spec(title: str, source: str, intro: list[str], terms: list[str], parts: list[Part]) -> str:
    used = {r.behaviour for p in parts for r in p.rules if r.behaviour}
    own = "The principle P1 and the styles are delib's own; put the policy's in their place."
    opening = "\n\n".join([f"Made from {source}. {own}", *intro])
    return whole(title or f"Made from {source}", opening, "\n".join(terms), used, "\n".join(map(_section, parts)))


def _section(part: Part) -> str:
    pieces = [f"## Category: {part.name}\nSummary: {part.summary}\n", *(f"{text}\n" for text in part.opening)]
    for number, rule in enumerate(part.rules, 1):
        todo = "" if rule.behaviour else f"{_TODO}\n"
        head = heading(f"{part.letters}{number}", rule.behaviour or UNDECIDED, rule.title or "Untitled")
        pieces.append(f"{head}\n{rule.text}\n{todo}")
    return "\n".join(pieces)


def one_line(text: str) -> str:
    """Text as one line that can be no heading."""
    return re.sub(r"^[#\s]+", "", " ".join(plain(text).split()))


def plain(text: str) -> str:
    """Text of which no line can be a heading of a spec. Bold marks a term in a spec, so it is taken off."""
    lines = re.sub(r"\*\*|__(?=\S)|(?<=\S)__", "", text).splitlines()
    return "\n".join(re.sub(r"^\s*#[#\s]*", "", line).rstrip() for line in lines if line.strip())
