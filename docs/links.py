"""A hook of mkdocs: links that lead out of docs/, to a file of the repository, are plain text on the site."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
