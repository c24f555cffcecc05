"""`delib export`: a trained model in the forms that people use, with its model card.

In: a run and the stage whose checkpoint leaves, or a model folder. Out: a new folder, or a repository on the hub, with
safetensors (the format of the checkpoint's numbers kept), one GGUF file, or a LoRA adapter, and `README.md`, the card.
Training examples leave by `export.py`.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from delib import export, model_card, pipeline
from delib.errors import UserError
from delib.models import weights
from delib.pipeline import CHECKPOINT
from delib.progress import say
from delib.run import sha256

What = Literal["data", "sft", "rl"]
Form = Literal["safetensors", "gguf", "adapter"]
Quantisation = Literal["f16", "q8_0", "q4_0"]
TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "*_tokens*.json", "chat_template*")
MODEL = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TEXTS = re.compile(
    r".*_tokens?|added_tokens_decoder|chat_template|response_schema|(target|exclude)_modules|layers_pattern"
)
"""Keys of JSON files whose values may look like a path and are none: tokens, templates, patterns of text and of
layers' names."""
PLACE = re.compile(r"[/~]|\.{1,2}[/\\]|file:|[A-Za-z]:[/\\]")
"""How a path begins that can't be anything else."""


class Source(NamedTuple):
    """The model that leaves: its folder and name, and the run and stage that made it, where they are known."""

    folder: Path
    name: str
    run: pipeline.Pipeline | None
    stage: str | None


def export_any(
    place: Path,
    to: str,
    public: bool = False,
    what: What | None = None,
    form: Form | None = None,
    quantisation: Quantisation | None = None,
) -> str:
    """A run's training examples or checkpoint, or a model folder, by what is asked for; returns where it is.

    Left out, `what` is the data of a run and the model of a folder, `form` is safetensors and `quantisation` q8_0.
    """
    folder = is_model(place)
    problems = []
    if folder and what is not None:
        problems.append(f"--what {what}: {place} is a model folder and not a run; leave it out")
    if not folder and what in (None, "data") and (form or quantisation):
        problems.append("--form and --quantisation are a model's; name one with --what sft or --what rl")
    elif quantisation and form != "gguf":
        problems.append(f"--quantisation {quantisation}: is of a GGUF file; add --form gguf, or leave it out")
    if problems:
        raise UserError(problems)
    if not folder and what in (None, "data"):
        return export.export(place, to, public)
    return export_model(place, to, public, what, form or "safetensors", quantisation or "q8_0")


def is_model(place: Path) -> bool:
    return not (place / "recipe.yaml").exists() and any((place / n).exists() for n in ("config.json", ADAPTER[0]))


def export_model(place: Path, to: str, public: bool, what: str | None, form: Form, quantisation: Quantisation) -> str:
    """Write the model to a new folder, or to the hub with `hub:OWNER/NAME`, private unless `public`.

    Raises UserError when it can't be had in this form, when a stage is not finished or what it was made from changed
    since, when the folder is there already, or when the hub refuses.
    """
    export.check_place(to, public)
    source = _source(place, what)
    if form == "adapter" or not (source.folder / "config.json").exists():
        _check_adapter(source)

    def write(folder: Path) -> str:
        said = _write(source, folder, form, quantisation)
        kind = quantisation if form == "gguf" else None
        told = model_card.render(source.run, source.stage, source.name, form, kind, _base_of(source, form))
        (folder / "README.md").write_text(told, encoding="utf-8")
        return said

    return export.deliver(to, public, "model", write)


def _source(place: Path, what: str | None) -> Source:
    """A run's checkpoint, also where its folder or the adapter in it was named; its run must be whole up to it."""
    if is_model(place):
        lies = place.resolve()
        lies = lies.parent if lies.name == weights.ADAPTER else lies
        stage = lies.parent.name
        if lies.name == CHECKPOINT and stage in model_card.BEFORE and (lies.parents[1] / "recipe.yaml").exists():
            place, what = lies.parents[1], stage
    if what is None:
        return Source(place, place.resolve().name, None, None)
    run = pipeline.open_run(place)
    made = export.finished(run, model_card.BEFORE[what])[what]
    folder = run.folder(what).path / CHECKPOINT
    if not folder.exists() or sha256(folder) != made.outputs[CHECKPOINT]:
        raise UserError(f"{folder}: is not what {what} left there; run 'delib {what} --run {place}' to make it anew")
    return Source(folder, f"{run.recipe.name}-{what}", run, what)


def adapter_of(folder: Path) -> Path | None:
    """Where a checkpoint's adapter lies; a folder may be one itself."""
    return next((p for p in (folder / weights.ADAPTER, folder) if (p / ADAPTER[0]).exists()), None)


