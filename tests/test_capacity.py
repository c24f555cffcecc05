"""The model of cost and time: by hand, its properties, mistakes in a cluster file, and what docs/capacity.md says."""

import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from delib import capacity, plan, recipe
from delib.capacity import CPU_SECONDS_A_CALL, Cluster, Row
from delib.errors import UserError
from delib.plan import Calls
from delib.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"
ASKED = "openai-api/mock/m"


def live(*overrides: str, named: str = "small") -> Recipe:
    chosen = [f"generate.teacher={ASKED}", f"judge={ASKED}", "evaluate.second_judge=null", *overrides]
    return recipe.load(recipe.shipped(Path(named)), chosen)


def cluster(served: dict[str, Any], **more: Any) -> Cluster:
    student = {"concurrency": 16, "read_tokens_per_second": 1000, "written_tokens_per_second": 100}
    training = {"tokens_per_second": 200}
    return Cluster.model_validate({"models": {ASKED: served, "smollm2": student}, "training": training} | more)


def of(rows: list[Row], stage: str, by: str = ASKED) -> Row:
    [row] = [row for row in rows if (row.stage, row.by) == (stage, by)]
    return row


LATENCY = {"concurrency": 50, "latency_seconds": 10}
TOKENS = {"concurrency": 8, "read_tokens_per_second": 10_000, "written_tokens_per_second": 500}


def test_a_stages_hours_and_money_by_hand():
    """1,000 calls, 4 million tokens read, at most 500,000 written and half of that expected; a fifth of tries fails."""
    calls = Calls("filter", ASKED, 1000, 4_000_000, 500_000)
    price = {"prompt": 0.5, "completion": 2}
    by_tokens = cluster({**TOKENS, "replicas": 2, "failure_rate": 0.2, "price": price}, length=0.5)
    row = capacity._served(calls, by_tokens, 1, 64)
    assert (row.calls, row.tokens, row.limit) == (1250, 5_312_500, "tokens/s")
    assert row.hours * 3600 == pytest.approx((5_000_000 / 10_000 + 312_500 / 500) / 2)
    assert row.cost == pytest.approx(5 * 0.5 + 0.3125 * 2)
    starved = capacity._served(calls, by_tokens, 1, 4)
    assert starved.hours == pytest.approx(row.hours * 16 / 4), "4 of 16 calls at once are a quarter of the work"
    by_latency = cluster({**LATENCY, "replicas": 3, "cost_per_hour": 6.0})
    row = capacity._served(calls, by_latency, 1, 64)
    assert row.limit == "latency" and row.hours * 3600 == pytest.approx(1000 * 10 / 64)
    assert row.cost == pytest.approx(row.hours * 3 * 6)
    assert capacity._served(calls, by_latency, 4, 64).hours * 3600 == pytest.approx(1000 * 10 / 150)
    fast = cluster({"concurrency": 10_000, "latency_seconds": 0.2})
    row = capacity._served(calls, fast, 1, 5000)
    assert row.limit == "cores" and row.hours * 3600 == pytest.approx(1000 * CPU_SECONDS_A_CALL)
    assert row.cost is None


def test_minutes_count_rays_workers_and_are_none_for_a_model_of_this_machine():
    def minutes(*overrides: str) -> dict[str, str]:
        told = plan.table(live(*overrides)).splitlines()
        return {row.split()[0]: row.split()[4] for row in told[1:-1]}

    one, four = minutes(), minutes("ray.workers=4")
    for stage in ("generate", "filter"):
        assert float(four[stage]) == pytest.approx(float(one[stage]) / 4, abs=0.1)
    assert float(one["filter"]) > 1 and one["evaluate"] == four["evaluate"]
    assert "64 at once, 4 times that in generate, 4 times that in filter." in plan.table(live("ray.workers=4"))
    here = minutes("judge=smollm2")
    assert (here["filter"], here["evaluate"], here["generate"]) == ("here", "here", one["generate"])


def test_counts_are_the_plans_and_grow_with_the_prompts():
    given = live()
    planned = {(c.stage, c.model): c for c in plan.made(given)}
    rows = capacity.foretell(given, cluster(LATENCY))
    for (stage, model), calls in planned.items():
        row = of(rows, stage, model)
        assert (row.calls, row.tokens) == (calls.calls, calls.sent + calls.written)
    own = planned["generate", ASKED].calls // given.generate.samples
    more = capacity.foretell(given, cluster(LATENCY), 10 * own)
    for stage, times in (("generate", 10), ("filter", 10), ("rl", 1), ("evaluate", 1), ("report", 1)):
        assert of(more, stage).calls == times * of(rows, stage).calls
    lessons = "training on 1"
    assert of(more, "sft", lessons).tokens == 10 * of(rows, "sft", lessons).tokens
    assert [row.stage for row in rows] == [
        "generate",
        "filter",
        "sft",
        "rl",
        "rl",
        "rl",
        "evaluate",
        "evaluate",
        "report",
    ]


