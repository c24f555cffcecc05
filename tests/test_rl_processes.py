"""RL in several processes on the CPU: real ones, gloo. One process learns from what they wrote in the same way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from delib import recipe
from delib.errors import UserError
from delib.recipe import RlSection
from delib.records import Manifest, Sample
from delib.run import StageFolder
from delib.stages import rl
from delib.training import fitting, footprint, processes, rollouts
from test_processes import TWO
from test_rl import BARE, POLICY, one_thread, opened  # noqa: F401 - a fixture that is used by itself
from test_rollouts import HashJudge, prompts_of_rows, wide_model  # noqa: F401 - a fixture

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
SCRIPT = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from delib.training import grpo
from test_rl_processes import *
from test_rollouts import *

torch.set_num_threads(1)
grpo.ROWS = 4  # more than one pass through the model for a process's six rows
out = Path({out!r})
out.mkdir(exist_ok=True)
(out / ("pid-" + os.environ["RANK"])).write_text(str(os.getpid()))

class Told(HashJudge):
    async def grade(self, *given):
        with (out / "judge.log").open("a") as log:
            log.write(os.environ["RANK"] + "\\n")
        await asyncio.sleep({pause})
        return await super().grade(*given)

def run(name, given, prompts):
    return rl.run(given, prompts, opened(Told()), POLICY, Path({start!r}), StageFolder(out / name))
"""


def section(steps=4, checkpoint_steps=100, **more):
    """Three groups a step, the second of which lies on both processes."""
    sizes = {"prompts": 3, "group": 4, "max_tokens": 24}
    return RlSection(steps=steps, learning_rate=1e-3, checkpoint_steps=checkpoint_steps, **sizes, **more)


