"""The model that trains: all its weights, some of its layers, or an adapter. SFT and RL take it from here."""

from pathlib import Path
from typing import Any

from delib.models import weights
from delib.recipe import Recipe, RlSection, SftSection


def student(recipe: Recipe, section: SftSection | RlSection, start: Path) -> Any:
    """The model in folder `start` as the stage of `section` trains it. Weights that train are float32 also where
    bfloat16 computes; beside an adapter they do not train, and are in the recipe's format."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    weights.without_bars()
    half = recipe.device == "cuda" and recipe.dtype == "bfloat16"  # what flash attention computes in
    packed = isinstance(section, SftSection) and section.batching == "packed"
    model = AutoModelForCausalLM.from_pretrained(
        start,
        dtype=getattr(torch, recipe.dtype if section.lora else "float32"),
        **({"attn_implementation": "flash_attention_2"} if half and packed and is_flash_attn_2_available() else {}),
    )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # it samples without saying so, as published ones do, and no checkpoint could be written
        model.generation_config.do_sample = True
    if isinstance(section, RlSection):
        _without_dropout(model)
    if section.lora is not None:
        torch.manual_seed(recipe.seed)
        return weights.adapted(model, section.lora, section.frozen_layers)
    # The last trainable layers start from the same weights after a kill: the trainer's checkpoint holds them all.
    weights.freeze(model, section.frozen_layers)
    return model


def _without_dropout(model: Any) -> None:
    """What RL rewards is what the model writes without dropout, as it is measured; its config stays as it is."""
    import torch

    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)
