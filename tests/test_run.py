import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from delib import run
from delib.errors import StageError, UserError
from delib.records import Example, Manifest, Message, Prompt


def example(number: int) -> Example:
    return Example(prompt_id=str(number), messages=[Message(role="user", content="hé")], reasoning="r", answer="a")


def manifest(key: str) -> Manifest:
    return Manifest(stage="distill", recipe=key, inputs={}, outputs={}, counts={})


def test_a_torn_last_line_is_healed(tmp_path):
    folder = run.StageFolder(tmp_path)
    folder.append(example(1))
    with folder.records_path.open("ab") as handle:
        handle.write(b'{"prompt_id": "2", "mess')
    again = run.StageFolder(tmp_path)
    assert [e.prompt_id for e in again.records(Example)] == ["1"]
    assert folder.records_path.read_bytes().endswith(b"mess"), "who only reads changes nothing"
    again.append(example(3))
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


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB; only where the tests may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)  # the failed writers may still hold their files


def test_tensors_on_a_disk_that_is_really_full(small_disk):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    big = {"weight": torch.zeros(5_000_000)}
    for kind, write in (
        (SafetensorError, lambda: save_file(big, small_disk / "model.safetensors")),
        (RuntimeError, lambda: torch.save(big, small_disk / "optimizer.pt")),
    ):
        with pytest.raises(kind) as caught:
            write()
        found = run.tensor_error(small_disk, caught.value)
        assert isinstance(found, StageError)
        assert str(small_disk) in str(found)
        assert "disk is full" in str(found)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", True),
        ("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", True),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
        ("[enforce fail at inline_container.cc:113] . file in archive is not in a subdirectory", False),
    ],
)
def test_only_a_full_disk_is_told_as_one(tmp_path, text, full):
    error = RuntimeError(text)
    found = run.tensor_error(tmp_path, error)
    assert isinstance(found, StageError) if full else found is error


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    folder = run.StageFolder(tmp_path)

    def full(self, *_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.append(example(1))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StageError, match="No space left on device"):
        folder.append(example(2))


def test_a_line_separator_in_an_answer_parts_no_record(tmp_path):
    folder = run.StageFolder(tmp_path)
    prompt = Prompt(id="p", messages=[Message(role="user", content="one\u2028two\x85three")])
    folder.replace([prompt, prompt])
    assert folder.records(Prompt) == [prompt, prompt]
    assert run.read_jsonl(folder.records_path, Prompt) == [prompt, prompt]


def test_what_was_only_begun_takes_no_finished_work_away(tmp_path):
    folder = run.StageFolder(tmp_path / "stage")
    folder.begin("one")
    folder.append(example(1))
    assert folder.begin("two") is True
    assert folder.begin("three") is False, "nothing was made under two"
    assert (tmp_path / "stage.stale" / run.RECORDS).exists()


def test_a_run_folder_is_one_commands_at_a_time(tmp_path):
    holding = "import sys, time, pathlib; from delib import run\n"
    holding += "with run.held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holding, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another command works on it"), run.held(tmp_path):
            pass
        other.kill()
        other.wait()
    with run.held(tmp_path), run.held(tmp_path):
        pass  # it went with its process, and a stage may hold it again
