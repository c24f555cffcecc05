"""A run folder on object storage: it is worked on in a folder here, and put there as it grows.

In: an address such as `s3://bucket/runs/mine`. Out: the folder here that mirrors it, with what stands there, and a Run
that puts there what its stages write. Nothing there is appended to or renamed: a stage has objects
`records/part-*.jsonl`, each put whole and never changed, its other outputs, and `manifest.json`, put last. While it
works its parts bear its key and the place of their first byte; at its end those of the finished records, in order, take
their place. One command at a time writes a stage: the later one takes it over, and the earlier stops at its next part.
"""

import hashlib
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delib import made_with
from delib.errors import StageError, UserError
from delib.models.weights import cache_dir
from delib.progress import say
from delib.records import Manifest, Record
from delib.run import MANIFEST, RECORDS, R, Run, StageFolder, sha256, write_whole

MARK, KEY, WRITER, SPENT = "remote", "key", "writer", "spent.json"
PART_BYTES = 16 * 2**20
"""Records that one object holds."""
PART_SECONDS = 60.0
"""Records that are finished are put there so often at least; what is younger is on this machine alone."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_BEGUN = re.compile(r"(?P<folder>(?:.+/)?)records/part-(?P<key>\w{12})-(?P<place>\d{15})-(?P<hash>\w{12})\.jsonl")


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
            raise StageError(
                f"{self.address}: {cause}; what was finished stands here, mend it and run the same command again"
            ) from error

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
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._reaching():
            self._files.get_file(f"{self._root}/{name}", str(file))

    def remove(self, names: list[str]) -> None:
        with self._reaching():
            for name in names:
                self._files.rm_file(f"{self._root}/{name}")


def _failures() -> tuple[type[BaseException], ...]:
    """What a storage's client raises: botocore's own errors are none of the system's."""
    foreign = sys.modules.get("botocore.exceptions")
    return (OSError, foreign.BotoCoreError) if foreign else (OSError,)


def mirror(address: str) -> Path:
    """The folder here that mirrors a run folder there, brought up to what stands there. Raises UserError for an address
    that can't be one, StageError where the storage fails."""
    store = Store(address)
    name = f"{Path(store.address).name}-{hashlib.sha256(store.address.encode()).hexdigest()[:8]}"
    folder = cache_dir() / "runs" / name
    pull(store, folder)
    write_whole(folder / MARK, store.address)
    say(f"{store.address}: worked on in {folder}")
    return folder


def opened(path: Path) -> Run:
    """The run in a folder; what a mirror's stages write is put where it mirrors."""
    mark = path / MARK
    return RemoteRun(path, Store(mark.read_text(encoding="utf-8"))) if mark.is_file() else Run(path)


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
        self._put = time.monotonic()
        self._folders: list[RemoteFolder] = []

    def sub(self, name: str) -> StageFolder:
        made = RemoteFolder(self.path / name, self._store, self._root, f"{self._name}/{name}", self._writer)
        self._folders.append(made)
        return made

    def begin(self, key: str) -> bool:
        other = super().begin(key)
        self._writer = uuid.uuid4().hex
        self._store.write(f"{self._name}/{WRITER}", self._writer.encode())
        if self._store.read(f"{self._name}/{MANIFEST}") is not None:
            self._store.remove([f"{self._name}/{MANIFEST}"])
        self._store.write(f"{self._name}/{KEY}", key.encode())
        self._put_files(self._root, "", (made_with.RECIPE, made_with.SPEC, SPENT))
        return other

    def append(self, record: Record) -> None:
        super().append(record)
        if self._end is None:
            self._end = self._standing()
        late = time.monotonic() - self._put > PART_SECONDS
        if late or self.records_path.stat().st_size - self._end > PART_BYTES:
            self.leave()

    def replace(self, records: Iterable[Record]) -> None:
        super().replace(records)
        self._end = None

    def rewrite(self, order: Iterable[str], kind: type[R], change: Callable[[R], R] | None = None) -> None:
        super().rewrite(order, kind, change)
        self._end = None

    def leave(self) -> None:
        for folder in self._folders:
            folder.leave()
        if not self._writer or not self.records_path.exists():
            return
        if self._end is None:
            self._end = self._standing()
        self._own()
        with self.records_path.open("rb") as handle:
            handle.seek(self._end)
            content = handle.read()
        content = content[: content.rfind(b"\n") + 1]
        if content:
            self._store.write(self._part(self._end, content), content)
            self._end += len(content)
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
        names = {f"{self._name}/{name}" for name in (KEY, WRITER, MANIFEST)}
        for output, made in manifest.outputs.items():
            names |= self._put_records(output, made) if output.endswith(RECORDS) else self._put_output(output)
        names |= self._put_files(self.path, f"{self._name}/", (made_with.RECIPE, made_with.SPEC))
        self._put_files(self._root, "", (made_with.RECIPE, made_with.SPEC, SPENT))
        self._store.write(f"{self._name}/{MANIFEST}", whole)
        self._store.remove([name for name in before if name not in names])

    def _key(self) -> str:
        """The stage's, which its folders share."""
        return (self._root / self._name.partition("/")[0] / KEY).read_text()[:12]

    def _part(self, place: int, content: bytes) -> str:
        return f"{self._name}/records/part-{self._key()}-{place:015d}-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"

    def _standing(self) -> int:
        """The end of the records here that stand there too. Parts that are not as these go, as after a change of their
        order: they are put anew."""
        begun = begun_parts(self._store.sizes()).get((f"{self._name}/", self._key()), [])
        end, same = 0, True
        with self.records_path.open("rb") as handle:
            for _, name, size in begun:
                content = handle.read(size)
                same = same and self._part(end, content) == name
                end += len(content)
        if not same:
            self._store.remove([name for _, name, _ in begun])
        return end if same else 0

    def _own(self) -> None:
        """Raises StageError where another command has begun the stage since."""
        other = self._store.read(f"{self._name.partition('/')[0]}/{WRITER}")
        if other is not None and other.decode() != self._writer:
            raise StageError(
                f"{self._store.address}/{self._name}: another command has taken over this stage; let one at a time "
                "work on it"
            )

    def _put_files(self, folder: Path, prefix: str, names: tuple[str, ...]) -> set[str]:
        there = {f"{prefix}{name}": folder / name for name in names if (folder / name).exists()}
        for name, file in there.items():
            self._store.put(name, file)
        return set(there)

    def _put_records(self, output: str, made: str) -> set[str]:
        """The finished records, in parts of whole lines whose names bear the hash of them all."""
        names, lines, size = set[str](), list[bytes](), 0

        def put() -> None:
            name = f"{self._name}/{output.removesuffix(RECORDS)}records/part-{made[:12]}-{len(names):05d}.jsonl"
            self._store.write(name, b"".join(lines))
            names.add(name)

        with (self.path / output).open("rb") as handle:
            for line in handle:
                lines.append(line)
                size += len(line)
                if size >= PART_BYTES:
                    put()
                    lines, size = [], 0
        if lines or not names:
            put()
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


