"""A spec for people to read: tables on the terminal, and one page of HTML that needs nothing else.

In: a spec, and perhaps the one category that is wanted. Out: text.
"""

import io
import shutil
from pathlib import Path

from delib import spec as specs
from delib.authoring.places import Section, sections
from delib.errors import UserError
from delib.rendering import environment
from delib.run import write_whole
from delib.spec import Clause, Spec

PRINCIPLES = "Principles"
WORDS = {"comply": "comply", "refuse": "refuse", "safe_complete": "safe completion"}


def report(path: Path, category: str | None, html: Path | None) -> str:
    """The spec as text or, with `html`, where its page was written."""
    spec = specs.load(path)
    if html is None:
        return terminal(spec, category)
    if html.suffix not in (".html", ".htm"):
        raise UserError(f"--html {html}: name a file that ends on .html")
    write_whole(html, page(spec, category))
    return f"{html}\n"


def wanted(spec: Spec, category: str | None) -> list[Section]:
    """The principles and all categories, or the one that is named. Raises UserError when it is not there."""
    laid = sections(spec.text)
    if category is None:
        return laid
    found = [s for s in laid if s.category == category]
    if not found:
        names = ", ".join(c.name for c in spec.categories)
        raise UserError(f"--category {category}: no such category; one of {names}")
    return found


def _clauses(spec: Spec, section: Section) -> list[Clause]:
    return [spec.clauses[ident] for ident in section.clauses]


def terminal(spec: Spec, category: str | None) -> str:
    """A table a category; of one category alone also its definitions and the clauses' texts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=shutil.get_terminal_size((100, 24)).columns)
    for section in wanted(spec, category):
        console.print(Text(section.category or PRINCIPLES, style="bold"))
        if section.category is not None:
            console.print(Text(spec.category(section.category).summary))
        table = Table("clause", "behaviour", "style", "title")
        for clause in _clauses(spec, section):
            style = spec.style_for(clause.id, clause.behaviour)
            cells = (clause.id, WORDS[clause.behaviour], style.name if style else "", clause.title)
            table.add_row(*(Text(cell) for cell in cells))
        if section.clauses:
            console.print(table)
        if category is not None:
            for term, text in section.terms.items():
                console.print(Text(f"{term}: {text}"))
            for clause in _clauses(spec, section):
                console.print(Text(f"\n{clause.id} {clause.title}", style="bold"))
                console.print(Text(clause.text))
        console.print()
    if category is None:
        styles = Table("style", "behaviour", "title", "elements")
        for style in spec.styles:
            elements = ", ".join(f"{e.kind} {e.name}" for e in style.elements)
            styles.add_row(*(Text(cell) for cell in (style.name, WORDS[style.behaviour], style.title, elements)))
        console.print(styles)
    return out.getvalue()


def page(spec: Spec, category: str | None) -> str:
    """One self-contained page with an anchor for each clause (`#clause-H1`)."""
    parts = [
        {
            "name": section.category or PRINCIPLES,
            "anchor": f"category-{number}" if section.category else "principles",
            "summary": spec.category(section.category).summary if section.category else None,
            "opening": _opening(section),
            "terms": section.terms,
            "clauses": [
                (c, style.name if (style := spec.style_for(c.id, c.behaviour)) else None, _paragraphs(c.text))
                for c in _clauses(spec, section)
            ],
        }
        for number, section in enumerate(wanted(spec, category))
    ]
    template = environment().get_template("spec.html")
    return template.render(spec=spec, parts=parts, whole=category is None, words=WORDS)


def _opening(section: Section) -> list[str]:
    """Its text outside clauses, without the summary and the terms, which stand by themselves."""
    defined = {f"- {term}: {text}" for term, text in section.terms.items()}
    return [text for _, text in section.own if not text.startswith("Summary:") and text not in defined]


def _paragraphs(text: str) -> list[tuple[str, bool]]:
    """The lines of a clause, each with whether it is the reason."""
    return [(line, line.startswith("Why:")) for line in text.splitlines() if line]
