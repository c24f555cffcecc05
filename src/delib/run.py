"""The run folder: one folder a stage with `records.jsonl` or a checkpoint, and `manifest.json`, written last.

A stage is done when its manifest stands, was written for the same key (recipe section, seed, inputs' hashes) and its
outputs still hash the same. Records are appended a whole line at a time; a torn last line is healed on resume.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from delib.errors import StageError, UserError
from delib.records import Manifest, Record

R = TypeVar("R", bound=Record)
RECORDS = "records.jsonl"
MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """A file's hash; of a folder, the hash over its files' names and hashes."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            total.update(f"{file.relative_to(path)}:{sha256(file)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def key_of(section: Any, seed: int, inputs: dict[str, str]) -> str:
    """What a stage's output depends on, as one hash."""
    text = json.dumps({"section": section, "seed": seed, "inputs": inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, never half. A full disk is a StageError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")  # several processes may write it at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> StageError | OSError:
    """A full or read-only disk as a StageError that names the file; any other OSError as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return StageError(f"{path}: {error.strerror}; what was finished stands, mend it and run the same command again")
    return error


_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|inline_container\.cc.*(?:unexpected pos|failed writing)"
)


def tensor_error(path: Path, error: Exception) -> Exception:
    """As disk_error, for the writers of tensors, which tell a full disk in words of their own: safetensors passes on
    the system's, torch's archive writer tells that fewer bytes were written. Any other error as it is."""
    if _DISK_FULL.search(str(error)):
        cause = str(error).splitlines()[0][:200]
        return StageError(
            f"{path}: the disk is full ({cause}); what was finished stands, make room and run the same command again"
        )
    return error


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """All records of a file. Raises UserError listing every bad line."""
    from delib.spec import read_text

    records: list[R] = []
    problems: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            for item in error.errors():
                place = ".".join(str(part) for part in item["loc"])
                problems.append(f"{path}:{number}: {place + ': ' if place else ''}{item['msg']}")
    if problems:
        raise UserError(problems)
    return records


def dump(record: Record) -> str:
    return record.model_dump_json(exclude_none=False)


def lock_of(folder: Path) -> FileLock:
    """The lock of a run folder: one in a process, which may take it several times. It goes with its process."""
    place = folder.resolve() / "lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(place, thread_local=False, is_singleton=True, fallback_to_soft=False)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run folder for this process alone: two that write one stage would take away each other's checkpoints. Where the
    file system knows no locks it goes without. Raises UserError where another one has it."""
    lock = None
    try:
        lock = lock_of(folder)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{folder}: another command works on it, or what a killed one had started does; wait for its end, or end it"
        ) from None
    except (NotImplementedError, OSError):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def set_aside(folder: Path) -> bool:
    """Rename a stage's folder to NAME.stale, in place of an earlier one; one that was only begun, without a record or a
    checkpoint, just goes. Returns whether it was kept."""
    if not any(p.is_dir() or p.name in (RECORDS, MANIFEST) for p in folder.iterdir()):
        shutil.rmtree(folder)
        return False
    stale = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    folder.rename(stale)
    return True


class StageFolder:
    """One stage's folder: appends, resumes, and closes with a manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._healed = False

    @property
    def records_path(self) -> Path:
        return self.path / RECORDS

    def manifest(self) -> Manifest | None:
        file = self.path / MANIFEST
        if not file.exists():
            return None
        try:
            return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError:
            return None

    def done(self, key: str) -> bool:
        """Whether the manifest stands for this key and every output it names is there, unchanged."""
        manifest = self.manifest()
        if manifest is None or manifest.recipe != key:
            return False
        return all((self.path / n).exists() and sha256(self.path / n) == h for n, h in manifest.outputs.items())

    def begin(self, key: str) -> bool:
        """Open for writing under `key`. Work of another key is set aside; returns whether there was any."""
        self.path.mkdir(parents=True, exist_ok=True)
        mark = self.path / "key"
        other = mark.exists() and mark.read_text() != key and set_aside(self.path)
        self.path.mkdir(exist_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        write_whole(mark, key)
        return other

    def records(self, kind: type[R]) -> list[R]:
        """The finished records, all of them held."""
        return list(self.stream(kind))

    def stream(self, kind: type[R]) -> Iterator[R]:
        """The finished records one by one; a torn last line (the process was killed in it) is none."""
        for _, line in self._lines():
            yield kind.model_validate_json(line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Where each whole line begins, and the line. What is appended meanwhile may or may not be among them."""
        if not self.records_path.exists():
            return
        place = 0
        with self.records_path.open("rb") as handle:
            for line in handle:
                if line.endswith(b"\n") and line != b"\n":
                    yield place, line
                place += len(line)

    def _heal(self) -> None:
        """Cut off a last line without its newline, before the first is added to it."""
        self._healed = True
        if not self.records_path.exists():
            return
        with self.records_path.open("rb") as handle:
            end = handle.seek(0, os.SEEK_END)
            place = end
            while place > 0:
                step = min(65536, place)
                handle.seek(place - step)
                found = handle.read(step).rfind(b"\n")
                if found >= 0:
                    place += found + 1 - step
                    break
                place -= step
        if place != end:
            os.truncate(self.records_path, place)

    def append(self, record: Record) -> None:
        if not self._healed:
            self._heal()
        try:
            with self.records_path.open("ab") as handle:
                handle.write(dump(record).encode() + b"\n")
        except OSError as error:
            self._healed = False  # what follows must not be glued to half a line
            raise disk_error(self.records_path, error) from error

    def replace(self, records: Iterable[Record]) -> None:
        """Write all records anew, whole, in the given order."""
        write_whole(self.records_path, "".join(dump(r) + "\n" for r in records))

    def rewrite(self, order: Iterable[str], kind: type[R], change: Callable[[R], R] | None = None) -> None:
        """Write the records anew, whole, in the order of their keys (`kind` has a `key`), each changed where `change`
        is given, else as its line is; of two with one key the later counts, and a key without a record is left out. One
        record is held at a time."""
        if not self.records_path.exists():
            self.replace([])
        places = {str(kind.model_validate_json(line).key): place for place, line in self._lines()}  # type: ignore[attr-defined]
        scratch = self.path / (RECORDS + ".part")
        try:
            with self.records_path.open("rb") as source, scratch.open("wb") as target:
                for key in order:
                    if key in places:
                        source.seek(places[key])
                        line = source.readline()
                        if change is not None:
                            line = dump(change(kind.model_validate_json(line))).encode() + b"\n"
                        target.write(line)
            scratch.replace(self.records_path)
        except OSError as error:
            raise disk_error(self.records_path, error) from error

    def sub(self, name: str) -> "StageFolder":
        """A folder of records in it."""
        return StageFolder(self.path / name)

    def leave(self) -> None:
        """Where a stage stops before its end. Here as in `publish` there is nothing to do; in the mirror of a run on
        object storage (`remote.py`) there is."""

    def publish(self) -> None:
        """Where a stage is found finished."""

    def finish(self, manifest: Manifest, outputs: list[str]) -> Manifest:
        hashes = {name: sha256(self.path / name) for name in outputs}
        final = manifest.model_copy(update={"outputs": hashes})
        write_whole(self.path / MANIFEST, final.model_dump_json(indent=1) + "\n")
        return final


class Run:
    """A run folder: `recipe.yaml` (resolved), then one folder a stage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    def finished(self, name: str, kind: type[R]) -> list[R]:
        """The records of a stage that is done. Raises UserError when it is not."""
        return self.folder_of(name).records(kind)

    def folder_of(self, name: str) -> StageFolder:
        """The folder of a stage that is done. Raises UserError when it is not."""
        folder = self.stage(name)
        if folder.manifest() is None:
            raise UserError(f"{self.path}: stage {name} is not finished; run 'delib {name} --run {self.path}' first")
        return folder

    def manifests(self, order: Iterable[str]) -> Iterator[Manifest]:
        for name in order:
            manifest = self.stage(name).manifest()
            if manifest is not None:
                yield manifest


def free_megabytes(path: Path) -> int:
    """Free space where `path` is or will be, in MiB."""
    place = path
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_bavail * stat.f_frsize // 2**20
