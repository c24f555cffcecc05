"""A run folder on object storage: it is worked on in a folder here, and put there as it grows.

In: an address such as `s3://bucket/runs/mine`. Out: the folder here that mirrors it, with what stands there, and a Run
that puts there what its stages write. Nothing there is appended to or renamed: a stage has objects
`records/part-*.jsonl`, each put whole and never changed, its other outputs, and `manifest.json`, put last. While it
works its parts bear its key and the place of their first byte; at its end those of the finished records, in order, take
their place. One command at a time writes a stage: the later one takes it over, with what was put, and the earlier stops
at its next part. Here a lock holds the mirror for one command.
"""

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from pydantic import ValidationError

from delib import made_with
from delib.errors import StageError, UserError
from delib.models.weights import cache_dir
from delib.progress import say
from delib.records import Manifest, Record
from delib.run import MANIFEST, RECORDS, R, Run, StageFolder, lock_of, set_aside, sha256, write_whole
from delib.storage import Store

MARK, KEY, WRITER, SPENT, LABELS = "remote", "key", "writer", "spent.json", "labels"
PART_BYTES = 16 * 2**20
"""Records that one object holds."""
PART_SECONDS = 60.0
"""Finished records are put there so often at least, as the next one is finished."""
_BEGUN = re.compile(r"(?P<folder>(?:.+/)?)records/part-(?P<key>\w{12})-(?P<place>\d{15})-(?P<hash>\w{12})\.jsonl")
_held: dict[Path, FileLock] = {}
"""The locks of mirrors that this process works in."""


def mirror(address: str) -> Path:
    """The folder here that mirrors a run folder there; nothing is fetched yet. Raises UserError for an address that
    can't be one."""
    store = Store(address)
    name = f"{Path(store.address).name}-{hashlib.sha256(store.address.encode()).hexdigest()[:8]}"
    folder = cache_dir() / "runs" / name
    write_whole(folder / MARK, store.address)
    return folder


def opened(path: Path, fetch: bool = True) -> Run:
    """The run in a folder, to work on. A mirror is brought up to what stands there (`fetch`; of several processes one
    does so), and what its stages write is put there. Raises UserError where another command works on it here."""
    mark = path / MARK
    if not mark.is_file():
        return Run(path)
    store = Store(mark.read_text(encoding="utf-8"))
    if fetch:
        if not _locked(path):
            raise UserError(f"{store.address}: another command works on it in {path}; wait for its end")
        say(f"{store.address}: worked on in {path}")
        pull(store, path)
    return RemoteRun(path, store)


def fetched(path: Path) -> None:
    """Bring a mirror up to what stands there, but for checkpoints, to be read. Where a command works on it here, it is
    left as it is."""
    if (path / MARK).is_file() and path.resolve() not in _held and _locked(path):
        try:
            pull(Store((path / MARK).read_text(encoding="utf-8")), path, checkpoints=False)
        finally:
            _held.pop(path.resolve()).release()


def _locked(path: Path) -> bool:
    """Whether this process holds the mirror, from now to its end; a lock goes with its process."""
    place = path.resolve()
    if place not in _held:
        lock = lock_of(place)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        _held[place] = lock
    return True


class RemoteRun(Run):
    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(path)
        self.store = store

    def stage(self, name: str) -> StageFolder:
        return RemoteFolder(self.path / name, self.store, self.path, name)


