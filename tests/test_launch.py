"""What `delib launch` writes: the scripts as their systems read them, names that need quotes, and one real launch."""

import ast
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import SPEC
from delib import launch, pipeline, recipe
from delib.errors import UserError
from delib.records import Example, Manifest, Message
from delib.run import RECORDS, Run

AWKWARD = '/shared/it\'s "my" $HOME `run`; x/tiny'
JUDGE = "judge=openai-api/my-service/m"


def made(system: launch.System, *overrides: str, named="gpu-8x80gb", run=AWKWARD, **more: Any) -> str:
    return launch.write(Path(named), list(overrides), system, run=Path(run), **more)


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def values(script: str, *names: str) -> list[str]:
    """What bash takes these variables of a script for: only its assignments are run."""
    lines = [line for line in script.splitlines() if line.strip().startswith(tuple(f"{name}=" for name in names))]
    show = "; ".join(f'printf "%s\\n" "${name}"' for name in names)
    done = subprocess.run(["bash", "-uc", "\n".join(lines) + "\n" + show], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("named", ["gpu-8x80gb", "gpu-24gb", "small"])
def test_the_slurm_script_is_bash_and_asks_for_nodes_and_gpus(named, tmp_path):
    each = {"gpu-8x80gb": 8, "gpu-24gb": 4, "small": 2}[named]
    script = made("slurm", named=named, nodes=2, per_node=each)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    first, *rest = script.splitlines()
    options = [line.removeprefix("#SBATCH ") for line in rest if line.startswith("#SBATCH ")]
    assert first == "#!/bin/bash" and rest[0].startswith("#SBATCH"), "sbatch reads options up to the first command"
    assert {"--nodes=2", "--ntasks-per-node=1", f"--job-name={named}"} <= set(options)
    assert (f"--gpus-per-node={each}" in options) == (named != "small")
    assert values(script, "run", "processes") == [AWKWARD, str(each)]
    assert "NEVER RUN ON A CLUSTER" in script
    assert "--to distill" in script


def test_record_stages_are_told_as_a_command_that_can_be_pasted():
    script = made("slurm", "sft.epochs=3", nodes=1)
    [line] = [line for line in script.splitlines() if line.endswith("--to distill")]
    words = shlex.split(line.removeprefix("#"))
    assert words == ["delib", "run", "gpu-8x80gb", "--set", "sft.epochs=3", "--out", AWKWARD, "--to", "distill"]


def test_the_config_is_the_recipes_own_for_so_many_processes():
    for system in ("slurm", "skypilot"):
        text = made(system, nodes=2)
        script = text if system == "slurm" else documents(text)[0]["run"]
        config = yaml.safe_load(script.split("<<'ACCELERATE'\n")[1].split("\nACCELERATE\n")[0])
        assert (config["num_machines"], config["num_processes"]) == (2, 16)
        assert config["distributed_type"] == "FSDP" and config["fsdp_config"]["fsdp_version"] == 2
    alone = launch._config(recipe.load(recipe.QUICKSTART), {}, 1, 1)
    assert alone["distributed_type"] == "NO", "accelerate refuses MULTI_GPU for one process"


def test_skypilot_takes_only_keys_that_its_schema_knows():
    """Keys and types after SkyPilot's own `get_task_schema` (sky/utils/schemas.py), which forbids any other."""
    kinds = {"name": str, "num_nodes": int, "resources": dict, "secrets": dict, "setup": str, "run": str}
    for overrides, device in (([JUDGE], "cuda"), (["device=cpu", "dtype=float32", "accelerate=null"], "cpu")):
        [task] = documents(made("skypilot", *overrides, nodes=2))
        assert all(isinstance(value, kinds[key]) for key, value in task.items())
        assert task["num_nodes"] == 2
        assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
        assert values(task["run"], "run") == [AWKWARD]
        if device == "cuda":
            assert [one["accelerators"] for one in task["resources"]["any_of"]] == ["H100:8", "A100-80GB:8"]
            assert set(task["secrets"].values()) == {None}, "names, and no values"
        else:
            assert "secrets" not in task and task["resources"] == {"cpus": "1+"}


def test_kuberay_has_the_fields_that_its_types_demand():
    """Required by ray.io/v1's Go types: headGroupSpec with rayStartParams and template; groupName, minReplicas,
    maxReplicas, rayStartParams and template of each worker group. Names and images are Kubernetes' own demand."""
    config, job = documents(made("kuberay", JUDGE, "name=My_Run.2", "sft.batch_size=24", "rl.prompts=24", nodes=3))
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "my-run-2")
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"] == 3
    assert workers["groupName"]
    for group, gpus in ((cluster["headGroupSpec"], None), (workers, 8)):
        assert isinstance(group["rayStartParams"], dict)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        [container] = group["template"]["spec"]["containers"]
        assert container["image"] and container["name"]
        assert container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu") == gpus
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["runs"] == str(Path(AWKWARD).parent)
        assert set(mounted) == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        refs = {env["name"]: env["valueFrom"]["secretKeyRef"] for env in container["env"] if "valueFrom" in env}
        assert set(refs) == {"MY_SERVICE_BASE_URL", "MY_SERVICE_API_KEY"}
        assert {ref["name"] for ref in refs.values()} == {"delib-keys"}
    sent = config["data"]
    assert config["metadata"]["name"] == "my-run-2-launch" and config["kind"] == "ConfigMap"
    given = {"nodes": 3, "processes": 8, "gpus": 8, "run": AWKWARD, "stages": ["sft", "rl"]}
    assert json.loads(sent["launch.json"]) == given
    assert yaml.safe_load(sent["accelerate.yaml"])["num_processes"] == 24
    ast.parse(sent["each_node.py"])
    assert job["spec"]["entrypoint"] == f"python {launch.PLACE}/each_node.py", "nothing in it that needs quotes"


