"""What training will take of each device's memory, before anything is loaded; and which ways of it nobody ran.

In: a recipe and its model's config. Out: bytes by purpose, as lines for `delib check`. An estimate: allocators, kernels
and libraries come on top (a tenth and some hundred megabytes is usual).
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from delib.errors import UserError
from delib.models import weights
from delib.recipe import Recipe
from delib.training import processes

PROMPT_TOKENS = 256
"""How long a prompt of RL's is counted; SFT's rows are as long as `sft.max_tokens`."""


class Footprint(NamedTuple):
    """Bytes on each device."""

    weights: float
    gradients: float
    optimiser: float
    activations: float


def estimate(recipe: Recipe, config: Any, stage: Literal["sft", "rl"] = "sft") -> Footprint:
    """Of a stage with a model of this config (transformers'), rows being as long as they may.

    Weights, gradients and optimiser after ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3.1): AdamW keeps two
    moments in float32 for each weight that trains, beside its gradient; here weights that train are float32, and while
    bfloat16 computes, autocast holds a copy of them in it. FSDP and ZeRO-3 leave 1/N of all this on each of N devices,
    and gather one layer at a time (counted: two). Activations after Korthikanti et al. (arXiv 2205.05198, section 4.1)
    for today's layers, see `kept_by_a_layer`; with gradient checkpointing the input of each layer and one whole layer
    (their section 5). The head computes in tiles on a GPU (TRL), so that logits are not counted; a CPU keeps those of
    the positions that are learned, which are counted as half of all. RL learns from `rl.device_batch` completions at
    once, and writes all of a process's together: then their keys and values of all layers take the activations' place,
    where they are more. With `rl.beta` and without an adapter TRL keeps a second model, in float32 as the first, to
    measure how far it moved. Not counted: what vLLM takes beside it.

    Raises UserError for a config of which no causal language model is made, or whose layers are of another kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    section, text = recipe.sft if stage == "sft" else recipe.rl, config.get_text_config()
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise UserError(f"model: {config.model_type} is no causal language model; name one that is") from error
        if section.lora is not None:
            model = weights.adapted(model, section.lora, section.frozen_layers)
        else:
            weights.freeze(model, section.frozen_layers)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stands = sum(p.numel() for p in model.parameters()) - trains
    compute = 2 if recipe.dtype == "bfloat16" else 4
    count = processes.planned(recipe)
    share = 1 / count if count > 1 and processes.sharded(recipe) else 1.0
    copies = compute * (trains if section.lora is None and compute == 2 else 0)
    gathered = 2 * compute * (trains + stands) / text.num_hidden_layers if share < 1 else 0.0
    held = (4 * trains + (compute if section.lora else 4) * stands + copies) * share + gathered
    if stage == "rl" and recipe.rl.beta and section.lora is None:
        held += 4 * (trains + stands) * share
    if stage == "sft":
        tokens, cached = processes.rows_at_once(recipe, count) * section.max_tokens, 0
    else:
        row = PROMPT_TOKENS + section.max_tokens
        tokens = processes.completions_at_once(recipe, count) * row
        written = processes.completions_a_step(recipe, count) * row
        cached = written * 2 * compute * _kept_heads(text) * text.num_hidden_layers
    try:
        layer = kept_by_a_layer(text, compute)
    except AttributeError as error:
        raise UserError(f"layers of {config.model_type} are of a kind that is not estimated") from error
    layers = text.num_hidden_layers - section.frozen_layers
    kept = compute * text.hidden_size * layers + layer if recipe.gradient_checkpointing else layer * layers
    logits = 0.0 if recipe.device == "cuda" else 3 * 4 * text.vocab_size / 2
    return Footprint(held, 4 * trains * share, 8 * trains * share, max(tokens * (kept + logits), cached))


def kept_by_a_layer(text: Any, compute: int) -> float:
    """Bytes that the backward pass needs of one layer, for each token: of each of two norms its input, the scaled input
    and the output, in float32 (6 h); and in the computing format, of so many bytes: queries, keys, values as they are
    attended with and what comes out, twice, as it is laid anew for the next layer; four of the gated MLP's width.
    Scores are computed again (sdpa, flash attention), and nothing is dropped out."""
    heads = text.num_attention_heads * _head(text)
    return float(24 * text.hidden_size + compute * (3 * heads + 2 * _kept_heads(text) + 4 * text.intermediate_size))


def _head(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _kept_heads(text: Any) -> int:
    """The width of all keys (or values) of a layer."""
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * _head(text)


def lines(recipe: Recipe, left_out: Collection[str] = ()) -> list[str]:
    """For `delib check`: the estimate, but of stages that are left out, and what was never run. Nothing where one
    process trains on a CPU."""
    if recipe.device == "cpu" and recipe.accelerate is None:
        return []
    found = _config(recipe)
    untried = never_run(recipe)
    told = [f"Never run on a GPU by delib's authors: {', '.join(untried)}."] if untried else []
    if found is None:
        return [f"Memory of training: not estimated, since the config of {recipe.model} could not be read here.", *told]
    stages: tuple[Literal["sft", "rl"], ...] = ("sft", "rl")
    return [*(_line(recipe, found, stage) for stage in stages if stage not in left_out), *told]


def _line(recipe: Recipe, config: Any, stage: Literal["sft", "rl"]) -> str:
    try:
        made = estimate(recipe, config, stage)
    except UserError as error:
        return f"Memory of {stage.upper()}: not estimated; {'; '.join(error.problems)}."
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in made._asdict().items())
    count = processes.planned(recipe)
    where = f"each of {count} devices" if count > 1 else "the device"
    return f"Memory of {stage.upper()} on {where}, about: {parts}; together {sum(made) / 2**30:.1f} GiB."


def _config(recipe: Recipe) -> Any:
    from transformers import AutoConfig

    try:
        local = recipe.model == weights.SMOLLM2 or recipe.model.startswith("/")
        return AutoConfig.from_pretrained(weights.resolve(recipe.model) if local else recipe.model)
    except (UserError, OSError, ValueError):
        return None


def never_run(recipe: Recipe) -> list[str]:
    """The ways of training in a recipe that were written by the libraries' documents alone."""
    if recipe.device == "cpu":
        return []
    kind = str(processes.config(recipe).get("distributed_type", "NO"))
    named = {
        "training on a GPU at all": True,
        "computing in bfloat16 there": recipe.dtype == "bfloat16",
        "TRL's fused head there (on a CPU it is tested)": True,
        "packed rows with flash attention": recipe.sft.batching == "packed",
        "several GPUs": kind == "MULTI_GPU",
        "FSDP": kind == "FSDP",
        "DeepSpeed": kind == "DEEPSPEED",
        "rollouts by vLLM": recipe.rl.rollouts.startswith("vllm"),
    }
    return [name for name, used in named.items() if used]
