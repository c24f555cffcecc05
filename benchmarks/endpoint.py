"""A mock of OpenAI's chat endpoint with chosen latency and faults, to test and measure what asks a model.

    python benchmarks/endpoint.py --port 0 --latency 0.2 --faults 0.3 --seed 1 --log calls.jsonl

It prints one JSON line, `{"base_url": "http://127.0.0.1:PORT/v1", "pid": …}`, when it is ready, and serves

- `POST /v1/chat/completions` (not streamed) and `GET /v1/models`, in OpenAI's shape
- `GET /stats`: calls, successes, kinds, how many were at once (max, mean), seconds from the first call's arrival to the
  last reply, its own CPU seconds, and for each body's hash how often it was asked and how often it succeeded
- `POST /reset`: forgets all of that, attempts too

A reply follows from the body's bytes alone, so the same request gets the same text in every run (`--stochastic` adds a
counter). What a request whose last message holds `"correctness"`, in quotes, gets is a judge's verdict; one that asks
for a category, a clause or a look-alike, as delib's labeller does, gets that; any other a teacher's reasoning and
answer. A fault follows from the body, the number of its attempt and the seed, whatever the order of the calls.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import time
from collections import Counter
from hashlib import blake2b, shake_128

from aiohttp import web

# Each passes: a body that meets one of them succeeds on its second or third attempt.
FAULTS = ["429-after", "429", "500", "reset", "hang", "half", "not-json", "no-choices"]
RETRY_AFTER = "0.05"
CREATED = 1_700_000_000  # a fixed time, so that replies are the same bytes on every run
REASONING_WORDS, ANSWER_WORDS = 40, 60
TEXT = (
    "a about advice after again also always answer any ask balance because before begin better both break bring build "
    "care change choose clear come common consider could day decide detail different each early enough even every "
    "example few find first follow friend gentle give good great habit have help here honest hour however idea if "
    "important keep kind know large learn least leave let life light listen little local long look make many matter "
    "may mean might moment month more morning most much need never new next note now often once one open other over "
    "part people perhaps person place plain plan point practice question quiet reach read ready reason rest right room "
    "safe same say season see share short show side simple since slow small some start step still story such sure take "
    "talk tell than thing think time together topic towards true try turn under until use useful usual view wait walk "
    "want water way week well what when while whole why with without word work world would write year yet you young"
)
WORDS = TEXT.split()
WORD_OF_BYTE = [WORDS[byte % len(WORDS)] for byte in range(256)]
BEHAVIOURS = ["comply", "comply", "comply", "comply", "refuse", "refuse", "safe_complete", "partial"]
GRADES = [7, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10, 6, 4, 1]


CATEGORIES = re.compile(r'"category" is one of (.+), or null')
CLAUSES = re.compile(r"^### (\S+) \((comply|refuse|safe_complete)\b", re.MULTILINE)  # as delib's excerpts show them


def prose(chosen: bytes) -> str:
    return " ".join(map(WORD_OF_BYTE.__getitem__, chosen)).capitalize() + "."


def text_of(content: object) -> str:
    """A message's text, whether given as a string or as OpenAI's list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return str(content)


def label_of(asked: str, drawn: bytes) -> dict[str, str] | None:
    """What a labeller says; None where none is asked for."""
    if named := CATEGORIES.search(asked):
        names = named[1].split(", ")
        return {"reason": prose(drawn[1:9]), "category": names[drawn[0] % len(names)]}
    if '"clause": "ID"' in asked and (clauses := CLAUSES.findall(asked)):
        clause, behaviour = clauses[drawn[0] % len(clauses)]
        return {"reason": prose(drawn[1:9]), "clause": clause, "behaviour": behaviour}
    return {"request": prose(drawn[:12])} if '{"request": ' in asked else None


