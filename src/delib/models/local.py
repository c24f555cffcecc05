"""A model folder run by transformers' `generate`: any architecture, CPU or GPU; on a CPU slower than the server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from delib import chat
from delib.records import Completion, Message


class LocalModel:
    """One model in this process; calls are made one after another."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self._turn = asyncio.Lock()

    async def complete(self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int) -> Completion:
        async with self._turn:
            return await asyncio.to_thread(self._generate, messages, max_tokens, temperature, seed)

    def _generate(self, messages: list[Message], max_tokens: int, temperature: float, seed: int) -> Completion:
        import torch

        sent = chat.render(self.tokenizer, messages)
        inputs = self.tokenizer(sent, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        torch.manual_seed(seed)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=max_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
            )
        length = inputs["input_ids"].shape[1]
        ids = made[0, length:].tolist()
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        usage = {"prompt": length, "completion": len(ids)}
        return chat.completion(text, sent=sent, model=self.name, cut=not ended, usage=usage, seed=seed)


@asynccontextmanager
async def load(folder: Path, *, name: str, device: str, dtype: str) -> AsyncIterator[LocalModel]:
    """Load a model folder. `dtype`: `float32` or `bfloat16`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    yield LocalModel(name, model.to(device).eval(), tokenizer)