def _check_adapter(source: Source) -> None:
    """Before anything is loaded: PEFT would unpickle weights where no safetensors lie."""
    folder = adapter_of(source.folder)
    if folder is None:
        who = "it" if source.stage is None else f"{source.stage}"
        raise UserError(
            f"{source.folder}: holds no LoRA adapter, since {who} trained the weights themselves; "
            "use --form safetensors or gguf"
        )
    if not (folder / ADAPTER[1]).exists():
        raise UserError(
            f"{folder}: no {ADAPTER[1]} in it; delib loads weights only from safetensors, so save it anew with PEFT"
        )
    try:
        base = _read(folder / ADAPTER[0])["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UserError(
            f"{folder / ADAPTER[0]}: names no model that it goes onto; write its folder or hub id as "
            "base_model_name_or_path"
        )


def _base_of(source: Source, form: Form) -> str:
    """The public name of the model that an adapter goes onto, or that was trained; empty where nobody knows."""
    if source.run is not None:
        recipe = source.run.recipe
        after_sft = form == "adapter" and source.stage == "rl"
        return f"{recipe.name}-sft" if after_sft else model_card.base_name(recipe.model, source.run.run.path)
    adapter = adapter_of(source.folder)
    if adapter is None:
        return ""
    return model_card.base_name(_read(adapter / ADAPTER[0])["base_model_name_or_path"], adapter)


def _write(source: Source, folder: Path, form: Form, quantisation: Quantisation) -> str:
    if form == "adapter":
        adapter = adapter_of(source.folder)
        assert adapter is not None
        _copy(adapter, folder, ADAPTER)
        _copy(source.folder, folder, TOKENIZER)
        config = _read(folder / ADAPTER[0])
        config["base_model_name_or_path"] = _base_of(source, form)
        _dump(folder / ADAPTER[0], config)
        return f"an adapter of {config['base_model_name_or_path']}"
    with _whole(source.folder, folder.parent) as model:
        if form == "safetensors":
            _copy(model, folder, (*MODEL, *TOKENIZER))
            return "safetensors"
        file = folder / f"{source.name}-{quantisation}.gguf"
        kept = weights.to_gguf(model, file, quantisation)
    if kept and quantisation != "f16":
        say(f"note: {len(kept)} tensors stay f16, as their rows are no multiple of 32: {', '.join(kept[:3])} …")
    return file.name


@contextmanager
def _whole(folder: Path, beside: Path) -> Iterator[Path]:
    """A folder with all weights: of an adapter alone its base is fetched and merged with it, in float32 so that none of
    its change is lost, for a while in the folder `beside`; its own tokenizer goes along where it has one. Raises
    UserError where the two don't fit."""
    if (folder / "config.json").exists():
        weights.resolve(str(folder))
        yield folder
        return
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoTokenizer

    name = _read(folder / ADAPTER[0])["base_model_name_or_path"]
    base = weights.resolve(name)
    mend = "merge the two where it was trained, and export the whole model"
    try:
        model = weights.beside(base, folder)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: this adapter does not fit {name} ({cause}); {mend}") from error
    with safe_open(folder / ADAPTER[1], "pt") as held:
        odd = {n for n in held.keys() if "lora_" in n} ^ {n for n in get_peft_model_state_dict(model) if "lora_" in n}  # noqa: SIM118
    if odd:
        raise UserError(f"{folder}: this adapter does not fit {name} (one of them alone has {min(odd)}); {mend}")
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        model.merge_and_unload().save_pretrained(scratch)
        own = any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model"))
        AutoTokenizer.from_pretrained(folder if own else base).save_pretrained(scratch)
        yield Path(scratch)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy files of these names; what of a JSON file's values tells where something lies on this machine stays."""
    for file in {f for pattern in patterns for f in source.glob(pattern) if f.is_file()}:
        shutil.copyfile(file, target / file.name)
        if file.name in ("config.json", "tokenizer_config.json", ADAPTER[0]):
            _dump(target / file.name, _placeless(_read(file), source))


def _placeless(value: Any, source: Path) -> Any:
    """A JSON value without the paths in it, at any depth. `source`: the folder of its file."""
    if isinstance(value, dict):
        return {
            k: v if TEXTS.fullmatch(k) else _placeless(v, source)
            for k, v in value.items()
            if TEXTS.fullmatch(k) or not _is_place(v, source)
        }
    if isinstance(value, list):
        return [_placeless(v, source) for v in value if not _is_place(v, source)]
    return value


def _is_place(value: Any, source: Path) -> bool:
    if not isinstance(value, str) or "\n" in value or "://" in value.removeprefix("file://"):
        return False
    return bool(PLACE.match(value)) or ("/" in value and not export.is_hub_id(value, source))


def _read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _dump(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