class RemoteFolder(StageFolder):
    """A stage's folder here and there. `root`: the run's folder here; `name`: the stage's in it."""

    def __init__(self, path: Path, store: Store, root: Path, name: str, writer: str = "") -> None:
        super().__init__(path)
        self._store, self._root, self._name, self._writer = store, root, name, writer
        self._end: int | None = None
        self._other: list[str] = []
        self._put = time.monotonic()
        self._folders: dict[str, RemoteFolder] = {}

    def sub(self, name: str) -> "RemoteFolder":
        if name not in self._folders:
            place = f"{self._name}/{name}"
            self._folders[name] = RemoteFolder(self.path / name, self._store, self._root, place, self._writer)
        return self._folders[name]

    def begin(self, key: str) -> bool:
        """What another command has put of the same work since this one looked counts too."""
        self._writer = uuid.uuid4().hex
        self._folders.clear()
        self._store.write(f"{self._name}/{WRITER}", self._writer.encode())
        if self._store.read(f"{self._name}/{KEY}") == key.encode():
            _pull_begun(self._store, self._root, self._name, self._store.sizes())
        other = super().begin(key)
        self._store.write(f"{self._name}/{KEY}", key.encode())
        self._put_files(self._root, "", (made_with.RECIPE, made_with.SPEC, SPENT))
        for file in self.path.glob(f"*/{RECORDS}"):
            self.sub(file.parent.name)
        self.leave()  # as when finished records are to be graded anew
        if self._store.read(f"{self._name}/{MANIFEST}") is not None:
            self._store.remove([f"{self._name}/{MANIFEST}"])
        return other

    def append(self, record: Record) -> None:
        super().append(record)
        if self._end is None:
            self._look()
        assert self._end is not None
        late = time.monotonic() - self._put > PART_SECONDS
        if late or self._other or self.records_path.stat().st_size - self._end > PART_BYTES:
            self.leave()

    def replace(self, records: Iterable[Record]) -> None:
        super().replace(records)
        self._end = None

    def rewrite(self, order: Iterable[str], kind: type[R], change: Callable[[R], R] | None = None) -> None:
        super().rewrite(order, kind, change)
        self._end = None

    def leave(self) -> None:
        for folder in self._folders.values():
            folder.leave()
        if not self._writer or not self.records_path.exists():
            return
        if self._end is None:
            self._look()
        assert self._end is not None
        self._own()
        with self.records_path.open("rb") as handle:
            handle.seek(self._end)
            while lines := handle.readlines(PART_BYTES):
                content = b"".join(line for line in lines if line.endswith(b"\n"))
                if content:
                    self._store.write(self._part(self._end, content), content)
                    self._end += len(content)
        self._store.remove(self._other)
        self._other = []
        self._put_files(self._root, "", (SPENT,))
        self._put = time.monotonic()

    def finish(self, manifest: Manifest, outputs: list[str]) -> Manifest:
        self._own()
        final = super().finish(manifest, outputs)
        self.publish()
        return final

    def publish(self) -> None:
        manifest = self.manifest()
        whole = (self.path / MANIFEST).read_bytes()
        if manifest is None or self._store.read(f"{self._name}/{MANIFEST}") == whole:
            return
        before = [name for name in self._store.sizes() if name.startswith(f"{self._name}/")]
        names = {f"{self._name}/{name}" for name in (WRITER, MANIFEST)}
        for output, made in manifest.outputs.items():
            names |= self._put_records(output, made) if output.endswith(RECORDS) else self._put_output(output)
        names |= self._put_files(self.path, f"{self._name}/", (KEY, made_with.RECIPE, made_with.SPEC))
        labels = [f"{LABELS}/{file.name}" for file in sorted((self._root / LABELS).glob("*"))]
        self._put_files(self._root, "", (made_with.RECIPE, made_with.SPEC, SPENT, *labels))
        self._store.write(f"{self._name}/{MANIFEST}", whole)
        self._store.remove([name for name in before if name not in names])

    def _key(self) -> str:
        """The stage's, which its folders share."""
        return (self._root / self._name.partition("/")[0] / KEY).read_text()[:12]

    def _part(self, place: int, content: bytes) -> str:
        return f"{self._name}/records/part-{self._key()}-{place:015d}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"

    def _look(self) -> None:
        """Find the end of the records here that stand there too. Where parts there are none of these, as after a change
        of order, all is put anew, and then those go."""
        begun = begun_parts(self._store.sizes()).get((f"{self._name}/", self._key()), [])
        end = 0
        with self.records_path.open("rb") as handle:
            same = all(self._part(place, handle.read(size)) == name for place, name, size in begun)
            end = handle.tell()
        self._end, self._other = (end, []) if same else (0, [name for _, name, _ in begun])
        self._put = time.monotonic()

    def _own(self) -> None:
        """Raises StageError where another command has begun the stage since."""
        other = self._store.read(f"{self._name.partition('/')[0]}/{WRITER}")
        if other is not None and other.decode() != self._writer:
            raise StageError(
                f"{self._store.address}/{self._name}: another command has begun this stage since; this one stops, and "
                "that one goes on with what was put"
            )

    def _put_files(self, folder: Path, prefix: str, names: tuple[str, ...]) -> set[str]:
        there = {f"{prefix}{name}": folder / name for name in names if (folder / name).exists()}
        for name, file in there.items():
            self._store.put(name, file)
        return set(there)

    def _put_records(self, output: str, made: str) -> set[str]:
        """The finished records, in parts of whole lines whose names bear the hash of them all."""
        start = f"{self._name}/{output.removesuffix(RECORDS)}records/part-{made[:12]}"
        names = set[str]()
        with (self.path / output).open("rb") as handle:
            while (lines := handle.readlines(PART_BYTES)) or not names:
                name = f"{start}-{len(names):05d}.jsonl"
                self._store.write(name, b"".join(lines))
                names.add(name)
        return names

    def _put_output(self, output: str) -> set[str]:
        place = self.path / output
        files = [p for p in sorted(place.rglob("*")) if p.is_file()] if place.is_dir() else [place]
        for file in files:
            self._store.put(f"{self._name}/{file.relative_to(self.path)}", file)
        return {f"{self._name}/{file.relative_to(self.path)}" for file in files}


def begun_parts(sizes: dict[str, int]) -> dict[tuple[str, str], list[tuple[int, str, int]]]:
    """The parts of unfinished work, by folder and key: place, name and size of each, in order."""
    found: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
    for name, size in sizes.items():
        if match := _BEGUN.fullmatch(name):
            part = (int(match["place"]), name, size)
            found.setdefault((match["folder"], match["key"]), []).append(part)
    return {where: sorted(parts) for where, parts in found.items()}


