"""The embedded llama.cpp server (xllamacpp): a model folder or GGUF file in, completions out, in this process.

It is spoken to over loopback HTTP with token ids that the model's own chat template and tokenizer made, so that what
is sent is what was trained on. The weights are quantised for speed; the recipe says how.
"""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from delib import chat
from delib.models import weights
from delib.records import Completion, Message

SLOTS = 16
"""Requests that decode side by side, each with its own part of the cache: in one unified cache every token also attends
to the other requests' places, 127 tokens/s instead of 182 on two cores (docs/results.md)."""


class EmbeddedModel:
    """A running server with the tokenizer of its model. `complete` may be called by many tasks at once."""

    def __init__(self, name: str, address: str, tokenizer: Any, session: Any) -> None:
        self.name, self.address, self.tokenizer, self.session = name, address, tokenizer, session

    async def complete(self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int) -> Completion:
        """One completion. Raises aiohttp.ClientError after three tries at a server that does not answer."""
        import aiohttp

        sent = chat.render(self.tokenizer, messages)
        body = {
            "prompt": self.tokenizer.encode(sent, add_special_tokens=False),
            "n_predict": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "cache_prompt": True,
        }
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(aiohttp.ClientConnectionError),
            stop=stop_after_attempt(3),
            wait=wait_exponential(multiplier=0.5),
            reraise=True,
        ):
            with attempt:
                async with self.session.post(f"{self.address}/completion", json=body) as reply:
                    reply.raise_for_status()
                    data = await reply.json()
        usage = {"prompt": data["tokens_evaluated"], "completion": data["tokens_predicted"]}
        cut = data["stop_type"] == "limit"
        return chat.completion(data["content"], sent=sent, model=self.name, cut=cut, usage=usage, seed=seed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


KEPT_GGUF = 4
"""Quantised copies that stay in the cache, the newest ones; each is quickly made again."""


def _gguf_of(folder: Path, quantisation: str) -> Path:
    """The folder's GGUF, made once for its weights and kept in the cache while it is among the newest."""
    stamp = "|".join(
        f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in sorted(folder.glob("*.safetensors"))
    )
    key = hashlib.sha256(f"{folder.resolve()}|{stamp}".encode()).hexdigest()[:16]
    target = weights.cache_dir() / "gguf" / f"{key}-{quantisation}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        weights.to_gguf(folder, target, quantisation)
        newest = sorted(target.parent.glob("*.gguf"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        for old in newest[KEPT_GGUF:]:
            old.unlink(missing_ok=True)
    return target


@asynccontextmanager
async def serve(folder: Path, *, name: str, quantisation: str, context_tokens: int) -> AsyncIterator[EmbeddedModel]:
    """Start a server for a model folder and stop it at the end.

    `context_tokens`: room for prompt and completion of one request, in tokens.
    """
    import aiohttp
    import xllamacpp
    from transformers import AutoTokenizer

    params = xllamacpp.CommonParams()
    params.model.path = str(_gguf_of(folder, quantisation))
    params.hostnames = ["127.0.0.1"]
    params.port = _free_port()
    params.n_parallel = SLOTS
    params.kv_unified = False
    params.n_ctx = min(SLOTS * context_tokens, SLOTS * 2048)
    params.n_batch = 2048
    params.ctx_shift = False
    params.verbosity = -1
    params.warmup = False
    server = await asyncio.to_thread(xllamacpp.Server, params)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=1800)
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=SLOTS)) as session:
            yield EmbeddedModel(name, server.listening_address, tokenizer, session)
    finally:
        del server
