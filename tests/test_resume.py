"""kill -9 in the middle of each long stage, then the same command: it goes on, and the records are those of an
unbroken run. Real processes, the tiny model, the compact judge."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROWS, prompt_row, write_rows

COMMAND = [sys.executable, "-c", "from delib.cli import main; main()"]
RECORD_STAGES = ("prompts", "generate", "filter", "distill")


def widen(folder: Path) -> None:
    """The small pack forty times over, so that a kill finds a stage at work."""
    prompts, demos = [], []
    originals = [json.loads(line) for line in (folder / "demos.jsonl").read_text().splitlines()]
    for copy in range(40):
        for name, text, category, clause, behaviour in ROWS:
            row = prompt_row(name, f"{text} (case {copy})", category, clause, behaviour)
            prompts.append(row | {"id": f"{name}-{copy}"})
        demos += [d | {"prompt_id": f"{d['prompt_id']}-{copy}"} for d in originals]
    write_rows(folder / "train.jsonl", prompts)
    write_rows(folder / "demos.jsonl", demos)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def run(folder: Path, out: str, to: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "run", "recipe.yaml", "--out", out, "--to", to, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def kill_when(folder: Path, out: str, to: str, ready, *more: str) -> None:
    """Start the command, wait until `ready()`, kill the process with SIGKILL while it works."""
    command = [*COMMAND, "run", "recipe.yaml", "--out", out, "--to", to, *more]
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        limit = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, (
                "it ended before it could be killed: " + (folder / "killed.log").read_text()[-2000:]
            )
            assert time.monotonic() < limit, "it never came so far"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_killed_record_stages_end_with_the_same_bytes(recipe_file):
    folder = recipe_file.parent
    widen(folder)
    done = run(folder, "whole", "distill")
    assert done.returncode == 0, done.stderr
    for stage, count in (("generate", 60), ("filter", 90)):
        records = folder / "broken" / stage / "records.jsonl"
        kill_when(folder, "broken", stage, lambda r=records, c=count: lines(r) >= c)
        assert not (folder / "broken" / stage / "manifest.json").exists()
        with records.open("ab") as handle:
            handle.write(b'{"torn')
    done = run(folder, "broken", "distill")
    assert done.returncode == 0, done.stderr
    for stage in RECORD_STAGES:
        name = f"{stage}/records.jsonl"
        assert (folder / "broken" / name).read_bytes() == (folder / "whole" / name).read_bytes(), stage


@pytest.mark.slow
def test_killed_training_and_evaluation_go_on(recipe_file):
    folder = recipe_file.parent
    widen(folder)
    write_rows(
        folder / "heldout.jsonl",
        [
            prompt_row(*r, suffix="-held") | {"id": f"held-{r[0]}-{n}"}
            for n in range(9)
            for r in [
                (name, f"{text} Number {n}.", category, clause, behaviour)
                for name, text, category, clause, behaviour in ROWS
            ]
        ],
    )
    changed = ["evaluate.max_tokens=128", "sft.epochs=2", "sft.decision_weight=4"]
    changed += ["sft.reasoning=false", "rl.cut_off=baseline"]  # the tiny model writes none, and hardly ends by itself
    more = [part for setting in changed for part in ("--set", setting)]
    done = run(folder, "whole", "evaluate", *more)
    assert done.returncode == 0, done.stderr
    for stage, step in (("sft", 20), ("rl", 2)):
        trainer = folder / "broken" / stage / "trainer"
        kill_when(
            folder,
            "broken",
            stage,
            lambda t=trainer, s=step: any(
                int(p.name.rsplit("-", 1)[1]) >= s and (p / "trainer_state.json").exists()
                for p in t.glob("checkpoint-*")
            ),
            *more,
        )
    answers = folder / "broken" / "evaluate" / "base_spec" / "records.jsonl"
    kill_when(folder, "broken", "evaluate", lambda: lines(answers) >= 5, *more)
    finished = answers.read_bytes().splitlines()[:5]
    done = run(folder, "broken", "evaluate", *more)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line)["completion"]["text"] for line in answers.read_bytes().splitlines()]
    assert all(json.loads(line)["completion"]["text"] in kept for line in finished)
    for stage in ("sft", "rl"):
        manifest = json.loads((folder / "broken" / stage / "manifest.json").read_text())
        unbroken = json.loads((folder / "whole" / stage / "manifest.json").read_text())
        assert manifest["detail"]["resumed_from"] is not None
        assert not (folder / "broken" / stage / "trainer").exists()
        assert manifest["counts"] == unbroken["counts"]
        assert any(row["loss"] for row in unbroken["detail"]["curve"]), stage
        for name in ("loss",) if stage == "sft" else ("loss", "reward"):
            ours = {r["step"]: r[name] for r in manifest["detail"]["curve"]}
            theirs = {r["step"]: r[name] for r in unbroken["detail"]["curve"]}
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9), stage
    graded = [(folder / out / "rl" / "records.jsonl").read_bytes() for out in ("whole", "broken")]
    assert graded[0] == graded[1]
