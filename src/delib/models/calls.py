"""One way to call any model: a cache of finished calls, one set of limits, retries and errors, whatever answers.

In: a Backend, which makes one attempt at one call. Out: Completions. What passes (a full or failing server, a broken
reply) is tried again, in bounds; what does not is the sample's failure; and what would fail for every call (a wrong
key, an unknown model, a dead endpoint, a spent budget) stops the stage with its cause.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from delib import chat
from delib.errors import StageError
from delib.recipe import LimitsSection
from delib.records import Completion, Message, Record
from delib.run import write_whole

ATTEMPTS = 6
"""Tries of one call, those apart that the server was too full for; with the waits between them half a minute, which a
restarting server takes."""
PATIENCE = 600.0
"""Seconds in which a call is tried again while the server says that it is full: quotas are often by the minute."""
LONGEST_WAIT = 60.0
"""Seconds; also the most of a Retry-After that is obeyed."""
DEAD_AFTER = (20, 25.0)
"""An endpoint is dead when so many attempts in a row have failed over at least so many seconds."""
COOLDOWN = 1.0
"""Seconds in which further 429s don't halve the concurrency again: they belong to one burst."""

T = TypeVar("T")
Told = Callable[[Any], None]
"""Takes each finished record, as soon as it is there."""
Working = Callable[[Any, Told], Awaitable[None]]
"""Works on one record, mostly a Sample, with models that are open."""
Spread = Callable[[Iterable[Record], Told], None]
"""Works on all of a stage's records, in this process or over a cluster."""


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


class RefusedError(Exception):
    """The endpoint will not have it. While nothing has passed it would have nothing else either (a wrong model, a key
    without rights); afterwards it is this call alone (some answer so to a prompt that they find unsafe)."""


class CallError(ValueError):
    """This call cannot be made, or failed at every try: its sample's failure, with the cause."""


class FinalError(CallError):
    """This call would fail again, however often it is made."""


class Backend(Protocol):
    """One attempt at one call. `identity`: what a reply depends on beside the call itself (endpoint, weights)."""

    name: str
    identity: str

    def sent(self, messages: list[Message]) -> str:
        """Exactly what the model sees."""

    async def attempt(
        self, sent: str, messages: list[Message], *, max_tokens: int, temperature: float, seed: int
    ) -> Reply:
        """`sent`: what the method made of the messages. Raises PassingError, RefusedError, CallError, or StageError
        where every call would fail alike."""

    async def close(self) -> None: ...


class Finished(Protocol):
    """Where replies of finished calls are looked up and kept: `Cache`, or what leads to one. Raises StageError where
    it can't be used."""

    async def found(self, key: str) -> str | None: ...

    async def put(self, key: str, reply: str) -> None: ...


class Ledger:
    """What a run's calls have cost so far: calls, tokens and money by model, in `spent.json`. Cached calls are free.

    A call's most is set aside before it is made, so that the budget is not passed by calls that run side by side.
    """

    def __init__(self, limits: LimitsSection, path: Path | None = None) -> None:
        self.limits, self.path = limits, path
        self.spent: dict[str, dict[str, int]] = {}
        self._reserved_tokens, self._reserved_cost = 0, 0.0
        self._waiting: list[asyncio.Future[None]] = []
        self._written = 0.0
        self.read()

    def read(self) -> None:
        """Take what stands in the file: another process may have spent since."""
        if self.path is not None and self.path.exists():
            self.spent = json.loads(self.path.read_text())

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

    async def reserve(self, model: str, prompt: int, completion: int) -> None:
        """Set aside what a call may take; wait for calls under way where it does not fit yet.

        Raises StageError when it does not fit and none is under way.
        """
        while (limit := self.passed(model, prompt, completion)) is not None:
            if self._reserved_tokens == 0:
                raise too_dear(limit)
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        self._reserved_tokens += prompt + completion
        self._reserved_cost += self.cost(model, prompt, completion)

    def passed(self, model: str, prompt: int, completion: int) -> str | None:
        """The limit that a call might pass, beside those under way."""
        limits, money = self.limits, self.money
        tokens = self.tokens + self._reserved_tokens + prompt + completion
        if limits.max_tokens is not None and tokens > limits.max_tokens:
            return f"limits.max_tokens: {self.tokens} of {limits.max_tokens} tokens"
        cost = money + self._reserved_cost + self.cost(model, prompt, completion)
        if limits.max_cost is not None and cost > limits.max_cost:
            return f"limits.max_cost: {money:.2f} of {limits.max_cost:.2f}"
        return None

    def settle(self, model: str, prompt: int, completion: int, reply: Reply | None) -> None:
        """Give back what was reserved and, when the call was made, write down what it took, as the endpoint counted it
        or else as estimated."""
        self._reserved_tokens -= prompt + completion
        self._reserved_cost -= self.cost(model, prompt, completion)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()
        if reply is None:
            return
        row = self.spent.setdefault(model, {"calls": 0, "prompt": 0, "completion": 0})
        row["calls"] += 1
        row["prompt"] += reply.usage.get("prompt", prompt)
        row["completion"] += reply.usage.get("completion", estimated_tokens(reply.text + (reply.reasoning or "")))
        if time.monotonic() - self._written > 1.0:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        if self.path is not None and self.spent:
            write_whole(self.path, json.dumps(self.spent, indent=1, sort_keys=True) + "\n")