def test_what_sft_and_rl_train_on_by_hand():
    rows = capacity.foretell(live("generate.max_tokens=100"), cluster(LATENCY), 1000)
    assert of(rows, "sft", "training on 1").tokens == 1000 * 2 * (256 + 100)
    assert of(rows, "rl", "training on 1").tokens == 28 * 16 * 4 * (256 + 192)
    assert of(rows, "rl", "smollm2").calls == 28 * 16 * 4
    assert of(rows, "evaluate", "smollm2").calls == 4 * 283
    limited = live("generate.max_tokens=100", "sft.limit=480", "filter.limit=900", "filter.best_of=9")
    assert of(capacity.foretell(limited, cluster(LATENCY), 1000), "sft", "training on 1").tokens == 480 * 2 * 356
    mixed = live("generate.max_tokens=100", "sft.mix={data: chat.jsonl, share: 0.2}", "sft.limit=400")
    assert of(capacity.foretell(mixed, cluster(LATENCY), 1000), "sft", "training on 1").tokens == 1000 * 356


@pytest.mark.parametrize("served", [LATENCY, TOKENS, {**TOKENS, **LATENCY}])
@pytest.mark.parametrize("concurrency", [1, 20, 1000, 100_000])
def test_more_of_anything_is_never_slower_and_failures_cost(served, concurrency):
    def row(times: int = 1, **changes: Any) -> Row:
        calls = Calls("generate", ASKED, 5000 * times, 20_000_000 * times, 5_000_000 * times)
        return capacity._served(calls, cluster({**served, **changes}), 1, concurrency)

    assert row(replicas=2).hours <= row().hours
    assert row(replicas=64).hours <= row(replicas=2).hours
    assert row(times=2).hours == pytest.approx(2 * row().hours)
    failing = row(failure_rate=0.5)
    assert failing.hours == pytest.approx(2 * row().hours)
    assert (failing.calls, failing.tokens) == (10_000, 2 * row().tokens)


def test_generate_and_filter_run_side_by_side_where_their_models_differ():
    apart = [Row("generate", 1, 1, 3.0, None, "latency", "a"), Row("filter", 1, 1, 5.0, None, "latency", "b")]
    same = [row._replace(by="a") for row in apart]
    after = Row("sft", 0, 1, 2.0, None, "tokens/s", "training on 1")
    assert capacity.hours([*apart, after]) == 7.0
    assert capacity.hours([*same, after]) == 10.0
    assert capacity.hours([row._replace(core_hours=4.0) for row in apart]) == 8.0, "one process makes both's calls"


def test_what_keeps_replicas_idle_is_told():
    busy = cluster({**TOKENS, "replicas": 100})
    [line] = [row for row in capacity.table(live(), busy).splitlines() if row.startswith("limits.")]
    assert line == f"limits.concurrency: 64 calls at once to {ASKED}, which takes 800; set it to 800"
    assert "limits." not in capacity.table(live("limits.concurrency=800"), busy)
    spread = live("ray={workers: 4}")
    assert "set it to 200" in capacity.table(spread, busy)


def problems_of(text: str, tmp_path: Path) -> list[str]:
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        capacity.load(file)
    return [problem.removeprefix(f"{file}") for problem in caught.value.problems]


def test_every_mistake_in_a_cluster_file_is_told_with_its_mend(tmp_path):
    text = """
models:
  a: {concurrency: 8, latency_seconds: 1, replica: 3, price: {prompt: 1, output: 2, completion: 2}}
  b: {concurrency: 8}
  c: {concurrency: 8, written_tokens_per_second: 2}
training: {tokens_per_second: 5, gpus: 8}
speed: 9
length: 0
"""
    found = problems_of(text, tmp_path)
    assert (
        ": models.a.replica: no such key; keys here are replicas, concurrency, latency_seconds, " in found[0] + found[1]
    )
    told = "\n".join(found)
    assert ": models.a.price.output: no such key; keys here are prompt, completion" in told
    assert ": models.b: Value error, give latency_seconds, or the tokens read and written a second" in told
    assert ": models.c: Value error, give both read_tokens_per_second and written_tokens_per_second" in told
    assert ": training.gpus: no such key; keys here are devices, tokens_per_second, cost_per_hour" in told
    assert ": speed: no such key; keys here are models, training, length" in told
    assert ": length: Input should be greater than 0 (got 0)" in told
    assert len(found) == 7
    assert problems_of("models: {}\n", tmp_path) == [": training: not given, and has no default; add it"]
    assert problems_of("- a\n", tmp_path)[0].startswith(": a cluster file is a mapping of keys: models,")
    assert problems_of("models: {a: [\n", tmp_path)[0].startswith(":2: broken YAML")
    both = "models: {a: {concurrency: 1, latency_seconds: 1, price: {prompt: 1, completion: 1}, cost_per_hour: 2}}\n"
    assert (
        "give price or cost_per_hour, not both" in problems_of(both + "training: {tokens_per_second: 1}\n", tmp_path)[0]
    )


