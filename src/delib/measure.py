"""`delib eval --suite`: one suite on one model, as an inspect_ai task, and its figures as a table.

In: a suite's name and a model, by delib's names or inspect_ai's. Out: the `.eval` log, which `inspect view` opens, the
table, and on demand figures and rows as JSON, which `delib compare` and `delib tables` read. `sweep` does it at several
limits of the completion's length.
"""

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from delib.errors import StageError, UserError
from delib.evals.scoring import HEADLINE
from delib.models import embedded, opened
from delib.progress import bar, say
from delib.records import Metric
from delib.run import write_whole
from delib.stages.prompts import content_id
from delib.stats import RESAMPLES, bootstrap
from delib.talk import shown, table


def suite(
    name: str,
    model: str,
    options: dict[str, str],
    log_dir: Path,
    limit: int | None = None,
    out: Path | None = None,
    how: dict[str, str] | None = None,
) -> str:
    """Run a suite and return its table. `options`: the task's own, such as judge, data and solver. `limit`: so
    many prompts, each under all attacks. `how`: model arguments of a model that is run here.

    Raises UserError for a mistake in any of these, StageError when the evaluation stopped; its log stands, and the same
    call goes on from it.
    """
    log = _evaluated(name, model, options, log_dir, limit, how)
    found = metrics_of(log)
    if out is not None:
        data = {"about": about_of(log), "metrics": [m.model_dump() for m in found], "rows": rows_of(log)}
        write_whole(out, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    about = log.eval.metadata or {}
    judged = f", judge {about['judge']}" if "judge" in about else ""
    lines = [f"{log.eval.task}: {model}, prompts {about['data']}{judged}"]
    failed = about_of(log)["failed"]
    lines += [f"{failed} of {log.results.total_samples} samples failed and are in no figure"] if failed else []
    suffix = _suffix(log)
    told = {about["headline"], "goodness" + suffix, *(name + suffix for name in HEADLINE)}
    lines.append(table([m for m in found if m.by is None or m.name in told]))
    return "\n".join(lines) + f"the log: {log.location}\n"


def sweep(
    name: str,
    model: str,
    options: dict[str, str],
    budgets: Sequence[int],
    log_dir: Path,
    limit: int | None = None,
    out: Path | None = None,
    how: dict[str, str] | None = None,
) -> str:
    """A suite at several lengths: its main figure against the tokens that a completion took, a line a budget.

    A budget is `max_tokens` of the whole completion, reasoning and answer, which every model obeys; one that thinks
    longer is cut off, and that counts against it. Raises as `suite` does.
    """
    if "max_tokens" in options:
        raise UserError("-T max_tokens: --budgets are its values; leave one of the two out")
    made, lines = [], list[str]()
    for budget in budgets:
        log = _evaluated(name, model, options | {"max_tokens": str(budget)}, log_dir, limit, how)
        found, about = metrics_of(log), about_of(log)
        tokens, cut = _lengths(log)
        made.append({"max_tokens": budget, "tokens": tokens.model_dump(), "cut_off": cut.model_dump()})
        made[-1] |= {"about": about, "metrics": [m.model_dump() for m in found], "log": log.location}
        main = next((m for m in found if m.by is None and m.name == about["headline"]), None)
        figure = f"{shown(main):24} {main.n}" if main else "–"
        figure += f", {main.n_ungraded} ungraded" if main and main.n_ungraded else ""
        lines.append(f"{budget:10} {shown(tokens):20} {shown(cut):22} {figure}")
    if out is not None:
        write_whole(out, json.dumps({"budgets": made}, ensure_ascii=False, indent=1) + "\n")
    head = f"{log.eval.task}: {model}, prompts {about['data']}\n"
    head += f"{'max_tokens':>10} {'tokens':20} {'cut_off':22} {about['headline']:24} n\n"
    note = "A budget is the most tokens of a whole completion, reasoning and answer; what is cut off counts against.\n"
    return head + "\n".join(lines) + "\n" + note


def budgets_of(text: str) -> list[int]:
    """Whole numbers with commas between. Raises UserError for others."""
    given = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in given):
        raise UserError(f"--budgets {text}: write whole numbers of tokens, such as 64,128,256")
    return sorted({int(part) for part in given})


def _lengths(log: Any) -> tuple[Metric, Metric]:
    """Tokens of a completion, and the share of completions that were cut off at the limit."""
    done = [(one, _group(one)) for one in log.samples or [] if one.error is None and one.output.choices]
    counted = [(float(one.output.usage.output_tokens), group) for one, group in done if one.output.usage]
    cut = [(float(one.output.stop_reason in ("max_tokens", "model_length")), group) for one, group in done]
    return _mean(log, "tokens", counted, len(done)), _mean(log, "cut_off", cut, len(done))


def _group(one: Any) -> str:
    prompt = one.metadata["prompt"]
    return str(prompt.get("group") or prompt["id"])


def _mean(log: Any, name: str, found: list[tuple[float, str]], n: int) -> Metric:
    value = low = high = None
    if found:
        value, low, high = bootstrap([v for v, _ in found], groups=[group for _, group in found])
    who = {"suite": log.eval.task, "arm": log.eval.model, "name": name}
    return Metric(**who, value=value, low=low, high=high, n=len(found), n_ungraded=n - len(found))


