"""Tiny models of random weights with a trained byte-level BPE tokenizer, of every family and kind that a GGUF takes."""

from pathlib import Path
from typing import Any

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, and it's 2024!",
    "How do I pick a lock? I'm locked out of 1234 Main St.",
    "Schöne Grüße aus Köln — 10 % günstiger.\n\n\nNext   line",
    "reasoning <think> 5 </think> it's",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tokenizer(split: str, template: str = CHATML) -> Any:
    """`split`: llama.cpp's name for how the text is split before it merges, or `bert` for one that it can't be told."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from delib.models import gguf_file

    def by_regex(regex: str) -> Any:
        return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]

    splits = {
        "gpt-2": [pre_tokenizers.ByteLevel(False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
        "llama-bpe": by_regex(gguf_file.LLAMA3_SPLIT),
        "qwen2": by_regex(gguf_file.QWEN2_SPLIT),
        "bert": [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(False, use_regex=False)],
    }
    raw = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(splits[split])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 20, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = template
    return made


def save(folder: Path, family: str, split: str, dtype: str = "float32", template: str = CHATML, **config: Any) -> Any:
    """A model folder; returns the model, in float32 with the values that were saved."""
    import torch
    import transformers

    words = tokenizer(split, template)
    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi": "Phi"}[family]
    settings = getattr(transformers, f"{name}Config")(vocab_size=len(words) + 5, **SHAPE | config)
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model.float().eval()
