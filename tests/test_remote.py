"""Run folders on object storage: against an S3-compatible server, with commands that are really killed."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import questions
from delib import pipeline, recipe, remote
from delib.errors import StageError, UserError
from delib.records import Manifest, Message, Prompt
from delib.run import StageFolder, key_of

PROMPTS, SAMPLES, CALLS_A_SAMPLE, CONCURRENCY = 30, 2, 4, 8
BUCKET = "bucket"


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
    questions(tmp_path, PROMPTS)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
name: mock
spec: spec.md
prompts: {{train: train.jsonl, heldout: held.jsonl, near_duplicates: null}}
generate: {{teacher: openai-api/mock/m, samples: {SAMPLES}, max_tokens: 300}}
filter: {{threshold: 0.0}}
judge: openai-api/mock/m
limits: {{concurrency: {CONCURRENCY}, timeout_seconds: 5}}
""",
        encoding="utf-8",
    )
    return path


def command(mock: Path, machine: str, address: str, *more: str, seconds: float = 60.0) -> subprocess.Popen:
    """`delib run` to distill on a machine, which is a cache of its own; parts are put after so many seconds."""
    words = ["run", str(mock), "--to", "distill", "--out", address, *more]
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
    plain = pipeline.start_run(recipe.load(mock, []), mock.parent / "plain")
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
    with pytest.raises(StageError, match="another command has taken over this stage"):
        for n in range(10, 30):
            folder.append(row(n))
    again = run("c").stage("filter")
    assert [p.id for p in again.stream(Prompt)] == [f"p{n}" for n in range(10)]


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
