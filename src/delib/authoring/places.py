"""Where things stand in a spec's file: what `spec.parse` leaves out because no model needs it.

In: a spec's text. Out: its principles and categories with their lines, definitions and text outside clauses.
A term is defined by a line `- term: …` under a category's `### Definitions`, or, for all categories, in the text of
`## Principles` before its first clause.
"""

import re
from typing import NamedTuple

from delib.spec import CLAUSE, Block, blocks

_DEFINITION = re.compile(r"^- ([^:`]+): (.+)$")
Line = tuple[int, str]


class Section(NamedTuple):
    """The principles (`category` None) or a category. `own` is its text outside definitions and clauses."""

    category: str | None
    line: int
    own: list[Line]
    terms: dict[str, str]
    clauses: dict[str, Block]


def sections(text: str) -> list[Section]:
    """The principles and categories of a spec that parses, in order."""
    return [_section(b) for b in blocks(text)[2] if b.heading.startswith(("## Principles", "## Category:"))]


def _section(block: Block) -> Section:
    named = block.heading.startswith("## Category:")
    own = [line for line in block.lines if line[1]]
    terms = {} if named else _terms(own)
    clauses: dict[str, Block] = {}
    for child in block.children:
        match = CLAUSE.match(child.heading)
        if match is not None:
            clauses[match.group(1)] = child
        elif child.heading == "### Definitions":
            terms |= _terms(child.lines)
        else:
            own += [(child.line, child.heading), *(line for line in child.lines if line[1])]
    name = block.heading.removeprefix("## Category:").strip() if named else None
    return Section(name, block.line, own, terms, clauses)


def _terms(lines: list[Line]) -> dict[str, str]:
    found = (_DEFINITION.match(text) for _, text in lines)
    return {m.group(1).strip(): m.group(2) for m in found if m}
