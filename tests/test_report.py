"""The report: hostile model output stays text, and nothing is printed that was not measured."""

import json

import pytest

from conftest import SPEC
from delib import chat, spec
from delib.errors import UserError
from delib.evals import labels
from delib.evals.scoring import metrics
from delib.pipeline import Pipeline
from delib.recipe import STARTER, Recipe
from delib.records import Manifest, Message, Prompt, Sample, Verdict
from delib.run import Run
from delib.stages import report
from scripted import AGREED

POLICY = spec.parse(SPEC)
HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)> | `x` [a](javascript:alert(3)) \u202e"


NOBODY = labels.Blind({}, 0)
"""Where nobody labelled anything."""


def make_run(path) -> Run:
    run = Run(path)
    rows = []
    found = []
    for arm in ("base", "base_spec", "sft", "rl"):
        folder = run.stage("evaluate").path / arm
        place = type(run.stage("x"))(folder)
        folder.mkdir(parents=True)
        prompt = Prompt(
            id="p", messages=[Message(role="user", content=HOSTILE)], category="fraud", clause="F1", behaviour="refuse"
        )
        verdict = Verdict(
            score=0.9, behaviour="refuse", criteria={"style": 0.9}, reason=HOSTILE, view="answer", judge="j", sent=""
        )
        made = chat.completion(chat.join(HOSTILE, HOSTILE), sent="", model=arm, cut=False)
        rows = [Sample(prompt=prompt, excerpt_id="x", completion=made, verdicts=[verdict])]
        place.replace(rows)
        found += metrics(rows, POLICY, arm)
    (run.stage("evaluate").path / "metrics.json").write_text(json.dumps([m.model_dump() for m in found]))
    flaws = {
        "marked": 1,
        "dropped": 1,
        "caught": 1,
        "precision": 1.0,
        "recall": 1.0,
        "by_fault": {"malformed": {"marked": 1, "caught": 1}},
    }
    details = {
        "filter": {"threshold": 0.5, "drops": {"malformed": 1}, "flaws": flaws},
        "sft": {"curve": [{"step": 1, "loss": 2.0, "accuracy": 0.1}, {"step": 2, "loss": 1.0, "accuracy": 0.2}]},
        "rl": {"curve": [], "groups_without_variance": 3},
    }
    for stage in ("prompts", "generate", "filter", "distill", "sft", "rl", "evaluate"):
        folder = run.stage(stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        made = Manifest(
            stage=stage,
            recipe="k",
            inputs={},
            outputs={},
            counts={"in": 1, "out": 1},
            seconds=2,
            detail=details.get(stage, {}),
        )
        (folder.path / "manifest.json").write_text(made.model_dump_json())
    return run


STAGES = ["prompts", "generate", "filter", "distill", "sft", "rl", "evaluate", "report"]


def test_hostile_output_is_escaped_and_the_page_asks_for_nothing(tmp_path):
    run = make_run(tmp_path)
    report.run(Recipe(), run, POLICY, run.stage("report"), STAGES, ["compact"], [], NOBODY, {})
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'src="http' not in page and "url(http" not in page
    assert "default-src 'none'" in page
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text
    assert "The agreement of the judge" not in page and "was not measured" in page


def test_every_figure_is_in_the_json_with_its_interval(tmp_path):
    run = make_run(tmp_path)
    agreements = [AGREED]
    report.run(Recipe(), run, POLICY, run.stage("report"), STAGES, ["compact"], agreements, NOBODY, {})
    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())
    main = next(r for r in rows if r["arm"] == "sft" and r["name"] == "not_unsafe" and r["by"] is None)
    assert set(main) == {"suite", "arm", "name", "value", "low", "high", "n", "n_ungraded", "by"}
    assert main["suite"] == "heldout" and main["value"] == 1.0 and main["low"] < 1.0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "0.900" in page and "kappa 0.80 [0.70, 0.88]" in page
    by_category = "| compact | fraud | n=5, 1 ungraded | 0.80, kappa undefined (its labels have only one class) |"
    assert "<td>n=5, 1 ungraded</td>" in page
    assert by_category in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "by each judge" not in page


