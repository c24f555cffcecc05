"""A model folder run by transformers' `generate`: any architecture, CPU or GPU; on a CPU slower than the server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from delib import chat
from delib.models import weights
from delib.models.calls import Reply
from delib.records import Message
from delib.run import sha256


class LocalModel:
    """One model in this process; calls are made one after another. A Backend (`calls.py`)."""

    def __init__(self, name: str, identity: str, model: Any, tokenizer: Any) -> None:
        self.name, self.identity, self.model, self.tokenizer = name, identity, model, tokenizer
        self.ends = weights.turn_ends(model, tokenizer)
        self._turn = asyncio.Lock()

    def sent(self, messages: list[Message]) -> str:
        return chat.render(self.tokenizer, messages)

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        async with self._turn:
            return await asyncio.to_thread(self._generate, sent, max_tokens, temperature, seed)

    def _generate(self, sent: str, max_tokens: int, temperature: float, seed: int) -> Reply:
        import torch

        inputs = self.tokenizer(sent, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        alone = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        sampling = alone if temperature > 0 else {"do_sample": False}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):  # RL draws from the same generators
            torch.manual_seed(seed)
            made = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                **sampling,
            )
        length = inputs["input_ids"].shape[1]
        ids = made[0, length:].tolist()
        ended = bool(ids) and ids[-1] in self.ends
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        return Reply(text, None, not ended, {"prompt": length, "completion": len(ids)})

    async def close(self) -> None:
        """Nothing to close: the weights go with the object."""


@asynccontextmanager
async def load(folder: Path, *, name: str, device: str, dtype: str) -> AsyncIterator[LocalModel]:
    """Load a model folder. `dtype`: `float32` or `bfloat16`.

    What the model's own `generation_config.json` says of penalties and sampling does not count: it writes as RL has it
    write, greedily or by temperature alone. In bfloat16 a merged adapter is beside its base again (`weights.parted`).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    weights.without_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapted = dtype != "float32" and (folder / weights.ADAPTER).exists()
    model: Any
    if adapted and AutoConfig.from_pretrained(folder).dtype == torch.float32:
        model = weights.parted(folder, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    ends = weights.turn_ends(model, tokenizer)
    identity = f"{await asyncio.to_thread(sha256, folder)} {device} {dtype}, ends {sorted(ends)}, temperature alone"
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
    yield LocalModel(name, identity, model.to(device).eval(), tokenizer)
