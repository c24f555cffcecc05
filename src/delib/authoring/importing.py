"""A policy document of somebody else's made into a spec: `delib spec import`.

In: markdown, in the layout of the OpenAI Model Spec or of plain headings and lists. Out: a spec that parses, and an
account of every heading: what it became, or why it was left out.
"""

from pathlib import Path

from delib.authoring import headings_and_lists, model_spec
from delib.authoring.draft import must_be_new
from delib.authoring.reading import headings
from delib.authoring.rebuilding import Imported
from delib.errors import UserError
from delib.run import write_whole
from delib.spec import parse, read_text

FORMATS = {"model-spec": model_spec.imported, "markdown": headings_and_lists.imported}
SHOWN_LINES = 5


def report(path: Path, form: str, to: Path) -> str:
    """Write the spec; returns the account. Raises UserError where something stands at `to` already."""
    must_be_new(to)
    made = read(path, form)
    write_whole(to, made.text)
    return f"{tell(made)}{to} is written. What is still to do, with its lines: delib spec check {to}\n"


def read(path: Path, form: str) -> Imported:
    """Raises UserError where the file can't be read or holds no policy in that form."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: no such format; one of {', '.join(FORMATS)}")
    made = FORMATS[form](headings(read_text(path)), path)
    parse(made.text, f"the spec made from {path}")
    return made


def tell(made: Imported) -> str:
    """The account for people: a line a heading, then what else was left out."""
    width = max((len(row.title) for row in made.rows), default=0)
    lines = [
        f"{row.line:>6}  {'taken' if row.taken else 'skipped':7}  {row.title[:60]:{min(width, 60)}}  {row.became}"
        for row in made.rows
    ]
    taken = sum(row.taken for row in made.rows)
    lines.append(f"{len(made.rows)} headings: {taken} taken, {len(made.rows) - taken} skipped.")
    for kind, at in made.left_out.items():
        where = f" ({', '.join(f'line {n}' for n in at)})" if len(at) <= SHOWN_LINES else ""
        lines.append(f"Left out: {kind}, {len(at)} of them{where}.")
    return "\n".join(lines) + "\n"
