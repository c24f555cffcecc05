"""Any model, outside a run: `delib chat`, `delib eval`, `delib judge-check`."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from delib import recipe as recipes
from delib import sources
from delib import spec as specs
from delib.errors import UserError
from delib.evals.scoring import HEADLINE, metrics, values
from delib.judges import agreement
from delib.judges.prompted import PromptedJudge
from delib.models import embedded, opened, weights
from delib.models.calls import CallError, here
from delib.opener import FITTED, Judge, Opener, recipe_of
from delib.progress import bar
from delib.records import Message, Metric
from delib.run import StageFolder, key_of, sha256, write_whole
from delib.stages import evaluate
from delib.stages import prompts as prompts_stage


def chat(model: str, max_tokens: int, hide_reasoning: bool = False, system: str | None = None) -> None:
    """Read lines, answer each with the whole conversation so far, after the `system` message where there is one."""
    recipe = recipe_of(model)
    opener = Opener(recipe, specs.load(recipes.path_of(recipe.spec)))
    console = Console()

    async def talk() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would wait for the line to end
        messages = [] if system is None else [Message(role="system", content=system)]
        async with opener.any(model, max(4096, embedded.PROMPT_ROOM + max_tokens), slots=1) as answering:
            while True:
                try:
                    line = input("you> ")  # nothing else is at work meanwhile
                except EOFError:
                    return
                if not line.strip():
                    return
                messages.append(Message(role="user", content=line))
                try:
                    made = await answering.complete(messages, max_tokens=max_tokens, temperature=0.0, seed=0)
                except CallError as error:
                    console.print(f"error: {error}", markup=False, highlight=False)
                    messages.pop()
                    continue
                if made.reasoning and not hide_reasoning:
                    console.print(made.reasoning, style="dim", markup=False, highlight=False)
                console.print(made.answer or f"({made.finish}: no answer)", markup=False, highlight=False)
                messages.append(Message(role="assistant", content=made.answer))

    asyncio.run(talk())


def evaluate_file(model: str, prompts: Path, out: Path | None, limit: int | None) -> str:
    """Answer and grade a file of prompts; returns the table, writes figures and rows to `out`."""
    if out is not None and out.is_dir():
        raise UserError(f"--json {out}: is a folder; name a file in it")
    recipe = recipe_of(model)
    spec = specs.load(recipes.path_of(recipe.spec))
    opener = Opener(recipe, spec)
    rows = prompts_stage.load(prompts, spec, "heldout")[:limit]
    opened.check(model)
    file = Path(model) if model.endswith(".gguf") else None
    identity = model if opened.is_hosted(model) else sha256(file or weights.resolve(model))

    @asynccontextmanager
    async def first_judge() -> AsyncIterator[list[Judge]]:
        async with opener.judge(recipe.judge) as judge:
            yield [judge]

    place = out or Path(prompts.name)
    inputs = {"model": identity, "prompts": sources.identity(prompts)}
    key = key_of([recipe.evaluate.model_dump(), limit], 0, inputs)
    work = StageFolder(place.with_name(f"{place.name}.{key[:12]}.work"))
    work.begin(key)
    answering = partial(
        evaluate.working,
        partial(opener.any, model, embedded.PROMPT_ROOM + recipe.evaluate.max_tokens),
        spec,
        in_context=False,
        max_tokens=recipe.evaluate.max_tokens,
    )
    answered = evaluate.answer_all(rows, here(answering, evaluate.AT_ONCE), spec, work, "eval")
    graded = evaluate.grade(answered, first_judge, opener.at_once)
    found = metrics(graded, spec, model, prompts.stem)
    if out is not None:
        data = {
            "about": {"model": model, "data": prompts.name, "judge": recipe.judge},
            "metrics": [m.model_dump() for m in found],
            "rows": [
                {
                    "id": s.prompt.id,
                    "reasoning": s.completion.reasoning if s.completion else None,
                    "answer": s.completion.answer if s.completion else None,
                    "finish": s.completion.finish if s.completion else None,
                    "verdict": s.verdicts[0].model_dump() if s.verdicts else None,
                    "prompt": prompts_stage.content_id(s.prompt),
                    "messages": [m.model_dump() for m in s.prompt.messages],
                    "source": s.prompt.source,
                    "group": s.prompt.group or s.prompt.id,
                    "figures": values(s, spec),
                }
                for s in graded
            ],
        }
        write_whole(out, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    shutil.rmtree(work.path, ignore_errors=True)
    by_category = [m for m in found if m.by and "category" in m.by and m.name in HEADLINE]
    several = len({m.by["category"] for m in by_category if m.by}) > 1
    return table([m for m in found if m.by is None] + (by_category if several else []))


def table(found: list[Metric]) -> str:
    """Figures as lines: name, what part it is of, value with interval, n. A figure of nothing is not printed as a
    number."""
    lines = []
    names = [f"{m.name} ({', '.join(m.by.values())})" if m.by else m.name for m in found]
    width = max([32, *map(len, names)])
    for name, metric in zip(names, found, strict=True):
        extra = f", {metric.n_ungraded} ungraded" if metric.n_ungraded else ""
        lines.append(f"{name:{width}} {shown(metric):24} n={metric.n}{extra}")
    return "\n".join(lines) + "\n"


def shown(metric: Metric) -> str:
    """A figure's value with its interval."""
    if metric.value is None or metric.low is None or metric.high is None:
        return "ungraded"
    digits = 0 if metric.name == "tokens" else 3
    return f"{metric.value:.{digits}f} [{metric.low:.{digits}f}, {metric.high:.{digits}f}]"


def judge_check(judge: str, data: Path, as_json: bool) -> str:
    """Agreement of a judge with labelled answers: comply against the rest, the whole and by category, and all four
    labels where the file's tell them."""
    if judge not in FITTED:
        try:
            opened.check(judge)
        except UserError as error:
            known = " and ".join(FITTED)
            raise UserError(f"--judge {judge}: no such judge; {known} are there, or {error}") from None
    rows = agreement.load(data)
    opener = Opener(recipes.load(recipes.QUICKSTART), specs.load(recipes.STARTER / "spec.md"))

    async def work(step: Callable[[], None]) -> dict[str, Any]:
        async with opener.judge(judge) as asked:
            if isinstance(asked, PromptedJudge):
                return await agreement.ask(asked, rows, opener.at_once, step)
            return agreement.measure(asked, rows, step)

    with bar("judge-check", len(rows)) as ticker:
        result = asyncio.run(work(ticker.step))
    if as_json:
        return json.dumps(result) + "\n"
    return "\n".join(agreement.lines(result)) + "\n"
