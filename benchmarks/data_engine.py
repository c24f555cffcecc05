"""Calls a second, CPU and memory of delib's data engine beside others, at one mock endpoint, in one run.

    python benchmarks/data_engine.py [--prompts 1000] [--at 16,64,256] [--turns 1] [--only delib,bare] [--json FILE]

The work (`data_engine/task.py`): for each prompt an answer, and three verdicts on it: four calls, of which three wait
for the first. The endpoint takes `--latency` seconds a call and fails none. Each engine is a process of its own, run
cold: a new home and cache folder each time, offline, telemetry off. The engines run on one core, the endpoint (and
this script) on another. What others need is installed into an environment of their own below `--envs`.

Measured from outside, alike for all: seconds from start to exit; CPU of the process and the children it waited for;
the greatest sum of its processes' memory (proportional set size, every 0.2 s). The endpoint counts calls and how many
were at once; a run with more or fewer calls than four a prompt says so. A run with one prompt shows what an engine
takes to start: its seconds and CPU stand apart, and CPU a call is given with and without it. An engine that can't be
installed or fails gets a row with its version and error. Linux only.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from delib.models.weights import cache_dir

HERE = Path(__file__).parent
CALLS = 4  # a prompt
SAMPLE_SECONDS = 0.2


class Engine(NamedTuple):
    """`needs`: what pip installs into the engine's own environment; empty: it runs in this one."""

    script: str
    package: str
    needs: tuple[str, ...] = ()


