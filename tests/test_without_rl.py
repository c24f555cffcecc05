"""A run whose arms do not name rl: RL is left out of it, its plan and its report, and is there for who asks by name."""

import pytest

import scripted
from delib import calls_left, capacity, changes, doctor, pipeline, plan, recipe, view
from delib.run import key_of
from delib.wiring import BEFORE, STAGES, before, stages_of

NO_RL = "evaluate.arms=[base, sft]"
MODEL = "openai-api/mock/m"
LEFT_OUT = "left out, since no arm of evaluate.arms asks for it"


def test_the_rule_counts_for_rl_alone_and_where_no_arm_names_it():
    whole = recipe.Recipe()
    assert stages_of(whole) == STAGES and all(before(whole, stage) == BEFORE[stage] for stage in BEFORE)
    given = recipe.Recipe(evaluate={"arms": ["base", "sft"]})
    assert stages_of(given) == tuple(stage for stage in STAGES if stage != "rl")
    assert stages_of(given, "rl") == STAGES[: STAGES.index("rl") + 1], "asked for by name"
    assert stages_of(given, "sft") == STAGES[: STAGES.index("sft") + 1]
    assert before(given, "evaluate") == ("prompts", "sft") and "rl" not in before(given, "report")
    assert all(before(given, stage) == BEFORE[stage] for stage in BEFORE if stage not in ("evaluate", "report"))


def test_a_run_is_whole_without_rl_and_rl_still_runs_by_name(recipe_file, monkeypatch):
    scripted.install(monkeypatch.setitem, monkeypatch.setattr)
    out = recipe_file.parent / "out"
    given = recipe.load(recipe_file, [NO_RL, "sft.epochs=1", "rl.steps=1"])
    ready = pipeline.start_run(given, out)
    assert changes.tell(ready) == f"A new run: nothing of it is made yet.\nrl        {LEFT_OUT}\n"
    pipeline.run_to(ready, "report")
    assert not (out / "rl").exists()
    assert set(ready.folder("evaluate").manifest().inputs) == {"prompts", "sft", "spec", "model"}
    for name in ("report.md", "report.html"):
        page = (out / "report" / name).read_text(encoding="utf-8")
        assert "sft" in page and "RL" not in page and "reward" not in page and "reinforcement" not in page
    data = view.write(out).read_text(encoding="utf-8")
    assert "also filtered the training data." in data and "gave the rewards" not in data
    assert {fate.what for fate in changes.fates(ready, "report").values()} == {"kept"}
    assert f"rl        {LEFT_OUT}\n" in changes.tell(ready) and "left out" not in changes.tell(ready, "rl")

    pipeline.open_run(out).execute("rl")
    assert (out / "rl" / "checkpoint").exists()
    assert {fate.what for fate in changes.fates(ready, "report").values()} == {"kept"}, "RL changes nothing else"

    # An evaluation of before this rule counted RL among what it read.
    folder = ready.folder("evaluate")
    manifest = folder.manifest()
    counted = manifest.model_copy(update={"inputs": manifest.inputs | {"rl": "of before"}})
    key = key_of(*ready.basis("evaluate"), counted.inputs)
    (folder.path / "manifest.json").write_text(counted.model_copy(update={"recipe": key}).model_dump_json())
    assert "evaluate  made anew: rl, which no arm asks for, counts no more" in changes.tell(ready)

    asked = pipeline.start_run(recipe.load(recipe_file, ["sft.epochs=1", "rl.steps=1"]), out)
    assert changes.fates(asked, "evaluate")["rl"].what == "kept"
    assert "rl" in asked.inputs("evaluate") and "rl" in asked.inputs("report")


@pytest.mark.parametrize("arms", [["base", "sft"], ["base", "rl"]])
def test_nothing_is_planned_of_what_is_left_out(arms, tiny_model, monkeypatch):
    given = recipe.Recipe(judge=MODEL, filter={"runs": 1}, evaluate={"arms": arms})
    rows = {line.split()[0] for line in plan.table(given).splitlines()}
    assert ("rl" in rows) == ("rl" in arms) and {"filter", "evaluate", "report"} <= rows
    served = {"concurrency": 8, "latency_seconds": 1}
    cluster = capacity.Cluster.model_validate(
        {"models": {MODEL: served, "smollm2": served}, "training": {"tokens_per_second": 1000}}
    )
    assert {row.stage for row in capacity.foretell(given, cluster)} - {"rl"} == {"filter", "sft", "evaluate", "report"}
    assert any(row.stage == "rl" for row in capacity.foretell(given, cluster)) == ("rl" in arms)
    on_gpu = given.model_copy(update={"device": "cuda", "model": str(tiny_model)})
    assert ("Memory of RL" in plan.table(on_gpu)) == ("rl" in arms) and "Memory of SFT" in plan.table(on_gpu)
    monkeypatch.setattr(doctor, "gpus", lambda: [("one", 80.0)])
    assert {f.about for f in doctor.fit(on_gpu)} == {"memory of sft"} | ({"memory of rl"} if "rl" in arms else set())


def test_rls_calls_are_told_to_who_asks_for_it_by_name(recipe_file, endpoint):
    endpoint()
    given = recipe.load(recipe_file, [NO_RL, f"judge={MODEL}"])
    ready = pipeline.start_run(given, recipe_file.parent / "out")
    section = given.rl

    def told(last: str) -> dict[str, int]:
        return {row.stage: row.left for row in calls_left.of(ready, stages_of(given, last), [])}

    assert told("rl")["rl"] == section.steps * section.prompts * section.group
    assert set(told("report")) == {"filter", "evaluate", "report"}
