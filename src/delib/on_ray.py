"""Record stages over a Ray cluster: Ray Data hands blocks of records to workers, where delib's own caller asks.

In: the records that a stage has still to work on. Out: each finished one, told to the one process that writes records,
as its block comes back. The models are opened in each worker as they are here, with the keys of its own environment.
What workers share, the cache of finished calls and the ledger, is held by one actor beside that process, on its disk:
SQLite's log can't lie on a network file system, and so no machine needs a shared one. A worker that dies loses its
calls under way; its blocks are given out again, and what was finished of them is in the cache.
"""

import asyncio
import importlib.util
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from delib.errors import StageError, UserError
from delib.models.cache import FILE, Cache
from delib.models.calls import Ledger, Reply, Spread, Told, Working, side_by_side, too_dear
from delib.models.weights import cache_dir
from delib.opener import Opener, kinds
from delib.progress import say
from delib.recipe import LimitsSection, RaySection, Recipe
from delib.records import Record
from delib.run import dump
from delib.spec import Spec

ROUND = 128 * 2**20
"""Characters of records that are handed to Ray at a time: a million samples need not fit into its object store."""
STORE_BYTES = 512 * 2**20
"""Object store of a cluster on this machine: a round, and what comes back of it."""
BLOCKS_AT_ONCE = 2
"""Blocks that a worker has begun: while one ends in its last calls, the next keeps it busy."""
ANSWER_SECONDS = 10.0
"""How long the head of a cluster may take to answer."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def problems(section: RaySection | None) -> list[str]:
    """What can be known before any compute."""
    if section is None:
        return []
    found = []
    if importlib.util.find_spec("ray") is None:
        found.append("ray: Ray is not installed; pip install -e '.[ray]' in the clone, or leave the section out")
    if section.address not in (None, "auto"):
        host, _, port = str(section.address).rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            found.append(f"ray.address: {section.address!r} is no HOST:PORT, such as 10.0.0.1:6379; nor is it auto")
    return found


@contextmanager
def cluster(section: RaySection) -> Iterator[Any]:
    """Ray, connected; a cluster that was begun for this ends with it. Raises UserError where there is none."""
    if found := problems(section):
        raise UserError(found)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # of its two the one on stderr; the file keeps what it tells
            handler.setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if section.address is None:
        # On loopback alone: whoever reaches a cluster may run programs on it.
        quiet |= {"num_cpus": section.workers, "object_store_memory": STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        quiet |= {"include_dashboard": False}
    elif section.address != "auto":
        host, _, port = section.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"ray.address: {section.address} does not answer ({error}); name the head of a running cluster "
                "('ray status' there tells it), or leave it out for one on this machine"
            ) from None
    if section.address is not None:
        say(f"ray: connecting to {section.address}; should this take minutes, it is another port than the head's")
    try:
        ray.init(address=section.address or "local", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "no cluster could be started here" if section.address is None else f"no cluster at {section.address}"
        raise UserError(
            f"ray.address: {where} ({error}); start the command on a machine of a running cluster, with Ray and Python "
            "in its versions"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Refused(NamedTuple):
    """A StageError on its way from the keeper to a worker."""

    cause: str


class Keeper:
    """The actor that holds the ledger and the cache for all workers."""

    def __init__(self, limits: LimitsSection, spent: Path | None, cache: Path) -> None:
        self._ledger, self._cache = Ledger(limits, spent), Cache(cache)
        self._stopped: str | None = None
        self._does: dict[str, Callable[..., Awaitable[Any]]] = {
            "found": self._found,
            "put": self._cache.put,
            "reserve": self._reserve,
            "settle": self._settle,
        }

    async def answer(self, asked: list[tuple[Any, ...]]) -> list[Any]:
        """What is asked at once: of each, what to do and what it takes."""
        return await asyncio.gather(*(self._answer(*one) for one in asked))

    async def _answer(self, what: str, *given: Any) -> Any:
        try:
            return await self._does[what](*given)
        except StageError as error:
            return Refused(str(error))

    async def _found(self, key: str) -> str | None:
        if self._stopped is not None:
            raise StageError(self._stopped)
        return await self._cache.found(key)

    async def _reserve(self, model: str, prompt: int, completion: int) -> None:
        """Unlike in one process nobody waits for calls under way: those of a worker that died would never end."""
        if (limit := self._ledger.passed(model, prompt, completion)) is not None:
            raise too_dear(limit)
        await self._ledger.reserve(model, prompt, completion)

    async def _settle(self, model: str, prompt: int, completion: int, reply: Reply | None) -> None:
        self._ledger.settle(model, prompt, completion, reply)

    async def stop(self, cause: str) -> None:
        """From now on no call is begun; those under way are finished, since they are paid for."""
        self._stopped = cause

    async def close(self) -> dict[str, dict[str, int]]:
        """What was spent, which is written."""
        self._ledger.write()
        return self._ledger.spent


class Post:
    """A worker's way to the keeper: what is asked in one turn of the loop goes together."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper
        self._waiting: list[tuple[tuple[Any, ...], asyncio.Future[Any] | None]] = []
        self._sent: set[asyncio.Task[None]] = set()

    async def ask(self, *asked: Any) -> Any:
        """Raises StageError where the keeper does, or is gone."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(asked, answered)
        answer = await answered
        if isinstance(answer, Refused):
            raise StageError(answer.cause)
        return answer

    def tell(self, *told: Any) -> None:
        """As ask, without waiting for the answer."""
        self._put(told, None)

    def _put(self, asked: tuple[Any, ...], answered: asyncio.Future[Any] | None) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append((asked, answered))

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._carry(waiting))
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)

    async def _carry(self, waiting: list[tuple[tuple[Any, ...], asyncio.Future[Any] | None]]) -> None:
        from ray.exceptions import RayActorError

        try:
            answers = await self._keeper.answer.remote([asked for asked, _ in waiting])
        except RayActorError as error:
            cause = f"the process that holds the ledger and the cache is gone ({error}); run the same command again"
            answers = [Refused(cause)] * len(waiting)
        for (_, answered), answer in zip(waiting, answers, strict=True):
            if answered is not None and not answered.done():
                answered.set_result(answer)


class SharedCache:
    """The keeper's cache, as a Caller takes it."""

    def __init__(self, post: Post) -> None:
        self._post = post

    async def found(self, key: str) -> str | None:
        reply: str | None = await self._post.ask("found", key)
        return reply

    async def put(self, key: str, reply: str) -> None:
        await self._post.ask("put", key, reply)