def _evaluated(
    name: str, model: str, options: dict[str, str], log_dir: Path, limit: int | None, how: dict[str, str] | None
) -> Any:
    """The log of a suite that was finished."""
    import inspect_ai
    from inspect_ai._util.error import PrerequisiteError

    from delib.evals import unfinished
    from delib.evals.building import at_end
    from delib.evals.provider import CONTEXT_TOKENS
    from delib.evals.registry import SUITES

    if name not in SUITES:
        raise UserError(f"--suite {name}: no such suite; one of {', '.join(SUITES)}")
    opened.check(model)
    hosted = opened.is_hosted(model)
    typed = _typed(name, SUITES[name], options)
    try:
        task = SUITES[name](**typed)
        most = limit and limit * len((task.metadata or {}).get("attacks", [name]))  # a sample for each attack
        total = len(task.dataset[:most])
        room = (task.config.max_tokens or 0) * _turns(task, typed) + embedded.PROMPT_ROOM
        # A model that delib runs itself makes no finished call again anyway, by its weights and not by its name.
        begun = unfinished.find(log_dir, task, model, typed, most) if hosted else None
        if begun:
            say(f"eval {task.name}: goes on from {begun[0]}, where {begun[1]} of {total} samples are finished")
        with bar(f"eval {task.name}", total, begun[1] if begun else 0) as ticker, at_end(ticker.step):
            if begun:
                log = inspect_ai.eval_retry(str(begun[0]), log_dir=str(log_dir), display="none")[0]
            else:
                log = inspect_ai.eval(
                    task,
                    model=model if hosted else f"delib/{model}",
                    model_args={} if hosted else {"context_tokens": max(room, CONTEXT_TOKENS)} | (how or {}),
                    limit=most,
                    log_dir=str(log_dir),
                    log_format="eval",
                    display="none",
                )[0]
    except PrerequisiteError as error:
        raise UserError(_plain(error)) from error
    if log.status != "success" or log.results is None:
        cause = log.error.message if log.error else log.status
        raise StageError(f"{name}: {cause}; the same command goes on; the log: {log.location}")
    return log


def _turns(task: Any, options: dict[str, Any]) -> int:
    """The most completions of one sample: an attack in several turns has each of them answered."""
    from delib.evals.building import turns

    under = max(map(turns, (task.metadata or {}).get("attacks", ["none"])))
    return under + turns(options.get("solver", "none")) - 1


def about_of(log: Any) -> dict[str, Any]:
    """What was measured, on what and by whom, as the log keeps it."""
    lost = {} if log.results is None else {"failed": log.results.total_samples - log.results.completed_samples}
    which = {"limit": log.eval.config.limit} if log.eval.config.limit is not None else {}
    return {"task": log.eval.task, "model": log.eval.model} | lost | which | (log.eval.metadata or {})


def read_log(path: Path, header_only: bool = False) -> Any:
    """A finished log of one of these suites, or all of it but its samples. Raises UserError for any other file."""
    from inspect_ai.log import read_eval_log

    try:
        log = read_eval_log(str(path), header_only=header_only)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no .eval log that can be read ({error})") from None
    if "headline" not in (log.eval.metadata or {}):
        raise UserError(f"{path}: a log of {log.eval.task}, which is no suite of delib's; name a log of delib/SUITE")
    if log.status != "success" or log.results is None:
        raise UserError(f"{path}: this evaluation is not finished; go on with 'inspect eval-retry {path}'")
    return log


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
    """The figures of a log of these suites, as `scorers.figures` told them, and the same by category and, where each
    prompt was asked under many attacks, by attack; one that nobody graded has no value."""
    whole = [{key: one.value for key, one in score.metrics.items()} for score in log.results.scores]
    return [m for told in whole for m in _metrics(log, told, None)] + _by(log, "category") + _by(log, "attack")


def _metrics(log: Any, told: dict[str, Any], by: dict[str, str] | None) -> list[Metric]:
    found = []
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
                by=by,
            )
        )
    return found


def _by(log: Any, key: str) -> list[Metric]:
    """The figures of each category or attack, by the metrics that the task itself has; none where all have one."""
    from inspect_ai.scorer import SampleScore

    from delib.evals.scorers import by_prompt, figures

    parts: dict[str, dict[str, list[Any]]] = {}
    for one in log.samples or []:
        label = one.metadata.get("under") if key == "attack" else _category(one)
        for scorer, score in (one.scores or {}).items():
            scored = SampleScore(score=score, sample_id=one.id, sample_metadata=one.metadata, scorer=scorer)
            parts.setdefault(str(label or "none"), {}).setdefault(scorer, []).append(scored)
    kept = log.eval.metadata
    measures = [figures(kept.get("resamples", RESAMPLES), _suffix(log))]
    if key == "category" and "attacks" in kept:
        measures.append(by_prompt(kept.get("resamples", RESAMPLES), _suffix(log)))
    found = []
    for label in sorted(parts) if len(parts) > 1 else ():
        for scores in parts[label].values():
            for told in (cast(dict[str, Any], measured(scores)) for measured in measures):
                found += _metrics(log, told, {key: label})
    return found


def _category(one: Any) -> str | None:
    label = one.metadata["prompt"].get("category") or one.metadata.get("published_category")
    return None if label is None else str(label)


def _suffix(log: Any) -> str:
    return "_shipped" if log.eval.metadata["headline"].endswith("_shipped") else ""


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
        "messages": [m.model_dump() for m in prompt.messages],
        "under": one.metadata.get("under"),
        "source": prompt.source,
        "group": prompt.group or prompt.id,
        "figures": figures,
    }
