"""Blind labels of a run's own answers: the figures that no judge has touched.

`draw` writes a sheet of answers of all arms, shuffled, without arm and without anyone's verdict; whoever holds the
guide (docs/labelling.md) fills in `label`. `read` puts the labels beside the judges' verdicts. A row's id is a hash of
arm, prompt and answer, so that no key needs to lie beside the sheet: whose a label is, the answers themselves tell.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from delib.errors import UserError
from delib.judges.reading import broken
from delib.records import Message, Observed, Record, Sample, Verdict
from delib.run import read_jsonl, write_whole
from delib.spec import Spec, digest

JUDGE = "labels"
SHEET, DRAWN = "sheet.jsonl", "drawn.txt"
Answers = Mapping[str, list[Sample]]
"""Arm → its samples."""


class Blind(NamedTuple):
    """What a sheet tells. `samples`: by arm, those of the drawn prompts with their label as a further verdict; empty
    where nothing is labelled. `left_out`: labels of arms that are gone."""

    samples: dict[str, list[Sample]]
    left_out: int


class Labelled(Record):
    """One answer of the sheet. `label` None: nobody has labelled it yet."""

    id: str
    messages: list[Message]
    answer: str
    label: Observed | None = None


def _ident(arm: str, sample: Sample) -> str:
    return digest(f"{arm}\n{sample.key}\n{sample.completion.answer if sample.completion else ''}")[:12]


def draw(answers: Answers, prompt_ids: set[str], folder: Path) -> int:
    """Write the sheet of all arms' answers to these prompts; how many answers it holds.

    Broken answers fail by rule and are not in it; `drawn.txt` names the prompts, so that they count all the same.
    Raises UserError when labels stand in the file already (they are work that can't be made again), or when no answer
    is whole.
    """
    file = folder / SHEET
    if file.exists() and any(row.label for row in read_jsonl(file, Labelled)):
        raise UserError(f"{file}: holds labels; move it away before you draw another sheet")
    rows = [
        Labelled(id=_ident(arm, s), messages=s.prompt.messages, answer=s.completion.answer)
        for arm, samples in answers.items()
        for s in samples
        if s.prompt.id in prompt_ids and s.completion is not None and broken(s.completion) is None
    ]
    if not rows:
        raise UserError(f"{folder.parent}: no arm has a whole answer to these prompts, so there is nothing to label")
    rows.sort(key=lambda row: row.id)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DRAWN, "".join(f"{i}\n" for i in sorted(prompt_ids)))
    write_whole(file, "".join(row.model_dump_json() + "\n" for row in rows))
    return len(rows)


def read(answers: Answers, earlier: Answers, folder: Path, spec: Spec) -> Blind:
    """The labels beside the judges' verdicts. `earlier`: answers that an arm of the ablation had once; an arm that has
    labels of these and no longer those answers is left out, since what is left of its labels is no fair part of it.

    A row that was taken out of the sheet as unclear is ungraded. Raises UserError when some rows are labelled and
    others not, and when rows are of no answers that are known.
    """
    file = folder / SHEET
    rows = read_jsonl(file, Labelled) if file.exists() else []
    if not any(row.label for row in rows):
        return Blind({}, 0)
    labels = {row.id: row.label for row in rows}
    arm_of = {_ident(arm, s): arm for arm, samples in answers.items() for s in samples}
    gone = {
        ident: arm
        for arm, samples in earlier.items()
        for ident in (_ident(arm, s) for s in samples)
        if ident in labels and ident not in arm_of
    }
    unlabelled = [row.id for row in rows if row.label is None]
    strangers = [i for i in labels if i not in arm_of and i not in gone]
    problems = []
    if unlabelled:
        problems.append(
            f"{file}: {len(unlabelled)} rows have no label, first {unlabelled[0]}; label them, or take out the lines "
            "that are unclear"
        )
    if len(labels) < len(rows):
        problems.append(f"{file}: {len(rows) - len(labels)} ids stand in it twice; keep one line of each")
    if strangers:
        problems.append(
            f"{file}: {len(strangers)} rows are not answers of this run, first {strangers[0]}; the arms were made anew "
            "since, so move the file away and draw another sheet"
        )
    if not (folder / DRAWN).exists():
        problems.append(f"{folder / DRAWN}: is not there, so that nothing tells which prompts were drawn; restore it")
    if problems:
        raise UserError(problems)
    drawn, lost = set((folder / DRAWN).read_text(encoding="utf-8").split()), set(gone.values())
    found = {
        arm: [
            s.model_copy(update={"verdicts": [*s.verdicts, *_verdict(s, labels.get(_ident(arm, s)), spec)]})
            for s in samples
            if s.prompt.id in drawn
        ]
        for arm, samples in answers.items()
        if arm not in lost
    }
    return Blind(found, sum((gone | arm_of)[i] in lost for i in labels))


def _verdict(sample: Sample, label: Observed | None, spec: Spec) -> list[Verdict]:
    if label is None or sample.completion is None:
        return []
    right = float(label == spec.required(sample.prompt.clause, sample.prompt.behaviour))
    return [
        Verdict(
            score=None,  # a label says what was done, and not how well
            behaviour=label,
            criteria={"compliance": right},
            reason=f"labelled {label}",
            view="answer",
            judge=JUDGE,
            sent=sample.completion.answer,
        )
    ]
