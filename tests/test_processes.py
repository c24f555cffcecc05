"""Several processes on the CPU train as one does; what a launcher starts, and what is refused. Real processes, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SPEC
from delib import pipeline, recipe
from delib.errors import StageError, UserError
from delib.records import Example, Manifest, Message
from delib.run import RECORDS, Run
from delib.stages import rl, sft
from delib.training import footprint, processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "--"]
DELIB = [sys.executable, "-c", "from delib.cli import main; main()"]
TWO = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: false
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
"""


@pytest.fixture
def run_folder(tmp_path, tiny_model):
    """Makes a run folder whose distill stage is finished: 13 examples, so that the last batch of four is not full."""
    (tmp_path / "spec.md").write_text(SPEC, encoding="utf-8")
    examples = [
        Example(
            prompt_id=f"p{n}",
            messages=[Message(role="user", content=f"Hello {n}?" + " please" * (n % 4))],
            reasoning="Harmful: " + "why " * (n % 5) + "K1 tells. I refuse.",
            answer="I'm sorry." * (1 + n % 3),
        )
        for n in range(13)
    ]

    def make(name, more=""):
        folder = tmp_path / name
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            f"name: {name}\nmodel: {tiny_model}\nspec: spec.md\n"
            f"sft: {{batch_size: 4, epochs: 2, decision_weight: 4, learning_rate: 0.003, checkpoint_steps: 3{more}",
            encoding="utf-8",
        )
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.dump(recipe.load(file)), encoding="utf-8")
        distill = Run(folder).stage("distill")
        distill.begin("made by hand")
        distill.replace(examples)
        made = Manifest(stage="distill", recipe="made by hand", inputs={}, outputs={}, counts={})
        distill.finish(made, [RECORDS])
        return folder

    return make


def started(command, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder.parent)}
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False, env=environment)


def manifest_of(folder):
    return json.loads((folder / "sft" / "manifest.json").read_text(encoding="utf-8"))


def same_losses(one, other):
    ours, theirs = (m["detail"]["curve"] for m in (one, other))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for ours_row, theirs_row in zip(ours, theirs, strict=True):
        assert ours_row["loss"] == pytest.approx(theirs_row["loss"], rel=1e-4)


