"""Seconds a generated token of `delib eval`, beside a bare client of the same server and inspect_ai's `hf/` provider.

    python benchmarks/evaluation.py [--model smollm2] [--prompts 200] [--max-tokens 128] [--turns 3] [--json FILE]

All answer the same held-out prompts of the starter pack, greedily, in float32, with the same most tokens:

- `delib eval`: the command, on the embedded llama.cpp server with 16 places, answers graded by the compact judge
- `bare client`: the same server with 16 requests under way, through aiohttp, and nothing else
- `inspect hf/`: inspect_ai's own provider for transformers, batches of 32, no scorer
- `delib eval, q8_0`: as the first, with the weights that an evaluation takes by default

Each is a process of its own, run one after another in turn; a turn's order is drawn. Loading is apart: of delib and
inspect by a run with one prompt, which is subtracted, of the bare client by its own clock. Tokens are counted by the
model's tokenizer in what each wrote. The figures of the two precisions stand beside each other, paired by prompt.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

SLOTS, BATCH, CONTEXT_TOKENS = 16, 32, 2048
ENGINES = ("delib eval", "bare client", "inspect hf/", "delib eval, q8_0")
COMMAND = [sys.executable, "-c", "from delib.cli import main; main()"]


class Work(NamedTuple):
    """`run`: the folder of a run for each precision, whose checkpoint is the model."""

    prompts: Path
    model: Path
    runs: dict[str, Path]
    max_tokens: int


def ready(folder: Path, model: str, count: int, max_tokens: int) -> Work:
    """The files that the engines take."""
    from delib import recipe as recipes
    from delib import spec as specs
    from delib.models import weights
    from delib.stages import evaluate, prompts

    spec = specs.load(recipes.path_of("starter:spec.md"))
    rows = evaluate.balanced(prompts.load(recipes.path_of("starter:heldout.jsonl"), spec, "heldout"), count)
    file, source = folder / "prompts.jsonl", weights.resolve(model)
    given = [row.model_dump(exclude={"split"}, exclude_none=True) for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    runs = {}
    cache = folder / "cache"
    cache.mkdir()
    for place in weights.cache_dir().iterdir():
        if place.is_dir() and place.name not in ("gguf", "vectors"):
            (cache / place.name).symlink_to(place, target_is_directory=True)
    for quantisation in ("f32", "q8_0"):
        runs[quantisation] = folder / quantisation
        changed = [f"evaluate.quantisation={quantisation}", f"evaluate.max_tokens={max_tokens}"]
        recipe = recipes.load(recipes.shipped(Path("quickstart")), changed)
        shutil.copytree(source, runs[quantisation] / "sft" / "checkpoint")
        (runs[quantisation] / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    return Work(file, source, runs, max_tokens)


def timed(command: list[str]) -> float:
    """Seconds from start to exit. What it says is shown where it fails."""
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout)
    return time.monotonic() - started


def measure(engine: str, work: Work, folder: Path, count: int) -> dict[str, Any]:
    """One run over the first `count` prompts: seconds, of which loading where it tells, tokens, figures."""
    out = folder / "out.json"
    for old in [out, *(folder / "cache").glob("calls.sqlite*")]:  # each run makes its own calls
        old.unlink(missing_ok=True)
    if engine.startswith("delib"):
        checkpoint = work.runs["q8_0" if "q8_0" in engine else "f32"] / "sft" / "checkpoint"
        given = ["--model", str(checkpoint), "--prompts", str(work.prompts), "--limit", str(count), "--json", str(out)]
        seconds = timed([*COMMAND, "eval", *given])
        told = json.loads(out.read_text(encoding="utf-8"))
        tokens = next(m["value"] * m["n"] for m in told["metrics"] if m["name"] == "tokens" and m["by"] is None)
        return {"seconds": seconds, "tokens": tokens, "rows": {r["id"]: r["figures"] for r in told["rows"]}}
    script = [sys.executable, __file__, "--engine", engine, "--files", str(work.prompts), str(work.model), str(out)]
    seconds = timed([*script, "--prompts", str(count), "--max-tokens", str(work.max_tokens)])
    return {"seconds": seconds, **json.loads(out.read_text(encoding="utf-8"))}


def messages(file: Path, count: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
    return [row["messages"] for row in rows]


def bare(asked: list[list[dict[str, str]]], model: Path, max_tokens: int) -> dict[str, Any]:
    """The embedded server, and requests to it alone."""
    import aiohttp
    from transformers import AutoTokenizer

    from delib.models import embedded

    started = time.monotonic()
    server = embedded.started(embedded.parameters(embedded.gguf_of(model, "f32"), CONTEXT_TOKENS, SLOTS))
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = time.monotonic()
    address = f"{server.listening_address}/completion"

    async def work() -> list[int]:
        connections = aiohttp.TCPConnector(limit=SLOTS)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None), connector=connections) as session:

            async def one(conversation: list[dict[str, str]]) -> int:
                ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
                body = {"prompt": ids, "n_predict": max_tokens, "temperature": 0.0, "cache_prompt": True}
                async with session.post(address, json=body) as reply:
                    return int((await reply.json())["tokens_predicted"])

            return await asyncio.gather(*map(one, asked))

    tokens = sum(asyncio.run(work()))
    return {"load": loaded - started, "calling": time.monotonic() - loaded, "tokens": tokens}


def by_inspect(asked: list[list[dict[str, str]]], model: Path, max_tokens: int) -> dict[str, Any]:
    """inspect_ai's provider for transformers."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, get_model
    from inspect_ai.solver import generate
    from transformers import AutoTokenizer

    kinds = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
    samples = [Sample(input=[kinds[m["role"]](content=m["content"]) for m in one]) for one in asked]
    given = {"model_path": str(model), "device": "cpu", "do_sample": False, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as logs:
        [log] = eval(
            Task(dataset=samples, solver=generate()),
            model=get_model("hf/local", **given),
            max_connections=BATCH,
            max_samples=BATCH,
            max_tokens=max_tokens,
            log_dir=logs,
            display="none",
        )
        if log.status != "success" or log.samples is None:
            raise SystemExit(f"inspect: {log.status}: {log.error}")
        tokenizer = AutoTokenizer.from_pretrained(model)
        ended = [len(tokenizer.encode(s.output.completion, add_special_tokens=False)) + 1 for s in log.samples]
    return {"tokens": sum(min(count, max_tokens) for count in ended)}


def table(runs: dict[str, list[dict[str, Any]]], starts: dict[str, list[dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """Medians over the turns, and each engine's ratio to the first two, turn by turn."""
    each: dict[str, list[float]] = {}
    for name, found in runs.items():
        each[name] = []
        for run, start in zip(found, starts[name], strict=True):
            if "calling" in run:
                each[name].append(run["calling"] / run["tokens"])
            else:
                each[name].append((run["seconds"] - start["seconds"]) / (run["tokens"] - start["tokens"]))
    lines = [
        "| engine | ms a token | tokens | to load, s | over the bare client | of inspect hf/ |",
        "|---|---|---|---|---|---|",
    ]
    data: dict[str, Any] = {}
    for name, rates in each.items():
        load = statistics.median(s.get("load", s["seconds"]) for s in starts[name])
        over = [a / b for a, b in zip(rates, each["bare client"], strict=True)]
        of = [a / b for a, b in zip(rates, each["inspect hf/"], strict=True)]
        data[name] = {"seconds_a_token": rates, "over_bare": over, "of_inspect": of, "load_seconds": load}
        spread, tokens = f"{min(over):.2f}–{max(over):.2f}", statistics.median(r["tokens"] for r in runs[name])
        lines.append(
            f"| {name} | {1000 * statistics.median(rates):.2f} | {tokens:.0f} "
            f"| {load:.1f} | {statistics.median(over):.2f} ({spread}) | {statistics.median(of):.2f} |"
        )
    return "\n".join(lines), data


def beside(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> str:
    """Figures of two precisions on the same prompts: both, and the difference with its interval."""
    from delib.stats import bootstrap, paired

    lines = ["| figure | n | f32 | q8_0 | difference |", "|---|---|---|---|---|"]
    for name in sorted({key for row in first.values() for key in row}):
        pairs = [(a[name], second[i][name]) for i, a in first.items() if name in a and name in second.get(i, {})]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not pairs:
            continue
        left, right = ([float(pair[side]) for pair in pairs] for side in (0, 1))
        mean, low, high = bootstrap(left)
        difference = paired(left, right)
        shown = f"{mean:.3f} ({low:.3f}–{high:.3f}) | {statistics.fmean(right):.3f}"
        lines.append(
            f"| `{name}` | {len(pairs)} | {shown} | {difference[0]:+.3f} ({difference[1]:+.3f}, {difference[2]:+.3f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="delib eval beside a bare client and inspect's hf/ provider.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given.engine:  # the process of one engine
        prompts, model, out = given.files
        work = bare if given.engine == "bare client" else by_inspect
        made = work(messages(prompts, given.prompts), model, given.max_tokens)
        out.write_text(json.dumps(made), encoding="utf-8")
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    starts: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        work = ready(folder, given.model, given.prompts, given.max_tokens)
        os.environ["DELIB_CACHE"] = str(folder / "cache")
        for engine in ENGINES:
            measure(engine, work, folder, 1)  # the copies in llama.cpp's format, and the judge's vectors
        for turn in range(given.turns):
            for engine in random.Random(turn).sample(ENGINES, len(ENGINES)):
                print(f"turn {turn + 1}: {engine}", file=sys.stderr, flush=True)
                starts[engine].append(measure(engine, work, folder, 1))
                runs[engine].append(measure(engine, work, folder, given.prompts))
    text, data = table(runs, starts)
    print(text)
    print()
    print(beside(runs["delib eval"][0]["rows"], runs["delib eval, q8_0"][0]["rows"]))
    if given.json:
        given.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
