"""The processes of a training stage: each is started by `accelerate launch` or torchrun, and knows its rank.

In: the environment that the launcher sets, and `recipe.accelerate`. One process leads: it alone writes records,
manifests and progress, and asks RL's judge; the others wait for it where the run folder changes, and are told.
"""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from delib.errors import StageError, UserError
from delib.recipe import Recipe
from delib.spec import read_text
from delib.training import fitting

LAUNCHED = "DELIB_LAUNCHED"
"""Set for what `launch` starts: a launcher that starts one process sets no rank."""
PATIENCE = timedelta(hours=6)
"""How long one process waits for another before it gives up: a judge may take longer over a step of RL than the minutes
that torch waits by itself. A process that ends is seen at once, by the launcher."""
STAGES: tuple[Literal["sft", "rl"], ...] = ("sft", "rl")
Row = TypeVar("Row")


def count() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if _ranked() else 1


def _ranked() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched() -> bool:
    """Whether a launcher started this process."""
    return _ranked() or LAUNCHED in os.environ


def leads() -> bool:
    return count() == 1 or os.environ["RANK"] == "0"


def wait(recipe: Recipe) -> None:
    """Wait until every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=recipe.device == "cpu", timeout=PATIENCE).wait_for_everyone()


def close(recipe: Recipe) -> None:
    """Leave the group of processes once all of them are at the end of the stage."""
    wait(recipe)
    if count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def gathered(rows: list[Row]) -> list[Row]:
    """The rows of all processes, in the order of their ranks. All of them must come here."""
    if count() == 1:
        return rows
    from accelerate.utils import gather_object

    made: list[Row] = gather_object(rows)
    return made


def spread(value: Row | None) -> Row:
    """What the process that leads has, for all of them; the others give None."""
    found = [value]
    if count() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def part(rows: list[Row]) -> list[Row]:
    """This process's own of the rows that `gathered` gave."""
    rank, size = int(os.environ["RANK"]) if count() > 1 else 0, len(rows) // count()
    return rows[rank * size : (rank + 1) * size]


def launch(recipe: Recipe, stage: str, run: Path) -> None:
    """Run a stage under `accelerate launch` with the recipe's config file. Raises StageError when it fails."""
    delib = shutil.which("delib", path=str(Path(sys.executable).parent)) or shutil.which("delib")
    if delib is None:
        raise UserError("accelerate: the command delib is not on the PATH; install the package")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(recipe.accelerate), "--no_python"]
    done = subprocess.run([*start, delib, stage, "--run", str(run)], check=False, env=os.environ | {LAUNCHED: "1"})
    if done.returncode != 0:
        raise StageError(f"{stage}: accelerate launch ended with {done.returncode}; its messages stand above")


def config(recipe: Recipe) -> dict[str, Any]:
    """What the accelerate config file says; empty without one. Raises UserError when it is none."""
    if recipe.accelerate is None:
        return {}
    path = Path(recipe.accelerate)
    try:
        found = yaml.safe_load(read_text(path))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("num_processes"), int):
        raise UserError(f"accelerate: {path} is no config file of accelerate; 'accelerate config' writes one")
    return found


def sharded(recipe: Recipe) -> bool:
    """Whether weights, gradients and optimiser lie in parts on all processes, as by FSDP and DeepSpeed's ZeRO-3."""
    found = config(recipe)
    if found.get("distributed_type") == "FSDP":
        strategy = str((found.get("fsdp_config") or {}).get("fsdp_sharding_strategy", "FULL_SHARD"))
        return strategy not in ("NO_SHARD", "3")
    stage = (found.get("deepspeed_config") or {}).get("zero_stage")
    return found.get("distributed_type") == "DEEPSPEED" and stage == 3


def planned(recipe: Recipe) -> int:
    """How many processes will train: those of the launcher that is at work, else of the config file."""
    return count() if launched() else int(config(recipe).get("num_processes", 1))


def devices(recipe: Recipe) -> None:
    """Raises UserError where the GPUs in sight are none, or more than the processes that train."""
    if recipe.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU here; set device: cpu, or mend the driver")
    seen = torch.cuda.device_count()
    if seen > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"device: cuda with {seen} GPUs needs a process for each: name a config file as `accelerate`, or let one "
            "be seen with CUDA_VISIBLE_DEVICES"
        )


