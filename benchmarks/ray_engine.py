"""Calls a second and CPU a call of generate and filter over Ray, beside the engine of one process, in one run.

    python benchmarks/ray_engine.py [--prompts 10000] [--workers 1,2,4] [--at-once 16] [--latency 0.2] [--json FILE]

The work is that of `data_engine.py`: a prompt is one call of a teacher and three of a judge, at a mock endpoint that
takes `--latency` seconds a call and fails none. The engine of one process makes `--at-once` calls side by side. Over
Ray each worker does; they run on a cluster of a head without CPUs and one raylet a worker, each with one logical CPU
and an object store of 100 MB, all on this machine. Each run is cold: a new cluster, cache and run folder.

With latency as the limit, W workers can make W times what one process does; the column "of ceiling" tells how near
they came. Where the machine's cores are full (last column) the figures tell of the cores and not of how Ray scales.
CPU is that of all processes of an engine from its first to its last: for Ray the cluster's own, and the workers'. The
endpoint's is apart. "Without start" leaves out what a run with one prompt takes, workers and all. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import data_engine

CALLS = data_engine.CALLS
STORE_BYTES = 100 * 10**6
SAMPLE_SECONDS = 0.5
CATEGORY = "violence"  # of the starter spec: its excerpt has 10,500 characters
COMMAND = [sys.executable, "-c", "from delib.cli import main; main()"]
PROMPT = "Which of these numbers is the odd one out, and why: {}?"
TICK = os.sysconf("SC_CLK_TCK")


def below(top: int) -> dict[int, float]:
    """The processes that descend from one, with the CPU seconds that each has used itself."""
    parents, used = dict[int, int](), dict[int, float]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = sum(map(int, fields[11:13])) / TICK
    inside = {top}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return {pid: used[pid] for pid in inside - {top} if pid in used}


def watched(process: subprocess.Popen[bytes], others: set[int]) -> tuple[float, float]:
    """Seconds until it ended, and CPU seconds of it and of all that descends from here but `others`. Of processes that
    end meanwhile the last look counts."""
    began = looked = time.monotonic()
    used = dict[int, float]()
    while True:
        pid, status, own = os.wait4(process.pid, os.WNOHANG)
        now = time.monotonic()
        if pid or now - looked > SAMPLE_SECONDS:
            looked = now
            used |= {p: seconds for p, seconds in below(os.getpid()).items() if p not in others | {process.pid}}
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return now - began, own.ru_utime + own.ru_stime + sum(used.values())
        time.sleep(0.02)


@contextmanager
def machines(workers: int) -> Iterator[str]:
    """A head and one raylet a worker; the address."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(workers):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster.address
    finally:
        cluster.shutdown()


def recipe_of(folder: Path, prompts: int, at_once: int, ray: dict[str, Any] | None) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": PROMPT.format(", ".join(str(n * k % 99_991) for k in range(7, 19)))}]}
        | {"category": CATEGORY}
        for n in range(1, prompts + 1)
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "benchmark",
        "prompts": {"train": "prompts.jsonl", "near_duplicates": None},
        "generate": {"teacher": "openai-api/mock/m", "samples": 1, "max_tokens": 384},
        "judge": "openai-api/mock/m",
        "limits": {"concurrency": at_once},
        "ray": ray,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def measure(endpoint: str, prompts: int, at_once: int, workers: int | None) -> dict[str, float]:
    """One cold run. `workers` None is the engine of one process."""
    data_engine.seen(endpoint, "/reset", "POST")
    others = set(below(os.getpid()))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, ray = Path(scratch), None
        os.environ |= {"DELIB_CACHE": str(folder / "cache"), "MOCK_BASE_URL": endpoint, "MOCK_API_KEY": "mock"}
        if workers is not None:
            ray = {"address": stack.enter_context(machines(workers)), "workers": workers}
        recipe, said = recipe_of(folder, prompts, at_once, ray), folder / "said"
        with said.open("wb") as out:
            process = subprocess.Popen(
                [*COMMAND, "run", str(recipe), "--to", "filter", "--out", str(folder / "run")], stdout=out, stderr=out
            )
            seconds, cpu_seconds = watched(process, others)
        if process.returncode:
            raise SystemExit(said.read_text(encoding="utf-8"))
        lines = (folder / "run" / "filter" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    counted = data_engine.seen(endpoint, "/stats")
    if len(lines) != prompts or counted["calls"] != CALLS * prompts:
        raise SystemExit(f"{len(lines)} records and {counted['calls']} calls for {prompts} prompts")
    return {
        "seconds": seconds,
        "calling_seconds": counted["seconds"],
        "cpu_seconds": cpu_seconds,
        "endpoint_cpu_seconds": counted["cpu_seconds"],
        "at_once_mean": counted["concurrent_mean"],
    }


def figures(run: dict[str, float], start: dict[str, float], prompts: int, ceiling: float) -> dict[str, float]:
    """What a run comes to; `start` is the same with one prompt."""
    calls, cores = CALLS * prompts, os.cpu_count() or 1
    calling = calls / run["calling_seconds"]
    return {
        "calls_per_second": calls / run["seconds"],
        "calls_per_second_while_calling": calling,
        "of_ceiling": calling / ceiling,
        "cpu_ms_per_call": 1000 * run["cpu_seconds"] / calls,
        "cpu_ms_per_call_without_start": 1000 * (run["cpu_seconds"] - start["cpu_seconds"]) / (calls - CALLS),
        "start_seconds": start["seconds"],
        "start_cpu_seconds": start["cpu_seconds"],
        "at_once_mean": run["at_once_mean"],
        "cores_full": (run["cpu_seconds"] + run["endpoint_cpu_seconds"]) / run["seconds"] / cores,
    }


def table(rows: dict[str, dict[str, float]], given: argparse.Namespace) -> str:
    lines = [
        f"{given.prompts} prompts, {CALLS} calls each, {given.latency} s a call, {given.at_once} at once a process, "
        f"{os.cpu_count()} cores; load of the machine before: {given.load:.1f}.",
        "",
        "| engine | calls/s | while calling | of ceiling | CPU ms/call | without start | to start: seconds | CPU s "
        "| at once | cores full |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        work = row["cpu_ms_per_call_without_start"]
        told = f"{work:.2f}" if work > 0 else "too few calls"
        lines.append(
            f"| {name} | {row['calls_per_second']:.0f} | {row['calls_per_second_while_calling']:.0f} "
            f"| {row['of_ceiling']:.0%} | {row['cpu_ms_per_call']:.2f} | {told} "
            f"| {row['start_seconds']:.1f} | {row['start_cpu_seconds']:.1f} | {row['at_once_mean']:.0f} "
            f"| {row['cores_full']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="generate and filter over Ray beside the engine of one process.")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--at-once", type=int, default=16, help="calls side by side of each process that asks")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the endpoint takes a call")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    given = parser.parse_args()
    if given.prompts < 2:
        parser.error("--prompts: give at least 2; a run with 1 is made to see what starting takes")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    given.load = os.getloadavg()[0]
    rows: dict[str, dict[str, float]] = {}
    with data_engine.endpoint(given.latency, min(os.sched_getaffinity(0))) as address:
        for workers in [None, *given.workers]:
            name = "one process" if workers is None else f"Ray, {workers} worker{'s' if workers > 1 else ''}"
            print(f"{name}: {given.prompts} prompts", file=sys.stderr, flush=True)
            start = measure(address, 1, given.at_once, workers)
            run = measure(address, given.prompts, given.at_once, workers)
            rows[name] = figures(run, start, given.prompts, (workers or 1) * given.at_once / given.latency)
    print(table(rows, given))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
