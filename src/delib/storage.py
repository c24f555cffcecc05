"""Objects below an address of any storage that fsspec knows (`s3://…`), by their names.

In: an address. Out: their sizes and contents. What the storage's client raises becomes a StageError, and an address
that can't be one, or has no bucket, a UserError.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from delib.errors import StageError, UserError


class Store:
    """The objects below an address, by their names. Raises StageError where the storage fails."""

    def __init__(self, address: str) -> None:
        import fsspec

        self.address = address.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"{address}: {error}") from error
        self._root = root.rstrip("/")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except _failures() as error:
            cause = f"{type(error).__name__}: {error}".strip()
            raise StageError(f"{self.address}: {cause}; mend it and run the same command again") from error

    def sizes(self) -> dict[str, int]:
        """The size of each object, in bytes."""
        self._files.invalidate_cache()
        bucket = self._root.partition("/")[0]
        with self._reaching():
            try:
                if bucket:
                    self._files.info(bucket)
            except (FileNotFoundError, PermissionError) as error:
                why = f"no such bucket, or no right to see it ({error}); make it, or name another"
                raise UserError(f"{self.address}: {why}") from error
            found = self._files.find(self._root, detail=True)
        made = {name.removeprefix(f"{self._root}/"): int(info["size"]) for name, info in found.items()}
        if astray := [name for name in made if ".." in name.split("/") or name.startswith("/")]:
            raise UserError(f"{self.address}: {astray[0]!r} can't be a file of a run; remove it there")
        return made

    def read(self, name: str) -> bytes | None:
        """None where there is no such object."""
        with self._reaching():
            try:
                return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._reaching():
            self._files.pipe_file(f"{self._root}/{name}", content)

    def put(self, name: str, file: Path) -> None:
        with self._reaching():
            self._files.put_file(str(file), f"{self._root}/{name}")

    def get(self, name: str, file: Path) -> None:
        """Fetch an object to a file, which is the old one or whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(file.name + ".part")
        with self._reaching():
            self._files.get_file(f"{self._root}/{name}", str(scratch))
            scratch.replace(file)

    def remove(self, names: list[str]) -> None:
        with self._reaching():
            for name in names:
                self._files.rm_file(f"{self._root}/{name}")


def _failures() -> tuple[type[BaseException], ...]:
    """What a storage's client raises: botocore's own errors are none of the system's."""
    foreign = sys.modules.get("botocore.exceptions")
    return (OSError, foreign.BotoCoreError) if foreign else (OSError,)