def rows_at_once(recipe: Recipe, processes: int) -> int:
    """Examples that each process takes at once. Raises UserError where they do not add up to the batch."""
    size = recipe.sft.batch_size
    if size % processes:
        raise UserError(
            f"sft.batch_size: {size} can not be parted among {processes} processes; take a multiple of {processes}"
        )
    return _at_once("sft", recipe.sft.device_batch, size // processes, "of sft.batch_size", processes)


def completions_a_step(recipe: Recipe, processes: int) -> int:
    """Completions of an RL step that each process writes and learns from; a group may lie on two of them, and its mean
    is over all of it. Raises UserError where they do not add up to the step's."""
    whole = recipe.rl.prompts * recipe.rl.group
    if whole % processes:
        raise UserError(
            f"rl.prompts: {whole} completions a step (prompts x group) can not be parted among {processes} processes; "
            f"let them be a multiple of {processes}"
        )
    return whole // processes


def completions_at_once(recipe: Recipe, processes: int) -> int:
    """Completions of these that a device learns from at once. Raises UserError where they do not add up to them."""
    part = completions_a_step(recipe, processes)
    return _at_once("rl", recipe.rl.device_batch, part, "completions of a step", processes)


def _at_once(stage: str, asked: int | None, part: int, what: str, processes: int) -> int:
    rows = min(asked or part, part)
    if part % rows:
        raise UserError(
            f"{stage}.device_batch: {rows} does not divide the {part} {what} that each of {processes} processes takes; "
            f"take a divisor of {part}"
        )
    return rows


def parts_of_a_step(recipe: Recipe, stage: Literal["sft", "rl"], processes: int) -> int:
    """Over how many parts of a step each process sums its gradients up. Raises UserError as the two above."""
    if stage == "sft":
        return recipe.sft.batch_size // (rows_at_once(recipe, processes) * processes)
    return completions_a_step(recipe, processes) // completions_at_once(recipe, processes)


def summing(recipe: Recipe) -> dict[str, Any]:
    """Arguments of a trainer: under FSDP gradients are parted after each part of a step. By default they would stay
    whole on every GPU until its last one, so that smaller parts would take more memory and not less."""
    if str(config(recipe).get("distributed_type")) != "FSDP":
        return {}
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def problems(recipe: Recipe) -> list[str]:
    """What of `accelerate`, `device`, batch sizes and adapter does not fit together."""
    told = fitting.layers(recipe, "sft", recipe.sft)
    try:
        found = config(recipe)
    except UserError as error:
        return told + error.problems
    for parted in (rows_at_once, completions_at_once):
        try:
            parted(recipe, planned(recipe))
        except UserError as error:
            told += error.problems
    kind = str(found.get("distributed_type", "NO"))
    if kind in ("FSDP", "DEEPSPEED") and recipe.device == "cpu":
        told.append(f"accelerate: {kind} needs GPUs; set device: cuda, or take a config file for the CPU")
    mixed = str(found.get("mixed_precision", "no")).lower()
    if mixed not in ("no", "false", "bf16" if recipe.dtype == "bfloat16" else "no"):
        told.append(
            f"accelerate: mixed_precision is {mixed}, and dtype {recipe.dtype}; let the file say what dtype says"
        )
    for stage, lora in (("sft", recipe.sft.lora), ("rl", recipe.rl.lora)):
        if kind == "DEEPSPEED" and sharded(recipe) and lora is not None:
            told.append(
                f"{stage}.lora: ZeRO-3 takes no adapter in float32 beside other weights; take FSDP or zero_stage 2"
            )
    if sharded(recipe) and recipe.rl.rollouts == "llamacpp":
        told.append(
            f"rl.rollouts: llamacpp needs all weights in one process, and {kind} parts them; set it to transformers"
        )
    if kind == "MULTI_CPU":
        told.append(
            "accelerate: MULTI_CPU starts several processes by MPI alone; MULTI_GPU does so without, on a CPU too"
        )
    summed = (found.get("deepspeed_config") or {}).get("gradient_accumulation_steps", "auto")
    if kind == "DEEPSPEED" and not told and summed != "auto":
        told += [
            f"accelerate: gradient_accumulation_steps is {summed}, and {stage} sums over {parts} parts of a step; take "
            "the key out of the file's deepspeed_config"
            for stage in STAGES
            if (parts := parts_of_a_step(recipe, stage, planned(recipe))) != summed
        ]
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        told.append("accelerate: deepspeed is not installed; run 'pip install deepspeed'")
    return told
