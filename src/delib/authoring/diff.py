"""What an edit of a spec changes, clause by clause: `delib spec diff OLD NEW`.

In: two specs. Out: changes (by a clause's ID, a category's, style's or term's name) and the excerpts that they reach.
Models are shown excerpts, so the categories of those are the ones whose prompts a re-run has to make again.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from delib import spec as specs
from delib.authoring.places import Section, sections
from delib.errors import UserError
from delib.spec import Category, Clause, Spec, Style

NO_CATEGORY = "no category"
"""How the excerpt of prompts without a category is called."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


class Change(BaseModel):
    """One change. `old` and `new` are the values where they are short; of longer texts, `removed` and `added` are the
    sentences that differ (none: only order or spacing differs)."""

    kind: Literal["clause", "category", "style", "term", "spec"]
    name: str
    place: str | None = None
    what: str
    old: str | None = None
    new: str | None = None
    removed: list[str] = []
    added: list[str] = []


class Diff(BaseModel):
    """All changes. `excerpts`: of each category and of `NO_CATEGORY`, whether it is changed, same, new or gone; `why`:
    the parts that stand in every excerpt and differ."""

    changes: list[Change]
    excerpts: dict[str, Literal["changed", "same", "new", "gone"]]
    why: list[str]


def report(old: Path, new: Path, as_json: bool) -> str:
    """The difference of two files, in words or as one JSON object. Raises UserError with the problems of both."""
    problems = [problem for path in (old, new) for problem in specs.check(path)]
    if problems:
        raise UserError(problems)
    before, after = specs.load(old), specs.load(new)
    found = compare(before, after)
    if as_json:
        return json.dumps({"old": str(old), "new": str(new)} | found.model_dump(), ensure_ascii=False) + "\n"
    return tell(found, before.text == after.text)


def compare(old: Spec, new: Spec) -> Diff:
    renamed = _renamed(old, new)
    changes = [
        *_texts("spec", "spec", None, "title", old.title, new.title),
        *_texts("spec", "introduction", None, "text", old.intro, new.intro),
        *_categories(old, new, renamed),
        *_clauses(old, new, renamed),
        *_around(old, new, renamed),
        *_styles(old, new),
    ]
    return Diff(changes=changes, excerpts=_excerpts(old, new), why=_everywhere(old, new))


def _renamed(old: Spec, new: Spec) -> dict[str, str]:
    """Categories under a new name: gone from one spec, and at least half of the clauses stand in one that is new."""
    kept = {c.name for c in old.categories} & {c.name for c in new.categories}
    gone, fresh = ([c for c in spec.categories if c.name not in kept] for spec in (old, new))
    found: dict[str, str] = {}
    for category in gone:
        shared = {c.name: _shared(category, c) for c in fresh if c.name not in found.values()}
        best = max(shared, key=lambda name: shared[name], default=None)
        if best is not None and shared[best] * 2 >= len(category.clauses):
            found[category.name] = best
    return found


def _shared(one: Category, other: Category) -> int:
    """How many clauses have the same ID, or the same text under another."""
    ids, texts = {c.id for c in other.clauses}, {c.text for c in other.clauses}
    return sum(c.id in ids or c.text in texts for c in one.clauses)


def _categories(old: Spec, new: Spec, renamed: dict[str, str]) -> Iterator[Change]:
    before, after = _by_name(old.categories), _by_name(new.categories)
    for name, category in before.items():
        now = renamed.get(name, name)
        if now not in after:
            yield Change(kind="category", name=name, what="removed")
            continue
        if now != name:
            yield Change(kind="category", name=name, what="renamed", old=name, new=now)
        yield from _texts("category", now, None, "summary", category.summary, after[now].summary)
    for name in after:
        if name not in before and name not in renamed.values():
            yield Change(kind="category", name=name, what="added")


def _by_name(categories: list[Category]) -> dict[str, Category]:
    return {c.name: c for c in categories}


