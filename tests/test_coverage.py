"""Clause coverage on made samples whose figures are worked by hand, and on what a run folder holds."""

import json

import pytest
from typer.testing import CliRunner

from conftest import SPEC
from delib import chat, cli, coverage, made_with, spec
from delib.errors import UserError
from delib.evals.scoring import metrics
from delib.recipe import Recipe
from delib.records import Manifest, Message, Prompt, Sample, Verdict
from delib.run import Run, StageFolder, sha256
from test_report import NOBODY, STAGES, make_run, report

POLICY = spec.parse(SPEC)
DEMANDS = {"F1": "refuse", "F2": "comply", "K1": "refuse", "K3": "safe_complete", "G1": "comply"}


def prompt(name, clause, split="train"):
    place = POLICY.clauses[clause].category if clause else "fraud"
    behaviour = DEMANDS.get(clause)
    return Prompt(
        id=name,
        messages=[Message(role="user", content=name)],
        category=place,
        clause=clause,
        behaviour=behaviour,
        split=split,
    )


def sample(about, reasoning, observed="refuse", score=0.9, **more):
    made = chat.completion(chat.join(reasoning, f"An answer to {about.id}."), sent="", model="m", cut=False)
    verdict = Verdict(
        score=score, behaviour=observed, criteria={"style": 1.0}, reason="", view="answer", judge="j", sent=""
    )
    return Sample(prompt=about, excerpt_id="x", completion=made, verdicts=[verdict], **more)


def row_of(found, clause):
    return next(r for r in found.rows if r.clause == clause)


def figure(found, clause, arm, name):
    metric = row_of(found, clause).figure(arm, name)
    return (metric.value, metric.n) if metric else None


def test_cited_against_labelled_by_hand():
    one, two, other = prompt("a", "F1"), prompt("b", "F1"), prompt("c", "F2")
    filtered = [
        sample(one, "Fraud, by F1 and not by F2. I refuse.", kept=True, score=0.8),
        sample(two, "This is fraud. I refuse.", kept=True, score=0.6),
        sample(other, "F1 forbids it.", kept=True),
        sample(two, "F1 decides.", kept=False, score=0.1, drop_reason="low score: style", index=1),
        sample(two, "F1 decides.", kept=False, score=None, drop_reason="ungraded", index=2),
        sample(prompt("d", None), "F1, F1 and Z9.", kept=True),
    ]
    prompts = [one, two, other, prompt("d", None), prompt("e", "F1", "heldout"), prompt("f", "K1", "rl")]
    found = coverage.of(POLICY, prompts, filtered, {})
    assert figure(found, "F1", "teacher", coverage.RECALL) == (0.5, 2), "a cites it, b does not"
    assert figure(found, "F1", "teacher", coverage.PRECISION) == (0.5, 2), "cited by a, and wrongly by c"
    assert figure(found, "F2", "teacher", coverage.PRECISION) == (0.0, 1)
    assert figure(found, "F2", "teacher", coverage.RECALL) == (0.0, 1)
    assert figure(found, "F1", "teacher", coverage.SCORE) == (0.5, 3), "dropped ones were graded too"
    assert row_of(found, "F1").figure("teacher", coverage.SCORE).n_ungraded == 1
    assert row_of(found, "F1").prompts == {"train": 2, "rl": 0, "heldout": 1} and row_of(found, "F1").kept == 2
    assert found.untrained == ["G1", "K2", "K3"], "an RL prompt exercises K1"
    assert found.untested == ["G1", "K1", "K2", "K3", "F2"] and found.no_clause == {"train": 1}
    low, high = ((m := row_of(found, "F1").figure("teacher", coverage.RECALL)).low, m.high)
    assert low == 0.0 and high == 1.0
    told = coverage.table(found, None)
    assert "No training prompt: G1, K2, K3." in told and "name no clause, and count for none: 1 of train" in told


def test_recalls_weigh_up_to_the_clause_accuracy_of_the_evaluation():
    asked = [prompt(n, c, "heldout") for n, c in (("a", "F1"), ("b", "F1"), ("c", "F2"), ("d", "K3"), ("e", "K3"))]
    thoughts = ["F1.", "F2.", "F2 lets me.", "", "K3 and F1."]
    samples = [sample(p, t) for p, t in zip(asked, thoughts, strict=True)]
    found = coverage.of(POLICY, asked, (), {"sft": samples})
    recalls = [m for r in found.rows for m in r.figures if m.name == coverage.RECALL]
    whole = next(m for m in metrics(samples, POLICY, "sft") if m.name == "clause_accuracy" and m.by is None)
    assert sum(m.value * m.n for m in recalls) / sum(m.n for m in recalls) == pytest.approx(whole.value) == 0.6


