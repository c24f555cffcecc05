"""A plain policy document of headings and lists, made into a spec.

In: a document's headings. Out: a heading with a list as a category, list items as clauses. A rule takes its behaviour
from its own words, else from the line that leads into the list ("must not:"), else from the headings above it. A
heading of such words alone ("Not allowed") adds its items to the category above it. Text without a list goes into the
introduction, which models are not shown.
"""

import re
from collections import defaultdict
from pathlib import Path

from delib.authoring.draft import prefix, short_title
from delib.authoring.reading import Block, Guess, Heading, guess
from delib.authoring.rebuilding import Imported, Part, Row, Rule, one_line, plain, spec
from delib.errors import UserError

_LISTS = ("bullet_list", "ordered_list")
_LABEL = re.compile(r"\*\*(?P<label>[^*]+?)[:.]?\*\*")
LABEL_WORDS = 4
"""The most words of a heading that says a behaviour and nothing else."""


def imported(found: list[Heading], path: Path) -> Imported:
    """Raises UserError where there is no list."""
    listed = [h for h in found if any(b.kind in _LISTS for b in h.blocks)]
    if not listed:
        raise UserError(f"{path}: no list in it; write each rule as a list item under a heading")
    first = [h for h in found if h.level == 1]
    title = first[0] if len(first) == 1 and first[0] is found[1] else None
    homes = {h: _home(h, title) for h in listed}
    names = _names(list(dict.fromkeys(homes.values())), title)
    rows: list[Row] = []
    intro: list[str] = []
    left_out: dict[str, list[int]] = defaultdict(list)
    openings: dict[Heading, list[str]] = defaultdict(list)
    rules: dict[Heading, list[Rule]] = defaultdict(list)
    for at in found:
        mine = _rules(at, title)
        prose = [text for b in at.blocks if b.kind == "paragraph" and b not in _leads(at) and (text := plain(b.text))]
        for block in at.blocks:
            if block.kind not in ("paragraph", "hr", *_LISTS):
                left_out[block.kind.replace("_", " ")].append(block.line)
        home = homes.get(at, at)
        rules[home] += mine
        if home in names:
            openings[home] += prose
        else:
            intro += [f"{one_line(at.title)}: {text}" if at.level else text for text in prose]
        if at.level:
            taken, became = _became(at, home, title, names, mine, bool(prose))
            rows.append(Row(at.line, one_line(at.title) or "(no title)", taken, became))
    parts: list[Part] = []
    for home, name in names.items():
        letters = prefix(name, {"P", *(p.letters for p in parts)})
        covered = f"Covers: {'; '.join(r.title.rstrip('…') for r in rules[home])}."
        summary = one_line(openings[home][0]) if openings[home] else covered
        parts.append(Part(name, letters, summary, openings[home][1:], rules[home]))
    return Imported(spec(one_line(title.title) if title else "", path.name, intro, [], parts), rows, left_out)


def _became(
    at: Heading, home: Heading, title: Heading | None, names: dict[Heading, str], mine: list[Rule], prose: bool
) -> tuple[bool, str]:
    if mine:
        kind = f"category {names[home]!r}" if home is at else f"part of category {names[home]!r}"
        open_ = sum(r.behaviour is None for r in mine)
        return True, f"{kind}: {len(mine)} clauses, {open_} to be decided"
    if at in names:
        return True, f"category {names[at]!r}; its clauses stand under the headings below"
    if at is title:
        return True, "title"
    if prose:
        return False, "no list: its text went into the introduction, which models are not shown"
    return False, "no list and no text of its own"


def _home(at: Heading, title: Heading | None) -> Heading:
    """The heading that the items' category is named after."""
    label = guess(one_line(at.title))
    above = at.parent
    if (
        label
        and label.behaviour
        and len(at.title.split()) <= LABEL_WORDS
        and above
        and above.level
        and above is not title
    ):
        return _home(above, title)
    return at


def _names(homes: list[Heading], title: Heading | None) -> dict[Heading, str]:
    names: dict[Heading, str] = {}
    for home in homes:
        name = "General" if home is title or not home.level else one_line(home.title) or "Untitled"
        if name in names.values() and home.parent and home.parent.level:
            name = f"{one_line(home.parent.title)}: {name}"
        names[home] = f"{name} (line {home.line})" if name in names.values() else name
    return names


def _leads(at: Heading) -> list[Block]:
    """Paragraphs that lead into a list: right before it, and ending on a colon."""
    pairs = zip(at.blocks, at.blocks[1:], strict=False)
    return [b for b, after in pairs if after.kind in _LISTS and b.kind == "paragraph" and plain(b.text).endswith(":")]


def _rules(at: Heading, title: Heading | None) -> list[Rule]:
    found: list[Rule] = []
    leads, lead = _leads(at), ""
    for block in at.blocks:
        if block in leads:
            lead = one_line(block.text)
            continue
        for _, item in block.items:
            text = plain(item)
            if text:
                found.append(Rule(_item_title(item), f"{lead} {text}".strip(), _guessed(text, lead, at, title)))
        lead = ""
    return found


def _guessed(item: str, lead: str, at: Heading, title: Heading | None) -> Guess | None:
    said = guess(item) or guess(lead.rstrip(":"))
    above: Heading | None = at
    while said is None and above is not None and above.level and above is not title:
        said, above = guess(one_line(above.title)), above.parent
    return said


def _item_title(item: str) -> str:
    label = _LABEL.match(item)
    if label:
        return one_line(label.group("label"))
    return short_title(re.split(r"(?<=[.;!?:])\s", one_line(item), maxsplit=1)[0])
