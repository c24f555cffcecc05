"""Any model, outside a run: `delib chat`, `delib eval`, `delib judge-check`."""

import asyncio
import json
import shutil
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from delib import pipeline
from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.evals.scoring import metrics, values
from delib.judges import agreement
from delib.judges.compact import CompactJudge
from delib.models import weights
from delib.progress import bar
from delib.recipe import Recipe
from delib.records import Message, Metric
from delib.run import StageFolder, key_of, sha256, write_whole
from delib.stages import evaluate
from delib.stages import prompts as prompts_stage


def recipe_of(model: str) -> Recipe:
    """The recipe of the run that a checkpoint stands in, else the quickstart's; it gives spec and max_tokens."""
    beside = Path(model).resolve().parent.parent / "recipe.yaml"
    return recipes.load(beside if beside.exists() else recipes.QUICKSTART)


def chat(model: str, max_tokens: int) -> None:
    """Read lines, answer each with the whole conversation so far."""
    source, recipe = weights.resolve(model), recipe_of(model)
    console = Console()

    async def talk() -> None:
        messages: list[Message] = []
        async with pipeline.open_model(recipe, source, model, 4096) as opened:
            while True:
                try:
                    line = await asyncio.to_thread(input, "you> ")
                except EOFError:
                    return
                if not line.strip():
                    return
                messages.append(Message(role="user", content=line))
                made = await opened.complete(messages, max_tokens=max_tokens, temperature=0.0, seed=0)
                if made.reasoning:
                    console.print(made.reasoning, style="dim", markup=False, highlight=False)
                console.print(made.answer or f"({made.finish}: no answer)", markup=False, highlight=False)
                messages.append(Message(role="assistant", content=made.answer))

    asyncio.run(talk())


def evaluate_file(model: str, prompts: Path, out: Path | None, limit: int | None) -> str:
    """Answer and grade a file of prompts; returns the table, writes figures and rows to `out`."""
    recipe = recipe_of(model)
    spec = specs.load(recipes.path_of(recipe.spec))
    rows = prompts_stage.load(prompts, spec, "heldout")[:limit]
    source = weights.resolve(model)
    place = out or Path(prompts.name)
    work = StageFolder(place.with_name(f"{place.name}.{Path(model).name}.work"))
    work.begin(key_of([recipe.evaluate.model_dump(), limit], 0, {"model": sha256(source), "prompts": sha256(prompts)}))

    def opened() -> AbstractAsyncContextManager[Any]:
        return pipeline.open_model(recipe, source, model, 2048)

    answered = evaluate.answer_all(
        rows, opened, spec, work, what="eval", in_context=False, max_tokens=recipe.evaluate.max_tokens
    )
    graded = evaluate.grade(answered, [CompactJudge(spec)])
    found = metrics(graded, spec, model, prompts.stem)
    if out is not None:
        data = {
            "metrics": [m.model_dump() for m in found],
            "rows": [
                {
                    "id": s.prompt.id,
                    "reasoning": s.completion.reasoning if s.completion else None,
                    "answer": s.completion.answer if s.completion else None,
                    "finish": s.completion.finish if s.completion else None,
                    "verdict": s.verdicts[0].model_dump() if s.verdicts else None,
                    "prompt": prompts_stage.content_id(s.prompt),
                    "source": s.prompt.source,
                    "group": s.prompt.group or s.prompt.id,
                    "figures": values(s, spec),
                }
                for s in graded
            ],
        }
        write_whole(out, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    shutil.rmtree(work.path)
    return table([m for m in found if m.by is None])


def table(found: list[Metric]) -> str:
    """Figures as lines: name, value with interval, n. A figure of nothing is not printed as a number."""
    lines = []
    for metric in found:
        if metric.value is None or metric.low is None or metric.high is None:
            shown = "ungraded"
        elif metric.name == "tokens":
            shown = f"{metric.value:.0f} [{metric.low:.0f}, {metric.high:.0f}]"
        else:
            shown = f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
        extra = f", {metric.n_ungraded} ungraded" if metric.n_ungraded else ""
        lines.append(f"{metric.name:32} {shown:24} n={metric.n}{extra}")
    return "\n".join(lines) + "\n"


def judge_check(judge: str, data: Path, as_json: bool) -> str:
    """Agreement of a judge with labelled answers: comply against the rest, and all four labels."""
    if judge not in pipeline.JUDGES:
        raise UserError(f"--judge {judge}: no such judge; {' and '.join(pipeline.JUDGES)} are there")
    rows = agreement.load(data)
    opened = pipeline.JUDGES[judge](specs.load(recipes.STARTER / "spec.md"))
    with bar("judge-check", len(rows)) as ticker:
        result = agreement.measure(opened, rows, ticker.step)
    if as_json:
        return json.dumps(result) + "\n"
    lines = [f"{k}: {v:.3f}" if isinstance(v, float) else f"{k}: {v}" for k, v in result.items() if k != "rows"]
    return "\n".join(lines) + "\n"