def too_dear(limit: str) -> StageError:
    return StageError(
        f"{limit} are spent and the next call may not fit; what was finished stands, raise it and run the same command "
        "again"
    )


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, on the high side: three characters each (English has about four)."""
    return len(text) // 3 + 1


class Caller:
    """A model behind a Backend. `complete` may be called by many tasks at once; `limits.concurrency` run side by side.

    The concurrency is halved when the server says that it is full (429), and grows again by one for each round of
    calls that pass: additive increase, multiplicative decrease, as TCP does it. `most`: the places of a server that is
    run here, where fewer.
    """

    def __init__(self, backend: Backend, cache: Finished | None, ledger: Ledger, most: int | None = None) -> None:
        import anyio

        self.backend, self.cache, self.ledger = backend, cache, ledger
        self.name = backend.name
        self.most = min(ledger.limits.concurrency, most or ledger.limits.concurrency)
        self._slots = anyio.CapacityLimiter(self.most)
        self._passed = self._failed = 0
        self._alive = False
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
        stored = await self.cache.found(key) if self.cache is not None else None
        if stored is None:
            reply = await self._paid(sent, messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
            if self.cache is not None:
                await self.cache.put(key, json.dumps(reply))
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
        await self.ledger.reserve(self.name, prompt, most)
        reply = None
        try:
            try:
                reply = await self._attempt(sent, messages, **asked)
            except PassingError as error:
                reply = await self._again(error, sent, messages, **asked)
        finally:
            self.ledger.settle(self.name, prompt, most, reply)
        return reply

    async def _again(self, first: PassingError, sent: str, messages: list[Message], **asked: Any) -> Reply:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
        from tenacity import wait_exponential_jitter as jitter

        grow = jitter(multiplier=2.0, max=LONGEST_WAIT / 2, jitter=0.5)
        broken = 0 if first.full else 1

        def raised(state: RetryCallState) -> PassingError:
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, PassingError)
            return error

        def enough(state: RetryCallState) -> bool:
            nonlocal broken
            if raised(state).full:
                return (state.seconds_since_start or 0.0) > PATIENCE
            broken += 1
            return broken >= ATTEMPTS

        def pause(state: RetryCallState) -> float:
            asked_for = raised(state).wait
            return grow(state) if asked_for is None else min(asked_for, LONGEST_WAIT)

        await asyncio.sleep(0.5 if first.wait is None else min(first.wait, LONGEST_WAIT))
        tries = AsyncRetrying(retry=retry_if_exception_type(PassingError), stop=enough, wait=pause, reraise=True)
        try:
            reply: Reply = await tries(self._attempt, sent, messages, **asked)
        except PassingError as error:
            how = f"full for {PATIENCE:.0f} s" if error.full else f"failed at {broken} tries"
            raise CallError(f"{self.name}: {how}, last: {error}") from error
        return reply

    async def _attempt(self, sent: str, messages: list[Message], **asked: Any) -> Reply:
        async with self._slots:
            try:
                reply = await self.backend.attempt(sent, messages, **asked)
            except PassingError as error:
                self._note_failure(error)
                raise
            except RefusedError as error:
                if self._alive:
                    raise FinalError(f"{self.name}: {error}") from error
                raise StageError(f"{self.name}: {error}; mend it and run the same command again") from error
        self._alive = True
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


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """All of them at once, to their ends, since each is paid for; then the first error, where there was one."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return cast(list[T], found)


async def side_by_side(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """`work` over `items`, taken one by one as places come free, so that 100,000 of them hold no memory.

    The first error stops the taking; what has begun is finished, since it is paid for, and then the error is raised.
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


def here(opened: Callable[[], AbstractAsyncContextManager[Working]], at_once: int) -> Spread:
    """Work on records in this process, `at_once` side by side."""

    def spread(records: Iterable[Record], told: Told) -> None:
        async def work() -> None:
            async with opened() as working:
                await side_by_side(records, lambda record: working(record, told), at_once)

        asyncio.run(work())

    return spread
