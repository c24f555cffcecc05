"""`delib tables`: the paper's tables with a run's arms, or any measured models, beside the paper's figures.

In: a run folder (all its arms), and `.eval` logs or JSON files of suites, each under its model's name or as
`NAME=FILE`; `sft=FILE` goes to a run's column of that name. Out: markdown. Each cell has value, interval and n; beside
each row stand prompts and judge of both sides. Only a file in the layout of a published set stands without "other
prompts", and is named.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from delib import measure, pipeline
from delib.errors import UserError
from delib.records import Metric
from delib.run import write_whole
from delib.stages.report import markdown_cell

NAMES = {"base": "base", "base_spec": "base, spec in its prompt", "sft": "SFT", "rl": "SFT + RL"}
JUDGE = "judge not told"


class Line(NamedTuple):
    """One row. `suite` and `figures`: where a log has it, the first figure that is there. `arm`: where a run has it, a
    figure and the part it is of. `published`: whether the paper's prompts are public, so that a file may be them."""

    name: str
    suite: str
    figures: tuple[str, ...]
    arm: tuple[str, dict[str, str] | None] | None
    paper: tuple[str, ...]
    prompts: str
    published: bool = False
    judge: str = JUDGE


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


STYLE = "safe_completion_style"
TABLES = (
    Table(
        "Table 1: safety",
        ("GPT-4o", "o1-preview", "o1", "o3-mini"),
        (
            Line(
                "challenging refusal, not_unsafe",
                "challenging_refusal",
                ("not_unsafe",),
                ("not_unsafe", {"source": "disallowed"}),
                ("0.80", "0.934", "0.90", "0.94"),
                "not public",
            ),
            Line(
                "toxic conversations, not_unsafe",
                "toxic_conversations",
                ("not_unsafe",),
                None,
                ("0.98", "0.98", "0.99", "0.98"),
                "WildChat, toxic ones",
                True,
            ),
            Line(
                "hard-refusal style",
                "hard_refusal_style",
                ("hard_refusal_style",),
                ("hard_refusal_style", {"source": "disallowed"}),
                ("0.72", "0.69", "0.79", "0.78"),
                "not public",
            ),
            Line(
                "self-harm safe-completion style",
                "self_harm_style",
                (STYLE,),
                (STYLE, {"category": "self-harm"}),
                ("0.04", "0.01", "0.92", "0.87"),
                "not public",
            ),
            Line(
                "regulated-advice style",
                "regulated_advice_style",
                (STYLE,),
                (STYLE, {"category": "regulated advice"}),
                ("0.28", "0.04", "0.65", "0.35"),
                "not public",
            ),
            Line(
                "StrongREJECT",
                "strong_reject",
                ("goodness@0.1", "not_unsafe@0.1"),
                None,
                ("0.37", "0.66", "0.88", "0.75"),
                "goodness@0.1; StrongREJECT, 60 prompts × 35 jailbreaks",
                True,
                "its grader, and people",
            ),
            Line(
                "XSTest, not_overrefuse",
                "xstest",
                ("not_overrefuse",),
                None,
                ("0.88", "0.976", "0.93", "0.90"),
                "XSTest",
                True,
            ),
            Line(
                "transformation exception, not_overrefuse",
                "transformation",
                ("not_overrefuse",),
                ("not_overrefuse", {"source": "transformation"}),
                ("0.28", "0.72", "0.89", "0.89"),
                "not public",
            ),
            Line(
                "policy over-refusal, not_overrefuse",
                "policy_overrefusal",
                ("not_overrefuse",),
                ("not_overrefuse", {"source": "lookalike"}),
                ("0.69", "0.87", "0.84", "0.83"),
                "not public",
            ),
        ),
    ),
    Table(
        "Table 2: policy retrieval from the reasoning",
        ("without training", "with all of it"),
        tuple(
            Line(
                name,
                "policy_retrieval",
                (figure,),
                (figure, None),
                paper,
                "not public",
                judge="sentences of the reasoning that speak of policies",
            )
            for name, figure, paper in (
                ("hard refusal", "policy_retrieval_refuse", ("0.27", "0.75")),
                ("safe completion", "policy_retrieval_safe_complete", ("0.21", "0.91")),
                ("comply", "policy_retrieval_comply", ("0.09", "0.54")),
            )
        ),
    ),
    Table(
        "Table 3: out of distribution",
        ("without training", "trained on plain English"),
        (
            Line(
                "encodings, all resisted",
                "encodings",
                ("all_resisted",),
                None,
                ("0.65±0.06", "0.97±0.02"),
                "not public, 250 prompts",
            ),
            Line(
                "other languages, not_unsafe",
                "multilingual",
                ("not_unsafe",),
                None,
                ("0.44±0.01", "0.69±0.01"),
                "not public",
            ),
        ),
    ),
)


class Cell(NamedTuple):
    metric: Metric
    figure: str
    prompts: str
    judge: str
    shipped: bool


Found = dict[tuple[str, str], Cell]
"""(column, row's suite and first figure) → what stands there."""


def write(run: Path | None, files: list[str], out: Path | None) -> str:
    """The tables as markdown; into `out` too, and then only its name is told. Raises UserError for all that can't be
    read."""
    columns: dict[str, str] = {}
    found: Found = {}
    problems: list[str] = []
    if run is not None:
        try:
            _of_run(run, columns, found)
        except UserError as error:
            problems += error.problems
    for given in files:
        name, equals, file = given.partition("=")
        try:
            _of_file(name if equals else None, Path(file if equals else given), columns, found)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    text = "\n".join(_table(table, columns, found) for table in TABLES)
    if out is None:
        return text
    write_whole(out, text)
    return f"the tables: {out}\n"


