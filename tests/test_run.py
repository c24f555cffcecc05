import errno
from pathlib import Path

import pytest

from delib import run
from delib.errors import StageError
from delib.records import Example, Manifest, Message


def example(number: int) -> Example:
    return Example(prompt_id=str(number), messages=[Message(role="user", content="hé")], reasoning="r", answer="a")


def manifest(key: str) -> Manifest:
    return Manifest(stage="distill", recipe=key, inputs={}, outputs={}, counts={})


def test_a_torn_last_line_is_healed(tmp_path):
    folder = run.StageFolder(tmp_path)
    folder.append(example(1))
    with folder.records_path.open("ab") as handle:
        handle.write(b'{"prompt_id": "2", "mess')
    assert [e.prompt_id for e in folder.records(Example)] == ["1"]
    folder.append(example(3))
    assert [e.prompt_id for e in folder.records(Example)] == ["1", "3"]


def test_done_needs_manifest_key_and_hashes(tmp_path):
    folder = run.StageFolder(tmp_path)
    folder.begin("k")
    folder.append(example(1))
    assert not folder.done("k")
    folder.finish(manifest("k"), [run.RECORDS])
    assert folder.done("k")
    assert not folder.done("other")
    folder.append(example(2))
    assert not folder.done("k")


def test_work_under_another_key_is_set_aside_not_lost(tmp_path):
    folder = run.StageFolder(tmp_path / "stage")
    assert folder.begin("one") is False
    folder.append(example(1))
    assert folder.begin("one") is False
    assert len(folder.records(Example)) == 1
    assert folder.begin("two") is True
    assert folder.records(Example) == []
    assert (tmp_path / "stage.stale" / run.RECORDS).exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    folder = run.StageFolder(tmp_path)

    def full(self, *_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.append(example(1))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StageError, match="No space left on device"):
        folder.append(example(2))
