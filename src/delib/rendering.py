"""How every page and text that has a file in `templates/` is set up: report, cards, the page of a run, the reference.

In: nothing. Out: Jinja's environment. What goes into HTML is escaped, whatever wrote it; markdown and plain text have
filters of their own; a name that is not given is an error, never a blank.
"""

from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