def test_two_processes_train_as_one_does(run_folder):
    """By torchrun: the same losses, one set of records and progress, the same weights."""
    import torch
    from safetensors.torch import load_file

    alone, together = run_folder("alone", "}"), run_folder("together", "}")
    pipeline.open_run(alone).execute("sft")
    done = started([*LAUNCH, *DELIB, "sft", "--run", str(together)], together)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("sft: in 13") == 1
    one, two = manifest_of(alone), manifest_of(together)
    assert two["detail"].pop("processes") == 2
    assert (one["counts"], one["outputs"].keys()) == (two["counts"], two["outputs"].keys())
    same_losses(two, one)
    ours, theirs = (load_file(f / "sft" / "checkpoint" / "model.safetensors") for f in (together, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert not (together / "sft" / "trainer").exists()


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_stopped(run_folder):
    alone, together = run_folder("alone", "}"), run_folder("together", "}")
    pipeline.open_run(alone).execute("sft")
    kind, steps = sft.trainer_class(), []

    class Stopped(kind):
        def compute_loss(self, *given, **more):
            steps.append(1)
            if len(steps) == 5:
                raise KeyboardInterrupt
            return super().compute_loss(*given, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "trainer_class", lambda: Stopped)
        pipeline.open_run(together).execute("sft")
    done = started([*LAUNCH, *DELIB, "sft", "--run", str(together)], together)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = manifest_of(alone), manifest_of(together)
    assert (two["detail"]["resumed_from"], two["detail"]["processes"]) == ("checkpoint-3", 2)
    same_losses(two, one)


@pytest.mark.slow
def test_an_accelerate_file_starts_the_processes_itself(run_folder, tmp_path):
    """`delib sft` as it is typed: two processes, an adapter, gradients summed over two batches of one."""
    (tmp_path / "two.yaml").write_text(TWO, encoding="utf-8")
    extra = ", device_batch: 1, lora: {rank: 2}, held_out_share: 0.2}\n"
    alone, together = run_folder("alone", extra), run_folder("together", extra + "accelerate: two.yaml\n")
    pipeline.open_run(alone).execute("sft")
    done = started([*DELIB, "sft", "--run", str(together)], together)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = manifest_of(alone), manifest_of(together)
    assert two["detail"]["processes"] == 2
    same_losses(two, one)
    assert two["detail"]["kept_step"] == one["detail"]["kept_step"]
    held = [[m["loss"] for m in made["detail"]["held_out"]] for made in (one, two)]
    assert held[1] == pytest.approx(held[0], rel=1e-4)
    assert (together / "sft" / "checkpoint" / "adapter" / "adapter_model.safetensors").exists()


def test_what_does_not_fit_together_is_told_before_any_compute(tmp_path, tiny_model):
    def told(accelerate="", **more):
        (tmp_path / "a.yaml").write_text(accelerate, encoding="utf-8")
        changed = {"model": str(tiny_model), "accelerate": str(tmp_path / "a.yaml") if accelerate else None} | more
        return processes.problems(recipe.Recipe.model_validate(changed))

    assert told() == told(TWO) == []
    assert "'accelerate config' writes one" in told("just text")[0]
    assert "take a multiple of 2" in told(TWO, sft={"batch_size": 5})[0]
    assert "take a divisor of 6" in told(TWO, sft={"batch_size": 12, "device_batch": 4})[0]
    assert told(TWO, sft={"batch_size": 12, "device_batch": 3}) == []
    assert "FSDP needs GPUs" in told(TWO.replace("MULTI_GPU", "FSDP"))[0]
    assert "by MPI alone" in told(TWO.replace("MULTI_GPU", "MULTI_CPU"))[0]
    deepspeed = told(TWO.replace("MULTI_GPU", "DEEPSPEED"), device="cuda")
    assert deepspeed == ["accelerate: deepspeed is not installed; run 'pip install deepspeed'"]
    assert "mixed_precision is bf16, and dtype float32" in told(TWO.replace("'no'", "bf16"))[0]
    assert told(TWO.replace("'no'", "bf16"), dtype="bfloat16") == []
    zero = TWO.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config: {zero_stage: 3}\n"
    assert "ZeRO-3 takes no adapter" in told(zero, device="cuda", sft={"lora": {}})[0]
    assert "take a divisor of 6" in told(TWO, rl={"prompts": 3, "group": 4, "device_batch": 4})[0]
    summed = zero.replace("stage: 3", "stage: 2, gradient_accumulation_steps: 1")
    parted = {"sft": {"batch_size": 8, "device_batch": 2}, "rl": {"prompts": 2, "group": 4, "device_batch": 1}}
    assert [p.split("; ")[0] for p in told(summed, device="cuda", **parted)[:2]] == [
        f"accelerate: gradient_accumulation_steps is 1, and {stage} sums over {parts} parts of a step"
        for stage, parts in (("sft", 2), ("rl", 4))
    ]
    assert told(summed, device="cuda") == told(zero, device="cuda", **parted) == deepspeed


def test_a_stage_is_not_held_up_by_the_other_ones_batch():
    given = recipe.Recipe.model_validate({"sft": {"batch_size": 4}, "rl": {"prompts": 3, "group": 4}})
    assert processes.parts_of_a_step(given, "rl", 3) == 1
    with pytest.raises(UserError, match=r"sft.batch_size: 4 can not be parted among 3"):
        processes.parts_of_a_step(given, "sft", 3)


def test_gradients_are_parted_after_each_part_of_a_step_under_fsdp(tmp_path):
    for kind, each in (("FSDP", {"sync_each_batch": True}), ("MULTI_GPU", None)):
        (tmp_path / "a.yaml").write_text(TWO.replace("MULTI_GPU", kind), encoding="utf-8")
        given = recipe.Recipe.model_validate({"device": "cuda", "accelerate": str(tmp_path / "a.yaml")})
        for made in (sft.arguments_of(given, 4, tmp_path), rl._arguments(given, tmp_path, True, 64)):
            assert made.accelerator_config.gradient_accumulation_kwargs == each


def test_what_the_model_has_not_is_told_where_it_is_at_hand(tmp_path, tiny_model, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    import tiny
    from delib.models import weights
    from delib.stages import rl

    tiny.save(tmp_path / "phi", "phi", "gpt-2")
    tiny.save(tmp_path / "bert", "llama", "bert")
    tiny.save(tmp_path / "qwen", "qwen2", "qwen2")

    def told(model, **sections):
        given = recipe.Recipe.model_validate({"model": str(model)} | sections)
        return rl.problems(given) + processes.problems(given)

    served, unknown = {"rl": {"rollouts": "llamacpp"}}, {"lora": {"targets": ["q_proj", "qq"]}}
    assert told(tmp_path / "qwen", **served) == []
    [problem] = told(tmp_path / "phi", **served)
    assert problem.startswith("rl.rollouts: llamacpp takes models of llama, qwen2, qwen3, and ")
    assert problem.endswith("phi is phi; set it to transformers")
    [problem] = told(tmp_path / "bert", **served)
    assert "can't be told of the tokenizer" in problem
    found = told(tmp_path / "qwen", sft=unknown, rl=unknown)
    assert [p.split(" has ")[0] for p in found] == [
        f"{stage}.lora.targets: no linear layer is called qq; this model" for stage in ("rl", "sft")
    ]
    GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=16).save_pretrained(tmp_path / "gpt2")
    frozen = {"frozen_layers": 1}
    assert told(tmp_path / "gpt2") == told(tmp_path / "qwen", sft=frozen, rl=frozen) == []
    assert told(tmp_path / "phi", sft=frozen) == []
    assert told(tmp_path / "gpt2", sft=frozen, rl=frozen) == [
        f"{stage}.frozen_layers: a GPT2LMHeadModel has no model.layers that could be frozen; set it to 0"
        for stage in ("rl", "sft")
    ]
    many = [
        f"{stage}.frozen_layers: 2, and the model has 2 layers: none is left to train; set it below 2"
        for stage in ("rl", "sft")
    ]
    for lora in (None, {"rank": 2}):
        all_of_them = {"frozen_layers": 2, "lora": lora}
        assert told(tmp_path / "qwen", sft=all_of_them, rl=all_of_them) == many
    with pytest.raises(UserError, match="frozen_layers: a GPT2LMHeadModel has no"):
        weights.freeze(GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path / "gpt2")), 1)
    monkeypatch.setenv("DELIB_CACHE", str(tmp_path / "empty"))
    for name in ("smollm2", "nobody/has-this", str(tmp_path / "none")):
        assert told(name, **served, sft=unknown) == [], "it is not fetched to find out"


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_gpus_that_are_none_or_too_many_are_told_before_a_model_is_loaded(tmp_path, monkeypatch, stage):
    import torch

    from delib.run import StageFolder
    from delib.stages import rl

    given, folder = recipe.Recipe(device="cuda"), StageFolder(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run():
        if stage == "sft":
            sft.run(given, [], tmp_path / "no model", folder)
        else:
            rl.run(given, [], None, None, tmp_path / "no model", folder)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here; set device: cpu"):
        run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"device: cuda with 4 GPUs.* CUDA_VISIBLE_DEVICES"):
        run()
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes.devices(given)