class SharedLedger(Ledger):
    """The keeper's ledger, as a Caller takes it."""

    def __init__(self, limits: LimitsSection, post: Post) -> None:
        super().__init__(limits)
        self._post = post

    async def reserve(self, model: str, prompt: int, completion: int) -> None:
        await self._post.ask("reserve", model, prompt, completion)

    def settle(self, model: str, prompt: int, completion: int, reply: Reply | None) -> None:
        self._post.tell("settle", model, prompt, completion, reply)


class Worker:
    """Works on blocks in a process of its own, with the models that it opened at its first."""

    def __init__(
        self, recipe: Recipe, spec: Spec, limits: LimitsSection, stage: str, checkpoint: Path | None, keeper: Any
    ) -> None:
        post = Post(keeper)
        self.opener = Opener(recipe, spec, SharedLedger(limits, post), SharedCache(post))
        self.stage, self.checkpoint = stage, checkpoint
        self._open, self._opening = AsyncExitStack(), asyncio.Lock()
        self._working: Working | None = None

    async def __call__(self, block: Any) -> Any:
        """In: a table with a record a line. Out: the finished ones alike; `stopped` tells why there are no more."""
        import pyarrow

        lines, causes = list[str | None](), list[str | None]()

        def told(record: Record) -> None:
            lines.append(dump(record))
            causes.append(None)

        records = map(kinds(self.stage)[0].model_validate_json, block["line"].to_pylist())
        try:
            working = await self._opened()
            await side_by_side(records, lambda record: working(record, told), self.opener.at_once)
        except (StageError, UserError) as error:
            lines.append(None)
            causes.append(str(error) if isinstance(error, StageError) else f"{socket.gethostname()}: {error}")
        types = {"line": pyarrow.string(), "stopped": pyarrow.string()}
        return pyarrow.table({"line": lines, "stopped": causes}, schema=pyarrow.schema(types))

    async def _opened(self) -> Working:
        async with self._opening:
            if self._working is None:
                self._working = await self._open.enter_async_context(self.opener.working(self.stage, self.checkpoint))
        return self._working


def over(section: RaySection, opener: Opener, stage: str, checkpoint: Path | None) -> Spread:
    """Work on a stage's records over the cluster. `opener`: its ledger counts what workers spend. `checkpoint` as
    `Opener.working` takes it."""

    def spread(records: Iterable[Record], told: Told) -> None:
        with cluster(section) as ray:
            cpus = int(ray.cluster_resources().get("CPU", 0))
            say(f"{stage}: over Ray, {section.workers} workers at most, {cpus} CPUs in the cluster")
            ledger = opener.ledger
            beside = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )
            started = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=beside)
            keeper = started.remote(ledger.limits, ledger.path, cache_dir() / FILE)
            given = (opener.recipe, opener.spec, ledger.limits, stage, checkpoint)
            try:
                for lines in rounds(records):
                    work_through(ray, section, lines, given, keeper, told)
            finally:
                with suppress(ray.exceptions.RayError):  # its file has what it wrote last
                    ledger.spent = ray.get(keeper.close.remote())

    return spread


def rounds(records: Iterable[Record]) -> Iterator[list[str]]:
    """The records as lines, as many at a time as a round holds."""
    lines, size = list[str](), 0
    for record in records:
        lines.append(dump(record))
        size += len(lines[-1])
        if size >= ROUND:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def work_through(
    ray: Any, section: RaySection, lines: list[str], given: tuple[Any, ...], keeper: Any, told: Told
) -> None:
    """One round. The first StageError, of a worker or of `told`, stops the calling everywhere, and is raised once what
    had begun is finished and told. `given`: what each worker takes beside the keeper."""
    kind = kinds(given[3])[1]
    blocks = -(-len(lines) // section.block)
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=section.workers, max_concurrent_calls_per_actor=BLOCKS_AT_ONCE
    )
    done = ray.data.from_items([{"line": line} for line in lines], override_num_blocks=blocks).map_batches(
        Worker, fn_constructor_args=(*given, keeper), compute=pool, batch_size=None, batch_format="pyarrow", num_cpus=1
    )
    stopped: StageError | None = None
    for block in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for line, cause in zip(block["line"].to_pylist(), block["stopped"].to_pylist(), strict=True):
            try:
                if cause is not None:
                    raise StageError(cause)
                told(kind.model_validate_json(line))
            except StageError as error:
                if stopped is None:
                    stopped = error
                    keeper.stop.remote(str(error))
    if stopped is not None:
        raise stopped
