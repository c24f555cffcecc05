"""Stage 3, filter: malformed completions out, the judge's verdicts on the rest, the best of each prompt kept.

In: Samples. Out: the same Samples with k verdicts each (view "full": the judge sees the reasoning here), kept or
dropped with a reason. The score is the minimum of the k, since any one run may miss a problem (arXiv 2412.16339).
Flaws that were marked on purpose are counted afterwards; the mark is never shown to the judge. Samples are read and
written one at a time, and only a few words of each are held.
"""

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, NamedTuple, Protocol

from delib.errors import StageError
from delib.models.calls import Spread, Told, Working
from delib.progress import bar
from delib.records import Completion, Manifest, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.stats import kappa

ENOUGH = 50
"""Ungraded samples after which the stage need not wait for its end to see that there are too many."""
MAX_UNGRADED = 0.5
"""The stage stops when the judge leaves more than this share ungraded: such a judge tells nothing."""


class Judge(Protocol):
    """Grades one completion `runs` times. Never raises for one bad completion: that is an ungraded verdict."""

    name: str

    async def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]: ...


class Row(NamedTuple):
    """What choosing and counting need of a sample."""

    key: str
    prompt_id: str
    pile: tuple[str, str, str]
    fault: str | None
    failed: bool
    kept: bool
    drop_reason: str | None
    scores: tuple[float | None, ...]
    observed: tuple[str | None, ...]

    @property
    def score(self) -> float:
        return min((s for s in self.scores if s is not None), default=0.0)


def row_of(sample: Sample) -> Row:
    prompt = sample.prompt
    return Row(
        key=sample.key,
        prompt_id=prompt.id,
        pile=(prompt.source, str(prompt.category), str(prompt.behaviour)),
        fault=sample.fault,
        failed=sample.failure is not None,
        kept=bool(sample.kept),
        drop_reason=sample.drop_reason,
        scores=tuple(v.score for v in sample.verdicts),
        observed=tuple(v.behaviour for v in sample.verdicts),
    )


def run(
    source: StageFolder,
    spread: Spread,
    folder: StageFolder,
    *,
    threshold: float,
    best_of: int,
    limit: int | None,
) -> Manifest:
    """Grade, drop, keep the best. Resumes after the last graded sample; what stayed ungraded is tried again.

    `source`: the folder of the samples. `spread` has each worked on as in `working`.
    """
    order = [s.key for s in source.stream(Sample)]
    graded = {s.key for s in folder.stream(Sample) if s.drop_reason != "ungraded"}

    tried, ungraded = 0, list[str]()

    if len(graded) < len(order):
        with bar("filter", len(order), len(graded)) as ticker:

            def told(judged: Sample) -> None:
                nonlocal tried
                folder.append(judged)
                ticker.step()
                tried += 1
                if (why := cause(judged)) is not None:
                    ungraded.append(why)
                    if len(ungraded) >= ENOUGH and len(ungraded) > MAX_UNGRADED * tried:
                        raise StageError(silent(ungraded, tried))

            spread((s for s in source.stream(Sample) if s.key not in graded), told)
    if len(ungraded) > MAX_UNGRADED * tried:
        raise StageError(silent(ungraded, tried))
    rows = {s.key: row_of(s) for s in folder.stream(Sample)}
    dropped = beyond([rows[key] for key in order], best_of, limit)

    def decided(sample: Sample) -> Sample:
        reason = dropped.get(sample.key)
        return sample if reason is None else sample.model_copy(update={"kept": False, "drop_reason": reason})

    folder.rewrite(order, Sample, decided)
    final = [r._replace(kept=False, drop_reason=dropped[r.key]) if r.key in dropped else r for r in rows.values()]
    counts = {
        "in": len(final),
        "out": sum(r.kept for r in final),
        "dropped": sum(not r.kept for r in final),
        "failed": sum(r.failed for r in final),
        "ungraded": sum(r.drop_reason == "ungraded" for r in final),
    }
    detail = funnel(final, threshold) | {"agreement": agreement(final)}
    return Manifest(stage="filter", recipe="", inputs={}, outputs={}, counts=counts, detail=detail)


def cause(sample: Sample) -> str | None:
    """Why a sample is ungraded; None when it is not."""
    if sample.drop_reason != "ungraded":
        return None
    return next((f"{sample.key}: {v.failure}" for v in sample.verdicts if v.failure), sample.key)


def silent(ungraded: list[str], of: int) -> str:
    return (
        f"filter: the judge left {len(ungraded)} of {of} samples ungraded, first {'; '.join(ungraded[:3])}; mend it, "
        "or name another, and run the same command again"
    )


