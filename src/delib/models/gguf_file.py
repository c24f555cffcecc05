"""A model folder as one GGUF file that llama.cpp runs: Llama, Qwen2 and Qwen3, with tokenizer and chat template.

In: a folder that `save_pretrained` wrote. Out: one file with weights, tokenizer and a template that tells llama.cpp
where the reasoning ends. Whatever llama.cpp would reckon otherwise than transformers is refused before anything is
written, all of it at once.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from delib.errors import UserError

FAMILIES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""By transformers' `model_type`, the name in `gguf.MODEL_ARCH`."""
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
"""By quantisation, the name in `gguf.LlamaFileType`."""
INSTEAD = "use safetensors, or engine: transformers"

LLAMA3_SPLIT, QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
PARTED = """{%- set parted = namespace(rows=[]) -%}
{%- for message in messages -%}
{%- if loop.last and message['role'] == 'assistant' and message['reasoning_content'] -%}
{%- set text = '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' + message['content'] -%}
{%- set parted.rows = parted.rows + [{'role': 'assistant', 'content': text}] -%}
{%- else -%}
{%- set parted.rows = parted.rows + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = parted.rows -%}
"""
"""Renders a last message's `reasoning_content` in think tags. llama.cpp finds out how a model writes its reasoning by
rendering a message with and without it; no prompt changes by this, since an earlier turn's reasoning is left out."""


def parted(template: str) -> str:
    """A chat template from which llama.cpp learns of the think tags; one that speaks of them stays as it is."""
    return template if "reasoning_content" in template or "</think>" in template else PARTED + template


class Tensor(NamedTuple):
    """Where a tensor lies, and as what it is written."""

    source: Path
    name: str
    target: str
    shape: list[int]
    kind: Any


def to_gguf(folder: Path, target: Path, quantisation: str) -> list[str]:
    """Write the file, whole and then renamed; one tensor is held at a time.

    `quantisation`: `f32`, `f16`, `q8_0` or `q4_0`; one-dimensional tensors stay float32. Returns the names of the
    tensors that stayed f16, since their rows are no multiple of a block. Raises UserError for what can't be written.
    """
    import gguf

    family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{folder}: no GGUF of architecture {family}; it is made of {', '.join(FAMILIES)}; {INSTEAD}")
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    architecture = gguf.MODEL_ARCH[FAMILIES[family]]
    kind = gguf.GGMLQuantizationType[quantisation.upper()]
    tensors, unknown = _tensors(folder, config, architecture, kind)
    rows = next((t.shape[0] for t in tensors if t.target == "token_embd.weight"), 0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else None
    splitter = pre_tokenizer(backend) if backend else None
    problems = [*_unlike(config, family), *_untold(tokenizer, splitter, rows), *unknown]
    if problems:
        raise UserError([f"{folder}: {problem}; {INSTEAD}" for problem in problems])
    scratch = target.with_suffix(f".{os.getpid()}.part")
    writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[architecture])
    _add_model(writer, config, target.stem, gguf.LlamaFileType[FILE_TYPES[quantisation]])
    _add_tokenizer(writer, tokenizer, str(splitter), rows)
    _add_tensors(writer, tensors, config, family)
    scratch.rename(target)
    return [t.target for t in tensors if t.kind != kind and len(t.shape) > 1]


def _tensors(folder: Path, config: Any, architecture: Any, kind: Any) -> tuple[list[Tensor], list[str]]:
    """What there is to write, in the files' order, and the problems with it."""
    import gguf
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    found: list[Tensor] = []
    problems: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - a file handle, no dict
                if name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
                    continue
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                shape = list(weights.get_slice(name).get_shape())
                used = kind
                if len(shape) == 1:
                    used = gguf.GGMLQuantizationType.F32
                elif shape[-1] % block:
                    used = gguf.GGMLQuantizationType.F16
                if target is None:
                    problems.append(f"tensor {name} has no place in a GGUF file of this architecture")
                else:
                    found.append(Tensor(file, name, target, shape, used))
    return found, problems