def test_each_ray_node_gets_its_rank_and_the_first_ones_address(tmp_path, monkeypatch):
    """The program that KubeRay runs, with a stand-in for Ray that works here and now."""
    ran: list[list[str]] = []
    place = tmp_path / "each_node.py"
    place.write_text((launch.TEMPLATES / "each_node.py").read_text(encoding="utf-8"), encoding="utf-8")
    given = {"nodes": 2, "processes": 4, "gpus": 4, "run": str(tmp_path / "a run"), "stages": ["sft", "rl"]}
    (tmp_path / "launch.json").write_text(json.dumps(given), encoding="utf-8")
    found = importlib.util.spec_from_file_location("each_node", place)
    assert found is not None and found.loader is not None
    program = importlib.util.module_from_spec(found)
    found.loader.exec_module(program)
    asked: list[Any] = []
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setitem(sys.modules, "ray.util.placement_group", FakeGroups(asked))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", FakeGroups(asked))
    monkeypatch.setattr(program.subprocess, "run", lambda command, check: ran.append(command))
    with pytest.raises(SystemExit, match="distill is not finished"):
        program.main()
    (tmp_path / "a run" / "distill").mkdir(parents=True)
    (tmp_path / "a run" / "distill" / "manifest.json").touch()
    program.main()
    assert asked == [([{"CPU": 1, "GPU": 4}] * 2, "STRICT_SPREAD")]
    assert [(c[c.index("--machine_rank") + 1], c[-3]) for c in ran] == [
        ("0", "sft"),
        ("1", "sft"),
        ("0", "rl"),
        ("1", "rl"),
    ]
    for command in ran:
        assert command[:2] == ["accelerate", "launch"] and command[-4:-3] == ["delib"]
        assert command[command.index("--num_processes") + 1] == "8"
        assert command[command.index("--main_process_ip") + 1] == "10.0.0.7"
        assert command[-1] == given["run"]
    assert ran[0][ran[0].index("--main_process_port") + 1] == ran[1][ran[1].index("--main_process_port") + 1]