def test_agreement_on_the_starters_answers_is_told_to_say_nothing_of_another_policy(tmp_path):
    run = make_run(tmp_path)
    agreed = [AGREED]
    starter = spec.load(STARTER / "spec.md")
    edited = spec.parse(starter.text.replace(starter.title, "My policy", 1))
    said = "this agreement says nothing of “My policy”."

    def pages(policy, blind=NOBODY):
        report.run(Recipe(), run, policy, run.stage("report"), STAGES, ["compact"], agreed, blind, {})
        return [(tmp_path / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]

    for page in pages(edited):
        assert said in page and "delib label" in page
    assert not any("says nothing of" in page for page in pages(starter))
    sample = run.stage("evaluate/base").records(Sample)[0]
    judged, labelled = (sample.verdicts[0].model_copy(update={"judge": name}) for name in ("compact-0", labels.JUDGE))
    own = sample.model_copy(update={"verdicts": [judged, labelled]})
    for page in pages(edited, labels.Blind({"base": [own]}, 0)):
        assert said in page and "own answers do: see below" in page


def test_blind_labels_stand_beside_the_judge(tmp_path):
    run = make_run(tmp_path)
    folder = tmp_path / "labels"
    file = folder / "sheet.jsonl"
    answers = {arm: run.stage(f"evaluate/{arm}").records(Sample) for arm in ("base", "sft")}
    whole = answers["base"][0]
    broken = whole.model_copy(update={"completion": chat.completion("<think>open", sent="", model="m", cut=False)})
    other = whole.prompt.model_copy(update={"id": "q"})
    verdict = whole.verdicts[0].model_copy(update={"judge": "compact-0"})
    broken = broken.model_copy(update={"prompt": other, "verdicts": [verdict]})
    answers = {arm: [s.model_copy(update={"verdicts": [verdict]}), broken] for arm, (s,) in answers.items()}
    assert labels.read(answers, {}, folder, POLICY) == NOBODY
    with pytest.raises(UserError, match="nothing to label"):
        labels.draw(answers, {"q"}, folder)
    assert labels.draw(answers, {"p", "q"}, folder) == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert all(set(row) == {"id", "messages", "answer", "label"} for row in rows)
    assert labels.read(answers, {}, folder, POLICY) == NOBODY
    file.write_text(json.dumps(rows[0] | {"label": "comply"}) + "\n" + json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="1 rows have no label"):
        labels.read(answers, {}, folder, POLICY)
    with pytest.raises(UserError, match="holds labels"):
        labels.draw(answers, {"p"}, folder)
    file.write_text(json.dumps(rows[0] | {"label": "comply", "id": "0"}) + "\n")
    with pytest.raises(UserError, match="not answers of this run"):
        labels.read(answers, {}, folder, POLICY)
    file.write_text("".join(json.dumps(row | {"label": "comply"}) + "\n" for row in rows))
    blind = labels.read(answers, {}, folder, POLICY)
    report.run(Recipe(), run, POLICY, run.stage("report"), STAGES, ["compact"], [], blind, {})
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())

    def of(judge):
        by = {"judge": judge, "on": "labels"}
        return {(r["arm"], r["value"], r["n"]) for r in found if r["by"] == by and r["name"] == "not_unsafe"}

    assert of("labels") == {("base", 0.0, 2), ("sft", 0.0, 2)}
    assert of("compact") == {("base", 0.5, 2), ("sft", 0.5, 2)}
    assert not [r for r in found if r["by"] == {"judge": "labels", "on": "labels"} and r["name"].endswith("_style")]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "by each judge: the prompts with blind labels" in page and "against the 2 blind labels" in page
    # Both are called comply by the labels, so that there is nothing to correct for chance.
    assert "kappa undefined (its labels have only one class)" in page and "labels, by category" in page


