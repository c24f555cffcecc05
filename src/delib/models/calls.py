"""One way to call any model: a cache of finished calls, one set of limits, retries and errors, whatever answers.

In: a Backend, which makes one attempt at one call. Out: Completions. What passes (a full or failing server, a broken
reply) is tried again, in bounds; what does not is the sample's failure; and what would fail for every call (a wrong
key, an unknown model, a dead endpoint, a spent budget) stops the stage with its cause.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from delib import chat
from delib.errors import StageError
from delib.models.cache import Cache
from delib.recipe import LimitsSection
from delib.records import Completion, Message
from delib.run import write_whole

ATTEMPTS = 6
"""Tries of one call; with the waits between them about a minute, which a restarting server takes."""
LONGEST_WAIT = 60.0
"""Seconds; also the most of a Retry-After that is obeyed."""
DEAD_AFTER = (20, 10.0)
"""An endpoint is dead when so many attempts in a row have failed over at least so many seconds."""
COOLDOWN = 1.0
"""Seconds in which further 429s don't halve the concurrency again: they belong to one burst."""

T = TypeVar("T")


class Reply(NamedTuple):
    """What an endpoint gave back. `reasoning` None: not apart from the text. `cut`: it ended at max_tokens."""

    text: str
    reasoning: str | None
    cut: bool
    usage: dict[str, int]


class PassingError(Exception):
    """An attempt failed in a way that may pass. `full`: the server asked for fewer calls; `wait`: for so long."""

    def __init__(self, cause: str, *, full: bool = False, wait: float | None = None) -> None:
        super().__init__(cause)
        self.full, self.wait = full, wait


class CallError(ValueError):
    """This call cannot be made, or failed at every try: its sample's failure, with the cause."""


class Backend(Protocol):
    """One attempt at one call. `identity`: what a reply depends on beside the call itself (endpoint, weights)."""

    name: str
    identity: str

    def sent(self, messages: list[Message]) -> str:
        """Exactly what the model sees."""

    async def attempt(self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int) -> Reply:
        """Raises PassingError, CallError, or StageError where every call would fail alike."""

    async def close(self) -> None: ...


