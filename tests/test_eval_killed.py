"""kill -9 of an evaluation of a model behind an endpoint, then the same command or `inspect eval-retry`: it goes on.

Real processes; the mock endpoint is the model that is measured, and its judge.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log_sample_summaries, recover_eval_log

from conftest import ROWS, SPEC, prompt_row, write_rows
from delib import measure
from delib.evals import unfinished
from delib.evals.registry import SUITES

PYTHON = [sys.executable, "-c"]
DELIB, INSPECT = "from delib.cli import main; main()", "from inspect_ai._cli.main import main; main()"
MODEL = "openai-api/mock/m"
OPTIONS = ["-T", "prompts=held.jsonl", "-T", "spec=spec.md", "--judge", MODEL]
PROMPTS = 8 * len(ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A policy and prompts to measure by, and keys, also inspect_ai's places, that are this test's own."""
    (tmp_path / "spec.md").write_text(SPEC, encoding="utf-8")
    rows = [prompt_row(*row) for row in ROWS]
    asked = [(r, f"{r['messages'][0]['content']} (case {n})", n) for r in rows for n in range(8)]
    made = [r | {"id": f"{r['id']}-{n}", "messages": [{"role": "user", "content": text}]} for r, text, n in asked]
    write_rows(tmp_path / "held.jsonl", made)
    monkeypatch.setenv("MOCK_API_KEY", "k")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


class Evaluation:
    """`delib eval` with a folder of logs and a cache of its own, and an endpoint that counts what it is asked."""

    def __init__(self, folder: Path, name: str, server) -> None:
        self.folder, self.logs, self.server = folder, folder / name, server
        self.command = [*PYTHON, DELIB, "eval", "--suite", "policy", "--model", MODEL, *OPTIONS, "--log-dir", name]
        self.env = os.environ | {"DELIB_CACHE": str(folder / f"{name}-cache"), "MOCK_BASE_URL": server.base_url}

    def run(self, command: list[str] | None = None) -> str:
        """To its end; what it told."""
        kept = {"cwd": self.folder, "env": self.env, "capture_output": True, "text": True, "check": False}
        done = subprocess.run(command or self.command, **kept)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def kill(self, ready: Callable[[], bool]) -> None:
        """Killed as soon as it is ready for that."""
        with (self.folder / "killed.txt").open("w") as told:
            process = subprocess.Popen(self.command, cwd=self.folder, env=self.env, stdout=told, stderr=told)
            limit = time.monotonic() + 120
            while not ready():
                assert process.poll() is None, (self.folder / "killed.txt").read_text()
                assert time.monotonic() < limit, "it never came so far"
                time.sleep(0.01)
            process.kill()
            process.wait()

    def written(self) -> bool:
        """Whether its log holds some of the samples; it is written every ten of them."""
        with suppress(OSError, ValueError):
            return any(read_eval_log_sample_summaries(file) for file in self.logs.glob("*.eval"))
        return False

    def log(self):
        """The newest, read as a finished one."""
        return measure.read_log(max(self.logs.glob("*.eval"), key=lambda file: file.stat().st_mtime_ns))

    def bodies(self) -> Counter:
        """How often each request was answered in full."""
        return Counter(call["body"] for call in self.server.calls() if call["kind"] == "ok")


def told_by(log) -> tuple:
    """What an evaluation found, without times and ids of its own."""
    rows = sorted(measure.rows_of(log), key=lambda row: row["id"])
    scores = {one.id: {name: s.as_dict() for name, s in one.scores.items()} for one in log.samples}
    return rows, scores, [m.model_dump() for m in measure.metrics_of(log)], measure.about_of(log)


def finished(evaluation: Evaluation) -> int:
    """The samples that a killed evaluation left behind whole, in its log or not yet there."""
    [log] = evaluation.logs.glob("*.eval")
    copy = evaluation.folder / f"{evaluation.logs.name}.eval"
    recover_eval_log(str(log), output=str(copy), cleanup=False)
    return sum(one.error is None for one in read_eval_log_sample_summaries(copy))


@pytest.mark.slow
def test_killed_evaluation_goes_on(folder, endpoint, monkeypatch):
    monkeypatch.chdir(folder)
    options = {"prompts": "held.jsonl", "spec": "spec.md", "judge": MODEL}
    whole = Evaluation(folder, "whole", endpoint())
    monkeypatch.setenv("DELIB_CACHE", whole.env["DELIB_CACHE"])
    measure.suite("policy", MODEL, options, whole.logs)
    found, asked = told_by(whole.log()), whole.bodies()
    assert len(found[0]) == PROMPTS and len(asked) == 2 * PROMPTS and set(asked.values()) == {1}

    retried = Evaluation(folder, "retried", endpoint("--latency", "0.5"))
    retried.kill(retried.written)
    kept = {"retried": finished(retried)}
    [killed] = retried.logs.glob("*.eval")
    retried.run([*PYTHON, INSPECT, "eval-retry", str(killed), "--log-dir", "retried", "--display", "none"])

    again = Evaluation(folder, "again", endpoint("--latency", "0.5"))
    again.kill(again.written)
    kept["again"] = finished(again)
    before = len(again.server.calls())
    again.kill(lambda: len(again.server.calls()) >= before + 4)
    (again.logs / "torn.eval").write_bytes(killed.read_bytes()[:100])
    task = SUITES["policy"](**options)
    assert unfinished.find(again.logs, task, MODEL, options, 9) is None, "another limit"
    assert unfinished.find(again.logs, task, "openai-api/mock/n", options, None) is None, "another model"
    assert unfinished.find(whole.logs, task, MODEL, options, None) is None, "a finished one is begun anew"
    held = (folder / "held.jsonl").read_text()
    write_rows(folder / "held.jsonl", [json.loads(line) for line in held.splitlines()[1:]])
    assert unfinished.find(again.logs, SUITES["policy"](**options), MODEL, options, None) is None, "other data"
    (folder / "held.jsonl").write_text(held)
    told = " ".join(again.run().split())
    done = re.search(rf"goes on from .*, where (\d+) of {PROMPTS} samples are finished", told)
    assert done and kept["again"] <= int(done[1]) < PROMPTS and f" {PROMPTS}/{PROMPTS} " in told

    for broken in (retried, again):
        assert json.dumps(told_by(broken.log())) == json.dumps(found), "as if nothing had happened"
        times = broken.bodies()
        assert set(times) == set(asked)
        assert sum(n == 1 for n in times.values()) >= 2 * kept[broken.logs.name] > 0, "answer and verdict, once each"