ENGINES = {
    "delib": Engine("peer_delib.py", "delib"),
    "curator": Engine("peer_curator.py", "bespokelabs-curator", ("bespokelabs-curator==0.1.31",)),
    # It imports requests and does not ask for it.
    "distilabel": Engine("peer_distilabel.py", "distilabel", ("distilabel[openai]==1.5.3", "requests")),
    "data-designer": Engine("peer_datadesigner.py", "data-designer", ("data-designer==0.9.7",)),
    "bare loop": Engine("bare.py", "aiohttp"),
}
QUIET = {
    "CURATOR_VIEWER": "0",
    "CURATOR_DISABLE_CACHE": "true",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "TELEMETRY_ENABLED": "false",  # curator's
    "NEMO_TELEMETRY_ENABLED": "false",
    "DISTILABEL_LOG_LEVEL": "WARNING",  # else a line for each request
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HOSTED_VLLM_API_KEY": "mock",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


class Setting(NamedTuple):
    """What all runs share."""

    address: str
    latency: float
    core: int


def python_of(engine: Engine, name: str, envs: Path) -> Path:
    """The interpreter that runs an engine, its environment made when it is not there. Raises CalledProcessError."""
    if not engine.needs:
        return Path(sys.executable)
    folder = envs / name
    python, made = folder / "bin" / "python", folder / "made"
    wanted = "\n".join(engine.needs)
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        base = sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"
        subprocess.run([base, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *engine.needs]
        subprocess.run(install, check=True, capture_output=True, text=True)
        made.write_text(wanted)
    return python


def version_of(python: Path, package: str) -> str:
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def endpoint(latency: float, core: int) -> Iterator[str]:
    command = [sys.executable, str(HERE / "endpoint.py"), "--latency", str(latency)]
    with on_core(core):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["base_url"]
    finally:
        process.kill()
        process.wait()


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What starts in here is pinned to that core; this script itself goes back to its own."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def seen(address: str, path: str, method: str = "GET") -> Any:
    request = urllib.request.Request(address.removesuffix("/v1") + path, method=method)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def memory_mb(group: int) -> float:
    """Of all processes of a group, shared pages counted once."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) == group:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return total / 1024


def watched(process: subprocess.Popen[str], most: float) -> tuple[float, float, float, int]:
    """Seconds until it ended (it is killed after `most`), CPU seconds, peak memory in MB, exit code."""
    began = sampled = time.monotonic()
    peak = 0.0
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        now = time.monotonic()
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return now - began, used.ru_utime + used.ru_stime, peak, process.returncode
        if now - began > most:
            os.killpg(process.pid, signal.SIGKILL)
        if now - sampled > SAMPLE_SECONDS:
            sampled, peak = now, max(peak, memory_mb(process.pid))
        time.sleep(0.01)


def measure(python: Path, script: str, setting: Setting, prompts: int, at_once: int) -> dict[str, Any]:
    """One cold run. `error` where it failed, or took more than twenty times as long as the endpoint needs."""
    address, ideal = setting.address, CALLS * prompts * setting.latency / at_once
    seen(address, "/reset", "POST")
    with tempfile.TemporaryDirectory() as home:
        out, complaints = Path(home) / "out", Path(home) / "err"
        given = ["--address", address, "--prompts", str(prompts), "--concurrency", str(at_once)]
        # Nothing of the caller's environment goes in: no proxies, no keys, no caches.
        environment = QUIET | {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8"}
        with on_core(setting.core), out.open("w") as stdout, complaints.open("w") as stderr:
            process = subprocess.Popen(
                [str(python), str(HERE / "data_engine" / script), *given],
                stdout=stdout,
                stderr=stderr,
                text=True,
                env=environment,
                cwd=home,
                start_new_session=True,
            )
        try:
            seconds, cpu_seconds, peak, code = watched(process, max(120.0, 20 * ideal))
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        said = out.read_text(errors="replace").splitlines()
        complained = complaints.read_text(errors="replace").splitlines()
    counted = seen(address, "/stats")
    run: dict[str, Any] = {
        "prompts": prompts,
        "calls": counted["calls"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_mb": peak,
        "at_once_most": counted["concurrent_max"],
        "at_once_mean": counted["concurrent_mean"],
        "calling_seconds": counted["seconds"],
        "endpoint_cpu_seconds": counted["cpu_seconds"],
    }
    if code or not said:
        run["error"] = f"exit {code}" + (f": {complained[-1].strip()[:300]}" if complained else "")
        run["stderr"] = complained[-40:]
    elif (reported := json.loads(said[-1])["calls"]) != CALLS * prompts:
        run["error"] = f"it reported {reported} calls for {prompts} prompts"
    return run


def figures(run: dict[str, Any], start: dict[str, Any]) -> dict[str, float]:
    """What a run comes to. Only the work's own calls count as done; `start` is the engine's run with one prompt."""
    done = CALLS * run["prompts"]
    return {
        "calls_per_second": done / run["seconds"],
        "calls_per_second_while_calling": done / run["calling_seconds"],
        "cpu_ms_per_call": 1000 * run["cpu_seconds"] / done,
        "cpu_ms_per_call_without_start": 1000 * (run["cpu_seconds"] - start["cpu_seconds"]) / (done - CALLS),
        "peak_memory_mb": run["peak_memory_mb"],
        "seconds": run["seconds"],
        "at_once_mean": run["at_once_mean"],
        "at_once_most": run["at_once_most"],
        "more_calls": run["calls"] - done,
        "endpoint_busy": run["endpoint_cpu_seconds"] / run["calling_seconds"],
    }


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each figure, how delib's compares with the best of the others and with the bare loop's, in this run."""
    found: dict[str, dict[str, Any]] = {}
    peers = [name for name in rows if name not in ("delib", "bare loop")]
    for key, best in (
        ("calls_per_second", max),
        ("calls_per_second_while_calling", max),
        ("cpu_ms_per_call", min),
        ("cpu_ms_per_call_without_start", min),
        ("peak_memory_mb", min),
    ):
        found[key] = {}
        if any(row[key] <= 0 for row in rows.values()):
            continue  # too few calls to tell the work's CPU from the start's
        if "delib" in rows and peers:
            peer = best(peers, key=lambda name: rows[name][key])
            found[key] |= {"best_peer": peer, "to_best_peer": rows["delib"][key] / rows[peer][key]}
        if "delib" in rows and "bare loop" in rows:
            found[key]["to_bare_loop"] = rows["delib"][key] / rows["bare loop"][key]
    return found


def table(result: dict[str, Any]) -> str:
    given = result["given"]
    lines = ["| engine | version | to start: seconds | CPU seconds | peak MB |", "|---|---|---|---|---|"]
    for name, about in result["engines"].items():
        start = about.get("start")
        if "error" in about:
            lines.append(f"| {name} | {about['version']} | does not run: {about['error']} | | |")
        else:
            cells = f"{start['seconds']:.1f} | {start['cpu_seconds']:.1f} | {start['peak_memory_mb']:.0f}"
            lines.append(f"| {name} | {about['version']} | {cells} |")
    lines += ["", "To start: a whole run with one prompt, four calls."]
    for at_once, part in result["at"].items():
        ceiling = int(at_once) / given["latency"]
        lines += [
            "",
            f"{given['prompts']} prompts, at most {at_once} calls at once (ceiling {ceiling:.0f} calls/s).",
            "",
            "| engine | calls/s | of ceiling | while calling | seconds | at once: mean, most | CPU ms/call "
            "| without start | peak MB | to bare loop: calls/s | CPU |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        bare = part["rows"].get("bare loop")
        for name, row in part["rows"].items():
            more = f" ({row['more_calls']:+.0f} calls)" if row["more_calls"] else ""
            to_bare = "| |"
            if bare:
                speed = row["calls_per_second"] / bare["calls_per_second"]
                to_bare = f"{speed:.2f}× | {row['cpu_ms_per_call'] / bare['cpu_ms_per_call']:.1f}× |"
            lines.append(
                f"| {name}{more} | {row['calls_per_second']:.0f} | {row['calls_per_second'] / ceiling:.0%} "
                f"| {row['calls_per_second_while_calling']:.0f} | {row['seconds']:.1f} "
                f"| {row['at_once_mean']:.0f}, {row['at_once_most']:.0f} | {row['cpu_ms_per_call']:.2f} "
                f"| {row['cpu_ms_per_call_without_start']:.2f} | {row['peak_memory_mb']:.0f} | {to_bare}"
            )
        lines += [f"| {name} | does not run: {error} |" + " |" * 9 for name, error in part["errors"].items()]
        told = [
            f"{key.replace('_', ' ')} {ratio['to_best_peer']:.2f}× ({ratio['best_peer']})"
            for key, ratio in part["ratios"].items()
            if "to_best_peer" in ratio
        ]
        if part["rows"]:
            busy = max(row["endpoint_busy"] for row in part["rows"].values())
            lines += ["", f"The endpoint's process was busy for at most {busy:.0%} of the time that calls were made."]
        if told:
            lines += ["", "delib to the best of the others: " + ", ".join(told) + "."]
    return "\n".join(lines)


def prepared(names: list[str], envs: Path) -> dict[str, dict[str, Any]]:
    """By engine its interpreter and version, or why it has none."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        engine = ENGINES[name]
        try:
            python = python_of(engine, name.replace(" ", "-"), envs)
            found[name] = {"python": python, "version": version_of(python, engine.package)}
        except (subprocess.CalledProcessError, OSError) as error:
            cause = getattr(error, "stderr", None) or str(error)
            found[name] = {"version": " ".join(engine.needs), "error": cause.strip().splitlines()[-1][:300]}
    return found


def compared(names: list[str], given: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    engines = prepared(names, given.envs)
    at: dict[str, Any] = {}
    with endpoint(given.latency, cores[0]) as address:
        setting = Setting(address, given.latency, cores[-1])

        def run(name: str, prompts: int, at_once: int) -> dict[str, Any]:
            print(f"{name}: {prompts} prompts, {at_once} at once", file=sys.stderr, flush=True)
            return measure(engines[name]["python"], ENGINES[name].script, setting, prompts, at_once)

        for about, name in [(engines[name], name) for name in names if "error" not in engines[name]]:
            about["start"] = run(name, 1, given.at[0])
            if "error" in about["start"]:
                about["error"] = about["start"]["error"]
        able = [name for name in names if "error" not in engines[name]]
        for at_once in given.at:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
            for _ in range(given.turns):
                for name in able:
                    runs[name].append(run(name, given.prompts, at_once))
            errors = {name: one["error"] for name, made in runs.items() for one in made if "error" in one}
            rows = {
                name: median([figures(one, engines[name]["start"]) for one in made])
                for name, made in runs.items()
                if name not in errors
            }
            at[str(at_once)] = {"rows": rows, "errors": errors, "ratios": ratios(rows), "runs": runs}
    for made in engines.values():
        made.pop("python", None)
    about = {"prompts": given.prompts, "latency": given.latency, "turns": given.turns, "cores": len(cores)}
    return {"given": about, "engines": engines, "at": at}


def main() -> None:
    parser = argparse.ArgumentParser(description="delib's data engine beside others, at one mock endpoint.")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--at", type=lambda text: [int(part) for part in text.split(",")], default=[16, 64, 256])
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the endpoint takes a call")
    parser.add_argument(
        "--turns", type=int, default=1, help="runs of each engine, in turn; the table has their medians"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ENGINES), help="some of the engines")
    parser.add_argument("--envs", type=Path, default=cache_dir() / "benchmarks", help="where environments are kept")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    given = parser.parse_args()
    unknown = [name for name in given.only if name not in ENGINES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(ENGINES)}")
    if given.prompts < 2:
        parser.error("--prompts: give at least 2; a run with 1 is made to see what starting takes")
    result = compared(given.only, given)
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
