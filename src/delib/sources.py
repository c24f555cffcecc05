"""Where prompts come from: JSON lines, a CSV or parquet file, or a data set of the hub (`hub:OWNER/NAME:SPLIT`).

In: a name. Out: rows in delib's own columns, each with its place: `file:line` of a text file, else `name:row`, rows
counted from 0. JSON lines are delib's own layout and are passed on as they are. The others may be sets that somebody
else made: whole conversations, whose closing assistant turns are taken off, or one column of text; columns that delib
has no use for are left aside. Data sets are read by `datasets`, which runs no code of theirs.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from delib.errors import UserError
from delib.run import sha256
from delib.spec import read_text

HUB = "hub:"
CONVERSATIONS = ("messages", "conversations", "conversation")
TEXTS = ("prompt", "question", "instruction", "goal", "text")
"""Columns that hold the prompt where there is no conversation; the first that is there."""
OWN = ("id", "category", "clause", "behaviour", "source", "expected", "checks", "group")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_LIST, _ARTIFACTS = re.compile(r"\s*\[\s*"), re.compile(r'"jailbreaks"\s*:\s*\[\s*')
_BETWEEN = re.compile(r"[\s,]*")
"""Where a list of rows begins in a JSON text, and what stands between two of them."""
LONGEST_CELL = 2**31 - 1
"""Characters; Python's own limit for a CSV cell, 131,072, is less than a long conversation."""


class Row(NamedTuple):
    """One row in delib's columns, or the reason why it is none."""

    place: str
    data: dict[str, Any]
    problem: str | None = None


def is_hub(name: Path | str) -> bool:
    return str(name).startswith(HUB)


def foreign(name: Path | str) -> bool:
    """Whether a set may be somebody else's, in a layout of its own: all but JSON lines."""
    return is_hub(name) or Path(name).suffix.lower() in (".csv", ".parquet")


def identity(name: Path | str) -> str:
    """What a set's content depends on: a file's hash; of a data set its name with the fingerprint that `datasets`
    gives it, in which the resolved revision is. Raises UserError when it is not there."""
    if is_hub(name):
        return f"{name}@{_data_set(str(name))._fingerprint}"
    try:
        return sha256(Path(name))
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; check the path") from None


def read(name: Path | str, text: str | None = None) -> Iterator[Row]:
    """The rows of a set. `text`: its column of prompts, where it is not one that is known by its name.

    Raises UserError when the set is not there or can not be read, or has no column of prompts.
    """
    if is_hub(name):
        return _hub(str(name), text)
    kinds = {".csv": _csv, ".parquet": _parquet}
    kind = kinds.get(Path(name).suffix.lower())
    return kind(Path(name), text) if kind else _jsonl(Path(name))


def table(name: Path | str) -> Iterator[Row]:
    """The rows of a set with all its columns under their own names: for layouts that only their reader knows. The cells
    of CSV files are texts, and empty ones are left out.

    Raises UserError when the set is not there or can not be read.
    """
    path, kind = Path(name), Path(name).suffix.lower()
    if is_hub(name):
        yield from (Row(f"{name}:{n}", dict(cells)) for n, cells in enumerate(_data_set(str(name))))
    elif kind == ".csv":
        lines = _csv_cells(path)
        _, header = next(lines)
        yield from (_under(header, place, cells) for place, cells in lines)
    elif kind == ".parquet":
        with _parquet_file(path) as file:
            yield from (Row(place, cells) for place, cells in _batches(path, file, None))
    elif kind == ".json":
        yield from _json_list(path)
    else:
        yield from _jsonl(path)


def _json_list(path: Path) -> Iterator[Row]:
    """Rows of a JSON file: a list of objects, or one under the key of JailbreakBench's artifacts."""
    text = read_text(path)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend it") from None
    if (begin := _LIST.match(text) or _ARTIFACTS.search(text)) is None:
        raise UserError(f"{path}: not a list of JSON objects; write one, or JSON lines")
    decode, line, counted, at = json.JSONDecoder().raw_decode, 1, 0, begin.end()
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        row, end = decode(text, at)
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing too
        yield Row(f"{path}:{line}", row) if isinstance(row, dict) else Row(f"{path}:{line}", {}, "not a JSON object")


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield Row(place, {}, f"not a JSON object ({error})")
            continue
        if not isinstance(row, dict):
            yield Row(place, {}, "not a JSON object (each line must be one)")
            continue
        if isinstance(row.get("expected"), str):
            row["expected"] = [row["expected"]]
        yield Row(place, row)


def _csv(path: Path, text: str | None) -> Iterator[Row]:
    lines = _csv_cells(path)
    _, header = next(lines)
    layout = _Layout(path, header, text)
    for place, cells in lines:
        found = _under(header, place, cells)
        yield layout.row(place, found.data, decoded=False) if found.problem is None else found


def _csv_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The header of a CSV file and then its rows, each with its place."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), strict=True)
    ended = 0
    try:
        for cells in reader:
            place, ended = f"{path}:{ended + 1}", reader.line_num
            if cells:
                yield place, cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}); mend it") from None


