"""A written policy: markdown in, Spec out. The format is told in docs/spec.md; the starter is an example of it.

`## Principles` and each `## Category: name` hold clauses (`### ID (behaviour[, style]): Title`), `## Styles` holds
style guidelines (`### name (behaviour): Title`) with `- must`, `- avoid` and `- length` elements. A clause of the
principles may decide a prompt of any category, or of none.
"""

import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

from pydantic import BaseModel

from delib.errors import UserError
from delib.records import Behaviour

BEHAVIOURS: tuple[str, ...] = get_args(Behaviour)
CLAUSE = re.compile(r"^### (\S+) \(([^)]*)\):\s*(.*)$")
_ELEMENT = re.compile(r"^- (must|avoid) `([^`]+)`: (.*?)(?:\s*Examples: (.*))?$")
_LENGTH = re.compile(r"^- length: (?:at least (\d+) words)?(?:, )?(?:at most (\d+) words)?$")
_ID = re.compile(r"[A-Z][A-Za-z]*-?\d+$")


class Element(BaseModel):
    """One checkable element of a style: the answer `must` show it or must `avoid` it."""

    kind: str
    name: str
    text: str
    examples: list[str]


class Style(BaseModel):
    """A style guideline. `min_words` and `max_words` bound the answer's length in words."""

    name: str
    behaviour: str
    title: str
    text: str
    elements: list[Element] = []
    min_words: int | None = None
    max_words: int | None = None


class Clause(BaseModel):
    """One numbered statement. `category` None: a principle, which may decide a prompt of any category."""

    id: str
    behaviour: Behaviour
    style: str | None
    title: str
    text: str
    category: str | None


class Category(BaseModel):
    name: str
    summary: str
    text: str
    clauses: list[Clause]


class Spec(BaseModel):
    """The parsed policy. `text` is the whole file; sections keep their markdown, which is what models are shown."""

    title: str
    intro: str
    text: str
    principles: str
    styles_text: str
    general: list[Clause]
    styles: list[Style]
    categories: list[Category]

    @property
    def hash(self) -> str:
        return digest(self.text)

    @cached_property
    def clauses(self) -> dict[str, Clause]:
        return {c.id: c for c in [*self.general, *(c for cat in self.categories for c in cat.clauses)]}

    @cached_property
    def ids(self) -> re.Pattern[str]:
        """What looks like a clause's ID: the form of one of this spec's, or a letter and a number."""
        shapes = {re.escape(re.sub(r"\d+", "", i)) for i in self.clauses}
        letters = "|".join(sorted(shapes | {"[A-Z]"}, key=len, reverse=True))
        return re.compile(rf"\b(?:{letters})\d{{1,3}}\b")

    def category(self, name: str) -> Category:
        return next(c for c in self.categories if c.name == name)

    def style(self, name: str) -> Style:
        return next(s for s in self.styles if s.name == name)

    def style_for(self, clause: str | None, behaviour: str) -> Style | None:
        """The style the clause names, or else the only style of that behaviour; None for comply."""
        if clause is not None and clause in self.clauses:
            named = self.clauses[clause].style
            if named is not None:
                return self.style(named)
        of_behaviour = [s for s in self.styles if s.behaviour == behaviour]
        return of_behaviour[0] if len(of_behaviour) == 1 else None

    def required(self, clause: str | None, behaviour: Behaviour | None) -> Behaviour | None:
        """The behaviour this spec demands: the clause's when it has that clause, else the given label."""
        return self.clauses[clause].behaviour if clause in self.clauses else behaviour

    def summary(self) -> str:
        """The summarised spec: every category's summary, principles' titles and styles' first lines."""
        lines = [f"- {c.name}: {c.summary}" for c in self.categories]
        rules = [f"- {c.title}" for c in self.general]
        styles = [f"- {s.title}: {s.text.splitlines()[0] if s.text else ''}" for s in self.styles]
        return "\n".join(["Categories:", *lines, "Principles:", *rules, "Styles:", *styles])

    def excerpt(self, category: str | None) -> str:
        """spec(category) of the paper: all summaries, principles and styles, and the FULL text of one category.

        `category` None (no category applies): the summaries, principles and styles alone.
        """
        return self._excerpts[category]

    @cached_property
    def _excerpts(self) -> dict[str | None, str]:
        common = "\n\n".join(
            [
                "# Summaries of all categories",
                *(f"- {c.name}: {c.summary}" for c in self.categories),
                self.principles,
                self.styles_text,
            ]
        )
        return {None: common} | {c.name: f"{common}\n\n{c.text}" for c in self.categories}

    def excerpt_id(self, category: str | None) -> str:
        """The hash of the excerpt, so that an edited clause touches only what saw it."""
        return digest(self.excerpt(category))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError when it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def load(path: Path) -> Spec:
    """Parse a spec. Raises UserError with every structural problem, each with its line and mend."""
    return parse(read_text(path), str(path))


