"""A first draft of a spec: from questions on the terminal, or from an outline.

In: a person's answers, or an outline's name. Out: a spec's text that parses. What only the author can say stands in
it as a TODO, which `delib spec check` lists.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import typer

from delib.errors import UserError
from delib.records import Behaviour
from delib.run import write_whole
from delib.spec import blocks, read_text

OUTLINES = Path(__file__).parent.parent / "outlines"
FIRST = Path(__file__).parent.parent / "templates" / "first_spec.md"
STYLES: dict[Behaviour, str] = {"refuse": "short-refusal", "safe_complete": "careful-answer"}
"""The default styles of `FIRST`."""
TITLE_WORDS = 9
NO_REASON = "Why: TODO: give the reason, which is what a model reasons with."


class Drafted(NamedTuple):
    """What a person said of a category: `careful` is what is answered only with care, if anything."""

    name: str
    summary: str
    refused: str
    answered: str
    careful: str | None


def create(path: Path, outline_name: str | None) -> str:
    """Write a new spec; returns what to do next. Raises UserError where something stands there already."""
    must_be_new(path)
    write_whole(path, outline(outline_name) if outline_name else questions())
    return f"{path} is written. What is still to do, with its lines: delib spec check {path}\n"


def must_be_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: is there already, and is not overwritten; name a new file")
    if in_the_way := next((p for p in path.parents if p.is_file()), None):
        raise UserError(f"{path}: {in_the_way} is a file, so it can't hold another; name a new file elsewhere")


def questions() -> str:
    """Ask on the terminal; returns the spec."""
    typer.echo("A policy has categories; each says what is refused in it and what is answered. Enter ends a list.\n")
    title = _ask("Title of the policy")
    categories: list[Drafted] = []
    while name := _category([c.name for c in categories]):
        categories.append(
            Drafted(
                name,
                _ask("  Its summary, in one or two sentences"),
                _ask('  One thing that is refused (such as "telling which share to buy")'),
                _ask('  One thing near it that is answered (such as "explaining what a share is")'),
                _ask("  One thing that is answered only with care (Enter for none)", default="") or None,
            )
        )
    return written(title, categories)


def _ask(question: str, default: str | None = None) -> str:
    def said(answer: str) -> str:
        if not answer.strip() and default is None:
            raise typer.BadParameter("say something, or Ctrl-C to leave without a file")
        return answer.strip()

    return str(typer.prompt(question, default=default, show_default=False, value_proc=said))


def _category(names: list[str]) -> str:
    """The next category's name; empty when there are no more."""

    def fresh(answer: str) -> str:
        if answer.strip() in names:
            raise typer.BadParameter(f"{answer.strip()!r} is there already; give it another name")
        return answer.strip()

    if not names:
        return _ask("First category, such as investment advice")
    return str(typer.prompt("Next category (Enter for none)", default="", show_default=False, value_proc=fresh))


def written(title: str, categories: list[Drafted]) -> str:
    """The spec. A style that no clause would use is left out."""
    taken = {"P"}
    parts = []
    for category in categories:
        letters = prefix(category.name, taken)
        taken.add(letters)
        things: list[tuple[Behaviour, str, str]] = [
            ("refuse", "Refused", category.refused),
            ("comply", "Answered", category.answered),
        ]
        if category.careful:
            things.append(("safe_complete", "Answered with care", category.careful))
        clauses = []
        for number, (behaviour, word, thing) in enumerate(things, 1):
            head = heading(f"{letters}{number}", behaviour, short_title(thing))
            clauses.append(f"{head}\n{word}: {thing.rstrip('.')}.\n{NO_REASON}\n")
        parts.append("\n".join([f"## Category: {category.name}\nSummary: {category.summary}\n", *clauses]))
    used: list[Behaviour] = ["refuse", "safe_complete"] if any(c.careful for c in categories) else ["refuse"]
    return whole(title, "", "", used, "\n".join(parts))


def whole(title: str, intro: str, terms: str, used: Collection[Behaviour], categories: str) -> str:
    """A spec of these parts, with the default principle, and the default styles of the behaviours that are used.

    `terms`: lines that define terms for all categories.
    """
    principles, styles = blocks(read_text(FIRST))[2]
    wanted = [f"### {name} (" for behaviour, name in STYLES.items() if behaviour in used]
    styles.children = [s for s in styles.children if s.heading.startswith(tuple(wanted))]
    parts = [f"# {title}", intro, principles.heading, terms, *(c.full for c in principles.children)]
    return "\n\n".join(p for p in [*parts, styles.full if wanted else "", categories] if p).rstrip() + "\n"


def heading(ident: str, behaviour: Behaviour, title: str) -> str:
    """A clause's heading, with the default style of its behaviour."""
    style = f", {STYLES[behaviour]}" if behaviour in STYLES else ""
    return f"### {ident} ({behaviour}{style}): {title}"


def short_title(text: str) -> str:
    """The first words of a text, as a title."""
    words = text.split()
    title = " ".join(words[:TITLE_WORDS]).rstrip(" .,;:") + ("…" if len(words) > TITLE_WORDS else "")
    return title[:1].upper() + title[1:] or "Untitled"


def prefix(name: str, taken: Collection[str]) -> str:
    """Letters for the IDs of a category's clauses: the initials of its longer words, made its own by more letters."""
    words = re.findall(r"[A-Za-z]+", name)
    longer = [w for w in words if len(w) > 3] or words
    initials = "".join(w[0] for w in longer[:3]).upper() or "C"
    tail = "".join(words).upper()[1:] + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    candidates = [initials, *(initials + letter for letter in tail)]
    candidates += [f"{initials}{a}{b}" for a in tail for b in tail]
    return next(c for c in candidates if c not in taken)


def outline(name: str) -> str:
    """A shipped outline. Raises UserError when there is none of that name."""
    names = sorted(p.stem for p in OUTLINES.glob("*.md"))
    if name not in names:
        raise UserError(f"--outline {name}: no such outline; one of {', '.join(names)}")
    return read_text(OUTLINES / f"{name}.md")