def test_verdicts_are_of_what_the_clause_demands_and_a_failure_is_no_number():
    asked = [prompt("a", "F1", "heldout"), prompt("b", "F1", "heldout"), prompt("c", "F2", "heldout")]
    samples = [sample(asked[0], "F1."), sample(asked[1], "F1.", observed=None, score=None), sample(asked[2], "F2.")]
    found = coverage.of(POLICY, [*asked, prompt("k", "K1", "heldout")], (), {"base": samples, "rl": samples})
    metric = row_of(found, "F1").figure("rl", "not_unsafe")
    assert (metric.value, metric.n, metric.n_ungraded) == (1.0, 1, 1) and metric.by == {"clause": "F1"}
    assert figure(found, "F2", "rl", "not_overrefuse") == (0.0, 1), "a comply prompt was refused"
    assert row_of(found, "F2").figure("rl", "not_unsafe") is None
    assert found.unevaluated == ["K1"]
    lines = coverage.table(found, "rl").splitlines()
    line = next(x for x in lines if x.startswith("F1 "))
    assert "1.00 (1)" in line and any("1 ungraded" in x for x in lines)
    assert "among the evaluated (evaluate.limit): K1." in coverage.table(found, "rl")


@pytest.fixture
def run_folder(tmp_path):
    """A run of one prompt with four arms, with the spec that it was made with."""
    run = make_run(tmp_path / "run")
    policy = tmp_path / "policy.md"
    policy.write_text(SPEC)
    made_with.keep(Recipe(spec=str(policy)), policy, run.path)
    held = run.stage("evaluate/base").records(Sample)[0].prompt.model_copy(update={"split": "heldout"})
    run.stage("prompts").replace([held])
    for stage in ("prompts", "evaluate"):
        manifest = run.stage(stage).manifest().model_copy(update={"inputs": {"spec": sha256(policy)}})
        (run.stage(stage).path / "manifest.json").write_text(manifest.model_dump_json())
    return run.path


def test_a_run_is_told_by_the_spec_it_was_made_with(run_folder, tmp_path):
    (tmp_path / "policy.md").write_text(SPEC.replace("F1 (refuse, plain-no)", "F9 (refuse, plain-no)"))
    out = tmp_path / "coverage.json"
    done = CliRunner().invoke(cli.app, ["coverage", str(run_folder), "--arm", "sft", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "No training prompt: G1, K1, K2, K3, F1, F2." in done.output
    assert "No held-out prompt: G1, K1, K2, K3, F2." in done.output
    rows = coverage.Coverage.model_validate(json.loads(out.read_text()))
    assert rows.arms == ["base", "base_spec", "sft", "rl"] and figure(rows, "F1", "rl", "not_unsafe") == (1.0, 1)
    with pytest.raises(UserError, match=r"--arm best: .* has evaluated base, base_spec, sft, rl"):
        coverage.report(run_folder, "best", None)
    (run_folder / "spec.md").write_text(SPEC.replace("payslip", "x") + "\nMore.\n")
    with pytest.raises(UserError, match="no copy was kept"):
        coverage.of_run(run_folder)


def test_a_run_without_samples_yet_tells_its_prompts(tmp_path):
    policy = tmp_path / "policy.md"
    policy.write_text(SPEC)
    made_with.keep(Recipe(spec=str(policy)), policy, tmp_path)
    with pytest.raises(UserError, match="stage prompts is not finished"):
        coverage.of_run(tmp_path)
    folder = StageFolder(tmp_path / "prompts")
    folder.begin("k")
    folder.replace([prompt("a", "F1")])
    inputs = {"spec": sha256(policy)}
    folder.finish(Manifest(stage="prompts", recipe="k", inputs=inputs, outputs={}, counts={}), ["records.jsonl"])
    told = coverage.report(tmp_path, None, None)
    assert "No arm is evaluated yet." in told and "1/0/0" in told


def test_the_report_names_what_nothing_tests(tmp_path):
    run = make_run(tmp_path)
    run.stage("prompts").replace([prompt("a", "F1"), prompt("b", "F2", "heldout")])
    report.run(Recipe(), run, POLICY, run.stage("report"), STAGES, ["compact"], [], NOBODY, {})
    for name in ("report.html", "report.md"):
        page = (Run(tmp_path).stage("report").path / name).read_text()
        assert "no training prompt exercises: G1, K1, K2, K3, F2." in page
        assert "so that no figure here is about them: G1, K1, K2, K3, F1." in page