def check(path: Path) -> list[str]:
    """Every structural problem of a spec file, one line each; empty when it is sound."""
    try:
        load(path)
    except UserError as error:
        return error.problems
    return []


class Block:
    """A heading with the lines under it, up to the next heading of its level or higher."""

    def __init__(self, line: int, heading: str) -> None:
        self.line, self.heading, self.lines = line, heading, list[tuple[int, str]]()
        self.children: list[Block] = []

    @property
    def own(self) -> str:
        return "\n".join(text for _, text in self.lines).strip()

    @property
    def full(self) -> str:
        return "\n\n".join(p for p in [self.heading, self.own, *(c.full for c in self.children)] if p)


def blocks(text: str) -> tuple[str, str, list[Block]]:
    """The title, the introduction and the `##` blocks with their `###` children."""
    title, intro, sections = "", list[str](), list[Block]()
    target: Block | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.rstrip()
        if line.startswith("# "):
            title = line[2:].strip()
        elif line.startswith("## "):
            target = Block(number, line)
            sections.append(target)
        elif line.startswith("### ") and sections:
            target = Block(number, line)
            sections[-1].children.append(target)
        elif target is None:
            intro.append(line)
        else:
            target.lines.append((number, line))
    return title, "\n".join(intro).strip(), sections


def parse(text: str, where: str = "spec") -> Spec:
    """Parse a spec's markdown. `where` names it in problems. Raises UserError listing every problem."""
    problems: list[str] = []
    seen: dict[str, int] = {}

    def bad(line: int, what: str) -> None:
        problems.append(f"{where}:{line}: {what}")

    def clause(block: Block, category: str | None) -> Clause | None:
        match = CLAUSE.match(block.heading)
        if match is None:
            if category is None or "(" in block.heading:
                bad(block.line, f"{block.heading!r} is no clause heading; write '### ID (behaviour, style): Title'")
            return None
        ident, inside, title = match.groups()
        behaviour, _, style = (part.strip() for part in inside.partition(","))
        if not _ID.match(ident):
            bad(block.line, f"clause ID {ident!r} must be letters and a number, such as H1 or SH-12")
        if ident in seen:
            bad(block.line, f"clause ID {ident} was used in line {seen[ident]}; give each clause its own")
        seen.setdefault(ident, block.line)
        if not title:
            bad(block.line, f"clause {ident} has no title; add one after the colon")
        if not block.own:
            bad(block.line, f"clause {ident} has no text; say what it covers, and why")
        if behaviour not in BEHAVIOURS:
            bad(block.line, f"clause {ident}: behaviour {behaviour!r} is not one of {', '.join(BEHAVIOURS)}")
            return None
        uses.append((block.line, ident, behaviour, style or None))
        return Clause(
            id=ident,
            behaviour=cast(Behaviour, behaviour),
            style=style or None,
            title=title,
            text=block.own,
            category=category,
        )

    uses: list[tuple[int, str, str, str | None]] = []
    title, intro, sections = blocks(text)
    general: list[Clause] = []
    styles: list[Style] = []
    categories: list[Category] = []
    principles = styles_text = ""
    if not title:
        bad(1, "no title; begin with '# Title'")
    for section in sections:
        name = section.heading[3:].strip()
        if name == "Principles":
            principles = section.full
            general = [c for b in section.children if (c := clause(b, None))]
        elif name == "Styles":
            styles_text = section.full
            styles = [s for b in section.children if (s := _style(b, bad))]
        elif name.startswith("Category:"):
            categories.append(_category(section, name.removeprefix("Category:").strip(), clause, bad))
        else:
            bad(section.line, f"section {name!r} is not 'Principles', 'Styles' or 'Category: name'; rename it")
    names = [c.name for c in categories]
    for duplicate in sorted({n for n in names if names.count(n) > 1}):
        bad(1, f"category {duplicate!r} stands twice; merge or rename one")
    if not any(c.clauses for c in categories):
        bad(1, "the spec has no clauses; add '## Category: name' with '### ID (behaviour): Title' under it")
    by_name = {s.name: s for s in styles}
    for line, ident, behaviour, style in uses:
        if style is not None and style not in by_name:
            bad(line, f"clause {ident}: no style {style!r} under '## Styles'; add it or correct the name")
        elif style is not None and by_name[style].behaviour != behaviour:
            bad(line, f"clause {ident} is {behaviour}, its style {style} is for {by_name[style].behaviour}")
        elif style is None and behaviour != "comply" and sum(s.behaviour == behaviour for s in styles) != 1:
            bad(line, f"clause {ident} is {behaviour} and names no style; write '({behaviour}, style)'")
    if problems:
        raise UserError(problems)
    return Spec(
        title=title,
        intro=intro,
        text=text,
        principles=principles,
        styles_text=styles_text,
        general=general,
        styles=styles,
        categories=categories,
    )


