"""Record stages over a real Ray cluster of several raylets, against a mock endpoint: records, kills, budgets."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import asking, own_cache, write_rows
from delib import on_ray, pipeline, recipe
from delib.errors import StageError, UserError
from delib.run import Run

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install -e '.[ray]'")
PROMPTS, SAMPLES, CALLS_A_SAMPLE, CONCURRENCY = 30, 2, 4, 8
STORE_BYTES = 100 * 10**6
KEY = "sk-only-in-the-environment"


class Machines(NamedTuple):
    """`cluster` is Ray's own for tests; `port`: where the endpoint is that its workers know."""

    cluster: Any
    address: str
    port: int

    def workers(self) -> list[int]:
        """The processes that ask, of any of the cluster's machines."""
        raylets = {info.process.pid for node in self.cluster.list_all_nodes() for info in node.all_processes["raylet"]}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent in raylets and b"MapWorker" in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue  # it ended meanwhile
        return found


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head and one machine more, a logical CPU each. Workers have the environment that these are started in."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    known = {"MOCK_BASE_URL": f"http://127.0.0.1:{port}/v1", "MOCK_API_KEY": KEY, "RAY_worker_niceness": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (on_ray.QUIET | known).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        given = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        cluster = Cluster(
            initialize_head=True, head_node_args=given | {"include_dashboard": False, "include_log_monitor": False}
        )
        try:
            cluster.add_node(**given)
            yield Machines(cluster, cluster.address, port)
        finally:
            cluster.shutdown()


@pytest.fixture
def mock(tmp_path: Path) -> Path:
    """A recipe with teacher and judge at the mock endpoint."""
    return asking(tmp_path, PROMPTS, SAMPLES, CONCURRENCY)


