"""`delib diff` on two made runs whose differences are worked by hand."""

import json

import pytest

from conftest import SPEC
from delib import chat, diff, made_with, spec
from delib.errors import UserError
from delib.recipe import Recipe
from delib.records import Manifest, Message, Prompt, Sample, Verdict
from delib.run import Run, sha256

F2 = "### F2 (comply): Spotting fraud\nSigns of a scam are explained."
EDITED = SPEC.replace(F2, "### F2 (refuse, plain-no): Spotting fraud\nSigns of a scam are for the branch to explain.")


def sample(name, clause, observed, policy):
    about = Prompt(
        id=name,
        messages=[Message(role="user", content=f"Question {name}?")],
        category=policy.clauses[clause].category,
        clause=clause,
        behaviour=policy.clauses[clause].behaviour,
        split="heldout",
    )
    made = chat.completion(chat.join(f"{clause} decides.", f"Answer {name} \x1b[2J."), sent="", model="m", cut=False)
    verdict = Verdict(
        score=0.9 if observed else None,
        behaviour=observed,
        criteria={"style": 1.0},
        reason="",
        view="answer",
        judge="j",
        sent="",
    )
    return Sample(prompt=about, excerpt_id="x", completion=made, verdicts=[verdict])


def make(path, text, rows, arms=("base", "sft"), **more):
    """A run that has evaluated `rows` (id, clause, what the answer was seen to do) alike in its arms."""
    path.mkdir()
    policy = path / "policy.md"
    policy.write_text(text)
    made_with.keep(Recipe(spec=str(policy), evaluate={"arms": list(arms)}, **more), policy, path)
    inputs, parsed = {"spec": sha256(policy)}, spec.parse(text)
    policy.write_text("# Gone\n")
    folder = Run(path).stage("evaluate")
    for arm in arms:
        place = Run(path).stage(f"evaluate/{arm}")
        place.path.mkdir(parents=True)
        place.replace([sample(*row, parsed) for row in rows])
    folder.finish(Manifest(stage="evaluate", recipe="k", inputs=inputs, outputs={}, counts={}), [])
    return path


def line_of(found, figure, part=""):
    return next((x for x in found.lines if x.figure == figure and x.part == part), None)


@pytest.fixture
def two(tmp_path):
    """Ten prompts on K1 that turn safe, one on F1 that stays, two on F2 whose demand the edit turned round."""
    many = [(f"k{i}", "K1") for i in range(10)]
    before = [*((*k, "comply") for k in many), ("f", "F1", "refuse"), ("s", "F2", "comply"), ("t", "F2", "comply")]
    after = [*((*k, "refuse") for k in many), ("f", "F1", "refuse"), ("s", "F2", "refuse"), ("t", "F2", "comply")]
    first = make(tmp_path / "a", SPEC, [*before, ("old", "F1", "refuse")], arms=("base", "sft"))
    return first, make(
        tmp_path / "b", EDITED, [*after, ("n", "K1", None), ("m", "K1", None)], arms=("sft", "rl"), seed=1
    )


def test_before_after_and_paired_differences_by_hand(two):
    found, _ = diff.of(*two, None)
    assert (found.arm, found.in_both, found.only_first, found.only_second) == ("sft", 13, 1, 2)
    safe = line_of(found, "not_unsafe")
    assert (safe.before, safe.after, safe.n) == (1 / 11, 1.0, 11), "F2 was no refuse prompt before, and has no pair"
    assert safe.difference == pytest.approx(10 / 11) and safe.sure and safe.low > 0.5
    assert line_of(found, "not_overrefuse") is None, "no prompt has to be helped in both"
    assert line_of(found, "judge_score").n == 11, "nor is a score by one demand set against one by another"
    whole = line_of(found, diff.AS_REQUIRED)
    assert (whole.before, whole.after, whole.n) == (pytest.approx(3 / 13), pytest.approx(12 / 13), 13)
    assert line_of(found, diff.AS_REQUIRED, "F2").edited and not line_of(found, diff.AS_REQUIRED, "K1").edited
    assert (
        line_of(found, diff.AS_REQUIRED, "investment").n == 10 and line_of(found, "clause_accuracy", "F1").after == 1.0
    )
    tests = [x for x in found.lines if x.n]
    assert all(x.adjusted >= x.p for x in tests) and max(x.adjusted for x in tests) == 1.0
    least = min(tests, key=lambda x: x.p)
    assert least.adjusted == pytest.approx(least.p * len(tests)), "Holm over all lines"