def pull(store: Store, folder: Path, checkpoints: bool = True) -> None:
    """Bring a mirror up to what stands there. What this machine alone has of the same work stays, and is put there by
    its stage. `checkpoints`: whether outputs that are folders are fetched too."""
    sizes = store.sizes()
    for name in (made_with.RECIPE, made_with.SPEC):
        if name in sizes:
            store.get(name, folder / name)
    for name in sizes:
        if name.startswith(f"{LABELS}/") and not (folder / name).exists():
            store.get(name, folder / name)
    if SPENT in sizes and _calls(found := store.read(SPENT)) > _calls(_content(folder / SPENT)):
        write_whole(folder / SPENT, (found or b"").decode())
    for stage in sorted({name.partition("/")[0] for name in sizes if "/" in name}):
        if f"{stage}/{MANIFEST}" in sizes:
            _pull_finished(store, folder, stage, sizes, checkpoints)
        elif f"{stage}/{KEY}" in sizes:
            _pull_begun(store, folder, stage, sizes)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _calls(spent: bytes | None) -> int:
    return sum(row["calls"] for row in json.loads(spent).values()) if spent else 0


def _pull_finished(store: Store, folder: Path, stage: str, sizes: dict[str, int], checkpoints: bool) -> None:
    """Fetch a finished stage beside the one here, and then put it in its place."""
    whole, place = store.read(f"{stage}/{MANIFEST}") or b"", folder / stage
    try:
        manifest = Manifest.model_validate_json(whole)
    except ValidationError:
        raise UserError(
            f"{store.address}/{stage}/{MANIFEST}: no manifest of this version of delib; remove the stage there"
        ) from None
    if astray := [output for output in manifest.outputs if ".." in output.split("/") or output.startswith("/")]:
        raise UserError(f"{store.address}/{stage}/{MANIFEST}: {astray[0]!r} can't be a file of a run")
    names = {name.removeprefix(f"{stage}/") for name in sizes if name.startswith(f"{stage}/")}
    wanted = {
        output: made
        for output, made in manifest.outputs.items()
        if checkpoints or output.endswith(RECORDS) or output in names
    }
    if whole == _content(place / MANIFEST) and all((place / output).exists() for output in wanted):
        return
    scratch = place.with_name(f"{stage}.fetched")
    shutil.rmtree(scratch, ignore_errors=True)
    for name in names & {KEY, made_with.RECIPE, made_with.SPEC}:
        store.get(f"{stage}/{name}", scratch / name)
    for output, made in wanted.items():
        if output.endswith(RECORDS):
            start = f"{output.removesuffix(RECORDS)}records/part-{made[:12]}-"
            (scratch / output).parent.mkdir(parents=True, exist_ok=True)
            with (scratch / output).open("wb") as handle:
                for name in sorted(n for n in names if n.startswith(start)):
                    handle.write(store.read(f"{stage}/{name}") or b"")
        else:
            for name in (n for n in names if n == output or n.startswith(f"{output}/")):
                store.get(f"{stage}/{name}", scratch / name)
        if not (scratch / output).exists() or sha256(scratch / output) != made:
            raise StageError(f"{store.address}/{stage}: {output} is not what its manifest says; remove the stage there")
    write_whole(scratch / MANIFEST, whole.decode())
    if place.exists():
        set_aside(place)
    scratch.rename(place)


def _pull_begun(store: Store, folder: Path, stage: str, sizes: dict[str, int]) -> None:
    """Take what was put of a stage that is not finished. Of work under the same key that is here as well both stay."""
    key, place = store.read(f"{stage}/{KEY}") or b"", folder / stage
    if key == _content(place / KEY):
        if (place / MANIFEST).exists():
            return
    elif place.exists():
        set_aside(place)
    for (inside, part), parts in begun_parts(sizes).items():
        if inside.startswith(f"{stage}/") and key.decode().startswith(part):
            _join(store, [name for _, name, _ in parts], folder / inside / RECORDS)
    write_whole(place / KEY, key.decode())


def _join(store: Store, parts: list[str], file: Path) -> None:
    """Make a file hold the records of both, those there first and as they are; a line of the file that they have is not
    repeated, and a torn last one is none. One part is held at a time, and a digest of each line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(file.name + ".part")
    seen = set[bytes]()
    with scratch.open("wb") as target:
        for name in parts:
            content = store.read(name) or b""
            target.write(content)
            seen.update(map(_digest, content.splitlines(keepends=True)))
        if file.exists():
            with file.open("rb") as here:
                _add_missing(here, target, seen)
    scratch.replace(file)


def _add_missing(source: BinaryIO, target: BinaryIO, seen: set[bytes]) -> None:
    for line in source:
        if line.endswith(b"\n") and _digest(line) not in seen:
            target.write(line)


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()
