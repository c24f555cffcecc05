"""The one cache of finished calls: `calls.sqlite` in delib's cache folder, shared by all stages and all runs.

A call's key is a hash of everything its reply depends on, so that a reply is found again exactly by the same call, and
no key or secret is in the file. Several processes may use it at once.
"""

import asyncio
import sqlite3
from contextlib import suppress
from pathlib import Path

from delib.errors import StageError
from delib.models.weights import cache_dir

FILE = "calls.sqlite"
WAIT_SECONDS = 60
"""How long a write waits for another process's."""


class Cache:
    """Replies by key, on disk. Safe against kill -9: a reply is there whole or not at all.

    Raises StageError when the file is broken or the disk is full or read-only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_dir() / FILE
        self._new: list[tuple[str, str]] = []
        self._written: asyncio.Future[None] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            self._rows.execute("PRAGMA journal_mode=WAL")
            # With a write-ahead log this can lose the last replies to a power cut, never to a killed process.
            self._rows.execute("PRAGMA synchronous=NORMAL")
            self._rows.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
        except (sqlite3.Error, OSError) as error:
            raise self._told(error) from error

    def get(self, key: str) -> str | None:
        try:
            found = self._rows.execute("SELECT reply FROM calls WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._told(error) from error
        return None if found is None else str(found[0])

    async def found(self, key: str) -> str | None:
        """As `get`, for a Caller, which need not know where replies are kept."""
        return self.get(key)

    async def put(self, key: str, reply: str) -> None:
        """Returns once it is written. Replies that came in together are written together, in one transaction."""
        loop = asyncio.get_running_loop()
        if not self._new or self._written is None or self._written.get_loop() is not loop:
            self._written = loop.create_future()
            loop.call_soon(self._write, self._written)
        self._new.append((key, reply))
        await asyncio.shield(self._written)

    def _write(self, written: asyncio.Future[None]) -> None:
        new, self._new = self._new, []
        try:
            self._rows.execute("BEGIN IMMEDIATE")
            self._rows.executemany("INSERT OR REPLACE INTO calls VALUES (?, ?)", new)
            self._rows.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._rows.execute("ROLLBACK")
            written.set_exception(self._told(error))
        else:
            written.set_result(None)

    def _told(self, error: Exception) -> StageError:
        return StageError(
            f"{self.path}: the cache of finished calls can't be used ({error}); make room, or delete the file if it is "
            "broken (its calls are then made again), and run the same command again"
        )