def test_models_without_rates_are_all_named():
    bare = Cluster.model_validate({"models": {}, "training": {"tokens_per_second": 1}})
    with pytest.raises(UserError) as caught:
        capacity.foretell(live(), bare)
    assert caught.value.problems == [
        f"models: no rates of {name}, which the recipe names; add them" for name in (ASKED, "smollm2")
    ]


def page() -> str:
    return (DOCS / "capacity.md").read_text(encoding="utf-8")


def cells(text: str, head: str) -> list[list[str]]:
    """The rows of the page's table whose first line begins so."""
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip().replace("*", "") for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(re.sub(r"[^\d.]", "", cell))


def test_the_pages_example_is_a_cluster_file(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(page().split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert set(capacity.load(file).models) == {"vllm/m", "Qwen/Qwen3-8B"}


def test_the_pages_tables_are_what_the_model_says():
    rates = {row[0]: row for row in cells(page(), "served")}
    for name, prompts, gpus, hours, gpu_hours, cost, share in cells(page(), "on"):
        _, of_one, read, written, trained, dear = rates[name]
        replicas = int(number(gpus) / number(of_one))
        served = {
            "replicas": replicas,
            "concurrency": 64,
            "read_tokens_per_second": number(read),
            "written_tokens_per_second": number(written),
            "cost_per_hour": number(of_one) * number(dear),
        }
        training = {"devices": int(number(gpus)), "tokens_per_second": number(trained), "cost_per_hour": number(dear)}
        models = {"vllm/m": {**served, "failure_rate": 0.01}, "Qwen/Qwen3-8B": served}
        given = Cluster.model_validate({"models": models, "training": training, "length": 0.5})
        workers = {8: 1, 64: 4, 512: 32}[int(number(gpus))]
        chosen = ["generate.teacher=vllm/m", "judge=vllm/m", f"limits.concurrency={ceil(64 * replicas / workers)}"]
        chosen += [f"ray={{workers: {workers}}}"] if workers > 1 else []
        rows = capacity.foretell(recipe.load(recipe.shipped(Path("gpu-8x80gb")), chosen), given, int(number(prompts)))
        whole, money = capacity.hours(rows), sum(row.cost or 0 for row in rows)
        assert number(hours) == pytest.approx(whole, abs=0.05) and number(cost) == pytest.approx(money, abs=0.5)
        assert number(gpu_hours) == pytest.approx(money / number(dear), abs=0.5)
        assert {row.limit for row in rows if row.stage in capacity.BESIDE} == {"tokens/s"}
        assert number(share) == pytest.approx(100 * of(rows, "filter", "vllm/m").hours / whole, abs=1)


def test_the_check_against_the_data_engine_is_told_as_it_is(tmp_path):
    """The benchmark's own recipe: its rows at 16 and at 64 were not fitted to, and are met within a fifth."""
    rows = [{"messages": [{"role": "user", "content": f"Is {n} odd?"}], "category": "violence"} for n in range(1000)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"judge: {ASKED}\ngenerate: {{teacher: {ASKED}, samples: 1}}\nprompts: {{train: prompts.jsonl}}\n")
    mock = cluster({"concurrency": 10_000, "latency_seconds": 0.2})
    told = cells(page(), "calls at once")
    assert [row[0] for row in told] == ["16", "64", "256, fitted"]
    for row in told:
        at_once = int(number(row[0]))
        found = capacity.foretell(recipe.load(file, [f"limits.concurrency={at_once}"]), mock)
        both = [of(found, stage) for stage in ("generate", "filter")]
        seconds = 3600 * capacity.hours(both)
        assert sum(row.calls for row in both) == 4000
        assert number(row[1]) == pytest.approx(4000 / seconds, abs=0.5)
        assert both[0].limit == row[3]
        if "fitted" not in row[0]:
            assert 0.8 < number(row[1]) / number(row[2]) < 1.2
