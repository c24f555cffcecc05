"""A first draft of a spec: from questions on the terminal, or from an outline.

In: a person's answers, or an outline's name. Out: a spec's text that parses. What only the author can say stands in
it as a TODO, which `delib spec check` lists. Beside it, where the person gave some, a first demonstration of each
clause, in the form that `generate.teacher: recorded` reads.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import typer

from delib import chat
from delib.errors import UserError
from delib.records import Behaviour
from delib.run import write_whole
from delib.spec import Clause, blocks, load, read_text

OUTLINES = Path(__file__).parent.parent / "outlines"
FIRST = Path(__file__).parent.parent / "templates" / "first_spec.md"
STYLES: dict[Behaviour, str] = {"refuse": "short-refusal", "safe_complete": "careful-answer"}
"""The default styles of `FIRST`."""
TITLE_WORDS = 9
PROMPTS, DEMONSTRATIONS = "prompts.jsonl", "demonstrations.jsonl"
KINDS: dict[Behaviour, tuple[str, str]] = {
    "refuse": ("disallowed", "refuse"),
    "comply": ("lookalike", "comply"),
    "safe_complete": ("safe_completion", "safe completion"),
}
"""A prompt's source, and the words that its reasoning concludes with (docs/pack.md)."""
OFFER = (
    "\nA model learns from demonstrations: a prompt, with the reasoning and the answer that you want. About 40 to "
    "60 are wanted to begin with; docs/tutorial.md tells why, under 'What 60 demonstrations are worth'."
)
NO_REASON = "Why: TODO: give the reason, which is what a model reasons with."


class Drafted(NamedTuple):
    """What a person said of a category: `careful` is what is answered only with care, if anything."""

    name: str
    summary: str
    refused: str
    answered: str
    careful: str | None


class Demonstration(NamedTuple):
    """What a person wants of a model that is asked `text`, which this clause decides."""

    clause: Clause
    text: str
    reasoning: str
    answer: str


def create(path: Path, outline_name: str | None) -> str:
    """Write a new spec; returns what to do next. Raises UserError where something stands there already."""
    must_be_new(path)
    write_whole(path, outline(outline_name) if outline_name else questions())
    more = "" if outline_name else demonstrations(path)
    return f"{path} is written. What is still to do, with its lines: delib spec check {path}\n{more}"


def demonstrations(path: Path) -> str:
    """Offer to note down some for a spec that was just written, and write them beside it; what to do with them, or
    nothing where there are none."""
    files = [path.with_name(name) for name in (PROMPTS, DEMONSTRATIONS)]
    if there := next((file for file in files if file.exists()), None):
        return f"{there} is there already, so demonstrations were not asked for.\n"
    rows = _noted([clause for category in load(path).categories for clause in category.clauses])
    if not rows:
        return ""
    for file, made in zip(files, (map(_prompt, rows), map(_recording, rows)), strict=True):
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return (
        f"{files[0]} and {files[1]} hold {len(rows)} of the 40 to 60 demonstrations to begin with; add more in that "
        f"form. To look at them: delib prompts check {files[0]} --spec {path}\n"
    )


def _noted(clauses: list[Clause]) -> list[Demonstration]:
    """Ask on the terminal. Where the answers end before their time, those that are whole count."""
    rows: list[Demonstration] = []
    typer.echo(OFFER)
    try:
        if not typer.confirm("Note down a first one of each clause now? (Enter for none)", default=False):
            return rows
        for clause in clauses:
            typer.echo(f"\n{clause.id} ({clause.behaviour}): {clause.title}")
            taken = [row.text for row in rows]
            if text := _fresh("  A prompt that it decides (Enter for none)", taken, "ask for something else"):
                by = f"  The reasoning: what is wanted, why, by {clause.id}, ending on {KINDS[clause.behaviour][1]!r}"
                rows.append(Demonstration(clause, text, _ask(by), _ask("  The answer, and nothing else")))
    except typer.Abort:
        typer.echo()
    return rows


def _prompt(row: Demonstration) -> dict[str, object]:
    clause = row.clause
    return {
        "id": _name(clause),
        "messages": [{"role": "user", "content": row.text}],
        "category": clause.category,
        "clause": clause.id,
        "behaviour": clause.behaviour,
        "source": KINDS[clause.behaviour][0],
    }


def _recording(row: Demonstration) -> dict[str, object]:
    return {"prompt_id": _name(row.clause), "text": chat.join(row.reasoning, row.answer)}


def _name(clause: Clause) -> str:
    return f"{clause.id.lower()}-01"


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
            raise typer.BadParameter("say something, or Ctrl-C to leave")
        if chat.OPEN in answer or chat.CLOSE in answer:
            raise typer.BadParameter(f"{chat.OPEN} and {chat.CLOSE} mark a model's reasoning; leave them out")
        return answer.strip()

    return str(typer.prompt(question, default=default, show_default=False, value_proc=said))


def _category(names: list[str]) -> str:
    """The next category's name; empty when there are no more."""
    if not names:
        return _ask("First category, such as investment advice")
    return _fresh("Next category (Enter for none)", names, "give it another name")


def _fresh(question: str, given: Collection[str], mend: str) -> str:
    """What was not given before; empty for none."""

    def said(answer: str) -> str:
        if answer.strip() in given:
            raise typer.BadParameter(f"{answer.strip()!r} is there already; {mend}")
        return answer.strip()

    return str(typer.prompt(question, default="", show_default=False, value_proc=said))


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