def _under(header: list[str], place: str, cells: list[str]) -> Row:
    """The cells that hold something, by column."""
    if len(cells) > len(header):
        problem = f"{len(cells)} cells under {len(header)} columns; quote a cell that holds a comma"
        return Row(place, {}, problem)
    return Row(place, {c: v for c, v in zip(header, cells, strict=False) if v})


def _parquet(path: Path, text: str | None) -> Iterator[Row]:
    with _parquet_file(path) as file:
        layout = _Layout(path, file.schema_arrow.names, text)
        for place, cells in _batches(path, file, layout.wanted):
            yield layout.row(place, cells)


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no readable parquet file ({_first_line(error)}); write it anew") from None


def _batches(path: Path, file: Any, columns: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    cells = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
    return ((f"{path}:{number}", row) for number, row in enumerate(cells))


def _hub(name: str, text: str | None) -> Iterator[Row]:
    data = _data_set(name)
    layout = _Layout(name, data.column_names, text)
    for number, cells in enumerate(data.select_columns(layout.wanted)):
        yield layout.row(f"{name}:{number}", cells)


@lru_cache(maxsize=4)
def _data_set(name: str) -> Any:
    """A data set of the hub, once a process: its rows and its fingerprint are then those of one revision."""
    import datasets
    import httpx2
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, split = name.removeprefix(HUB).partition(":")
    parts = repository.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{name}: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIGURATION:SPLIT")
    try:
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    # ValueError: no such configuration or split. RuntimeError: a set that is a script, which nobody runs any more.
    except (DatasetsError, HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: {_first_line(error)}; check owner, name, configuration and split, that you may read it "
            "('hf auth login'), and the network"
        ) from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Layout:
    """Which columns of a foreign set are of use. Case does not matter in their names."""

    def __init__(self, name: Path | str, columns: Iterable[str], text: str | None) -> None:
        given = list(columns)
        self.known = {c.strip().lower(): c for c in reversed(given)}
        self.source = str(name) if is_hub(name) else Path(name).name
        named = self.known.get(text.strip().lower()) if text else None
        talks = [self.known[c] for c in CONVERSATIONS if c in self.known]
        texts = [self.known[c] for c in TEXTS if c in self.known and text is None]
        has = f"it has {', '.join(given)}"
        if text and named is None and not talks:
            raise UserError(f"{name}: no column {text!r}, which prompts.text names; {has}")
        self.talk = None if named else next(iter(talks), None)
        self.text = named or next(iter(texts), None)
        if self.talk is None and self.text is None:
            raise UserError(
                f"{name}: no column of prompts; {has}. Name the one with prompts.text, or call it messages (of role "
                f"and content) or {', '.join(TEXTS[:-1])} or {TEXTS[-1]}"
            )
        column = self.talk or self.text
        assert column is not None
        self.column = column
        self.wanted = list(dict.fromkeys([column, *(self.known[c] for c in OWN if c in self.known)]))

    def row(self, place: str, cells: dict[str, Any], decoded: bool = True) -> Row:
        """One row. `decoded` false: cells are texts, and those that hold more than text are JSON."""
        own = {c: cells.get(self.known[c]) for c in OWN if c in self.known and self.known[c] != self.column}
        data: dict[str, Any] = {c: str(v) for c, v in own.items() if v is not None and v != ""}
        data.setdefault("source", self.source)
        try:
            if "expected" in data:
                data["expected"] = _expected(own["expected"], decoded)
            if "checks" in data:
                data["checks"] = _checks(own["checks"])
            value = cells.get(self.column)
            data["messages"] = conversation(value) if self.talk else _opening(_one_turn(value))
        except ValueError as error:
            return Row(place, {}, str(error))
        return Row(place, data)


def _expected(value: Any, decoded: bool) -> list[str]:
    if not decoded and value.lstrip().startswith(("[", '"')):
        value = _json("expected", value)
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _checks(value: Any) -> Any:
    """Checks: JSON in a text, or a table's struct, which has an empty place for each that is not asked."""
    if isinstance(value, str):
        return _json("checks", value)
    return ({k: v for k, v in value.items() if v is not None} or None) if isinstance(value, dict) else value


def _json(what: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: not JSON ({error})") from None


def conversation(value: Any) -> list[dict[str, str]]:
    """A foreign set's conversation up to its last answer. Raises ValueError when it is none."""
    return _opening(_turns(value))


def _one_turn(value: Any) -> list[dict[str, str]]:
    return [] if value is None else [{"role": "user", "content": str(value)}]


def _turns(value: Any) -> list[dict[str, str]]:
    """A conversation of `role` and `content`, or of `from` and `value`."""
    if isinstance(value, str):
        value = _json("messages", value)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("messages: not a list of turns; name a column of text with prompts.text")
    found = []
    for turn in value:
        role = str(turn.get("role") or turn.get("from"))
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if role.lower() not in ROLES:
            raise ValueError(f"messages: role {role!r} is none of {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise ValueError("messages: a turn's content is no text")
        found.append({"role": ROLES[role.lower()], "content": content or ""})
    return found


def _opening(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation up to its last answer: foreign sets hold whole ones, and a prompt waits for an answer."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return turns