class Ledger:
    """What a run's calls have cost so far: calls, tokens and money by model, in `spent.json`. Cached calls are free.

    A call's most is set aside before it is made, so that the budget is not passed by calls that run side by side.
    """

    def __init__(self, limits: LimitsSection, path: Path | None = None) -> None:
        self.limits, self.path = limits, path
        self.spent: dict[str, dict[str, int]] = json.loads(path.read_text()) if path and path.exists() else {}
        self._reserved_tokens, self._reserved_cost = 0, 0.0
        self._written = 0.0

    def cost(self, model: str, prompt: int, completion: int) -> float:
        """Money in the unit of the recipe's prices, which are for a million tokens."""
        price = self.limits.prices.get(model)
        return (prompt * price.prompt + completion * price.completion) / 1e6 if price else 0.0

    @property
    def tokens(self) -> int:
        return sum(row["prompt"] + row["completion"] for row in self.spent.values())

    @property
    def money(self) -> float:
        return sum(self.cost(name, row["prompt"], row["completion"]) for name, row in self.spent.items())

    def reserve(self, model: str, prompt: int, completion: int) -> None:
        """Raises StageError when the call's most does not fit."""
        cost = self.cost(model, prompt, completion)
        tokens, limits = prompt + completion, self.limits
        if limits.max_tokens is not None and self.tokens + self._reserved_tokens + tokens > limits.max_tokens:
            raise StageError(
                f"limits.max_tokens: {self.tokens} of {limits.max_tokens} tokens are spent and the next call may not "
                "fit; what was finished stands, raise it and run the same command again"
            )
        if limits.max_cost is not None and self.money + self._reserved_cost + cost > limits.max_cost:
            raise StageError(
                f"limits.max_cost: {self.money:.2f} of {limits.max_cost:.2f} are spent and the next call may not fit; "
                "what was finished stands, raise it and run the same command again"
            )
        self._reserved_tokens += tokens
        self._reserved_cost += cost

    def settle(self, model: str, prompt: int, completion: int, usage: dict[str, int] | None) -> None:
        """Give back what was reserved and, when the call was made, write down what it took."""
        self._reserved_tokens -= prompt + completion
        self._reserved_cost -= self.cost(model, prompt, completion)
        if usage is None:
            return
        row = self.spent.setdefault(model, {"calls": 0, "prompt": 0, "completion": 0})
        row["calls"] += 1
        row["prompt"] += usage.get("prompt", prompt)
        row["completion"] += usage.get("completion", 0)
        if time.monotonic() - self._written > 1.0:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        if self.path is not None and self.spent:
            write_whole(self.path, json.dumps(self.spent, indent=1, sort_keys=True) + "\n")


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, on the high side: three characters each (English has about four)."""
    return len(text) // 3 + 1


class Caller:
    """A model behind a Backend. `complete` may be called by many tasks at once; `limits.concurrency` run side by side.

    The concurrency is halved when the server says that it is full (429), and grows again by one for each round of
    calls that pass: additive increase, multiplicative decrease, as TCP does it.
    """

    def __init__(self, backend: Backend, cache: Cache | None, ledger: Ledger) -> None:
        import anyio

        self.backend, self.cache, self.ledger = backend, cache, ledger
        self.name = backend.name
        self.most = ledger.limits.concurrency
        self._slots = anyio.CapacityLimiter(self.most)
        self._passed = self._failed = 0
        self._failing_since = self._halved = 0.0

    async def complete(
        self, messages: list[Message], *, max_tokens: int, temperature: float, seed: int, index: int = 0
    ) -> Completion:
        """One completion, from the cache when this very call was finished before.

        `index`: which sample or judge run of the same prompt this is; a call of its own. Raises CallError when this
        call failed, StageError when no further one can pass.
        """
        sent = self.backend.sent(messages)
        how = json.dumps([self.backend.identity, max_tokens, temperature, seed, index])
        key = hashlib.sha256(f"{how}\n{sent}".encode()).hexdigest()
        stored = self.cache.get(key) if self.cache is not None else None
        if stored is None:
            reply = await self._paid(sent, messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
            if self.cache is not None:
                self.cache.put(key, json.dumps(reply))
        else:
            reply = Reply(*json.loads(stored))
        return chat.received(
            reply.text,
            reply.reasoning,
            sent=sent,
            model=self.name,
            cut=reply.cut,
            usage=reply.usage,
            seed=seed,
        )

    async def _paid(self, sent: str, messages: list[Message], **asked: Any) -> Reply:
        prompt, most = estimated_tokens(sent), int(asked["max_tokens"])
        self.ledger.reserve(self.name, prompt, most)
        usage = None
        try:
            try:
                reply = await self._attempt(messages, **asked)
            except PassingError as error:
                reply = await self._again(error, messages, **asked)
            usage = reply.usage
        finally:
            self.ledger.settle(self.name, prompt, most, usage)
        return reply

    async def _again(self, first: PassingError, messages: list[Message], **asked: Any) -> Reply:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
        from tenacity import wait_exponential_jitter as jitter

        grow = jitter(multiplier=0.5, max=LONGEST_WAIT, jitter=0.5)

        def pause(state: RetryCallState) -> float:
            raised = state.outcome.exception() if state.outcome else None
            asked_for = raised.wait if isinstance(raised, PassingError) else None
            return grow(state) if asked_for is None else min(asked_for, LONGEST_WAIT)

        await asyncio.sleep(0.5 if first.wait is None else min(first.wait, LONGEST_WAIT))
        tries = AsyncRetrying(
            retry=retry_if_exception_type(PassingError),
            stop=stop_after_attempt(ATTEMPTS - 1),
            wait=pause,
            reraise=True,
        )
        try:
            reply: Reply = await tries(self._attempt, messages, **asked)
        except PassingError as error:
            raise CallError(f"{self.name}: failed at {ATTEMPTS} tries, last: {error}") from error
        return reply

    async def _attempt(self, messages: list[Message], **asked: Any) -> Reply:
        async with self._slots:
            try:
                reply = await self.backend.attempt(messages, **asked)
            except PassingError as error:
                self._note_failure(error)
                raise
        self._failed = 0
        self._passed += 1
        if self._passed >= self._slots.total_tokens < self.most:
            self._slots.total_tokens += 1
            self._passed = 0
        return reply

    def _note_failure(self, error: PassingError) -> None:
        now = time.monotonic()
        if error.full:
            # A server that says it is full is alive.
            self._failed = 0
            if now - self._halved > COOLDOWN:
                self._halved, self._passed = now, 0
                self._slots.total_tokens = max(1, int(self._slots.total_tokens) // 2)
            return
        if self._failed == 0:
            self._failing_since = now
        self._failed += 1
        count, seconds = DEAD_AFTER
        if self._failed >= count and now - self._failing_since >= seconds:
            raise StageError(
                f"{self.name}: {self._failed} attempts in a row failed, last: {error}; "
                "mend the endpoint and run the same command again"
            ) from error

    async def close(self) -> None:
        self.ledger.write()
        await self.backend.close()


async def side_by_side(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """`work` over `items`, taken one by one as places come free, so that 100,000 of them hold no memory.

    The first StageError or UserError stops the taking; what has begun is finished, since it is paid for, and then the
    error is raised.
    """
    source = iter(items)
    stopped: list[Exception] = []

    async def worker() -> None:
        for item in source:
            if stopped:
                return
            try:
                await work(item)
            except Exception as error:
                stopped.append(error)
                return

    await asyncio.gather(*(worker() for _ in range(at_once)))
    if stopped:
        raise stopped[0]
