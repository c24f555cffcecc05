"""What is opened once and used by many: a model or judge that stays open until the event loop ends.

inspect_ai has no end of a task to close things at. A task of our own therefore holds the context open, and is cancelled
with the loop; each loop opens anew, since sessions belong to theirs.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """`opened`: makes the context manager. Raises from `get` what opening raises, and then opens again next time."""

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._opened = opened
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holder: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[T] | None = None

    async def get(self) -> T:
        loop = asyncio.get_running_loop()
        if self._holder is None or self._ready is None or self._loop is not loop or self._holder.done():
            self._loop, self._ready = loop, loop.create_future()
            self._holder = loop.create_task(self._hold(self._ready))
        waited: set[asyncio.Future[Any]] = {self._holder, self._ready}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            self._holder.result()
        return self._ready.result()

    async def _hold(self, ready: asyncio.Future[T]) -> None:
        async with self._opened() as value:
            ready.set_result(value)
            await asyncio.Event().wait()

    async def close(self) -> None:
        """Close it now, in its own loop; elsewhere it went with that loop."""
        if self._holder is not None and self._loop is asyncio.get_running_loop() and not self._holder.done():
            self._holder.cancel()
            await asyncio.wait({self._holder})