def message(asked: str, key: bytes, style: str) -> dict[str, str]:
    """What the assistant says to `asked`, its last message, for a key that stands for the whole request."""
    drawn = shake_128(key).digest(REASONING_WORDS + ANSWER_WORDS)
    if '"correctness"' in asked:
        unseen = '"style"' in asked and '"reasoning_quality"' not in asked  # a judge that is not shown the reasoning
        criteria = ["correctness", "helpfulness", "compliance", "style" if unseen else "reasoning_quality"]
        verdict: dict[str, object] = {name: GRADES[byte % 16] for name, byte in zip(criteria, drawn, strict=False)}
        verdict |= {"behaviour": BEHAVIOURS[drawn[4] % 8], "reason": prose(drawn[5:15])}
        return {"role": "assistant", "content": json.dumps(verdict)}
    if label := label_of(asked, drawn):
        return {"role": "assistant", "content": json.dumps(label)}
    reasoning, answer = prose(drawn[:REASONING_WORDS]), prose(drawn[REASONING_WORDS:])
    if style == "tags":
        return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{answer}"}
    field = "reasoning_content" if style == "field" else "reasoning"
    return {"role": "assistant", "content": answer, field: reasoning}


def reply(body: bytes, key: bytes, style: str) -> bytes:
    """A good reply's JSON. Raises ValueError, KeyError, IndexError or TypeError where the body is no request."""
    request = json.loads(body)
    said = message(text_of(request["messages"][-1]["content"]), key, style)
    read, written = len(body) // 4, sum(map(len, said.values())) // 4
    return json.dumps(
        {
            "id": f"chatcmpl-{key.hex()}",
            "object": "chat.completion",
            "created": CREATED,
            "model": request["model"],
            "choices": [{"index": 0, "message": said, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
        }
    ).encode()


def fault(body_hash: str, attempt: int, seed: int, faults: float, lasting: float) -> str:
    """`ok`, one of FAULTS, or `lasting-500` and `lasting-400` for a body that never succeeds."""
    drawn = blake2b(f"{seed} {body_hash}".encode(), digest_size=16).digest()
    share = int.from_bytes(drawn[:4], "big") / 2**32
    if share < lasting:
        return "lasting-500" if drawn[4] % 2 else "lasting-400"
    if share < lasting + faults and attempt <= 1 + drawn[5] % 2:
        return FAULTS[drawn[5 + attempt] % len(FAULTS)]
    return "ok"


def failed(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"error": {"message": text, "type": "mock_error", "param": None, "code": None}}
    return web.json_response(error, status=status, headers=headers)


class Endpoint:
    """The counts, and one handler for every request: a router and middleware would be most of a call's cost."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if options.log else None
        self.reset()

    def reset(self) -> None:
        self.asked: Counter[str] = Counter()
        self.succeeded: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.calls = self.now = self.most = 0
        self.busy = 0.0  # call-seconds: the sum over calls of how long each was open
        self.first = self.last = 0.0
        self.cpu = time.process_time()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        what = (request.method, request.path)
        if what == ("POST", "/v1/chat/completions"):
            return await self.chat(request)
        if what == ("GET", "/v1/models"):
            model = {"id": "m", "object": "model", "created": CREATED, "owned_by": "mock"}
            return web.json_response({"object": "list", "data": [model]})
        if what == ("GET", "/stats"):
            return web.json_response(self.stats())
        if what == ("POST", "/reset"):
            self.reset()
            return web.json_response({})
        return failed(404, f"{request.method} {request.path}: not served here")

    def stats(self) -> dict[str, object]:
        seconds = self.last - self.first
        return {
            "calls": self.calls,
            "successes": self.succeeded.total(),
            "kinds": self.kinds,
            "concurrent_max": self.most,
            "concurrent_mean": self.busy / seconds if seconds > 0 else 0.0,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.cpu,
            "bodies": {body: {"asked": n, "succeeded": self.succeeded[body]} for body, n in self.asked.items()},
        }

    async def chat(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.content.read()
        began = time.monotonic()
        self.first = self.first or began
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        body_hash = blake2b(body, digest_size=12).hexdigest()
        self.asked[body_hash] += 1
        try:
            return await self.answered(request, body, body_hash, self.asked[body_hash])
        finally:
            self.now -= 1
            self.last = time.monotonic()
            self.busy += self.last - began

    async def answered(self, request: web.BaseRequest, body: bytes, body_hash: str, attempt: int) -> web.StreamResponse:
        options = self.options
        key = f"{body_hash} {self.calls}".encode() if options.stochastic else body_hash.encode()
        kind = "dead" if options.dead else fault(body_hash, attempt, options.seed, options.faults, options.lasting)
        try:
            good = reply(body, blake2b(key, digest_size=12).digest(), options.reasoning)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            kind, good = "not-a-request", repr(error).encode()
        if options.latency:
            await asyncio.sleep(options.latency)
        if kind == "hang":
            await asyncio.sleep(options.hang)
        if request.transport is None or request.transport.is_closing():
            kind = "gone"  # whoever asked left before the reply: the call was made and is not finished
        return await self.sent(request, kind, good, body_hash, attempt)

    async def sent(
        self, request: web.BaseRequest, kind: str, good: bytes, body_hash: str, attempt: int
    ) -> web.StreamResponse:
        """Sends what the kind says, after counting and logging it."""
        response: web.StreamResponse
        match kind:
            case "ok":
                response = web.Response(body=good, content_type="application/json")
            case "not-json":
                response = web.Response(body=good[: len(good) // 2], content_type="application/json")
            case "no-choices":
                response = web.json_response(json.loads(good) | {"choices": []})
            case "429-after":
                response = failed(429, "Too many requests; try again soon.", {"Retry-After": RETRY_AFTER})
            case "429":
                response = failed(429, "Too many requests.")
            case "500" | "lasting-500":
                response = failed(500, "The server had an error.")
            case "lasting-400":
                response = failed(400, "This request is not accepted.")
            case "not-a-request":
                response = failed(400, f"Not a chat request: {good.decode()}")
            case "dead":
                response = failed(503, "The server is down.")
            case _:
                response = web.StreamResponse()
                response.content_length = len(good)
        whole = isinstance(response, web.Response)
        self.count(body_hash, attempt, kind, response.status if whole or kind == "half" else 0)
        if not whole:
            await self.broken(request, response, kind, good)
        return response

    def count(self, body_hash: str, attempt: int, kind: str, status: int) -> None:
        self.kinds[kind] += 1
        if kind == "ok":
            self.succeeded[body_hash] += 1
        if self.log is not None:
            line = {"body": body_hash, "attempt": attempt, "kind": kind, "status": status}
            os.write(self.log, json.dumps(line).encode() + b"\n")

    async def broken(self, request: web.BaseRequest, response: web.StreamResponse, kind: str, good: bytes) -> None:
        """Ends the connection without a whole reply: after half of it, by a reset, or by closing."""
        transport = request.transport
        if transport is None:
            return
        if kind == "half":
            await response.prepare(request)
            await response.write(good[: len(good) // 2])
            transport.close()  # flushes the half first
            return
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # on, for no time: closing then sends a reset
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()


async def serve(options: argparse.Namespace) -> None:
    endpoint = Endpoint(options)
    # Kept open for an hour: a close by the server between two calls would be a fault that nobody asked for.
    runner = web.ServerRunner(web.Server(endpoint.handle, access_log=None, keepalive_timeout=3600))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port, backlog=4096)
    await site.start()
    port = runner.addresses[0][1]
    print(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "pid": os.getpid()}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A mock of OpenAI's chat endpoint.")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--faults", type=float, default=0.0, help="share of bodies whose first attempt or two fail")
    parser.add_argument("--lasting", type=float, default=0.0, help="share of bodies that always fail")
    parser.add_argument("--hang", type=float, default=3.0, help="seconds that a hanging call stays open")
    parser.add_argument("--dead", action="store_true", help="every call gets 503")
    parser.add_argument("--stochastic", action="store_true", help="the same request gets another reply each time")
    parser.add_argument("--reasoning", choices=["tags", "field", "openrouter"], default="tags")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--log", help="a file to append one JSON line a call to")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
