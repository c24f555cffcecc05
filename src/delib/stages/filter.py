"""Stage 3, filter: malformed completions out, the judge's verdicts on the rest, the best of each prompt kept.

In: Samples. Out: the same Samples with k verdicts each (view "full": the judge sees the reasoning here), kept or
dropped with a reason. The score is the minimum of the k, since any one run may miss a problem (arXiv 2412.16339).
Flaws that were marked on purpose are counted afterwards; the mark is never shown to the judge.
"""

from collections import Counter
from typing import Any, Literal, Protocol

from delib.progress import bar
from delib.records import Completion, Manifest, Prompt, Sample, Verdict
from delib.run import StageFolder


class Judge(Protocol):
    """Grades one completion `runs` times. Never raises for one bad completion: that is an ungraded verdict."""

    name: str

    def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]: ...


def run(samples: list[Sample], judge: Judge, folder: StageFolder, *, runs: int, threshold: float) -> Manifest:
    """Grade, drop, keep the best. Resumes after the last graded sample."""
    graded = {s.key: s for s in folder.records(Sample)}
    with bar("filter", len(samples), len(graded)) as ticker:
        for sample in samples:
            if sample.key not in graded:
                graded[sample.key] = grade(sample, judge, runs, threshold)
                folder.append(graded[sample.key])
                ticker.step()
    final = best_of_each([graded[s.key] for s in samples])
    folder.replace(final)
    counts = {
        "in": len(final),
        "out": sum(bool(s.kept) for s in final),
        "dropped": sum(not s.kept for s in final),
        "failed": sum(s.failure is not None for s in final),
        "ungraded": sum(s.drop_reason == "ungraded" for s in final),
    }
    return Manifest(stage="filter", recipe="", inputs={}, outputs={}, counts=counts, detail=funnel(final, threshold))


def grade(sample: Sample, judge: Judge, runs: int, threshold: float) -> Sample:
    """One sample with its verdicts, and dropped where it must be."""
    made = sample.completion
    if sample.failure is not None or made is None:
        return sample.model_copy(update={"kept": False, "drop_reason": "failed"})
    if made.finish == "malformed" or made.reasoning is None:
        return sample.model_copy(update={"kept": False, "drop_reason": "malformed"})
    if made.finish == "length":
        return sample.model_copy(update={"kept": False, "drop_reason": "truncated"})
    verdicts = judge.grade(sample.prompt, made, "full", runs)
    marked = sample.model_copy(update={"verdicts": verdicts})
    if any(v.score is None for v in verdicts):
        return marked.model_copy(update={"kept": False, "drop_reason": "ungraded"})
    score = marked.score
    if score is None or score < threshold:
        lowest = min(verdicts, key=lambda v: v.score if v.score is not None else 2.0)
        weakest = min(lowest.criteria, key=lambda name: lowest.criteria[name])
        return marked.model_copy(update={"kept": False, "drop_reason": f"low score: {weakest}"})
    return marked.model_copy(update={"kept": True})


def best_of_each(samples: list[Sample]) -> list[Sample]:
    """Of the kept completions of a prompt only the best stays; the first wins a tie."""
    best: dict[str, Sample] = {}
    for sample in samples:
        if sample.kept:
            rival = best.get(sample.prompt.id)
            if rival is None or (sample.score or 0.0) > (rival.score or 0.0):
                best[sample.prompt.id] = sample
    final = []
    for sample in samples:
        if sample.kept and best[sample.prompt.id].key != sample.key:
            sample = sample.model_copy(update={"kept": False, "drop_reason": "not the best of its prompt"})
        final.append(sample)
    return final


def funnel(samples: list[Sample], threshold: float) -> dict[str, Any]:
    """Drops by reason, and how the filter did on the flaws that were marked on purpose.

    A flaw is caught when the sample was dropped for itself (not merely for a better rival). Precision: the share of
    such drops that were marked; recall: the share of the marked that were dropped; by fault the same recall.
    """
    for_itself = [s for s in samples if not s.kept and s.drop_reason != "not the best of its prompt"]
    marked = [s for s in samples if s.fault is not None]
    caught = [s for s in for_itself if s.fault is not None]
    by_fault: dict[str, dict[str, int]] = {}
    for sample in marked:
        row = by_fault.setdefault(str(sample.fault), {"marked": 0, "caught": 0})
        row["marked"] += 1
        row["caught"] += any(s.key == sample.key for s in caught)
    return {
        "threshold": threshold,
        "drops": dict(Counter(s.drop_reason for s in samples if not s.kept)),
        "flaws": {
            "marked": len(marked),
            "dropped": len(for_itself),
            "caught": len(caught),
            "precision": len(caught) / len(for_itself) if for_itself else None,
            "recall": len(caught) / len(marked) if marked else None,
            "by_fault": by_fault,
        },
    }
