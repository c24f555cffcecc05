"""Blind labels of a run's own answers: the figures that no judge has touched.

`sheet` writes answers of all arms, shuffled, without arm and without anyone's verdict; whoever holds the guide
(docs/labelling.md) fills in `label`. `verdicts` reads them back; a row's id is a hash of arm and prompt, so that no
key needs to lie beside the sheet.
"""

from collections.abc import Mapping
from pathlib import Path

from delib.errors import UserError
from delib.judges.reading import broken
from delib.records import Message, Observed, Record, Sample, Verdict
from delib.run import read_jsonl, write_whole
from delib.spec import Spec, digest

JUDGE = "labels"


class Labelled(Record):
    """One answer of the sheet. `label` None: nobody has labelled it yet."""

    id: str
    messages: list[Message]
    answer: str
    label: Observed | None = None


def _ident(arm: str, sample: Sample) -> str:
    return digest(f"{arm}\n{sample.key}\n{sample.completion.answer if sample.completion else ''}")[:12]


def sheet(arms: Mapping[str, list[Sample]], file: Path) -> int:
    """Write the sheet; how many answers it holds. Broken answers, which fail by rule, are not in it.

    Raises UserError when labels stand in the file already: they are work that can't be made again.
    """
    if file.exists() and any(row.label for row in read_jsonl(file, Labelled)):
        raise UserError(f"{file}: holds labels; move it away before you draw another sheet")
    rows = [
        Labelled(id=_ident(arm, s), messages=s.prompt.messages, answer=s.completion.answer)
        for arm, samples in arms.items()
        for s in samples
        if s.completion is not None and broken(s.completion) is None
    ]
    rows.sort(key=lambda row: row.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(row.model_dump_json() + "\n" for row in rows))
    return len(rows)


def labelled(arms: Mapping[str, list[Sample]], file: Path, spec: Spec) -> dict[str, list[Sample]]:
    """The samples that were drawn for the sheet, each with the label as its last verdict. Samples whose answer is
    broken by rule need no label and are among them when their prompt was drawn for another arm. Empty where there is
    no sheet, or one without any label. Raises UserError when some rows are labelled and others not."""
    found = {row.id: row.label for row in read_jsonl(file, Labelled)} if file.exists() else {}
    if not any(found.values()):
        return {}
    unlabelled = [ident for ident, label in found.items() if label is None]
    if unlabelled:
        raise UserError(f"{file}: {len(unlabelled)} rows have no label, first {unlabelled[0]}; label them all")
    drawn = {s.prompt.id for arm, samples in arms.items() for s in samples if _ident(arm, s) in found}
    return {
        arm: [
            s.model_copy(update={"verdicts": [*s.verdicts, *_verdict(s, found.get(_ident(arm, s)), spec)]})
            for s in samples
            if s.prompt.id in drawn
        ]
        for arm, samples in arms.items()
    }


def _verdict(sample: Sample, label: Observed | None, spec: Spec) -> list[Verdict]:
    if label is None or sample.completion is None:
        return []
    required = spec.required(sample.prompt.clause, sample.prompt.behaviour)
    criteria = {"compliance": float(label == required)}
    style = spec.style_for(sample.prompt.clause, required) if required else None
    if style is not None:
        words = len(sample.completion.answer.split())
        fits = words >= (style.min_words or 0) and words <= (style.max_words or words)
        criteria["style"] = float(fits and label == required)
    told = f"labelled {label}"
    sent = sample.completion.answer
    score = min(criteria.values())
    return [
        Verdict(score=score, behaviour=label, criteria=criteria, reason=told, view="answer", judge=JUDGE, sent=sent)
    ]