def test_labels_of_an_ablation_that_went_stale_are_left_out_and_counted(tmp_path):
    """Of one arm both answers were labelled; one of them is other since, or the arm is gone: both labels are out."""
    run = make_run(tmp_path)
    arms = list(Recipe().evaluate.arms)

    def answered(folder: str, answer: str) -> Sample:
        (sample,) = run.stage(f"evaluate/{arms[0]}").records(Sample)
        made = chat.completion(chat.join("So I answer.", answer), sent="", model="m", cut=False)
        sample = sample.model_copy(update={"completion": made})
        other = sample.model_copy(update={"prompt": sample.prompt.model_copy(update={"id": "q"})})
        place = run.stage(f"{folder}/rl_only")
        place.path.mkdir(parents=True, exist_ok=True)
        place.replace([sample, other.model_copy(update={"completion": made.model_copy(update={"answer": "Same."})})])
        return place.records(Sample)

    made_once = answered("ablate", "Once.")
    ours = {arm: run.stage(f"evaluate/{arm}").records(Sample) for arm in arms}
    folder = tmp_path / "labels"
    drawn = labels.draw(ours | {"rl_only": made_once}, {"p", "q"}, folder)
    assert drawn == len(arms) + 2
    rows = [json.loads(line) for line in (folder / "sheet.jsonl").read_text().splitlines()]
    (folder / "sheet.jsonl").write_text("".join(json.dumps(r | {"label": "refuse"}) + "\n" for r in rows))

    opened = Pipeline(Recipe(), run)
    assert set(opened.answers()) == set(arms), "the ablation is not finished by this recipe"
    blind = opened.blind()
    assert set(blind.samples) == set(arms) and blind.left_out == 2
    report.run(Recipe(), run, POLICY, run.stage("report"), STAGES, ["compact"], [], blind, {})
    for name in ("report.html", "report.md"):
        assert "2 blind labels are left out" in (tmp_path / "report" / name).read_text(encoding="utf-8")

    run.stage("ablate").path.rename(tmp_path / "ablate.stale")
    assert opened.blind() == blind
    again = ours | {"rl_only": answered("ablate", "Twice.")}
    earlier = {"rl_only": made_once}
    assert labels.read(again, earlier, folder, POLICY).left_out == 2, "one of its answers is the same, by chance"
    assert set(labels.read(again, earlier, folder, POLICY).samples) == set(arms)
    with pytest.raises(UserError, match="1 rows are not answers of this run"):
        labels.read(again, {}, folder, POLICY)


def test_a_control_says_that_it_is_one(tmp_path):
    run = make_run(tmp_path)
    report.run(Recipe(sft={"reasoning": False}), run, POLICY, run.stage("report"), STAGES, ["compact"], [], NOBODY, {})
    for name in ("report.html", "report.md"):
        assert "is a control" in (tmp_path / "report" / name).read_text(encoding="utf-8")


def test_a_second_judge_changes_no_answer(tmp_path, monkeypatch):
    """With another judge the answers of a finished evaluate stand (the same key); only the grading is done again."""
    run = make_run(tmp_path)
    monkeypatch.setattr(Pipeline, "inputs", lambda self, stage: {})
    one, two = (Pipeline(Recipe(evaluate={"second_judge": judge}), run) for judge in (None, "probe"))
    assert one.key("evaluate") == two.key("evaluate")
    other = Pipeline(Recipe(evaluate={"max_tokens": 64}), run)
    assert other.key("evaluate") != one.key("evaluate")
    manifest = run.stage("evaluate").manifest().model_copy(update={"detail": {"judges": ["compact"]}})
    (run.stage("evaluate").path / "manifest.json").write_text(manifest.model_dump_json())
    assert one.graded("evaluate") and not two.graded("evaluate") and two.graded("sft")
