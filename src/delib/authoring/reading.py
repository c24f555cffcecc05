"""Other people's policy documents in markdown, read into headings with what stands under each.

In: a document's text. Out: its headings in order, with their lines and blocks, as a CommonMark parser sees them: a
`#` inside a fenced example is no heading. Here is also what the explicit words of a rule say of its behaviour.
"""

import re
import textwrap
from dataclasses import dataclass, field
from typing import NamedTuple

from delib.records import Behaviour

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_MARKER = re.compile(r"\s*(?:[-*+]|\d+[.)])\s*(?:\[[ xX]\]\s+)?")


class Block(NamedTuple):
    """A block under a heading. `kind` is markdown-it's: paragraph, bullet_list, ordered_list, fence, code_block,
    blockquote, table, html_block, hr. `items`: of a list, the text of each item without its marker, with its line."""

    kind: str
    line: int
    text: str
    items: list[tuple[int, str]]


@dataclass(eq=False)
class Heading:
    """A heading, or the document before its first one (level 0, no title)."""

    line: int
    level: int
    title: str
    parent: "Heading | None" = None
    blocks: list[Block] = field(default_factory=list)


def headings(text: str) -> list[Heading]:
    """The document's start and its headings, in order, each with its parent."""
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    # What stands before the document is taken away line by line, so that lines keep their numbers.
    text = _FRONT_MATTER.sub(lambda m: "\n" * m.group().count("\n"), text)
    lines = text.split("\n")
    found = [Heading(1, 0, "")]
    for node in SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(text)).children:
        if node.map is None:
            continue
        start, end = node.map
        if node.type == "heading":
            title = " ".join(node.children[0].content.split())
            level = int(node.tag[1:])
            parent = next(h for h in reversed(found) if h.level < level)
            found.append(Heading(start + 1, level, title, parent))
            continue
        children = node.children if node.type.endswith("_list") else []
        items = [(c.map[0] + 1, _item(lines[c.map[0] : c.map[1]])) for c in children if c.map is not None]
        raw = "\n".join(lines[start:end]).rstrip()
        found[-1].blocks.append(Block(node.type, start + 1, raw, [i for i in items if i[1]]))
    return found


def _item(lines: list[str]) -> str:
    first = _MARKER.sub("", lines[0], count=1)
    return "\n".join([first, textwrap.dedent("\n".join(lines[1:]))]).strip()


_NEGATED = r"(?:do not|don['’]t|does not|never|must not|should not|shall not|will not|may not|cannot)"
_STATES = r"(?!\s+(?:be (?!\w+(?:ed|en|wn|ade|iven)\b)|have|assume|hesitate|forget|need))"
_OPEN = re.compile(r"\b(?:unless|except|depending)\b|\bonly (?:if|when|with|after)\b", re.IGNORECASE)
_ANSWERED = re.compile(
    rf"\b{_NEGATED} (?:refuse|decline)\b"
    r"|\b(?:allowed|permitted|acceptable|answered)\b"
    r"|\b(?:may|can) (?:be )?(?:answer|explain|discuss|help|describe)\w*\b"
    r"|\bcompl(?:y|ied) with requests\b"
    r"|^do(?:['’]?s)?$",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|never) (?:be )?$", re.IGNORECASE)
_REFUSED = re.compile(
    r"\b(?:refuse[sd]?|declined?|declines|prohibited|prohibitions?|forbidden|disallowed)\b"
    r"|\b(?:not|never) (?:be )?(?:allowed|permitted|acceptable|answered)\b"
    rf"|^(?:the (?:assistant|model|agent) )?(?:do not|don['’]ts?|never)\b{_STATES}"
    rf"|\b(?:must|should|shall|will|may) (?:not|never)\b{_STATES}",
    re.IGNORECASE,
)


class Guess(NamedTuple):
    """What a rule's own words say. `behaviour` None: they name both sides, or hang on a condition, so that a person has
    to decide. `words` are those that say it."""

    behaviour: Behaviour | None
    words: str


def guess(rule: str) -> Guess | None:
    """The behaviour that explicit words name; None where no word does."""
    if condition := _OPEN.search(rule):
        return Guess(None, condition.group())
    answered = [m for m in _ANSWERED.finditer(rule) if not _DENIED.search(rule[: m.start()])]
    spans = [m.span() for m in answered]
    refused = [m for m in _REFUSED.finditer(rule) if not any(a <= m.start() < b for a, b in spans)]
    if answered and refused:
        return Guess(None, f"{answered[0].group()} … {refused[0].group()}")
    if answered:
        return Guess("comply", answered[0].group())
    return Guess("refuse", refused[0].group()) if refused else None