@pytest.fixture
def made(mock: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Runs the recipe to a stage, in a cache of its own; that stage's records."""

    def run(out: str, to: str, *overrides: str) -> bytes:
        monkeypatch.setenv("DELIB_CACHE", str(mock.parent / f"cache-{out}"))
        ready = pipeline.start_run(recipe.load(mock, list(overrides)), mock.parent / out)
        pipeline.run_to(ready, to)
        return records(mock, out, to)

    return run


def over(machines: Machines, **more: Any) -> str:
    section = {"address": machines.address, "workers": 2, "block": 4} | more
    return f"ray={section}"


def when_asked(log: Path, calls: int, act: Callable[[], None]) -> threading.Thread:
    """Do something once the endpoint was asked so often."""

    def watch() -> None:
        while log.read_bytes().count(b"\n") < calls:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def records(recipe_file: Path, out: str, stage: str) -> bytes:
    return (recipe_file.parent / out / stage / "records.jsonl").read_bytes()


def spent(recipe_file: Path, out: str) -> int:
    [row] = json.loads((recipe_file.parent / out / "spent.json").read_text()).values()
    return row["prompt"] + row["completion"]


def repeated(calls: list[dict]) -> int:
    asked = Counter(call["body"] for call in calls)
    assert len(asked) == PROMPTS * SAMPLES * CALLS_A_SAMPLE, "each call was made"
    return asked.total() - len(asked)


@needs_ray
def test_under_faults_and_a_killed_worker_the_records_are_those_of_one_process(machines, made, endpoint, mock):
    endpoint()
    plain = made("plain", "filter")
    server = endpoint("--port", str(machines.port), "--latency", "0.1", "--faults", "0.3", "--hang", "6")
    killed = []

    def kill() -> None:
        killed.append(machines.workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    watch = when_asked(server.log, 60, kill)
    assert made("ray", "filter", over(machines)) == plain
    watch.join()
    assert killed
    assert records(mock, "ray", "generate") == records(mock, "plain", "generate")
    failed = [call for call in server.calls() if call["kind"] != "ok"]
    assert len({call["kind"] for call in failed}) > 5
    again = repeated(server.calls()) - len(failed)
    assert again <= CONCURRENCY, "beside what failed only what was under way at the one that was killed"
    session = Path(machines.cluster.head_node.get_session_dir_path())
    kept = [*mock.parent.rglob("*"), *session.rglob("*")]
    assert not [file for file in kept if file.is_file() and KEY.encode() in file.read_bytes()]


@needs_ray
def test_a_spent_budget_stops_all_workers_and_a_larger_one_goes_on(machines, made, endpoint, mock):
    endpoint()
    plain = made("plain", "generate")
    server = endpoint("--port", str(machines.port))
    with pytest.raises(StageError, match=r"limits\.max_tokens.*run the same command again"):
        made("ray", "generate", over(machines), "limits.max_tokens=100000")
    assert 50_000 < spent(mock, "ray") <= 100_000
    assert made("ray", "generate", over(machines), "limits.max_tokens=10000000") == plain
    assert repeated(server.calls()) == 0
    assert spent(mock, "ray") == spent(mock, "plain")


@needs_ray
@pytest.mark.slow
def test_what_a_worker_lacks_is_told(machines, made, monkeypatch):
    monkeypatch.setenv("OTHER_BASE_URL", "http://127.0.0.1:9/v1")  # here, and not where the machines were started
    with pytest.raises(StageError, match=rf"{socket.gethostname()}: openai-api/other/m: set OTHER_BASE_URL"):
        made("ray", "generate", over(machines), "generate.teacher=openai-api/other/m")


def started(mock: Path, *overrides: str) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from delib.cli import main; main()", "run", str(mock), "--to", "generate"]
    given = [part for override in overrides for part in ("--set", override)]
    environment = os.environ | {"DELIB_CACHE": str(mock.parent / "cache-ray")}
    return subprocess.Popen(
        [*command, "--out", str(mock.parent / "ray"), *given], env=environment, stderr=subprocess.DEVNULL
    )


@needs_ray
@pytest.mark.slow
def test_a_killed_command_goes_on_from_its_cache(machines, made, endpoint, mock):
    endpoint()
    plain = made("plain", "generate")
    server = endpoint("--port", str(machines.port), "--latency", "0.1")
    process = started(mock, over(machines))
    watch = when_asked(server.log, 100, process.kill)
    process.wait()
    watch.join()
    while machines.workers():
        time.sleep(0.05)
    assert len(server.calls()) < PROMPTS * SAMPLES * CALLS_A_SAMPLE
    assert made("ray", "generate", over(machines)) == plain
    assert repeated(server.calls()) <= 2 * CONCURRENCY, "what was under way at two workers"


@needs_ray
@pytest.mark.slow
def test_a_machine_that_comes_later_takes_its_part(machines, made, endpoint, mock):
    endpoint()
    plain = made("plain", "generate")
    server = endpoint("--port", str(machines.port), "--latency", "1")
    process = started(mock, over(machines, workers=3, block=1), "limits.concurrency=2")
    when_asked(server.log, 20, lambda: None).join()
    while (before := len(machines.workers())) < 2 and process.poll() is None:
        time.sleep(0.05)
    machines.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    after = 0
    while process.poll() is None:
        after = max(after, len(machines.workers()))
        time.sleep(0.05)
    assert (process.returncode, before, after) == (0, 2, 3)
    assert records(mock, "ray", "generate") == plain
    assert repeated(server.calls()) == 0


@needs_ray
def test_a_head_that_does_not_answer_is_told_at_once():
    section = recipe.RaySection(address="127.0.0.1:1")
    with pytest.raises(UserError, match=r"ray\.address: 127\.0\.0\.1:1 does not answer"), on_ray.cluster(section):
        pass


def test_what_is_wrong_before_any_compute(mock, monkeypatch):
    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    found = pipeline.check(recipe.load(mock, ["ray={address: 'ray://head:10001'}"]))
    assert [problem.partition(":")[0] for problem in found] == ["ray", "ray.address"]
    assert "pip install -e '.[ray]'" in found[0]
    assert pipeline.check(recipe.load(mock, [])) == []


@needs_ray
def test_a_run_that_was_begun_without_ray_may_go_on_with_it(mock, monkeypatch):
    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    runs = [pipeline.start_run(recipe.load(mock, given), mock.parent / "run") for given in ([], ["ray={workers: 4}"])]
    for stage in ("prompts", "generate", "filter"):
        assert runs[0].basis(stage) == runs[1].basis(stage)


@needs_ray
def test_labels_and_lookalikes_over_ray_are_those_of_one_process(machines, made, endpoint, mock):
    rows = [json.loads(line) for line in (mock.parent / "train.jsonl").read_text().splitlines()]
    write_rows(mock.parent / "train.jsonl", [{k: row[k] for k in ("id", "messages")} for row in rows])
    asked = ["prompts.labeller=openai-api/mock/m", "prompts.lookalikes=openai-api/mock/m"]
    endpoint()
    plain = made("plain", "prompts", *asked)
    server = endpoint("--port", str(machines.port))
    assert made("ray", "prompts", *asked, over(machines)) == plain
    manifest = Run(mock.parent / "ray").stage("prompts").manifest()
    assert manifest.counts["labelled"] > 10 and manifest.counts["lookalikes"] > 3
    assert len(server.calls()) == len({call["body"] for call in server.calls()})


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "llamacpp"])
def test_answers_of_all_arms_over_ray_are_those_of_one_process(machines, recipe_file, monkeypatch, engine):
    whole = recipe_file.parent / "whole"
    given = [f"engine={engine}", "evaluate.arms=[base, base_spec, sft]"]
    pipeline.run_to(pipeline.start_run(recipe.load(recipe_file, given), whole), "sft")
    shutil.copytree(whole, recipe_file.parent / "ray")
    for name, more in (("whole", []), ("ray", [over(machines, block=1)])):
        monkeypatch.setenv("DELIB_CACHE", str(own_cache()))  # each makes its own calls
        ready = pipeline.start_run(recipe.load(recipe_file, [*given, *more]), recipe_file.parent / name)
        assert ready.execute("evaluate").counts["out"] > 6
    for arm in ("base", "base_spec", "sft"):
        assert records(recipe_file, "ray", f"evaluate/{arm}") == records(recipe_file, "whole", f"evaluate/{arm}")