class FakeRay:
    """As much of Ray as the program uses; a task is run when it is asked for."""

    def __init__(self) -> None:
        self.util = self

    def init(self) -> None: ...

    def get_node_ip_address(self) -> str:
        return "10.0.0.7"

    def get(self, made: Any) -> Any:
        return made

    def remote(self, *, num_cpus: int, num_gpus: int, max_retries: int, scheduling_strategy: Any) -> Any:
        assert max_retries == 0 and num_gpus == 4

        def task(work: Any) -> Any:
            work.remote = work
            return work

        return task


class FakeGroups:
    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def placement_group(self, bundles: Any, strategy: str) -> "FakeGroups":
        self.asked.append((bundles, strategy))
        return self

    def ready(self) -> bool:
        return True

    def PlacementGroupSchedulingStrategy(self, group: Any, placement_group_bundle_index: int) -> int:
        return placement_group_bundle_index


@pytest.mark.parametrize("system", ["slurm", "kuberay", "skypilot"])
def test_no_key_is_ever_written(system, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "sk-verysecret")
    monkeypatch.setenv("MY_SERVICE_BASE_URL", "http://user:word@host/v1")
    text = made(system, JUDGE)
    assert "MY_SERVICE_API_KEY" in text
    assert "sk-verysecret" not in text and "user:word" not in text


@pytest.mark.parametrize(
    ("judge", "named"),
    [
        ("compact", []),
        ("smollm2", []),
        ("vllm/m", ["VLLM_BASE_URL", "VLLM_API_KEY"]),
        ("openai-api/a-b/org/m", ["A_B_BASE_URL", "A_B_API_KEY"]),
        ("anthropic/m", ["ANTHROPIC_API_KEY"]),
    ],
)
def test_variables_are_those_of_the_judge(judge, named, monkeypatch):
    monkeypatch.setattr(launch.opened, "providers", lambda: frozenset({"anthropic"}))  # its import takes seconds
    assert launch._variables(recipe.load(recipe.QUICKSTART, [f"judge={judge}"])) == named


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        made("kuberay", "judge=openai-api/a$(reboot)/m", run="runs/mine", nodes=3, per_node=5)
    batch, group, place, judge = caught.value.problems
    assert batch.startswith("sft.batch_size: 16 can not be parted among 15 processes")
    assert group.startswith("rl.prompts: 64 completions a step") and "a multiple of 15" in group
    assert place == "--run runs/mine: on kuberay give an absolute path, in a folder that all nodes share"
    assert judge.startswith("judge: the key of openai-api/a$(reboot)/m can be in no variable")
    with pytest.raises(UserError, match="name a folder in one that all nodes share"):
        made("skypilot", run="/mine")
    with pytest.raises(UserError, match=r"--run: .* holds a line break or a control character"):
        made("slurm", run="runs/a\nreboot")
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        made("slurm", named=str(tmp_path / "none.yaml"))


def test_it_is_shown_and_written(tmp_path):
    out = tmp_path / "a b.sh"
    shown = made("slurm", out=out)
    written = out.read_text(encoding="utf-8")
    assert shown == f"{written}\n{out}: written; start it with: sbatch '{out}'\n"
    assert "\nlaunch sft\nlaunch rl\n" in written


@pytest.mark.parametrize("system", ["slurm", "kuberay", "skypilot"])
def test_rl_is_left_out_where_no_arm_asks_for_it(system):
    """With it go its judge's key, and what it demands of the number of processes."""
    script = made(system, JUDGE, "evaluate.arms=[base,sft]", "rl.prompts=15", nodes=2)
    assert "MY_SERVICE" not in script and "SFT on 2 nodes" in script
    said = {"slurm": "launch sft\n", "kuberay": '"stages": ["sft"]', "skypilot": "for stage in sft; do"}
    assert said[system] in script and "launch rl" not in script