def started(tmp_path, start, out, code, pause=0.0):
    values = {"tests": str(Path(__file__).parent), "out": str(out), "start": str(start), "pause": pause}
    file = tmp_path / f"{out.name}.py"
    file.write_text(SCRIPT.format(**values) + code, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    with (tmp_path / f"{out.name}.out").open("a") as log:
        return subprocess.Popen([*LAUNCH, str(file)], stdout=log, stderr=log, env=environment, cwd=tmp_path)


def written(folder):
    """The journal's completions, by place in all steps."""
    rows = StageFolder(folder / "trainer" / rollouts.JOURNAL).records(rollouts.Rollout)
    return sorted(rows, key=lambda row: (row.step, row.place))


LIVE = """
for name in ("live", "served"):
    made = run(name, recipe.Recipe(sft=BARE, rl=RUNS[name]), prompts_of_rows())
    if os.environ["RANK"] == "1":  # the leader tells the others its manifest
        (out / f"{name}.json").write_text(made.model_dump_json())
run("same", recipe.Recipe(sft=BARE, rl=section(steps=1)), prompts_of_rows()[:1])
"""
RUNS = {"live": section(), "served": section(steps=2, rollouts="llamacpp", device_batch=3)}


@pytest.mark.slow
def test_what_two_processes_write_is_learned_from_as_by_one(wide_model, tmp_path):  # noqa: F811
    """Live in two, with draws of their own; then one process replays the same rollouts: the same records, losses and
    weights. So each group has one mean over all of it, on whichever process its completions lie."""
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "two"
    process = started(tmp_path, wide_model, out, LIVE)
    assert process.wait() == 0, (tmp_path / "two.out").read_text()[-3000:]
    rows = written(out / "live")
    assert [(r.step, r.place) for r in rows] == [(n // 12, n % 12) for n in range(4 * 12)]
    chosen = [p.id for p in rl.mixed(prompts_of_rows(), 4 * 3, 0)]
    assert [r.prompt_id for r in rows] == [name for name in chosen for _ in range(4)]
    ids = [r.ids for r in written(out / "same")]
    assert ids[:6] != ids[6:], "of one prompt, each process draws by seeds of its own"

    for name, given in RUNS.items():
        alone, two = tmp_path / f"{name} alone", Manifest.model_validate_json((out / f"{name}.json").read_text())
        shutil.copytree(out / name / "trainer" / rollouts.JOURNAL, alone / "trainer" / rollouts.JOURNAL)
        one = rl.run(
            recipe.Recipe(sft=BARE, rl=given),
            prompts_of_rows(),
            opened(HashJudge()),
            POLICY,
            wide_model,
            StageFolder(alone),
        )
        assert two.detail["processes"] == 2
        losses, expected = ([h["loss"] for h in made.detail["curve"]] for made in (two, one))
        assert losses == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert any(abs(loss) > 1e-3 for loss in losses)
        assert two.counts == one.counts
        assert (out / name / "records.jsonl").read_bytes() == (alone / "records.jsonl").read_bytes()
        ours, theirs = (load_file(f / "checkpoint" / "model.safetensors") for f in (out / name, alone))
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)
    samples = [s for name in ("live", "served", "same") for s in StageFolder(out / name).records(Sample)]
    asked = (out / "judge.log").read_text().split()
    assert set(asked) == {"0"}, "one process asks the judge"
    assert len(asked) == sum(bool(s.verdicts) for s in samples) > 20, "and asks it once for each completion"

    before = (out / "same" / "records.jsonl").read_bytes()
    further = recipe.Recipe(sft=BARE, rl=section(steps=2))
    made = rl.run(further, prompts_of_rows()[:1], opened(HashJudge()), POLICY, wide_model, StageFolder(out / "same"))
    assert (made.detail["resumed_from"], made.counts["out"]) == ("checkpoint-1", 2 * 12)
    assert (out / "same" / "records.jsonl").read_bytes().startswith(before), "one process goes on where two stopped"


GOING_ON = """
made = run("run", recipe.Recipe(sft=BARE, rl=section(steps=6, checkpoint_steps=2, device_batch=2)), prompts_of_rows())
if os.environ["RANK"] == "0":
    (out / "curve.json").write_text(json.dumps([h["loss"] for h in made.detail["curve"]]))
processes.close(recipe.Recipe())  # as the pipeline does at a stage's end; torch may abort at exit otherwise
"""


@pytest.mark.slow
def test_kill_9_of_all_processes(wide_model, tmp_path):  # noqa: F811
    """Both are killed while the judge is asked; the same command goes on, and ends as an unbroken run does."""

    def start(name):
        return started(tmp_path, wide_model, tmp_path / name, GOING_ON, pause=0.05)

    def asked(name):
        file = tmp_path / name / "judge.log"
        return file.read_text().count("\n") if file.exists() else 0

    assert start("whole").wait() == 0, (tmp_path / "whole.out").read_text()[-3000:]
    process = start("broken")
    while asked("broken") < asked("whole") * 2 // 3:
        assert process.poll() is None, (tmp_path / "broken.out").read_text()[-3000:]
        time.sleep(0.01)
    process.kill()
    for rank in ("0", "1"):
        os.kill(int((tmp_path / "broken" / f"pid-{rank}").read_text()), signal.SIGKILL)
    process.wait()
    assert start("broken").wait() == 0, (tmp_path / "broken.out").read_text()[-3000:]
    losses = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("whole", "broken")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-9)
    whole, broken = ((tmp_path / name / "run" / "records.jsonl").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
    assert asked("broken") - asked("whole") <= 12, "at most what was in flight is asked about again"


DEAD = """
Told.fails_above = {above}
run("run", recipe.Recipe(sft=BARE, rl=section(steps=2)), prompts_of_rows())
"""


@pytest.mark.slow
def test_a_judge_that_grades_nothing_ends_all_processes(wide_model, tmp_path):  # noqa: F811
    """The one that leads tells why, none waits for it, and the same command goes on."""
    out = tmp_path / "two"
    process = started(tmp_path, wide_model, out, DEAD.format(above=-1.0))
    assert process.wait(timeout=300) != 0
    assert "StageError: rl: step 1: the judge left all" in (tmp_path / "two.out").read_text()
    process = started(tmp_path, wide_model, out, DEAD.format(above=1.0))
    assert process.wait() == 0, (tmp_path / "two.out").read_text()[-3000:]
    samples = StageFolder(out / "run").records(Sample)
    assert [s.index for s in samples] == list(range(2 * 12))
    assert not any(s.failure for s in samples)


def test_what_rl_in_several_processes_can_not_take_is_told(tmp_path):
    def told(accelerate, **section):
        (tmp_path / "a.yaml").write_text(accelerate, encoding="utf-8")
        given = {"model": "nobody/has-this", "accelerate": str(tmp_path / "a.yaml"), "rl": section, "device": "cuda"}
        return processes.problems(recipe.Recipe.model_validate(given))

    assert told(TWO, prompts=3, group=2) == told(TWO, rollouts="llamacpp") == []
    [problem] = told(TWO, prompts=3, group=3)
    assert problem.startswith("rl.prompts: 9 completions a step (prompts x group) can not be parted among 2 processes")
    sharded = TWO.replace("MULTI_GPU", "FSDP")
    [problem] = told(sharded, rollouts="llamacpp")
    assert problem.endswith("and FSDP parts them; set it to transformers")
    zero = TWO.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config: {zero_stage: 3}\n"
    assert any(p.startswith("rl.lora: ZeRO-3 takes no adapter") for p in told(zero, lora={}))


def test_check_tells_that_vllm_was_never_run_and_what_it_needs(monkeypatch):
    monkeypatch.setattr(fitting, "find_spec", lambda _: None)
    given = {"model": "nobody/has-this", "rl": {"rollouts": "vllm_server"}}
    needs_gpu, needs_vllm = rl.problems(recipe.Recipe.model_validate(given))
    assert needs_gpu == (
        "rl.rollouts: vllm_server needs a GPU; set device: cuda, or rl.rollouts to transformers or llamacpp"
    )
    assert needs_vllm.endswith("needs vllm, which is not installed; run 'pip install trl[vllm]'")
    assert "rollouts by vLLM" in footprint.never_run(recipe.Recipe.model_validate(given | {"device": "cuda"}))


def test_rows_of_a_step_have_to_part_before_anything_is_loaded(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    given = recipe.Recipe(sft=BARE, rl=section())
    with pytest.raises(UserError, match=r"12 completions a step .* among 5 processes; let them be a multiple of 5"):
        rl.run(given, prompts_of_rows(), opened(HashJudge()), POLICY, tiny_model, StageFolder(tmp_path))
