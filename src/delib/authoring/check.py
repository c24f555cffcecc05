"""What a sound spec's author should look at again: `delib spec check`.

In: a spec's text that parses. Out: warnings, one line each, `file:line: what; mend`. Each rule is one that a reader
can check by hand (docs/spec.md tells them); none judges what a policy ought to say.
"""

import re
from collections.abc import Iterator, Set
from itertools import combinations
from pathlib import Path

from delib import spec as specs
from delib.authoring.places import Section, sections
from delib.errors import UserError
from delib.overlap import runs, words
from delib.spec import Spec

MAX_EXCERPT_TOKENS = 8000
"""The paper's full policies are of 5 to 10 thousand tokens each (Guan et al., 2024)."""
CHARACTERS_A_TOKEN = 3
"""On the high side: English has about four."""
RUN_WORDS = 3
NEAR_TEXT = 0.5
"""Jaccard index of runs of three words at which two clauses say nearly the same. Within a category of the starter the
nearest two are 0.05 alike."""
NEAR_TITLE = 0.75
"""Jaccard index of single words; of the starter's titles the nearest two are 0.5 alike."""
_TODO = re.compile(r"\bTODO\b:?\s*(.*)")
_CITED = re.compile(r"\b([A-Z][A-Za-z]*-?)\d+\b(?!\.\d)")
_MARKED = re.compile(r"\*\*(?P<bold>[^*]+)\*\*|[\"“](?P<quoted>[^\"“”]+)[\"”]")
_TITLE_CASE = re.compile(r"[A-Z][a-z]\w*(?:[ -][A-Z][a-z]\w*){1,3}")

Note = tuple[int, str]


def report(path: Path, strict: bool) -> str:
    """The warnings and what the spec holds, for people. Raises UserError with every structural problem or, where
    `strict`, with every warning."""
    text = specs.read_text(path)
    found = warnings(text, str(path))
    if found and strict:
        raise UserError(found)
    spec = specs.parse(text)
    counted = f", {len(found)} warning{'s' if len(found) > 1 else ''}" if found else ""
    sound = f"{path}: sound; {len(spec.categories)} categories, {len(spec.clauses)} clauses{counted}\n"
    return "".join(f"warning: {warning}\n" for warning in found) + sound


def warnings(text: str, where: str) -> list[str]:
    """What to look at again, in the order of lines. Raises UserError when the spec does not parse."""
    spec, laid = specs.parse(text, where), sections(text)
    rules = (
        _todos(text, laid),
        _unknown_ids(text, spec),
        _one_sided(spec, laid),
        _alike(spec, laid),
        _undefined(laid),
        _without_reason(laid),
        _unused_styles(text, spec),
        _too_long(spec, laid),
    )
    return [f"{where}:{line}: {what}" for line, what in sorted(note for rule in rules for note in rule)]


def _todos(text: str, laid: list[Section]) -> Iterator[Note]:
    of_clause = {n: ident for s in laid for ident, block in s.clauses.items() for n, _ in block.lines}
    for line, words_ in enumerate(text.splitlines(), 1):
        if found := _TODO.search(words_):
            where = f"clause {of_clause[line]}: " if line in of_clause else ""
            yield line, f"{where}still to do: {found.group(1).rstrip('.') or words_}; decide it and take out the TODO"


def _unknown_ids(text: str, spec: Spec) -> Iterator[Note]:
    """Citations of clauses that are not there. Only letters that some clause's ID has make an ID: B12 is a vitamin."""
    letters = {match.group(1) for ident in spec.clauses if (match := _CITED.fullmatch(ident))}
    for line, words_ in enumerate(text.splitlines(), 1):
        for match in _CITED.finditer(words_):
            if match.group(1) in letters and match.group() not in spec.clauses:
                yield line, f"{match.group()} is cited, and no clause has that ID; correct it or write the clause"


