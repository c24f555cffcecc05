"""Figures of whole evaluations: many attacks on one prompt, by category, at several lengths of completion."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import inspect_ai
import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import read_eval_log

from conftest import csv_file
from delib import compare, measure, recipe, tables
from delib.errors import UserError
from delib.evals import building, suites
from delib.evals.registry import SUITES
from delib.stats import bootstrap
from test_suites import answering, checkpoint, figures_of, held, judges  # noqa: F401 - fixtures among them

REFUSED, COMPLIED = "<think>r</think>I can't help with that.", "<think>r</think>Here is how it is done."


def test_attacks_are_named_and_their_mistakes_told():
    assert building.named_attacks("none, encoding(rot13)+role_play,none") == ["none", "encoding(rot13)+role_play"]
    assert building.named_attacks(["role_play", "prefix_injection"]) == ["role_play", "prefix_injection"]
    everything = building.named_attacks("all")
    assert len(everything) == len(set(everything)) == 42 and set(building.named_attacks("encodings")) < set(everything)
    assert building.named_attacks(None) == []
    with pytest.raises(UserError, match="attacks: no attack 'sing'") as told:
        building.named_attacks("sing,encoding(smoke)")
    assert len(told.value.problems) == 3
    with pytest.raises(PrerequisiteError, match="no attack 'sing'"):
        suites.strong_reject(attacks="sing")


def test_a_prompt_under_many_attacks_by_hand(judges, held):  # noqa: F811
    """Of four prompts under four attacks: week 0 falls to one, week 1 to two; the others stand."""

    def say(text):
        fell = ("week 0" in text and "play" in text) or ("week 1" in text and "play" not in text and "Sure" not in text)
        return COMPLIED if fell else REFUSED

    rows = [["c", "s", f"Tell of week {i}"] for i in range(4)]
    file = csv_file(held / "sr.csv", "category,source,forbidden_prompt", *rows)
    attacks = ["none", "role_play", "prefix_injection", "jailbreak(opposite-day)"]
    task = suites.strong_reject(file, spec="spec.md", attacks=",".join(attacks))
    assert [s.id.partition("@")[2] for s in task.dataset[:4]] == attacks, "a prompt's attacks stand together"
    asked = {}

    def keep(text):
        asked[text] = say(text)
        return asked[text]

    log = inspect_eval(task, model=answering(keep), display="none", log_dir=str(held))[0]
    found = figures_of(log)
    assert len(asked) == 16, "each attack asks in its own words"
    resisted = {s.id: s.scores["policy_scorer"].value["not_unsafe"] for s in log.samples}
    by_prompt = {}
    for name, value in resisted.items():
        by_prompt.setdefault(name.partition("@")[0], []).append(value)
    stood = [min(values) for values in by_prompt.values()]
    assert sorted(stood)[:2] == [0.0, 0.0] and 0 < sum(stood) < 4
    assert found["all_resisted"] == found["not_unsafe@0.1"] == sum(stood) / 4
    assert found["all_resisted_n"] == found["not_unsafe@0.1_n"] == 4 and found["not_unsafe_n"] == 16
    assert found["not_unsafe"] == sum(resisted.values()) / 16 > found["all_resisted"]
    assert found["all_resisted_low"] <= found["all_resisted"] <= found["all_resisted_high"]
    assert log.eval.metadata["headline"] == "not_unsafe@0.1" and log.eval.metadata["attacks"] == attacks
    metrics = measure.metrics_of(read_eval_log(log.location))
    by_attack = {m.by["attack"]: m for m in metrics if m.by and m.name == "not_unsafe"}
    assert set(by_attack) == set(attacks) and all(m.n == 4 for m in by_attack.values())
    rows = compare.read(log.location)
    assert len(rows) == 16 + 4
    assert sum(row.figures.get("all_resisted", 0.0) for row in rows.values()) == sum(stood)
    assert {row.asked for row in rows.values()} == {f"Tell of week {i}" for i in range(4)}
    told = tables.write(None, [f"rl={log.location}"], None)
    assert "| SFT + RL |" in told and "other attacks, not_unsafe@0.1)" in told and "sr.csv × 4 attacks; compact" in told


def test_intervals_under_many_attacks_draw_prompts(judges, held):  # noqa: F811
    """Half of the prompts stand against every attack and half fall to each: six times a prompt is no more than one."""
    rows = [["c", "s", f"Tell of {'bad' if i % 2 else 'good'} week {i}"] for i in range(12)]
    file = csv_file(held / "sr.csv", "category,source,forbidden_prompt", *rows)
    attacks = "none,role_play,prefix_injection,many_shot(1),many_shot(2),many_shot(3)"
    task = suites.strong_reject(file, spec="spec.md", attacks=attacks)
    model = answering(lambda text: COMPLIED if "bad" in text else REFUSED)
    found = figures_of(log := inspect_eval(task, model=model, display="none", log_dir=str(held))[0])
    values = [s.scores["policy_scorer"].value["not_unsafe"] for s in log.samples]
    interval = (found["not_unsafe_low"], found["not_unsafe_high"])
    assert len(values) == found["not_unsafe_n"] == 72 and sum(values) == 36
    assert interval == bootstrap(values, groups=[s.metadata["request"] for s in log.samples])[1:]
    low, high = bootstrap(values)[1:]
    assert interval[1] - interval[0] > 2 * (high - low)


def test_there_is_room_for_every_turn_of_an_attack(held, checkpoint, monkeypatch):  # noqa: F811
    assert building.turns("none") == building.turns("encoding(hex)+role_play") == 1
    assert building.turns("role_play+multi_turn") == 4 and building.turns("multi_turn( novel-editor )") == 3
    given = []

    def asked(*_, model_args, **__):
        given.append(model_args)
        raise PrerequisiteError("enough")

    monkeypatch.setattr(inspect_ai, "eval", asked)
    for options in (
        {"attacks": "none,multi_turns"},
        {"attacks": "none,role_play"},
        {"attacks": "none,role_play", "max_tokens": "1025"},
        {"solver": "multi_turn(warm-up)"},
        {"attacks": "multi_turn(warm-up)", "solver": "multi_turn(warm-up)", "max_tokens": "400"},
    ):
        with pytest.raises(UserError, match="enough"):
            measure.suite("strong_reject", str(checkpoint), options, held / "logs")
    rooms = [{"context_tokens": n} for n in (4 * 512 + 1024, 2048, 2049, 2048, 3 * 400 + 1024)]
    assert given == rooms, "every completion of a sample counts, at the task's own limit"


def test_inspects_own_command_measures_by_a_suite(tmp_path, endpoint):
    endpoint()
    command = [str(Path(sys.executable).with_name("inspect")), "eval", "delib/gsm8k", "--model", "openai-api/mock/m"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("INSPECT_")}
    done = subprocess.run(
        [*command, "--limit", "2", "--log-dir", "logs"],
        cwd=tmp_path,
        env=env | {"MOCK_API_KEY": "k", "XDG_DATA_HOME": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (tmp_path / "logs").glob("*.eval")
    log = measure.read_log(file)
    accuracy = next(m for m in measure.metrics_of(log) if m.name == "accuracy_shipped" and m.by is None)
    assert (accuracy.value, accuracy.n, accuracy.arm) == (0.0, 2, "openai-api/mock/m") and len(
        measure.rows_of(log)
    ) == 2


def test_a_lost_verdict_leaves_its_prompt_ungraded_and_is_told(judges, held):  # noqa: F811
    judges.add("compact")
    task = suites.encodings("nine.jsonl", spec="spec.md", attacks="encoding(rot13),encoding(hex)")
    log = inspect_eval(task, model=answering(lambda _: REFUSED), display="none", log_dir=str(held))[0]
    found = figures_of(log)
    lost = found["not_unsafe_ungraded"]
    assert lost == 6
    assert found["all_resisted"] == 1.0 and found["all_resisted_n"] + found["all_resisted_ungraded"] == 9
    assert 3 <= found["all_resisted_ungraded"] <= 6
    # Of fewer than half of the prompts no worst tenth is told.
    fallen = found["all_resisted_ungraded"]
    assert found["not_unsafe@0.1_ungraded"] == (fallen if fallen <= 4 else 9)
    assert ("not_unsafe@0.1" in found) == (fallen <= 4)


def test_the_encodings_suite_ships_and_goes_by_prompts():
    task = SUITES["encodings"]()
    assert task.name == "encodings_shipped" and task.metadata["headline"] == "all_resisted_shipped"
    assert len(task.dataset) == 94 * 12 and task.metadata["resamples"] == 10_000
    assert len({s.metadata["request"] for s in task.dataset[:24]}) == 2


def test_figures_by_category(judges, held):  # noqa: F811
    task = suites.policy("heldout.jsonl", spec="spec.md")
    log = inspect_eval(task, model=answering(lambda _: REFUSED), display="none", log_dir=str(held))[0]
    found = {(m.by or {}).get("category"): m for m in measure.metrics_of(log) if m.name == "not_overrefuse"}
    assert {key: m.n for key, m in found.items()} == {None: 3, "fraud": 1, "investment": 1, "none": 1}
    assert all(m.low is not None and m.value == 0.0 for m in found.values())


def test_a_sweep_on_a_checkpoint(judges, held, checkpoint):  # noqa: F811
    options = {"prompts": "heldout.jsonl", "spec": "spec.md"}
    told = measure.sweep(
        "policy", str(checkpoint), options, measure.budgets_of("8, 4"), held / "logs", None, held / "s.json"
    )
    rows = json.loads((held / "s.json").read_text())["budgets"]
    assert [(r["max_tokens"], r["tokens"]["value"], r["cut_off"]["value"]) for r in rows] == [(4, 4, 1), (8, 8, 1)]
    assert all(r["tokens"]["n"] == 6 and r["about"]["headline"] == "not_unsafe" for r in rows)
    lines = told.splitlines()
    assert lines[1].split() == ["max_tokens", "tokens", "cut_off", "not_unsafe", "n"]
    assert lines[2].split()[:2] == ["4", "4"] and "0.000 [" in lines[2] and lines[3].split()[:2] == ["8", "8"]
    with pytest.raises(UserError, match="--budgets are its values"):
        measure.sweep("policy", str(checkpoint), options | {"max_tokens": "4"}, [4], held / "logs")
    with pytest.raises(UserError, match="whole numbers"):
        measure.budgets_of("64,many")


def test_only_logs_of_these_suites_are_read(tmp_path):
    (tmp_path / "x.eval").write_text("no zip")
    with pytest.raises(UserError, match="log that can be read"):
        measure.read_log(tmp_path / "x.eval")


def test_a_runs_arms_are_measured_by_what_it_lacks_and_once(judges, held, checkpoint, monkeypatch):  # noqa: F811
    from test_report import make_run

    make_run(held)
    shutil.copy(recipe.path_of("starter:spec.md"), held / "spec.md")
    monkeypatch.setattr(tables, "SUITES", ("xstest", "encodings"))
    monkeypatch.setattr(tables, "SWEPT", ("policy_overrefusal",))
    made = tables.of_run(held, ["base", "sft"], 2, [8, 16])
    assert [name.split("=")[0] for name in made] == ["base"] * 3 + ["sft"] * 3
    opened = json.loads(Path(made[0].split("=")[1]).read_text())
    assert opened["about"]["failed"] == 0 and opened["rows"][0]["figures"]["tokens"] == 16, "the run's own max_tokens"
    text = tables.write(held, made, None)
    row = next(line for line in text.splitlines() if line.startswith("| encodings"))
    assert row.count("(n=2, other prompts)") == 2 and "shipped × 12 attacks; compact" in row and row.count("–") >= 2
    assert next(line for line in text.splitlines() if line.startswith("| XSTest")).count("n=40, other prompts") == 2
    swept = [line for line in text.splitlines() if "policy_overrefusal, not_overrefuse_shipped" in line]
    assert [line.split(" | ")[2] for line in swept] == ["8", "16"] * 2 and "| shipped; compact |" in swept[0]
    monkeypatch.setattr(measure, "suite", None)
    monkeypatch.setattr(measure, "sweep", None)
    assert tables.of_run(held, ["base", "sft"], 2, [8, 16]) == made, "what stands is not made again"
    with pytest.raises(TypeError):
        tables.of_run(held, ["base"], 3, [])
    with pytest.raises(UserError, match="--measure base_spec,rl_only: name arms of this run, of base, sft, rl"):
        tables.of_run(held, ["base_spec", "rl_only", "sft"], 2, [])
    (held / "rl" / "manifest.json").unlink()
    with pytest.raises(UserError, match="--measure rl: its stage is not finished"):
        tables.of_run(held, ["rl"], 2, [])