def _clauses(old: Spec, new: Spec, renamed: dict[str, str]) -> Iterator[Change]:
    before, after = old.clauses, new.clauses
    fresh = {(c.title, c.text): c.id for c in after.values() if c.id not in before}
    renumbered = {i: fresh[c.title, c.text] for i, c in before.items() if i not in after and (c.title, c.text) in fresh}
    for ident, clause in before.items():
        now = after.get(renumbered.get(ident, ident))
        if now is None:
            yield Change(kind="clause", name=ident, place=clause.category, what="removed", old=_heading(clause))
            continue
        if now.id != ident:
            yield Change(kind="clause", name=ident, place=now.category, what="renumbered", old=ident, new=now.id)
        yield from _clause(clause, now, renamed)
    for ident, clause in after.items():
        if ident not in before and ident not in renumbered.values():
            yield Change(kind="clause", name=ident, place=clause.category, what="added", new=_heading(clause))


def _clause(old: Clause, new: Clause, renamed: dict[str, str]) -> Iterator[Change]:
    if renamed.get(old.category or "", old.category) != new.category:
        places = [c.category or "the principles" for c in (old, new)]
        yield Change(kind="clause", name=new.id, place=new.category, what="moved", old=places[0], new=places[1])
    for what in ("behaviour", "style"):
        one, other = getattr(old, what), getattr(new, what)
        if one != other:
            yield Change(kind="clause", name=new.id, place=new.category, what=what, old=one, new=other)
    yield from _texts("clause", new.id, new.category, "title", old.title, new.title)
    yield from _texts("clause", new.id, new.category, "text", old.text, new.text)


def _heading(clause: Clause) -> str:
    style = f", {clause.style}" if clause.style else ""
    return f"({clause.behaviour}{style}): {clause.title}"


def _around(old: Spec, new: Spec, renamed: dict[str, str]) -> Iterator[Change]:
    """Terms, and text outside clauses, of what stands in both specs."""
    before, after = ({s.category: s for s in sections(spec.text)} for spec in (old, new))
    for name, section in before.items():
        now = after.get(renamed.get(name or "", name))
        if now is None:
            continue
        for term in dict.fromkeys([*section.terms, *now.terms]):
            yield from _texts("term", term, now.category, "text", section.terms.get(term), now.terms.get(term))
        kind: Literal["category", "spec"] = "spec" if name is None else "category"
        place = now.category or "principles"
        yield from _texts(kind, place, None, "text outside clauses", _outside(section), _outside(now))


def _outside(section: Section) -> str:
    """Its text outside clauses, but for what is compared elsewhere: summary and terms."""
    lines = [t for _, t in section.own if not t.startswith("Summary:")]
    return "\n".join(t for t in lines if not any(t == f"- {k}: {v}" for k, v in section.terms.items()))


def _styles(old: Spec, new: Spec) -> Iterator[Change]:
    before, after = ({s.name: s for s in spec.styles} for spec in (old, new))
    for name in dict.fromkeys([*before, *after]):
        if name not in after or name not in before:
            yield Change(kind="style", name=name, what="added" if name in after else "removed")
            continue
        one, other = before[name], after[name]
        yield from _texts("style", name, None, "behaviour", one.behaviour, other.behaviour)
        yield from _texts("style", name, None, "title", one.title, other.title)
        yield from _texts("style", name, None, "text", one.text, other.text)
        yield from _texts("style", name, None, "length", _length(one), _length(other))
        elements = [{f"{e.kind} `{e.name}`": e for e in style.elements} for style in (one, other)]
        for element in dict.fromkeys([*elements[0], *elements[1]]):
            texts = [
                f"{e.text}\n" + "\n".join(f'"{x}"' for x in e.examples) if e else None
                for e in (side.get(element) for side in elements)
            ]
            yield from _texts("style", name, None, element, *texts)


def _length(style: Style) -> str:
    bounds = [("at least", style.min_words), ("at most", style.max_words)]
    return ", ".join(f"{word} {n} words" for word, n in bounds if n) or "any length"


_SHORT = ("title", "summary", "behaviour", "length")