def run_folder(folder: Path, model: Path) -> Path:
    """A recipe whose run folder, with a space and a quote in its name, has its distill stage finished."""
    (folder / "spec.md").write_text(SPEC, encoding="utf-8")
    file, run = folder / "tiny.yaml", folder / "it's a run"
    sft = "sft: {batch_size: 4, epochs: 1, learning_rate: 0.003}"
    file.write_text(f"name: tiny\nmodel: {model}\nspec: spec.md\n{sft}\n", encoding="utf-8")
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.dump(recipe.load(file)), encoding="utf-8")
    distill = Run(run).stage("distill")
    distill.begin("made by hand")
    message = Message(role="user", content="Hello?")
    distill.replace(
        [Example(prompt_id=f"p{n}", messages=[message], reasoning="K1 tells.", answer="I'm sorry.") for n in range(8)]
    )
    distill.finish(Manifest(stage="distill", recipe="by hand", inputs={}, outputs={}, counts={}), [RECORDS])
    return file


def by_hand(folder: Path, script: str) -> subprocess.Popen:
    """SLURM's script, run by bash with SLURM's variables and commands stood in for."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    # srun: past its own options, the rest is what each node runs. scontrol: the list of hosts.
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo localhost; echo other",
        "delib": f'exec {shlex.quote(sys.executable)} -c "from delib.cli import main; main()" "$@"',
        "accelerate": f'exec {shlex.quote(sys.executable)} -m accelerate.commands.accelerate_cli "$@"',
    }
    for name, body in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "4217", "SLURM_JOB_NODELIST": "localhost"}
    file = folder / "script.sh"
    file.write_text(script, encoding="utf-8")
    return subprocess.Popen(
        ["bash", str(file)],
        env=os.environ | slurm | {"PATH": f"{commands}:{os.environ['PATH']}", "TRITON_CACHE_DIR": str(folder)},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_the_slurm_script_trains_a_tiny_model_in_two_processes(tmp_path, tiny_model):
    """The script as it is written, but for RL: bash runs it, with SLURM's variables and commands stood in for."""
    file = run_folder(tmp_path, tiny_model)
    run = tmp_path / "it's a run"
    script = launch.write(file, [], "slurm", nodes=1, per_node=2, run=run).replace("\nlaunch rl\n", "\n")
    process = by_hand(tmp_path, script)
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said[-3000:]
    manifest = json.loads((run / "sft" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["detail"]["processes"] == 2
    assert manifest["counts"]["in"] == 8


@pytest.mark.slow
def test_what_the_script_trains_goes_on_after_kill_9_in_sft_and_in_rl(recipe_file, monkeypatch):
    """Two processes by the script as it is written; all of them are killed, and it is started again."""
    monkeypatch.chdir(recipe_file.parent)
    changes = ["sft.epochs=8", "rl.steps=6", "rl.checkpoint_steps=1"]
    whole, broken = recipe_file.parent / "whole", recipe_file.parent / "broken"
    pipeline.run_to(pipeline.start_run(recipe.load(recipe_file, changes), whole), "distill")
    shutil.copytree(whole, broken)

    def script(run: Path) -> str:
        return launch.write(recipe_file, changes, "slurm", nodes=1, per_node=2, run=run)

    unbroken = by_hand(recipe_file.parent, script(whole))
    said = unbroken.communicate()[1].decode()
    assert unbroken.returncode == 0, said[-3000:]
    for stage in ("sft", "rl"):
        started = by_hand(recipe_file.parent, script(broken))
        while not list((broken / stage / "trainer").glob("checkpoint-[2-9]*")):
            assert started.poll() is None, f"it ended before it had two checkpoints of {stage}"
            time.sleep(0.02)
        for process in [*psutil.Process(started.pid).children(recursive=True), started]:
            process.kill()
        started.communicate()
        assert not (broken / stage / "manifest.json").exists()
    again = by_hand(recipe_file.parent, script(broken))
    said = again.communicate()[1].decode()
    assert again.returncode == 0, said[-3000:]
    for stage in ("sft", "rl"):
        first, second = (load_file(run / stage / "checkpoint" / "model.safetensors") for run in (whole, broken))
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
        assert Run(broken).stage(stage).manifest().detail["resumed_from"] is not None
    assert Run(broken).stage("sft").manifest().detail["processes"] == 2
    rows = [(run / "rl" / "records.jsonl").read_bytes() for run in (whole, broken)]
    assert rows[0] == rows[1]
