"""What of a recipe does not fit its model, as far as the model is at hand: it is never fetched to find that out.

In: a recipe. Out: problems, told before any compute; none where the model's config is not here yet, since the stage
then tells the same.
"""

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from delib import chat
from delib.errors import UserError
from delib.models import gguf_file, weights
from delib.recipe import Recipe, RlSection, SftSection
from delib.records import Message, Prompt


def folder_at_hand(name: str) -> Path | None:
    """The local folder with a model's config, or None: a folder, what was pulled, or the hub's cache."""
    if name == weights.SMOLLM2:
        folder = weights.cache_dir() / "smollm2-135m-instruct"
    elif Path(name).is_dir() or Path(name).is_absolute():
        folder = Path(name)
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    return folder if (folder / "config.json").exists() else None


def _config(recipe: Recipe) -> Any:
    folder = folder_at_hand(recipe.model)
    if folder is None:
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):  # of a kind that this transformers does not know
        return None


def template(recipe: Recipe, prompts: Iterable[Prompt]) -> list[str]:
    """What the model's chat template can't render: anything, where there is none; the conversations of the prompts, and
    a system message for the arm that has the policy in its context. Without transformers where the template takes any
    role."""
    folder = folder_at_hand(recipe.model)
    text = None if folder is None else _template_of(folder)
    if folder is None or text is None:
        return []
    if not text:  # of a model in the hub's cache not all files may be here yet
        return [f"model: {chat.no_template(recipe.model)}"] if Path(recipe.model).is_dir() else []
    if "raise_exception" not in text and _declares_end(folder):
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):  # its files are not all here
        return []
    if not tokenizer.chat_template:
        return [f"model: {chat.no_template(recipe.model)}"]
    if tokenizer.eos_token is None:
        return [no_end(recipe.model)]
    found = []
    for roles, row in {tuple(m.role for m in p.messages): p for p in prompts}.items():
        try:
            chat.render(tokenizer, row.messages)
        except UserError as error:
            found.append(f"prompts: {row.id} is one of {', '.join(roles)}; {error}")
    if "base_spec" in recipe.evaluate.arms:
        try:
            chat.render(tokenizer, [Message(role="system", content="a"), Message(role="user", content="b")])
        except UserError as error:
            mend = "leave it out ('delib ablate' needs it)"
            found.append(f"evaluate.arms: base_spec has the policy in a system message; {error}; {mend}")
    return found


def no_end(model: str) -> str:
    """What is told of a model that could not be taught to end its turn."""
    return f"model: {model}: its tokenizer has no eos_token; name in its tokenizer_config.json the one that ends a turn"


def _declares_end(folder: Path) -> bool:
    """Whether a tokenizer's file names the token that ends a turn. Without it transformers may know of one still."""
    told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return told.get("eos_token") is not None


def _template_of(folder: Path) -> str | None:
    """The text of a model's chat template, empty where it has none; None where its files don't tell."""
    told = folder / "tokenizer_config.json"
    if not told.exists() or (folder / "additional_chat_templates").exists():
        return None
    try:
        beside = [file.read_text(encoding="utf-8") for file in folder.glob("chat_template.jinja")]
        inside = json.loads(told.read_text(encoding="utf-8")).get("chat_template") or ""
    except (OSError, ValueError, AttributeError):  # transformers tells what is wrong with it
        return None
    return "".join([*beside, inside if isinstance(inside, str) else json.dumps(inside)])


def layers(recipe: Recipe, stage: str, section: SftSection | RlSection) -> list[str]:
    """Layers that an adapter names or that are to be frozen, and that the model does not have."""
    lora, frozen = section.lora, section.frozen_layers
    fits = not frozen or _freezes(recipe, frozen)
    if lora is not None and not (lora.targets is None and fits):
        return _tried(recipe, stage, lambda model: weights.adapted(model, lora, frozen))
    if lora is None and not fits:
        return _tried(recipe, stage, lambda model: weights.freeze(model, frozen))
    return []


def _freezes(recipe: Recipe, layers: int) -> bool:
    """Whether it is known by its config alone that so many layers can be frozen: without torch, whose import takes
    seconds."""
    folder = folder_at_hand(recipe.model)
    if folder is None:
        return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") in gguf_file.FAMILIES and layers < config.get("num_hidden_layers", 0)


def _tried(recipe: Recipe, stage: str, change: Callable[[Any], Any]) -> list[str]:
    """What is in the way of a change, seen on a model without weights."""
    if (config := _config(recipe)) is None:
        return []
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError:
            return [f"model: {config.model_type} is no causal language model; name one that is"]
        try:
            change(model)
        except UserError as error:
            return [f"{stage}.{problem}" for problem in error.problems]
    return []


def rollouts(recipe: Recipe) -> list[str]:
    """Whether llama.cpp or vLLM can write the rollouts: what a GGUF file is not made of, what vLLM needs."""
    if recipe.rl.rollouts.startswith("vllm"):
        return _vllm(recipe)
    if recipe.rl.rollouts != "llamacpp" or (config := _config(recipe)) is None:
        return []
    if config.model_type not in gguf_file.FAMILIES:
        return [
            f"rl.rollouts: llamacpp takes models of {', '.join(gguf_file.FAMILIES)}, and {recipe.model} is "
            f"{config.model_type}; set it to transformers"
        ]
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_at_hand(recipe.model), local_files_only=True)
    except (OSError, ValueError):  # its files are not all here
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and gguf_file.pre_tokenizer(json.loads(backend.to_str())) is not None:
        return []
    return [
        f"rl.rollouts: llamacpp can't be told of the tokenizer of {recipe.model}, which is no byte-level BPE that "
        "splits text as GPT-2, SmolLM2, Llama 3 or Qwen2 do; set it to transformers"
    ]


def _vllm(recipe: Recipe) -> list[str]:
    found, name = [], recipe.rl.rollouts
    if recipe.device == "cpu":
        found.append(f"rl.rollouts: {name} needs a GPU; set device: cuda, or rl.rollouts to transformers or llamacpp")
    if find_spec("vllm") is None:
        found.append(f"rl.rollouts: {name} needs vllm, which is not installed; run 'pip install trl[vllm]'")
    return found
