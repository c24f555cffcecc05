"""`delib run` with a live teacher and judge behind a mock endpoint: faults, kill -9, the plan; all real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from conftest import questions

COMMAND = [sys.executable, "-c", "from delib.cli import main; main()"]
CALLS_A_SAMPLE = 4
"""One of the teacher and three of the judge."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """40 prompts, two samples each, teacher and judge at the mock endpoint."""
    questions(tmp_path, 40)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
name: mock
spec: spec.md
prompts: {train: train.jsonl, heldout: held.jsonl, near_duplicates: null}
generate: {teacher: openai-api/mock/m, samples: 2, max_tokens: 300}
judge: openai-api/mock/m
limits: {concurrency: 16, timeout_seconds: 1}
""",
        encoding="utf-8",
    )
    return path


def start(recipe: Path, out: str, *more: str) -> subprocess.Popen:
    environment = os.environ | {"DELIB_CACHE": str(recipe.parent / f"cache-{out}")}
    command = [*COMMAND, "run", str(recipe), "--out", str(recipe.parent / out), "--to", "filter", *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(recipe: Path, out: str, *more: str, code: int = 0) -> str:
    process = start(recipe, out, *more)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def records(recipe: Path, out: str, stage: str) -> bytes:
    return (recipe.parent / out / stage / "records.jsonl").read_bytes()


def test_faults_leave_the_records_of_a_faultless_run(recipe, endpoint):
    endpoint()
    finish(recipe, "plain")
    server = endpoint("--faults", "0.3", "--hang", "3")
    finish(recipe, "faulty")
    assert len({c["kind"] for c in server.calls()}) > 6
    for stage in ("generate", "filter"):
        assert records(recipe, "plain", stage) == records(recipe, "faulty", stage)


def killed(recipe: Path, server, kills: int, seed: int) -> None:
    """Kill the run at random moments of its calls, then let it end."""
    draw = random.Random(seed)
    total = 40 * 2 * CALLS_A_SAMPLE
    marks = sorted(draw.sample(range(1, total), kills))
    for mark in marks:
        process = start(recipe, "killed")
        while process.poll() is None and len(server.calls()) < mark:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(recipe, "killed")


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_repeats_only_what_was_in_flight_and_loses_nothing(recipe, endpoint, kills):
    endpoint()
    finish(recipe, "plain")
    server = endpoint("--latency", "0.05")
    killed(recipe, server, kills, seed=kills)
    for stage in ("generate", "filter"):
        assert records(recipe, "plain", stage) == records(recipe, "killed", stage)
    asked = Counter(c["body"] for c in server.calls())
    assert len(asked) == 40 * 2 * CALLS_A_SAMPLE, "each call was made"
    repeated = sum(asked.values()) - len(asked)
    assert repeated <= 16 * kills, "what was in flight at a kill, at most the concurrency"


def test_judging_starts_before_the_last_completion_is_there(recipe, endpoint):
    server = endpoint("--latency", "0.05")
    process = start(recipe, "stream", "--set", "limits.concurrency=4")
    while process.poll() is None and len(server.calls()) < 60:
        time.sleep(0.01)
    written = records(recipe, "stream", "generate").count(b"\n")
    process.kill()
    process.wait()
    assert written < 40, "of 60 calls many were the judge's, while most completions were not yet written"


def test_a_spent_budget_stops_the_stage_and_a_larger_one_goes_on(recipe, endpoint):
    endpoint()
    said = finish(recipe, "short", "--set", "limits.max_tokens=20000", code=1)
    assert "limits.max_tokens" in said and "run the same command again" in said and "Traceback" not in said
    spent = json.loads((recipe.parent / "short" / "spent.json").read_text())
    assert sum(r["prompt"] + r["completion"] for r in spent.values()) <= 20000
    finish(recipe, "short", "--set", "limits.max_tokens=2000000")


def test_the_plan_is_the_calls_that_are_made_and_an_upper_bound_of_their_tokens(recipe, endpoint):
    server = endpoint()
    said = subprocess.run([*COMMAND, "check", str(recipe)], capture_output=True, text=True, check=True).stdout
    rows = {line.split()[0]: line.split() for line in said.splitlines() if "openai-api/mock/m" in line}
    assert [rows[stage][1] for stage in ("generate", "filter", "evaluate")] == ["80", "240", "4"]
    assert server.calls() == [], "nothing is asked yet"
    finish(recipe, "planned")
    assert len(server.calls()) == 80 + 240
    planned = sum(int(rows[stage][n].replace(",", "")) for stage in ("generate", "filter") for n in (2, 3))
    [spent] = json.loads((recipe.parent / "planned" / "spent.json").read_text()).values()
    assert planned * 0.3 < spent["prompt"] + spent["completion"] <= planned