def _texts(
    kind: Literal["clause", "category", "style", "term", "spec"],
    name: str,
    place: str | None,
    what: str,
    old: str | None,
    new: str | None,
) -> Iterator[Change]:
    """The change of a text, if any; None is one that is not there."""
    if old == new:
        return
    if old is None or new is None:
        what = f"{'added' if old is None else 'removed'}" + ("" if what == "text" else f" {what}")
    one, other = (_sentences(t or "") for t in (old, new))
    short = what in _SHORT
    yield Change(
        kind=kind,
        name=name,
        place=place,
        what=what,
        old=old if short else None,
        new=new if short else None,
        removed=[] if short else list((Counter(one) - Counter(other)).elements()),
        added=[] if short else list((Counter(other) - Counter(one)).elements()),
    )


def _sentences(text: str) -> list[str]:
    return [s.strip() for s in _SENTENCE.split(text) if s.strip()]


def _excerpts(old: Spec, new: Spec) -> dict[str, Literal["changed", "same", "new", "gone"]]:
    found: dict[str, Literal["changed", "same", "new", "gone"]] = {}
    before, after = ([c.name for c in spec.categories] for spec in (old, new))
    for name in dict.fromkeys([*before, *after]):
        if name not in after or name not in before:
            found[name] = "new" if name in after else "gone"
        else:
            found[name] = "same" if old.excerpt_id(name) == new.excerpt_id(name) else "changed"
    found[NO_CATEGORY] = "same" if old.excerpt_id(None) == new.excerpt_id(None) else "changed"
    return found


def _everywhere(old: Spec, new: Spec) -> list[str]:
    summaries = [[(c.name, c.summary) for c in spec.categories] for spec in (old, new)]
    parts = {
        "the categories' names, summaries or order": summaries[0] != summaries[1],
        "the principles": old.principles != new.principles,
        "the styles": old.styles_text != new.styles_text,
    }
    return [part for part, differs in parts.items() if differs]


def tell(diff: Diff, same_text: bool) -> str:
    """The changes in words. `same_text`: the two files are equal to the letter."""
    lines = [line for change in diff.changes for line in _told(change)]
    if not diff.changes:
        lines = ["Nothing changed." if same_text else "No clause changed; only order, spacing or headings differ."]
    touched = [name for name, state in diff.excerpts.items() if state == "changed"]
    new, gone = ([n for n, state in diff.excerpts.items() if state == kind] for kind in ("new", "gone"))
    same = [name for name, state in diff.excerpts.items() if state == "same"]
    lines.append("")
    if diff.why:
        lines.append(f"Every excerpt changes, since these stand in all: {', '.join(diff.why)}.")
    elif touched:
        lines.append(f"Excerpts that change: {len(touched)} of {len(touched) + len(same)} ({', '.join(touched)}).")
    else:
        lines.append("No excerpt changes.")
    if new:
        lines.append(f"New: {', '.join(new)}.")
    if gone:
        lines.append(f"Gone: {', '.join(gone)}; prompts that name a category that is gone must be relabelled.")
    if touched:
        lines.append("A re-run makes again what saw them: the prompts of these categories.")
    if same and touched:
        lines.append(f"It keeps the prompts of {', '.join(same)}.")
    return "\n".join(lines) + "\n"


def _told(change: Change) -> Iterator[str]:
    name = change.name if change.kind in ("clause", "spec") else f"{change.kind} {change.name}"
    head = f"{name} ({change.place})" if change.place else name
    if change.what in ("added", "removed") and not (change.removed or change.added):
        heading = change.new or change.old
        yield f"{head}: {change.what}" + (f" {heading}" if heading else "")
    elif change.old is not None or change.new is not None:
        yield f"{head}: {change.what}: {change.old or 'none'} -> {change.new or 'none'}" + _consequence(change)
    else:
        only_order = "" if change.removed or change.added else " (order or spacing alone)"
        yield f"{head}: {change.what}{only_order}"
    yield from (f"  - {sentence}" for sentence in change.removed)
    yield from (f"  + {sentence}" for sentence in change.added)


def _consequence(change: Change) -> str:
    if change.kind == "clause" and change.what == "behaviour":
        return "; prompts that it decides are relabelled"
    if change.what == "renumbered":
        return f"; prompts that name {change.old} must name {change.new}"
    if change.kind == "category" and change.what == "renamed":
        return "; prompts labelled with the old name must be relabelled"
    return ""