def _unlike(config: Any, family: str) -> list[str]:
    """What llama.cpp would reckon otherwise than transformers does."""
    problems = []
    rope = config.rope_parameters
    kind = rope["rope_type"]
    known = {"default": set(), "linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}
    if family == "llama":
        known["llama3"] = known["yarn"] | {"low_freq_factor", "high_freq_factor"}
    given = {key for key, value in rope.items() if value is not None} - {"rope_type", "rope_theta", "type"}
    if kind not in known:
        problems.append(f"rotary embedding {kind} is not written; it knows {', '.join(known)}")
    elif given - known[kind]:
        problems.append(f"rotary embedding {kind} with {', '.join(sorted(given - known[kind]))} is not written")
    if config.hidden_act != "silu":
        problems.append(f"activation {config.hidden_act}: llama.cpp takes silu here")
    if getattr(config, "use_sliding_window", False):
        problems.append("its sliding attention window is not known to llama.cpp's architecture")
    return problems


def pre_tokenizer(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level BPE tokenizer splits text before it merges; None when it has none.

    `backend`: the tokenizer as the tokenizers library writes it. Told by the rules themselves, so that a tokenizer
    that was trained anew is known too.
    """
    model, splitter = backend["model"], backend.get("pre_tokenizer") or {}
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or (backend.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        return None
    if not model["merges"]:  # llama.cpp takes no tokenizer without any
        return None
    if (backend.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    *before, last = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    whole = bool(model.get("ignore_merges"))
    if len(before) > 1:
        return None
    if not before:
        return "gpt-2" if last["use_regex"] and not whole else None
    rule = before[0]
    if rule["type"] == "Digits" and rule["individual_digits"] and last["use_regex"] and not whole:
        return "smollm"
    if rule["type"] == "Split" and rule["behavior"] == "Isolated" and not rule["invert"] and not last["use_regex"]:
        return {(LLAMA3_SPLIT, True): "llama-bpe", (QWEN2_SPLIT, False): "qwen2"}.get(
            (rule["pattern"].get("Regex", ""), whole)
        )
    return None


def _untold(tokenizer: Any, splitter: str | None, rows: int) -> list[str]:
    """What of the tokenizer can't be told to llama.cpp. `rows`: of the embedding matrix."""
    if splitter is None:
        return [
            "its tokenizer is none of those that can be written: byte-level BPE that splits text as GPT-2, SmolLM2, "
            "Llama 3 or Qwen2 do"
        ]
    most = max(tokenizer.get_vocab().values())
    return [f"its tokenizer has token {most}, its embeddings {rows} rows"] if most >= rows else []


def _add_model(writer: Any, config: Any, name: str, file_type: Any) -> None:
    """The metadata that llama.cpp builds the network from."""
    import gguf

    heads, rope = config.num_attention_heads, config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def _add_tokenizer(writer: Any, tokenizer: Any, splitter: str, rows: int) -> None:
    """Tokens, merges, special tokens and template, as transformers holds them and not as some file tells."""
    import gguf

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = []
    for number in range(rows):
        if number not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            kinds.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        special = gguf.SpecialVocab(place, load_merges=True, n_vocab=rows)
    special.add_special_token = {"bos": _begins(tokenizer)}
    special.chat_template = parted(tokenizer.get_chat_template()) if tokenizer.chat_template else None
    special.add_to_gguf(writer, quiet=True)


def _begins(tokenizer: Any) -> bool:
    """Whether llama.cpp is to write the first token itself. In a conversation it must not where the template does not,
    since training renders by the template alone."""
    first = tokenizer.bos_token_id
    if first is None or tokenizer("a")["input_ids"][0] != first:
        return False
    if not tokenizer.chat_template:
        return True
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return bool(text.startswith(tokenizer.bos_token))


def _add_tensors(writer: Any, tensors: list[Tensor], config: Any, family: str) -> None:
    """Write everything to the file, tensor by tensor."""
    import gguf
    import numpy as np

    factors = _rope_factors(config) if config.rope_parameters["rope_type"] == "llama3" else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        if tensor.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            shape, dtype = tuple(tensor.shape), np.dtype(f"float{8 * gguf.GGML_QUANT_SIZES[tensor.kind][1]}")
        else:
            shape, dtype = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind), np.dtype("uint8")
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.target, shape, dtype, size, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for array, kind in _arrays(tensors, config, family):
        writer.write_tensor_data(gguf.quants.quantize(array, kind))
    writer.close()


def _arrays(tensors: list[Tensor], config: Any, family: str) -> Iterator[tuple[Any, Any]]:
    """Each tensor as float32, and as what it is written.

    llama.cpp's rotary embedding of the Llama architecture takes neighbouring rows of a query or key as a pair, that of
    transformers (and of llama.cpp's Qwen) rows half a head apart: there the rows are interleaved, biases too.
    """
    from safetensors import safe_open

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family == "llama" else {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for tensor in tensors:
            if tensor.source not in opened:
                opened[tensor.source] = stack.enter_context(safe_open(tensor.source, "pt"))
            array = opened[tensor.source].get_tensor(tensor.name).float().numpy()
            count = heads.get(tensor.name.split(".")[-2])
            if count is not None:
                split = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
                array = split.swapaxes(1, 2).reshape(array.shape)
            yield array, tensor.kind


def _rope_factors(config: Any) -> Any:
    """By what Llama 3's rotary embedding divides each frequency, float32 of half a head."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return (1.0 / config.rope_parameters["rope_theta"] ** places / scaled).float().numpy()
