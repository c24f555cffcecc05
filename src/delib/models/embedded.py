"""The embedded llama.cpp server (xllamacpp): a model folder or GGUF file in, completions out, in this process.

It is spoken to over loopback HTTP with token ids that the model's own chat template and tokenizer made, so that what
is sent is what was trained on. The weights are quantised for speed; the recipe says how.
"""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from delib import chat
from delib.errors import UserError
from delib.models import weights
from delib.models.calls import FinalError, PassingError, Reply
from delib.models.endpoint import Endpoint
from delib.records import Message
from delib.run import sha256

SLOTS = 16
"""Requests that decode side by side, each with its own part of the cache: in one unified cache every token also attends
to the other requests' places, 127 tokens/s instead of 182 on two cores (docs/results.md)."""


PAST = 2048
"""MiB at most for the keys and values of prompts that a slot held before, where they come again: a chat, an excerpt of
the spec. An arm asks each prompt once, and a rollout its group at the same time, so that they keep none: llama.cpp's
own 8,192 would be filled by some two thousand answers of SmolLM2 (docs/results.md)."""


PROMPT_ROOM = 1024
"""Tokens of room for a prompt, beside what is written to it."""

SAMPLERS = "temperature"
"""A temperature means the same in each engine: llama.cpp's own cuts (top-k 40, top-p 0.95, min-p 0.05) are off, as RL
and the transformers engine sample without any."""


class EmbeddedModel:
    """A running server with the tokenizer of its model: a Backend (`calls.py`). `room`: for prompt and completion, in
    tokens, where the model itself has more; what this cuts off is a failure, and no answer."""

    def __init__(self, name: str, identity: str, address: str, tokenizer: Any, session: Any, room: int | None) -> None:
        self.name, self.identity = name, identity
        self._address, self._tokenizer, self._session, self._room = address, tokenizer, session, room

    def sent(self, messages: list[Message]) -> str:
        return chat.render(self._tokenizer, messages)

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        import aiohttp

        prompt = self._tokenizer.encode(sent, add_special_tokens=False)
        if self._room is not None and len(prompt) >= self._room:
            raise FinalError(self._no_room(len(prompt), max_tokens))
        body = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "cache_prompt": True,
        }
        try:
            async with self._session.post(f"{self._address}/completion", json=body) as reply:
                if reply.status != 200:
                    raise FinalError(f"{self.name}: {reply.status} {(await reply.text())[:300]}")
                data = await reply.json()
        except aiohttp.ClientConnectionError as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        usage = {"prompt": data["tokens_evaluated"], "completion": data["tokens_predicted"]}
        cut = data["stop_type"] == "limit"
        if cut and self._room is not None and usage["completion"] < max_tokens:
            raise FinalError(self._no_room(len(prompt), max_tokens))
        return Reply(data["content"], None, cut, usage)

    def _no_room(self, prompt: int, most: int) -> str:
        return (
            f"{self.name}: {self._room} tokens of room ended before an answer of at most {most} did, after a prompt of "
            f"{prompt}; shorten the prompt, or set engine to transformers"
        )

    async def close(self) -> None:
        """The server ends with `serve`."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


KEPT_GGUF = 4
"""Quantised copies that stay in the cache, the newest ones; each is quickly made again."""


def gguf_of(folder: Path, quantisation: str) -> Path:
    """The folder's GGUF, made once for its files and kept in the cache while it is among the newest. Config, tokenizer
    and chat template go into it too, so that each file of the folder counts."""
    key = hashlib.sha256(f"{folder.resolve()}|{weights.stamp(folder)}".encode()).hexdigest()[:16]
    target = weights.cache_dir() / "gguf" / f"{key}-{quantisation}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        weights.to_gguf(folder, target, quantisation)
        newest = sorted(target.parent.glob("*.gguf"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        for old in newest[KEPT_GGUF:]:
            old.unlink(missing_ok=True)
    return target


def parameters(file: Path, context_tokens: int, slots: int) -> Any:
    """llama.cpp's for a server of a GGUF file at a free port, with so much room for each of the `slots` requests, and
    none for prompts that a slot held before."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames = ["127.0.0.1"]
    params.port = _free_port()
    params.n_parallel = slots
    params.kv_unified = False
    params.n_ctx = slots * context_tokens
    params.n_batch = 2048
    params.cache_ram_mib = 0
    params.ctx_shift = False
    params.verbosity = -1
    params.warmup = False
    return params


def started(params: Any) -> Any:
    """A server that has begun to work: one that is ended before it has never ends (seen with xllamacpp 2026.10). Raises
    RuntimeError for a file that llama.cpp does not take."""
    import urllib.request

    import xllamacpp

    server = xllamacpp.Server(params)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{server.listening_address}/slots", timeout=600) as reply:  # its working loop answers this
        reply.read()
    return server


@asynccontextmanager
async def serve(
    folder: Path, *, name: str, quantisation: str, context_tokens: int, slots: int = SLOTS
) -> AsyncIterator[EmbeddedModel]:
    """Start a server for a model folder and stop it at the end.

    `context_tokens`: room for prompt and completion of each of the `slots` requests at once, in tokens; never more than
    the model was made for.
    """
    import aiohttp
    from transformers import AutoTokenizer

    most = int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    room = min(context_tokens, most)
    params = parameters(gguf_of(folder, quantisation), room, slots)
    params.sampling.samplers = SAMPLERS
    server = await asyncio.to_thread(started, params)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    identity = f"{await asyncio.to_thread(sha256, folder)} {quantisation}, temperature alone"
    timeout = aiohttp.ClientTimeout(total=None)  # as in serve_gguf
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=slots)) as session:
            limited = room if room < most else None
            yield EmbeddedModel(name, identity, server.listening_address, tokenizer, session, limited)
    finally:
        del server


@asynccontextmanager
async def serve_gguf(file: Path, *, context_tokens: int, slots: int) -> AsyncIterator[Endpoint]:
    """Start a server for any GGUF file that llama.cpp takes, spoken to with the chat template in the file.

    `context_tokens`: room for each of the `slots` requests at once, in tokens. No call is given up for its time: the
    server lives and dies with this process, and on few cores a full round of long prompts takes many minutes. Raises
    UserError for a file that llama.cpp does not take.
    """
    params = parameters(file, context_tokens, slots)
    params.cache_ram_mib = PAST
    params.use_jinja = True
    params.sampling.samplers = SAMPLERS
    try:
        server = await asyncio.to_thread(started, params)
    except RuntimeError as error:
        raise UserError(f"{file}: llama.cpp does not take this file, or has no room for it ({error})") from error
    identity = f"{await asyncio.to_thread(sha256, file)}, temperature alone"
    backend = Endpoint(str(file), f"{server.listening_address}/v1", None, file.name, seconds=None, identity=identity)
    try:
        yield backend
    finally:
        await backend.close()
        del server