def pull(store: Store, folder: Path) -> None:
    """Bring a mirror up to what stands there. What this machine alone has stays, and is put there by its stage."""
    sizes = store.sizes()
    for name in (made_with.RECIPE, made_with.SPEC):
        if name in sizes:
            store.get(name, folder / name)
    if SPENT in sizes and _calls(found := store.read(SPENT)) > _calls(_content(folder / SPENT)):
        write_whole(folder / SPENT, (found or b"").decode())
    for stage in sorted({name.partition("/")[0] for name in sizes if "/" in name}):
        if f"{stage}/{MANIFEST}" in sizes:
            _pull_finished(store, folder, stage, sizes)
        elif f"{stage}/{KEY}" in sizes:
            _pull_begun(store, folder, stage, sizes)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _calls(spent: bytes | None) -> int:
    return sum(row["calls"] for row in json.loads(spent).values()) if spent else 0


def _pull_finished(store: Store, folder: Path, stage: str, sizes: dict[str, int]) -> None:
    whole = store.read(f"{stage}/{MANIFEST}")
    if whole is None or whole == _content(folder / stage / MANIFEST):
        return
    manifest = Manifest.model_validate_json(whole)
    (folder / stage / MANIFEST).unlink(missing_ok=True)
    for name in (KEY, made_with.RECIPE, made_with.SPEC):
        if f"{stage}/{name}" in sizes:
            store.get(f"{stage}/{name}", folder / stage / name)
    for output, made in manifest.outputs.items():
        if output.endswith(RECORDS):
            start = f"{stage}/{output.removesuffix(RECORDS)}records/part-{made[:12]}-"
            _join(store, sorted(name for name in sizes if name.startswith(start)), folder / stage / output)
        else:
            for name in (n for n in sizes if n == f"{stage}/{output}" or n.startswith(f"{stage}/{output}/")):
                store.get(name, folder / name)
        if not (folder / stage / output).exists() or sha256(folder / stage / output) != made:
            raise StageError(f"{store.address}/{stage}: {output} is not what its manifest says; remove the stage there")
    write_whole(folder / stage / MANIFEST, whole.decode())


def _pull_begun(store: Store, folder: Path, stage: str, sizes: dict[str, int]) -> None:
    key = store.read(f"{stage}/{KEY}")
    same = key == _content(folder / stage / KEY)
    if key is None or (same and (folder / stage / MANIFEST).exists()):
        return
    for (place, part), parts in begun_parts(sizes).items():
        file = folder / place / RECORDS
        if not place.startswith(f"{stage}/") or not key.decode().startswith(part):
            continue
        if not same or not file.exists() or file.stat().st_size < sum(size for _, _, size in parts):
            _join(store, [name for _, name, _ in parts], file)
    (folder / stage / MANIFEST).unlink(missing_ok=True)
    if not same:
        write_whole(folder / stage / KEY, key.decode())


def _join(store: Store, names: list[str], file: Path) -> None:
    """Parts as one file, which is the old one or whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch: Any = file.with_name(file.name + ".part")
    with scratch.open("wb") as handle:
        for name in names:
            handle.write(store.read(name) or b"")
    scratch.replace(file)
