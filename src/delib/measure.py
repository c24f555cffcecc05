"""`delib eval --suite`: one suite on one model, as an inspect_ai task, and its figures as a table.

In: a suite's name and a model, by delib's names or inspect_ai's. Out: the `.eval` log, which `inspect view` opens, the
table, and on demand figures and rows as JSON, which `delib compare` reads.
"""

import json
import math
from pathlib import Path
from typing import Any

from delib.errors import StageError, UserError
from delib.models import opened
from delib.progress import bar
from delib.records import Metric
from delib.run import write_whole
from delib.stages.prompts import content_id
from delib.talk import table


def suite(
    name: str, model: str, options: dict[str, str], log_dir: Path, limit: int | None = None, out: Path | None = None
) -> str:
    """Run a suite and return its table. `options`: the task's own, such as judge, data and solver.

    Raises UserError for a mistake in any of these, StageError when the evaluation stopped; its log stands, and
    `inspect eval-retry` goes on from it.
    """
    import inspect_ai
    from inspect_ai._util.error import PrerequisiteError

    from delib.evals.registry import SUITES

    if name not in SUITES:
        raise UserError(f"--suite {name}: no such suite; one of {', '.join(SUITES)}")
    opened.check(model)
    hosted = opened.is_hosted(model)
    try:
        task = SUITES[name](**_typed(name, SUITES[name], options))
        total = len(task.dataset[:limit])
        with bar(f"eval {task.name}", total) as ticker:

            async def step(_: Any) -> None:
                ticker.step()

            task.cleanup = step
            log = inspect_ai.eval(
                task,
                model=model if hosted else f"delib/{model}",
                limit=limit,
                log_dir=str(log_dir),
                log_format="eval",
                display="none",
            )[0]
    except PrerequisiteError as error:
        raise UserError(_plain(error)) from error
    if log.status != "success" or log.results is None:
        cause = log.error.message if log.error else log.status
        raise StageError(f"{name}: {cause}; the log, from which 'inspect eval-retry' goes on: {log.location}")
    found = metrics_of(log)
    if out is not None:
        data = {"metrics": [m.model_dump() for m in found], "rows": rows_of(log)}
        write_whole(out, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    about = log.eval.metadata or {}
    judged = f", judge {about['judge']}" if "judge" in about else ""
    lines = [f"{task.name}: {model}, prompts {about['data']}{judged}"]
    failed = log.results.total_samples - log.results.completed_samples
    lines += [f"{failed} of {log.results.total_samples} samples failed and are in no figure"] if failed else []
    return "\n".join(lines) + "\n" + table(found) + f"the log: {log.location}\n"


def options_of(given: list[str]) -> dict[str, str]:
    """The options in texts such as `data=FILE`. Raises UserError for those that are none."""
    parts = [text.partition("=") for text in given]
    problems = [f"-T {key}: write key=value, such as -T data=FILE" for key, equals, _ in parts if not equals]
    if problems:
        raise UserError(problems)
    return {key: value for key, _, value in parts}


def _typed(name: str, task: Any, options: dict[str, str]) -> dict[str, Any]:
    """The options that a task has, whole numbers as such. Raises UserError for others."""
    import inspect

    known = inspect.signature(task).parameters
    problems = [
        f"-T {key}: {name} has no such option; it has {', '.join(known)}" for key in options if key not in known
    ]
    needed = [key for key, one in known.items() if one.default is one.empty and key not in options]
    problems += [f"{name}: needs -T {key}=…" for key in needed]
    if "max_tokens" in options and not options["max_tokens"].isdecimal():
        problems.append(f"-T max_tokens={options['max_tokens']}: not a whole number")
    if problems:
        raise UserError(problems)
    return {key: int(value) if key == "max_tokens" else value for key, value in options.items()}


def _plain(error: Exception) -> list[str]:
    """The problems in an error of inspect's, without its mark-up."""
    from rich.text import Text

    text = Text.from_markup(str(getattr(error, "message", error))).plain
    return [line for line in text.removeprefix("error: ").splitlines() if line.strip()]


def metrics_of(log: Any) -> list[Metric]:
    """The figures of a log of these suites, as `scorers.figures` told them; one that nobody graded has no value."""
    found = []
    for score in log.results.scores:
        told = {key: one.value for key, one in score.metrics.items()}
        for key, ungraded in told.items():
            name = key.removesuffix("_ungraded")
            if name == key:
                continue
            found.append(
                Metric(
                    suite=log.eval.task,
                    arm=log.eval.model,
                    name=name,
                    value=told.get(name),
                    low=told.get(f"{name}_low"),
                    high=told.get(f"{name}_high"),
                    n=round(told.get(f"{name}_n", 0)),
                    n_ungraded=round(ungraded),
                )
            )
    return found


def rows_of(log: Any) -> list[dict[str, Any]]:
    """A row a sample, as `delib eval --prompts --json` writes them; those that failed have no figures."""
    return [_row(one) for one in log.samples or []]


def _row(one: Any) -> dict[str, Any]:
    from delib.evals.scorers import prompt_of, reading

    made = reading(one.output, one.messages).made
    figures: dict[str, float | None] = {}
    for score in (one.scores or {}).values():
        figures |= {k: None if math.isnan(v) else v for k, v in score.as_dict().items()}
    prompt = prompt_of(one.metadata)
    return {
        "id": one.id,
        "epoch": one.epoch,
        "reasoning": made.reasoning if made else None,
        "answer": made.answer if made else None,
        "finish": made.finish if made else None,
        "prompt": content_id(prompt),
        "source": prompt.source,
        "group": prompt.group or prompt.id,
        "figures": figures,
    }
