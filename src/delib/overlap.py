"""What is too near: prompts that are nearly the same, and training prompts that stand in the evaluation.

In: prompts. Out: which of them to leave out, each with the one it is near to. Both rules look at words, case and
punctuation apart; text in a script without spaces is one word, of which only whole copies are found.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from delib.records import Prompt

SHINGLE_WORDS = 5
"""Runs of five words, as Lee et al. (arXiv 2107.06499) compare documents. They hold a prompt apart from a look-alike
that turns one word: of the starter's twins the nearest two are 0.69 alike by them, and 0.86 by runs of five letters."""
PERMUTATIONS = 128
MARGIN = 0.05
"""How far an estimate may be below the similarity and the pair still be looked at: with 128 permutations the standard
error at 0.8 is 0.035."""
CROWD = 200
"""The most earlier prompts that one is compared with; more share its words only where many stand in one wrapper."""
COPIED_WORDS = 8
COPIED_SHARE = 0.5
"""Contamination, see `contaminated`."""


class Near(NamedTuple):
    """The prompt that another one is near to, and how near: similarity, or the share of its words that are copied."""

    id: str
    share: float


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(found: list[str], size: int) -> list[tuple[str, ...]]:
    """Every run of so many words; of fewer words, all of them as one run."""
    return [tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))]


def near_duplicates(prompts: list[Prompt], similarity: float) -> dict[str, Near]:
    """The ids to leave out: those at least so similar to an earlier prompt that stays, by the Jaccard index of their
    runs of five words. MinHash finds the pairs that may be; a few of those just above the similarity escape it.

    Prompts that differ in a label (behaviour, clause, expected answer, checks) or in their system message are never
    near: one may be the look-alike of the other. Linear in the prompts: where more than `CROWD` of them share most of
    their words, the others are compared with those alone, and near ones among the others may stay.
    """
    from datasketch import MinHash, MinHashLSH

    # Weighted to miss few: what it finds is looked at.
    index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    hashes: list[np.ndarray] = []

    def shingles() -> Iterator[list[bytes]]:
        for prompt in prompts:
            found = set(runs(words(_conversation(prompt)), SHINGLE_WORDS))
            hashes.append(np.array([hash(run) for run in found]))
            yield [" ".join(run).encode() for run in found]

    sketches = np.empty((len(prompts), PERMUTATIONS), dtype=np.uint32)
    left_out: dict[str, Near] = {}
    for row, sketch in enumerate(MinHash.generator(shingles(), num_perm=PERMUTATIONS)):
        sketches[row] = sketch.hashvalues
        rivals = np.sort(np.array(index.query(sketch), dtype=np.int64))
        likely = rivals[(sketches[rivals] == sketches[row]).mean(axis=1) >= similarity - MARGIN]
        for rival in likely:
            share = _jaccard(hashes[rival], hashes[row])
            if share >= similarity and _same_labels(prompts[rival], prompts[row]):
                left_out[prompts[row].id] = Near(prompts[rival].id, round(share, 2))
                break
        else:
            if len(rivals) < CROWD:
                index.insert(row, sketch, check_duplication=False)
    return left_out


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _conversation(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.messages if m.role != "system")


def _same_labels(one: Prompt, other: Prompt) -> bool:
    """Whether no label holds them apart; a prompt without a label has none that could."""
    names = ("behaviour", "clause", "expected", "checks")
    labels = [(getattr(one, name), getattr(other, name)) for name in names]
    if any(a is not None and b is not None and a != b for a, b in labels):
        return False
    first, second = ([m.content for m in p.messages if m.role == "system"] for p in (one, other))
    return first == second


class _Asked(NamedTuple):
    """An evaluation prompt: its id, and its user turns as a number of words and the runs of eight in them."""

    id: str
    length: int
    runs: list[tuple[str, ...]]


def contaminated(prompts: Iterable[Prompt], heldout: Iterable[Prompt]) -> dict[str, Near]:
    """The ids of prompts that hold an evaluation prompt, each with that one and the share of its words they hold.

    The rule is that of Tülu 3 (arXiv 2411.15124, section on decontamination; the search of allenai/open-instruct): a
    word of an evaluation prompt is copied when it lies in a run of eight words that also stands in the training
    prompt; more than half of its words copied by one training prompt is contamination. GPT-3 (arXiv 2005.14165,
    appendix C) took any single run of 8 to 13 words, which for prompts throws out what shares a phrase ("write a
    function in Python that takes a list") or a wrapper. An evaluation prompt of fewer than eight words must be equal.
    Only the user's turns count.
    """
    asked: list[_Asked] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for prompt in heldout:
        found = words(_user_text(prompt))
        if found:
            for run in dict.fromkeys(mine := runs(found, COPIED_WORDS)):
                holders[run].append(len(asked))
            asked.append(_Asked(prompt.id, len(found), mine))
    known: dict[frozenset[tuple[str, ...]], Near | None] = {}
    matched: dict[str, Near] = {}
    for prompt in prompts:
        # Many prompts may share a wrapper, and all its runs: the same runs are looked up once.
        shared = frozenset(run for run in runs(words(_user_text(prompt)), COPIED_WORDS) if run in holders)
        if shared not in known:
            numbers = sorted({n for run in shared for n in holders[run]})
            known[shared] = next((near for n in numbers if (near := _copied(asked[n], shared))), None)
        near = known[shared]
        if near is not None:
            matched[prompt.id] = near
    return matched


def _copied(asked: _Asked, shared: frozenset[tuple[str, ...]]) -> Near | None:
    covered: set[int] = set()
    for start, run in enumerate(asked.runs):
        if run in shared:
            covered.update(range(start, start + len(run)))
    share = len(covered) / asked.length
    return Near(asked.id, round(share, 2)) if share > COPIED_SHARE else None


def _user_text(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.messages if m.role == "user")