def test_only_training_is_run_by_several_processes(run_folder, monkeypatch):
    folder = run_folder("alone", "}")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and only sft"):
        pipeline.open_run(folder).execute("distill")
    assert not processes.leads()


def test_a_launcher_that_fails_stops_the_stage(run_folder, tmp_path, monkeypatch):
    """What it starts is not started again by itself."""
    (tmp_path / "one.yaml").write_text(TWO.replace("num_processes: 2", "num_processes: 1"), encoding="utf-8")
    opened = pipeline.open_run(run_folder("alone", "}\naccelerate: one.yaml\n"))
    seen = []

    def fails(command, check, env):
        seen.append((command, env[processes.LAUNCHED]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(StageError, match="accelerate launch ended with 3"):
        opened.execute("sft")
    ((command, mark),) = seen
    assert command[-3:-1] == ["sft", "--run"]
    assert mark == "1"
    monkeypatch.setenv(processes.LAUNCHED, "1")
    assert processes.launched()
    assert processes.count() == 1


def test_the_estimate_counts_what_a_layer_keeps(tiny_model, tmp_path):
    """Bytes that torch keeps for the backward pass of a small model, beside the formula."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=6, **sizes)
    model = LlamaForCausalLM(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros((2, 100), dtype=torch.int64), use_cache=False)
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert 200 * 6 * footprint.kept_by_a_layer(config, 4) == pytest.approx(found, rel=0.1)
    weights = sum(p.numel() for p in model.parameters())
    given = {"device": "cuda", "sft": {"batch_size": 2, "max_tokens": 100}}
    whole = footprint.estimate(recipe.Recipe.model_validate(given), config)
    assert whole[:3] == (4 * weights, 4 * weights, 8 * weights)
    assert whole.activations == pytest.approx(found, rel=0.1)
    less = footprint.estimate(recipe.Recipe.model_validate(given | {"gradient_checkpointing": True}), config)
    assert less.activations < whole.activations / 4
    adapter = given | {"dtype": "bfloat16", "sft": given["sft"] | {"lora": {"rank": 2}}}
    small = footprint.estimate(recipe.Recipe.model_validate(adapter), config)
    assert small.optimiser == 2 * small.gradients < whole.optimiser / 10
    assert small.weights == 2 * weights + small.gradients
    (tmp_path / "fsdp.yaml").write_text(TWO.replace("MULTI_GPU", "FSDP"), encoding="utf-8")
    parted = given | {"accelerate": str(tmp_path / "fsdp.yaml")}
    assert footprint.estimate(recipe.Recipe.model_validate(parted), config)[1:3] == (2 * weights, 4 * weights)
    told = footprint.lines(recipe.Recipe.model_validate(parted | {"model": str(tiny_model)}))
    assert told[0].startswith("Memory of SFT on each of 2 devices, about: weights 0.0")
    assert told[1].startswith("Memory of RL on each of 2 devices, about: ")
    assert "Never run on a GPU" in told[2]
    assert "FSDP" in told[2]
    assert footprint.lines(recipe.Recipe()) == []


QWEN3 = {"Qwen/Qwen3-1.7B": (2048, 6144, 28, 16), "Qwen/Qwen3-4B": (2560, 9728, 36, 32)} | {
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32)
}
"""Width, width of the MLP, layers, heads, as published."""
MEMORY = {"gpu-24gb": 24, "gpu-80gb": 80, "gpu-8x80gb": 80}


def qwen3(width, inner, layers, heads):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=width < 4096,
    )


def test_rl_of_all_weights_fits_where_they_are_parted():
    config = qwen3(*QWEN3["Qwen/Qwen3-8B"])
    parted = footprint.estimate(recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ["rl.lora=null"]), config, "rl")
    alone = recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ["rl.lora=null", "accelerate=null"])
    whole = footprint.estimate(alone, config, "rl")
    assert sum(parted) / 2**30 < 80 < sum(whole) / 2**30
    assert whole.optimiser == 2 * whole.gradients == 8 * parted.optimiser
    held = footprint.estimate(
        recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ["rl.lora=null", "rl.beta=0.04"]), config, "rl"
    )
    assert held.weights - parted.weights == pytest.approx(whole.gradients / 8), (
        "a second model, of float32 as the gradients"
    )
    in_parts = recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ["rl.lora=null", "accelerate=null", "rl.device_batch=8"])
    few = footprint.estimate(in_parts, config, "rl")
    keys = 64 * (256 + alone.rl.max_tokens) * 2 * 2 * 8 * 128 * 36  # of all that is written, 36 layers in bfloat16
    assert whole.activations / 8 < few.activations == max(whole.activations / 8, keys)


@pytest.mark.parametrize("name", ["gpu-24gb", "gpu-80gb", "gpu-8x80gb"])
def test_shipped_gpu_recipes_are_sound(name):
    loaded = recipe.load(recipe.RECIPES / f"{name}.yaml")
    assert pipeline.check(loaded) == []
    assert processes.planned(loaded) == (8 if "8x" in name else 1)
    config = qwen3(*QWEN3[loaded.model])
    for stage in ("sft", "rl"):
        gib = sum(footprint.estimate(loaded, config, stage)) / 2**30
        assert gib < 0.85 * MEMORY[name], (stage, gib)


ZERO3 = ["accelerate=accelerate-zero3-8.yaml", "rl.lora=null"]


@pytest.mark.parametrize(("name", "trls", "kind"), [("fsdp", "fsdp2", "FSDP"), ("zero3", "zero3", "DEEPSPEED")])
def test_shipped_accelerate_files_are_read_by_accelerate_and_say_what_trls_own_do(name, trls, kind):
    import trl
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(recipe.RECIPES / f"accelerate-{name}-8.yaml"))
    given = load_config_from_file(str(Path(trl.__file__).parent / "accelerate_configs" / f"{trls}.yaml"))
    for key in ("distributed_type", "num_machines", "num_processes", "mixed_precision", "deepspeed_config"):
        assert getattr(found, key) == getattr(given, key), key
    assert found.fsdp_config.items() <= given.fsdp_config.items()
    assert found.distributed_type.value == kind


def test_zero3_for_the_shipped_recipe_is_sound_but_for_what_is_not_installed(monkeypatch):
    loaded = recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ZERO3)
    assert pipeline.check(loaded) == ["accelerate: deepspeed is not installed; run 'pip install deepspeed'"]
    monkeypatch.setattr(processes, "find_spec", lambda name: object())
    assert pipeline.check(loaded) == []
    assert processes.sharded(loaded) and processes.planned(loaded) == 8
    assert processes.config(loaded)["deepspeed_config"]["zero3_save_16bit_model"] is True
    untried = footprint.never_run(loaded)
    assert "DeepSpeed" in untried and "FSDP" not in untried
    adapter = recipe.load(recipe.RECIPES / "gpu-8x80gb.yaml", ZERO3[:1])
    assert [told[:32] for told in pipeline.check(adapter)] == ["rl.lora: ZeRO-3 takes no adapter"]
    config = qwen3(*QWEN3[loaded.model])
    for stage in ("sft", "rl"):
        gib = sum(footprint.estimate(loaded, config, stage)) / 2**30
        assert gib < 0.85 * MEMORY["gpu-8x80gb"], (stage, gib)
