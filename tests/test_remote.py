"""Run folders on object storage: against an S3-compatible server, with commands that are really killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import asking
from delib import pipeline, recipe, remote
from delib.errors import StageError, UserError
from delib.records import Manifest, Message, Prompt
from delib.run import StageFolder, dump, key_of

PROMPTS, SAMPLES, CALLS_A_SAMPLE, CONCURRENCY = 30, 2, 4, 8
BUCKET = "bucket"
ALL = "filter.threshold=0.0"  # so that there is something to distill


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 of this machine, with one bucket; its address."""
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield told["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def mock(tmp_path: Path) -> Path:
    """A recipe with teacher and judge at the mock endpoint."""
    return asking(tmp_path, PROMPTS, SAMPLES, CONCURRENCY)


def command(mock: Path, machine: str, address: str, *more: str, seconds: float = 60.0) -> subprocess.Popen:
    """`delib run` to distill on a machine, which is a cache of its own; parts are put after so many seconds."""
    words = ["run", str(mock), "--to", "distill", "--out", address, "--set", ALL, *more]
    code = f"from delib import remote; remote.PART_SECONDS = {seconds}; from delib.cli import main; main()"
    environment = os.environ | {"DELIB_CACHE": str(mock.parent / machine)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def objects(prefix: str) -> dict[str, bytes]:
    import boto3

    client = boto3.client("s3")
    rows = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        row["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=row["Key"])["Body"].read()
        for row in rows
    }


def until(seen: Callable[[], bool]) -> None:
    for _ in range(1200):
        if seen():
            return
        time.sleep(0.05)
    raise AssertionError("not seen within a minute")


def test_a_killed_run_goes_on_from_another_machine(s3, mock, endpoint, monkeypatch):
    monkeypatch.setenv("DELIB_CACHE", str(mock.parent / "plain-cache"))
    endpoint()
    plain = pipeline.start_run(recipe.load(mock, [ALL]), mock.parent / "plain")
    pipeline.run_to(plain, "distill")

    server = endpoint("--latency", "0.2")
    address = f"s3://{BUCKET}/killed"
    first = command(mock, "first", address, seconds=0.2)
    until(lambda: sum("generate/records/part-" in name for name in objects("killed")) >= 2)
    first.kill()
    first.wait()
    time.sleep(0.5)  # the endpoint writes down a call at its end
    made, there = len(server.calls()), objects("killed")
    assert "prompts/manifest.json" in there and "generate/manifest.json" not in there
    begun = b"".join(there[name] for name in sorted(there) if name.startswith("generate/records/part-"))
    assert 0 < begun.count(b"\n") < PROMPTS * SAMPLES

    second = command(mock, "second", address)
    said = second.communicate()[0].decode()
    assert second.returncode == 0, said
    whole = objects("killed")
    for stage in ("prompts", "generate", "filter", "distill"):
        manifest = Manifest.model_validate_json(whole[f"{stage}/manifest.json"])
        parts = [name for name in whole if name.startswith(f"{stage}/records/")]
        assert parts == [f"{stage}/records/part-{manifest.outputs['records.jsonl'][:12]}-00000.jsonl"]
        assert whole[parts[0]] == plain.folder(stage).records_path.read_bytes()
    # The second machine has nothing of the first but the bucket; so verdicts are asked for again, and of the teacher's
    # completions only those that had not been put.
    asked = Counter(call["body"] for call in server.calls())
    assert len(asked) == PROMPTS * SAMPLES * CALLS_A_SAMPLE
    assert asked.total() - len(asked) <= made - begun.count(b"\n")
    spent = json.loads(whole["spent.json"])["openai-api/mock/m"]["calls"]
    assert len(asked) < spent <= len(server.calls()), "what both machines spent"

    third = command(mock, "third", address)
    before = len(server.calls())
    said = third.communicate()[0].decode()
    assert third.returncode == 0 and "distill: done already" in said and len(server.calls()) == before


def test_without_a_bucket_or_a_server_it_is_told(s3, mock, endpoint, monkeypatch):
    endpoint()
    gone = command(mock, "first", "s3://nowhere/run")
    said = gone.communicate()[0].decode()
    assert gone.returncode == 2 and "error: s3://nowhere/run: no such bucket" in said
    odd = command(mock, "first", "gopher://bucket/run")
    said = odd.communicate()[0].decode()
    assert odd.returncode == 2 and "error: gopher://bucket/run: Protocol not known: gopher" in said
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    dead = command(mock, "first", f"s3://{BUCKET}/run")
    said = dead.communicate()[0].decode()
    assert dead.returncode == 1 and f"error: s3://{BUCKET}/run: " in said and "Traceback" not in said


def row(n: int) -> Prompt:
    return Prompt(id=f"p{n}", messages=[Message(role="user", content="x" * 40)])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[[str], remote.RemoteRun]:
    """The mirror on a machine of this name of a run in memory."""
    monkeypatch.setattr(remote, "PART_BYTES", 300)
    address = f"memory://{tmp_path.name}/run"

    def made(machine: str) -> remote.RemoteRun:
        monkeypatch.setenv("DELIB_CACHE", str(tmp_path / machine))
        found = remote.opened(remote.mirror(address))
        assert isinstance(found, remote.RemoteRun)
        return found

    return made


def names(run: remote.RemoteRun) -> list[str]:
    return sorted(run.store.sizes())


def manifest(stage: str, key: str) -> Manifest:
    return Manifest(stage=stage, recipe=key, inputs={}, outputs={}, counts={})


KEY = key_of({}, 0, {})


def test_parts_are_immutable_and_replaced_by_those_of_the_ordered_records(run):
    here = run("a")
    folder = here.stage("filter")
    folder.begin(KEY)
    seen: dict[str, bytes] = {}
    for n in range(20):
        folder.append(row(n))
        for name in names(here):
            if "/records/" in name:
                content = here.store.read(name)
                assert seen.setdefault(name, content) == content
    assert len(seen) >= 5
    order = [f"p{n}" for n in reversed(range(20))]
    folder.replace([row(int(key[1:])) for key in order])
    folder.finish(manifest("filter", KEY), ["records.jsonl"])
    parts = [name for name in names(here) if "/records/" in name]
    assert len(parts) >= 5 and not set(parts) & set(seen), "none was written again under its name"
    other = run("b").stage("filter")
    assert other.done(KEY) and [p.id for p in other.stream(Prompt)] == order


def test_another_machine_has_what_was_put_and_goes_on(run):
    here = run("a")
    folder = here.stage("filter")
    folder.begin(KEY)
    for n in range(9):
        folder.append(row(n))
    folder.leave()
    there = run("b").stage("filter")
    assert not there.begin(KEY)
    assert [p.id for p in there.stream(Prompt)] == [f"p{n}" for n in range(9)]
    there.append(row(9))
    there.leave()
    with pytest.raises(StageError, match="another command has begun this stage since"):
        for n in range(10, 30):
            folder.append(row(n))
    again = run("c").stage("filter")
    assert [p.id for p in again.stream(Prompt)] == [f"p{n}" for n in range(10)]


def test_two_machines_in_turn_lose_nothing(run):
    first = run("a").stage("filter")
    first.begin(KEY)
    for n in range(4):
        first.append(row(n))
    first.leave()
    with first.records_path.open("ab") as handle:  # what the first had not put yet, and a line that it was killed in
        handle.write(dump(row(4)).encode() + b"\n" + b'{"id": "torn')
    second = run("b").stage("filter")
    second.begin(KEY)
    for n in range(10, 20):
        second.append(row(n))
    second.leave()
    again = run("a").stage("filter")
    again.begin(KEY)
    again.append(row(30))
    again.leave()
    whole = {f"p{n}" for n in [*range(5), *range(10, 20), 30]}
    for machine in ("a", "b", "c"):
        ids = [p.id for p in run(machine).stage("filter").stream(Prompt)]
        assert set(ids) == whole and len(ids) == len(whole)


def test_what_another_command_puts_before_this_one_begins_counts(run):
    here, there = run("a").stage("filter"), run("b").stage("filter")
    there.begin(KEY)
    for n in range(9):
        there.append(row(n))
    there.leave()
    here.begin(KEY)
    here.append(row(9))
    here.leave()
    assert [p.id for p in run("c").stage("filter").stream(Prompt)] == [f"p{n}" for n in range(10)]


def test_work_of_another_key_that_was_only_begun_there_does_not_take_the_records_here(run):
    folder = run("a").stage("evaluate")
    folder.begin(KEY)
    arm = folder.sub("sft")
    arm.path.mkdir()
    for place in (folder, arm):
        place.append(row(1))
    other = key_of({"changed": 1}, 0, {})
    run("b").stage("evaluate").begin(other)
    again = run("a").stage("evaluate")
    assert not again.begin(other)
    assert list(again.stream(Prompt)) == [] and not (again.path / "sft").exists()


def test_a_finished_stage_that_is_begun_again_keeps_its_records_there(run):
    """As evaluate does with another second judge."""
    folder = run("a").stage("evaluate")
    folder.begin(KEY)
    arm = folder.sub("sft")
    arm.path.mkdir()
    arm.append(row(1))
    folder.finish(manifest("evaluate", KEY), ["sft/records.jsonl"])
    again = run("a").stage("evaluate")
    again.begin(KEY)
    again.sub("sft").append(row(2))
    again.leave()
    assert len([name for name in names(run("a")) if "sft/records/part-" in name and len(name) > 60]) == 2
    other = run("b").stage("evaluate")
    assert other.manifest() is None
    assert [p.id for p in StageFolder(other.path / "sft").stream(Prompt)] == ["p1", "p2"]


def test_a_changed_checkpoint_takes_the_place_of_the_old_one(run):
    def made(machine: str, key: str, *files: str) -> None:
        folder = run(machine).stage("sft")
        folder.begin(key)
        (folder.path / "checkpoint").mkdir()
        for name in files:
            (folder.path / "checkpoint" / name).write_text(key)
        folder.finish(manifest("sft", key), ["checkpoint"])

    made("a", KEY, "model.safetensors", "adapter.safetensors")
    other = key_of({"changed": 1}, 0, {})
    made("b", other, "model.safetensors")
    folder = run("a").stage("sft")
    assert folder.done(other)
    assert [file.name for file in (folder.path / "checkpoint").iterdir()] == ["model.safetensors"]
    shutil.rmtree(folder.path / "checkpoint")
    assert run("a").stage("sft").done(other), "it is fetched again"


def test_readers_fetch_no_checkpoint_and_leave_a_mirror_that_is_worked_on(run, monkeypatch, tmp_path):
    folder = run("a").stage("sft")
    folder.begin(KEY)
    (folder.path / "checkpoint").mkdir()
    (folder.path / "checkpoint" / "model.safetensors").write_text("weights")
    folder.append(row(1))
    folder.finish(manifest("sft", KEY), ["checkpoint", "records.jsonl"])
    monkeypatch.setenv("DELIB_CACHE", str(tmp_path / "reader"))
    mirror = remote.mirror(f"memory://{tmp_path.name}/run")
    assert not (mirror / "sft").exists(), "a name alone fetches nothing"
    remote.fetched(mirror)
    assert (mirror / "sft" / "records.jsonl").exists() and not (mirror / "sft" / "checkpoint").exists()
    assert run("reader").stage("sft").done(KEY), "who works on it has all"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = tmp_path / "worked"
    monkeypatch.setenv("DELIB_CACHE", str(other))
    mirror = remote.mirror(f"memory://{tmp_path.name}/run")
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(mirror / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        remote.fetched(mirror)
        assert not (mirror / "sft").exists()
        with pytest.raises(UserError, match="another command works on it"):
            remote.opened(mirror)
        process.kill()
    remote.fetched(mirror)
    assert (mirror / "sft").exists(), "the lock went with its process"


def test_labels_go_with_the_report(run):
    here = run("a")
    (here.path / "labels").mkdir()
    (here.path / "labels" / "sheet.jsonl").write_text("{}")
    folder = here.stage("report")
    folder.begin(KEY)
    (folder.path / "report.md").write_text("figures")
    folder.finish(manifest("report", KEY), ["report.md"])
    assert (run("b").path / "labels" / "sheet.jsonl").read_text() == "{}"


def test_a_storage_that_fails_does_not_hide_why_a_stage_stopped(run, monkeypatch, mock, capsys):
    here = run("a")
    ready = pipeline.Pipeline(recipe.load(mock, []), here)

    def stopped(self: object, folder: StageFolder) -> None:
        folder.append(row(1))
        monkeypatch.setattr(here.store._files, "pipe_file", broken)
        raise KeyboardInterrupt

    def broken(*_: object) -> None:
        raise OSError("no route to it")

    monkeypatch.setitem(pipeline._RUN, "prompts", stopped)
    with pytest.raises(KeyboardInterrupt):
        ready.execute("prompts")
    assert "no route to it" in capsys.readouterr().err.replace("\n", " ")


def test_of_another_key_nothing_counts(run):
    folder = run("a").stage("filter")
    folder.begin(KEY)
    folder.append(row(1))
    folder.leave()
    there = run("b").stage("filter")
    other = key_of({"changed": 1}, 0, {})
    assert there.begin(other)
    assert list(there.stream(Prompt)) == []
    there.append(row(2))
    there.finish(manifest("filter", other), ["records.jsonl"])
    mirror = run("a")
    assert [p.id for p in mirror.stage("filter").stream(Prompt)] == ["p2"]
    assert len([name for name in names(mirror) if "/records/" in name]) == 1


def test_a_changed_order_is_put_anew(run):
    folder = run("a").stage("filter")
    folder.begin(KEY)
    for n in range(9):
        folder.append(row(n))
    folder.leave()
    folder.replace([row(n) for n in reversed(range(9))])
    folder.append(row(9))
    folder.leave()
    assert [p.id for p in run("b").stage("filter").stream(Prompt)] == [f"p{n}" for n in [*reversed(range(9)), 9]]


def test_folders_of_a_stage_are_put_too(run):
    stage = run("a").stage("evaluate")
    stage.begin(KEY)
    stage.append(row(0))
    arm = stage.sub("sft")
    arm.path.mkdir()
    arm.append(row(1))
    stage.leave()
    other = run("b").stage("evaluate")
    assert [p.id for p in StageFolder(other.path / "sft").stream(Prompt)] == ["p1"]


def test_checkpoints_are_put_whole_and_a_finished_stage_that_was_not_put_is_put_later(run, monkeypatch):
    here = run("a")
    folder = here.stage("sft")
    folder.begin(KEY)
    (folder.path / "checkpoint" / "deep").mkdir(parents=True)
    (folder.path / "checkpoint" / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder.path / "checkpoint" / "deep" / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteFolder, "publish", lambda self: None)  # it was killed here
        folder.finish(manifest("sft", KEY), ["checkpoint"])
    again = run("a").stage("sft")
    assert again.done(KEY), "what this machine alone has stays"
    again.publish()
    other = run("b").stage("sft")
    assert other.done(KEY)
    assert (other.path / "checkpoint" / "model.safetensors").read_bytes() == b"weights" * 1000
    order = names(run("a"))
    run("a").stage("sft").publish()
    assert names(run("a")) == order


def test_what_is_broken_there_is_told(run):
    here = run("a")
    folder = here.stage("filter")
    folder.begin(KEY)
    folder.append(row(1))
    folder.finish(manifest("filter", KEY), ["records.jsonl"])
    [part] = [name for name in names(here) if "/records/" in name]
    here.store.write(part, b'{"id": "other"}\n')
    with pytest.raises(StageError, match=r"records\.jsonl is not what its manifest says"):
        run("b")
    here.store.write("filter/../../x", b"")
    with pytest.raises(UserError, match="can't be a file of a run"):
        run("c")


def test_only_runs_take_an_address():
    done = subprocess.run(
        [sys.executable, "-c", "from delib.cli import main; main()", "ablate", "small", "--out", "s3://b/r"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "s3://b/r: this command writes to a folder of this machine" in done.stderr