@asynccontextmanager
async def working(
    opened: Callable[[], AbstractAsyncContextManager[Judge]], *, runs: int, threshold: float
) -> AsyncIterator[Working]:
    """A judge at work: it grades a sample and tells of it."""
    async with opened() as judge:

        async def work(sample: Sample, told: Told) -> None:
            told(await grade(sample, judge, runs, threshold))

        yield work


async def grade(sample: Sample, judge: Judge, runs: int, threshold: float) -> Sample:
    """One sample with its verdicts, and dropped where it must be."""
    made = sample.completion
    if sample.failure is not None or made is None:
        return sample.model_copy(update={"kept": False, "drop_reason": "failed"})
    if made.finish == "malformed" or made.reasoning is None:
        return sample.model_copy(update={"kept": False, "drop_reason": "malformed"})
    if made.finish == "length":
        return sample.model_copy(update={"kept": False, "drop_reason": "truncated"})
    verdicts = await judge.grade(sample.prompt, made, "full", runs)
    marked = sample.model_copy(update={"verdicts": verdicts})
    if any(v.score is None for v in verdicts):
        return marked.model_copy(update={"kept": False, "drop_reason": "ungraded"})
    score = marked.score
    if score is None or score < threshold:
        lowest = min(verdicts, key=lambda v: v.score if v.score is not None else 2.0)
        weakest = min(lowest.criteria, key=lambda name: lowest.criteria[name])
        return marked.model_copy(update={"kept": False, "drop_reason": f"low score: {weakest}"})
    return marked.model_copy(update={"kept": True})


NOT_BEST = "not the best of its prompt"
BEYOND = "beyond the limit of its source and category"


def beyond(rows: list[Row], best_of: int, limit: int | None) -> dict[str, str]:
    """Which kept samples go after all, and why: rivals of one prompt, then what is over the limit.

    The limit is filled in turn from each pile (source, category, behaviour), the best of a pile first, so that a large
    pile cannot crowd out a small one. The earlier sample wins a tie.
    """
    dropped: dict[str, str] = {}
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        if row.kept:
            by_prompt.setdefault(row.prompt_id, []).append(row)
    piles: dict[tuple[str, str, str], list[Row]] = {}
    for rivals in by_prompt.values():
        ranked = sorted(rivals, key=lambda r: -r.score)
        dropped |= {r.key: NOT_BEST for r in ranked[best_of:]}
        for row in ranked[:best_of]:
            piles.setdefault(row.pile, []).append(row)
    if limit is not None:
        best_first = [sorted(pile, key=lambda r: -r.score) for _, pile in sorted(piles.items())]
        turns = [row for turn in itertools.zip_longest(*best_first) for row in turn if row is not None]
        dropped |= {r.key: BEYOND for r in turns[limit:]}
    return dropped


def agreement(rows: list[Row]) -> dict[str, Any] | None:
    """How far the k runs of one completion agree; None when there are no two.

    `same_side`: the share of completions whose runs are all above or all below the middle of the scale; `spread`: the
    mean of highest less lowest score; `kappa`: of the behaviours that the first two runs saw.
    """
    several = [r for r in rows if len(r.scores) > 1 and None not in r.scores]
    if not several:
        return None
    scores = [[s for s in r.scores if s is not None] for r in several]
    pairs = [(r.observed[0], r.observed[1]) for r in several]
    chance_corrected = kappa([str(a) for a, _ in pairs], [str(b) for _, b in pairs])
    return {
        "n": len(several),
        "same_side": sum(len({s >= 0.5 for s in row}) == 1 for row in scores) / len(scores),
        "spread": sum(max(row) - min(row) for row in scores) / len(scores),
        "kappa": chance_corrected if chance_corrected == chance_corrected else None,
    }


def funnel(rows: list[Row], threshold: float) -> dict[str, Any]:
    """Drops by reason, and how the filter did on the flaws that were marked on purpose.

    A flaw is caught when the sample was dropped for itself (not merely for a better rival or over the limit).
    Precision: the share of such drops that were marked; recall: the share of the marked that were dropped; by fault
    the same recall.
    """
    for_itself = [r for r in rows if not r.kept and r.drop_reason not in (NOT_BEST, BEYOND)]
    marked = [r for r in rows if r.fault is not None]
    caught = {r.key for r in for_itself if r.fault is not None}
    by_fault: dict[str, dict[str, int]] = {}
    for row in marked:
        counted = by_fault.setdefault(str(row.fault), {"marked": 0, "caught": 0})
        counted["marked"] += 1
        counted["caught"] += row.key in caught
    return {
        "threshold": threshold,
        "drops": dict(Counter(r.drop_reason for r in rows if not r.kept)),
        "flaws": {
            "marked": len(marked),
            "dropped": len(for_itself),
            "caught": len(caught),
            "precision": len(caught) / len(for_itself) if for_itself and marked else None,
            "recall": len(caught) / len(marked) if marked else None,
            "by_fault": by_fault,
        },
    }
