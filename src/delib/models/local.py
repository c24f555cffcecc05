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
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):  # RL draws from the same generators
            torch.manual_seed(seed)
            made = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                eos_token_id=sorted(self.ends),
                pad_token_id=self.tokenizer.pad_token_id,
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
    """Load a model folder. `dtype`: `float32` or `bfloat16`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights.without_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    identity = f"{await asyncio.to_thread(sha256, folder)} {device} {dtype}"
    if further := weights.turn_ends(model, tokenizer) - {tokenizer.eos_token_id}:
        identity += f" {sorted(further)}"  # calls that were cached before these were known as ends told a cut-off
    yield LocalModel(name, identity, model.to(device).eval(), tokenizer)