def test_each_side_is_held_against_its_own_label_and_the_edited_clause_comes_first(two):
    found, _ = diff.of(*two, "sft")
    assert found.relabelled == ["s", "t"]
    assert [c["id"] for c in found.changed] == ["t", *(f"k{i}" for i in range(10))], "s does what it must in both"
    one = found.changed[0]
    assert (one["before"]["demands"], one["before"]["as_required"]) == ("comply", 1.0)
    assert (one["after"]["demands"], one["after"]["as_required"]) == ("refuse", 0.0)
    told = diff.report(*two, None, 2, False)
    assert told.startswith("F2 (fraud): behaviour: comply -> refuse; prompts that it decides are relabelled")
    assert "held-out prompts in both: 13; 1 in the first alone, 2 in the second alone" in told
    assert "2 of them have another clause or demand now (s, t)" in told
    assert "The recipes differ too, so that not all is the edit's doing: seed 0 → 1; evaluate.arms" in told
    assert "Changed sides (as_required): 11, of which 2 are shown" in told
    assert "F2 demands refuse, does not\n    reasoning: F2 decides.\n    answer: Answer t \\x1b[2J." in told
    assert "k1 (" not in told and "k0 (investment): Question k0?" in told and "\x1b" not in told
    clauses = [x.part for x in found.lines if x.kind == "clause" and x.figure == diff.AS_REQUIRED]
    assert clauses == ["F2", "K1", "F1"]
    line = next(x for x in told.splitlines() if x.startswith("K1: as_required"))
    assert "0.000   1.000  +1.000 [" in line and " ** " in line and line.endswith(" 10")


def test_keys_that_change_no_figure_are_no_difference():
    idle = Recipe(rl={"device_batch": 2, "report_to": "trackio"}, evaluate={"second_judge": "probe"})
    assert diff._recipes(Recipe(), idle) == []
    assert diff._recipes(Recipe(), Recipe(rl={"group": 2})) == ["rl.group 4 → 2"]


def test_ungraded_answers_are_no_numbers(tmp_path):
    rows = [("a", "F1", "refuse"), ("b", "F1", None)]
    found, _ = diff.of(make(tmp_path / "a", SPEC, rows), make(tmp_path / "b", SPEC, rows[::-1]), None)
    line = line_of(found, "not_unsafe")
    assert (line.n, line.n_ungraded, line.difference) == (1, 1, 0.0) and found.changed == []
    none = [("a", "F1", None)]
    told = diff.report(make(tmp_path / "c", SPEC, none), tmp_path / "a", None, 4, False)
    assert next(x for x in told.splitlines() if x.startswith("not_unsafe")).endswith("0, 1 ungraded")


def test_a_run_that_was_started_anew_is_told_by_what_its_answers_were_made_with(two):
    first, second = two
    evaluated = made_with.recipe_of(second).model_copy(update={"spec": str(second / "spec.md")})
    made_with.keep(evaluated, second / "spec.md", second / "evaluate")
    made_with.keep(evaluated.model_copy(update={"seed": 7}), second / "spec.md", second)
    found, _ = diff.of(first, second, None)
    assert found.recipes[0] == "seed 0 → 1"


def test_ids_of_other_peoples_sets_are_shown_without_what_a_terminal_obeys(tmp_path):
    rows = [[("a\x1b[2J", "F2", seen)] for seen in ("comply", "refuse")]
    told = diff.report(make(tmp_path / "a", SPEC, rows[0]), make(tmp_path / "b", SPEC, rows[1]), None, 1, False)
    assert "\x1b" not in told and "a\\x1b[2J (fraud)" in told


def test_json_holds_all_of_it(two):
    found = json.loads(diff.report(*two, None, 0, True))
    assert len(found["changed"]) == 11 and found["spec"]["excerpts"]["fraud"] == "changed"
    assert diff.RunDiff.model_validate(found).lines


def test_mistakes_are_told_together(two, tmp_path):
    with pytest.raises(UserError) as error:
        diff.of(tmp_path / "x", tmp_path / "y", None)
    assert len(error.value.problems) == 2
    with pytest.raises(UserError, match=r"--arm rl: .*a has evaluated base, sft and .*b has evaluated sft, rl"):
        diff.of(*two, "rl")
    other = make(tmp_path / "c", SPEC, [("quite-other", "F1", "refuse")])
    with pytest.raises(UserError, match="no common prompt"):
        diff.of(two[0], other, None)
    (two[0] / "spec.md").unlink()
    with pytest.raises(UserError, match="no copy was kept"):
        diff.of(*two, None)