def _of_run(run: Path, columns: dict[str, str], found: Found) -> None:
    opened = pipeline.open_run(run)
    opened.answers()  # told in the pipeline's words where the arms are not measured
    metrics = _metrics(json.loads((opened.folder("evaluate").path / "metrics.json").read_text(encoding="utf-8")))
    recipe = opened.recipe
    columns.update({arm: NAMES[arm] for arm in recipe.evaluate.arms})
    known = {(m.arm, m.name, str(m.by)): m for m in metrics}
    for line in (line for table in TABLES for line in table.lines if line.arm):
        assert line.arm is not None
        figure, by = line.arm
        for arm in recipe.evaluate.arms:
            metric = known.get((arm, figure, str(by)))
            if metric is not None:
                found[arm, _key(line)] = Cell(metric, figure, str(recipe.prompts.heldout), recipe.judge, True)


def _of_file(name: str | None, file: Path, columns: dict[str, str], found: Found) -> None:
    about, metrics = _measured(file)
    column = name or str(about["model"])
    columns.setdefault(column, NAMES.get(column, column))
    suite = str(about["suite"])
    suffix = "_shipped" if str(about["headline"]).endswith("_shipped") else ""
    whole = {m.name.removesuffix(suffix): m for m in metrics if m.by is None}
    lines = [line for table in TABLES for line in table.lines if line.suite == suite]
    if not lines:
        raise UserError(f"{file}: {suite} is in none of these tables; name logs of {', '.join(_suites())}")
    judge = str(about.get("grader") if suite == "strong_reject" and about.get("grader") else about.get("judge"))
    attacks = f" × {len(about['attacks'])} attacks" if "attacks" in about else ""
    for line in lines:
        figure = next((f for f in line.figures if f in whole), None)
        if figure is None:
            raise UserError(f"{file}: has no {' and no '.join(line.figures)}; {_how(line)}")
        prompts = ("shipped" if suffix else str(about["data"])) + attacks
        found[column, _key(line)] = Cell(whole[figure], figure, prompts, judge, bool(suffix))


def _how(line: Line) -> str:
    if line.suite == "strong_reject":
        return "ask each prompt under many attacks, by -T attacks=all"
    return "nobody has answered a prompt that it is about"


def _suites() -> list[str]:
    return list(dict.fromkeys(line.suite for table in TABLES for line in table.lines))


def _measured(file: Path) -> tuple[dict[str, Any], list[Metric]]:
    if file.suffix == ".eval":
        log = measure.read_log(file)
        return measure.about_of(log), measure.metrics_of(log)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        about = data["about"]
        if "suite" in about:
            return about, _metrics(data["metrics"])
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a run folder first, and then logs and JSON files") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a file that 'delib eval --suite --json' wrote; make it anew") from None
    raise UserError(f"{file}: of prompts of your own, not of a suite; make it with 'delib eval --suite'")


def _metrics(rows: Any) -> list[Metric]:
    try:
        return [Metric.model_validate(row) for row in rows]
    except ValidationError as error:
        raise ValueError(str(error)) from error


def _key(line: Line) -> str:
    return f"{line.suite} {line.figures[0]}"


def _other(line: Line, cell: Cell) -> list[str]:
    """What about this cell is not as in the paper."""
    marks = ["other prompts"] if cell.shipped or not line.published else []
    marks += ["other attacks"] if line.suite == "strong_reject" else []
    return marks + ([cell.figure] if cell.figure != line.figures[0] else [])


def _shown(line: Line, cell: Cell | None) -> str:
    """Value, interval and n with what is not as in the paper. Nothing measured is a dash."""
    if cell is None:
        return "–"
    m = cell.metric
    marks = _other(line, cell)
    if m.value is None or m.low is None or m.high is None:
        return f"ungraded ({', '.join([f'{m.n_ungraded} answers', *marks])})"
    lost = [f"{m.n_ungraded} ungraded"] if m.n_ungraded else []
    return f"{m.value:.2f} [{m.low:.2f}–{m.high:.2f}] ({', '.join([f'n={m.n}', *lost, *marks])})"


def _table(table: Table, columns: dict[str, str], found: Found) -> str:
    head = [
        "",
        *columns.values(),
        "prompts, judge",
        *(f"paper: {c}" for c in table.columns),
        "paper's prompts, n, judge",
    ]
    rows = [head, ["---"] * len(head)]
    for line in table.lines:
        cells = [found.get((column, _key(line))) for column in columns]
        behind = dict.fromkeys(f"{c.prompts}; {c.judge}" for c in cells if c is not None)
        there = f"{line.prompts}; {'' if '×' in line.prompts or '250' in line.prompts else 'n not told; '}{line.judge}"
        rows.append([line.name, *(_shown(line, c) for c in cells), " / ".join(behind) or "–", *line.paper, there])
    text = "\n".join("| " + " | ".join(markdown_cell(cell) for cell in row) + " |" for row in rows)
    note = "Here: 95 % intervals, prompts resampled. Paper: arXiv 2412.16339v2, other models than these."
    return f"## {table.title}\n\n{text}\n\n{note}\n"