def _category(section: Block, name: str, clause, bad) -> Category:  # type: ignore[no-untyped-def]
    if not name:
        bad(section.line, "a category needs a name: '## Category: name'")
    found = re.search(r"^Summary:\s*(.+)$", section.own, re.MULTILINE)
    if found is None:
        bad(section.line, f"category {name!r} has no summary; add a line 'Summary: …' under its heading")
    clauses = [c for b in section.children if b.heading != "### Definitions" and (c := clause(b, name))]
    if not clauses:
        bad(section.line, f"category {name!r} is empty; add a clause '### ID (behaviour): Title'")
    return Category(name=name, summary=found.group(1) if found else "", text=section.full, clauses=clauses)


def _style(block: Block, bad) -> Style | None:  # type: ignore[no-untyped-def]
    match = CLAUSE.match(block.heading)
    if match is None or match.group(2) not in BEHAVIOURS:
        bad(block.line, f"{block.heading!r} is no style heading; write '### name (behaviour): Title'")
        return None
    name, behaviour, title = match.groups()
    prose: list[str] = []
    style = Style(name=name, behaviour=behaviour, title=title, text="")
    for number, line in block.lines:
        element, length = _ELEMENT.match(line), _LENGTH.match(line)
        if element:
            kind, label, text, examples = element.groups()
            quoted = re.findall(r'"([^"]+)"', examples or "")
            if not quoted:
                bad(number, f'style {name}, element {label!r}: give examples, such as Examples: "…" / "…"')
            style.elements.append(Element(kind=kind, name=label, text=text, examples=quoted))
        elif length and (length.group(1) or length.group(2)):
            style.min_words = int(length.group(1)) if length.group(1) else None
            style.max_words = int(length.group(2)) if length.group(2) else None
        elif line.startswith("- "):
            bad(
                number,
                f"style {name}: {line!r} is no element; write '- must `name`: … Examples: \"…\"', or avoid, or length",
            )
        elif line:
            prose.append(line)
    if not any(e.kind == "must" for e in style.elements):
        bad(block.line, f"style {name} has no 'must' element; nothing could check it")
    style.text = "\n".join(prose)
    return style