def _one_sided(spec: Spec, laid: list[Section]) -> Iterator[Note]:
    for section in laid:
        if section.category is None:
            continue
        clauses = spec.category(section.category).clauses
        refused = [c.id for c in clauses if c.behaviour == "refuse"]
        if refused and not any(c.behaviour == "comply" for c in clauses):
            yield (
                section.line,
                f"category {section.category!r} refuses ({', '.join(refused)}) and has nothing to comply with; add a "
                "clause that says what near these is answered, or a model learns to refuse the subject",
            )


def _alike(spec: Spec, laid: list[Section]) -> Iterator[Note]:
    for section in laid:
        for first, second in combinations(section.clauses, 2):
            one, other = spec.clauses[first], spec.clauses[second]
            texts = _jaccard(*(set(runs(words(_said(c.text)), RUN_WORDS)) for c in (one, other)))
            titles = _jaccard(*(set(words(c.title)) for c in (one, other)))
            if texts < NEAR_TEXT and titles < NEAR_TITLE:
                continue
            what = "say nearly the same" if texts >= NEAR_TEXT else "have nearly the same title"
            place = f"{second} and {first} (line {section.clauses[first].line}) {what}"
            if one.behaviour == other.behaviour:
                yield section.clauses[second].line, f"{place}; merge them, or say which decides when"
            else:
                yield (
                    section.clauses[second].line,
                    f"{place}, and {second} demands {other.behaviour}, {first} {one.behaviour}; "
                    "take one out, or say in both where the line runs",
                )


def _said(text: str) -> str:
    """A clause's text without its reason and without what is still to do."""
    return "\n".join(line for line in text.split("Why:")[0].splitlines() if not _TODO.search(line))


def _jaccard(one: Set[object], other: Set[object]) -> float:
    return len(one & other) / len(one | other) if one and other else 0.0


def _undefined(laid: list[Section]) -> Iterator[Note]:
    """Terms in **bold**, or in double quotes with every word capital, of the clauses and the text around them."""
    for_all = {t for s in laid if s.category is None for t in s.terms}
    for section in laid:
        known = {t.lower() for t in for_all | set(section.terms)}
        seen: set[str] = set()
        for line, text in [*section.own, *(n for block in section.clauses.values() for n in block.lines)]:
            for term in _terms_in(text):
                if term.lower() in seen or any(term.lower() in (t, f"{t}s", f"{t}es") for t in known):
                    continue
                seen.add(term.lower())
                where = "the principles" if section.category is None else f"category {section.category!r}"
                yield (
                    line,
                    f"the term {term!r} is not defined in {where}; add '- {term}: …' under '### Definitions' of the "
                    "category, or to the text of '## Principles' for all, or take off its marks",
                )


def _terms_in(text: str) -> Iterator[str]:
    for match in _MARKED.finditer(text):
        bold, quoted = match.group("bold", "quoted")
        if bold:
            yield bold.strip().rstrip(":.,")
        elif _TITLE_CASE.fullmatch(quoted):
            yield quoted


def _without_reason(laid: list[Section]) -> Iterator[Note]:
    """One that is still to do is not also told that it lacks its reason."""
    for section in laid:
        for ident, block in section.clauses.items():
            if "Why:" not in block.own and not _TODO.search(block.own):
                yield (
                    block.line,
                    f"clause {ident} gives no reason; add a line 'Why: …', which is what a model reasons with",
                )


def _unused_styles(text: str, spec: Spec) -> Iterator[Note]:
    used = {style.name for c in spec.clauses.values() if (style := spec.style_for(c.id, c.behaviour))}
    for block in specs.blocks(text)[2]:
        for child in block.children if block.heading == "## Styles" else []:
            name = child.heading.split()[1]
            if name not in used:
                yield child.line, f"no clause uses the style {name}; name it in a clause's heading or take it out"


def _too_long(spec: Spec, laid: list[Section]) -> Iterator[Note]:
    for section in laid:
        tokens = len(spec.excerpt(section.category)) // CHARACTERS_A_TOKEN
        if tokens > MAX_EXCERPT_TOKENS and section.category is not None:
            yield (
                section.line,
                f"the excerpt of category {section.category!r} has about {tokens:,} tokens, more than "
                f"{MAX_EXCERPT_TOKENS:,}; split the category, or shorten it or the principles",
            )
