"""The OpenAI Model Spec's layout, made into a spec.

In: a document whose headings end on `{#anchor authority=level}`, with links `[?](#anchor)`, examples in fences after
`**Example**: …` and commentary after `!!! meta`. Out: headings of the first level as categories, sections with an
authority as clauses, the text around them as the category's opening, definitions as terms for all categories.

A clause refuses where its title forbids something at a level that neither developers nor users can lift; a
prohibition below is a default that they may change, and so is left to be decided.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from delib.authoring.draft import prefix
from delib.authoring.reading import Block, Heading, guess
from delib.authoring.rebuilding import Imported, Part, Row, Rule, one_line, plain, spec
from delib.errors import UserError

_ATTRIBUTES = re.compile(r"\s*\{#(?P<anchor>[\w-]+)(?P<rest>[^}]*)\}\s*$")
_DEFINED = re.compile(r"\*\*(?P<term>[^*]+?):?\*\*:?\s*(?P<text>.+)", re.DOTALL)
_POINTS_BACK = re.compile(r"\b(?:above|(?:first|second) response)\b|^Here,")
_FIRM = ("root", "system")
_DEFINITIONS = "definitions"


class _Section(NamedTuple):
    """A heading without its attributes. `top` is the heading of the first level that it stands under."""

    at: Heading
    title: str
    anchor: str
    authority: str | None
    top: Heading


def imported(found: list[Heading], path: Path) -> Imported:
    """Raises UserError where no section has an authority."""
    sections = [_section(h) for h in found if h.level]
    rules = [s for s in sections if s.authority]
    if not rules:
        raise UserError(
            f"{path}: no heading has an authority, such as '## Title {{#anchor authority=root}}', so this is not the "
            "Model Spec's layout; try --format markdown"
        )
    names = {s.at: s.title for s in sections}
    letters: dict[Heading, str] = {}
    for rule in rules:
        if rule.top not in letters:
            if names[rule.top] in (names[top] for top in letters):
                names[rule.top] += f" (line {rule.top.line})"
            letters[rule.top] = prefix(names[rule.top], {"P", *letters.values()})
    idents = {r.at: f"{letters[r.top]}{[x.top for x in rules[:n]].count(r.top) + 1}" for n, r in enumerate(rules)}
    links = {s.anchor: (s.title, idents.get(s.at)) for s in sections}
    left_out: dict[str, list[int]] = defaultdict(list)
    rows: list[Row] = []
    terms: list[str] = []
    openings: dict[Heading, list[str]] = defaultdict(list)
    clauses: dict[Heading, list[Rule]] = defaultdict(list)
    for section in sections:
        texts, points_back = _instructions(section.at.blocks, left_out)
        texts = [_without_links(t, links) for t in texts]
        category = f"category {names[section.top]!r}"
        if section.authority:
            clause = _rule(section, texts, points_back)
            clauses[section.top].append(clause)
            taken, became = True, f"clause {idents[section.at]} of {category}, {clause.decided}"
        elif section.top in letters:
            lead = [] if section.at is section.top else [f"{section.title}:"]
            openings[section.top] += [plain(t) for t in [" ".join([*lead, *texts[:1]]), *texts[1:]] if texts]
            taken, became = True, category if section.at is section.top else f"opening text of {category}"
            if not texts and lead:
                taken, became = False, "no text of its own; what stands under it has its own rows"
        elif section.anchor == _DEFINITIONS:
            terms = _terms(texts)
            taken, became = True, f"{len(terms)} terms for all categories, under Principles"
        else:
            taken, became = False, "for people: no section with an authority stands under its chapter"
        rows.append(Row(section.at.line, section.title, taken, became))
    parts = [
        Part(names[top], letters[top], f"Covers: {'; '.join(r.title for r in mine)}.", openings[top], mine)
        for top, mine in clauses.items()
    ]
    intro = ["Worked examples, commentary, footnote marks and bold are left out."]
    return Imported(spec("", path.name, intro, terms, parts), rows, left_out)


def _section(at: Heading) -> _Section:
    top = at
    while top.parent is not None and top.parent.level:
        top = top.parent
    match = _ATTRIBUTES.search(at.title)
    if match is None:
        return _Section(at, one_line(at.title) or f"Section of line {at.line}", "", None, top)
    authority = re.search(r"authority=(\w+)", match.group("rest"))
    title = one_line(at.title[: match.start()]) or match.group("anchor")
    return _Section(at, title, match.group("anchor"), authority.group(1) if authority else None, top)


def _instructions(blocks: list[Block], left_out: dict[str, list[int]]) -> tuple[list[str], bool]:
    """The texts that instruct, without examples and commentary; and whether one points back at an example."""
    kept: list[str] = []
    points_back, after = False, ""
    for block in blocks:
        if block.text.startswith("!!!"):
            left_out["block of commentary"].append(block.line)
            after = "commentary"
        elif block.kind == "code_block" and after == "commentary":
            continue
        elif block.kind == "fence":
            left_out["worked example"].append(block.line)
            after = "example"
        elif not block.text.startswith("**Example**"):
            points_back |= after == "example" and bool(_POINTS_BACK.search(block.text))
            kept.append(block.text)
            after = ""
    return kept, points_back


def _without_links(text: str, links: dict[str, tuple[str, str | None]]) -> str:
    """No footnote marks and no addresses; a link to a section that became a clause is followed by its ID."""

    def cited(match: re.Match[str]) -> str:
        words, anchor = match.groups()
        title, ident = links.get(anchor, (anchor, None))
        return (title if words == "?" else words) + (f" ({ident})" if ident else "")

    text = re.sub(r"\[\^[^\]]+\]", "", text)
    text = re.sub(r"\[([^\]]+)\]\(#([\w-]+)\)", cited, text)
    return re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text)


def _terms(texts: list[str]) -> list[str]:
    """`- term: …` of each; what stands between two terms belongs to the first."""
    found: list[str] = []
    for text in texts:
        if match := _DEFINED.match(text):
            found.append(f"- {one_line(match.group('term')).lower()}: {one_line(match.group('text'))}")
        elif found:
            found[-1] += f" {one_line(text)}"
    return found


def _rule(section: _Section, texts: list[str], points_back: bool) -> Rule:
    text = "\n\n".join([*(t for t in map(plain, texts) if t), f"Authority: {section.authority}."])
    if points_back:
        text += "\nTODO: a sentence here points back at an example that was left out; reword it or take it out."
    guessed = guess(section.title)
    if guessed and guessed.behaviour == "refuse" and section.authority not in _FIRM:
        guessed = None
    return Rule(section.title, text, guessed)
