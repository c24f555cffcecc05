"""`delib tables`: the paper's tables with a run's arms, or any measured models, beside the paper's figures.

In: a run folder (all its arms, those of an ablation too), and `.eval` logs or JSON files of suites, each under its
model's name or as `NAME=FILE`; `sft=FILE` goes to a run's column of that name, and a sweep's file to a table of its
own. Out: markdown. Each cell has value, interval and n; beside each row stand prompts and judge of both sides. Only a
file in the layout of a published set stands without "other prompts", and is named. `of_run` measures what a run itself
does not: each arm by each suite, which stands in `tables/ARM-SUITE.json` and is not made again.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from delib import measure, pipeline
from delib.errors import UserError
from delib.evals.scoring import JUDGED, by_judge
from delib.paper import TABLES, Line, Table
from delib.progress import say
from delib.records import Metric
from delib.run import key_of, write_whole
from delib.stages.report import markdown_cell
from delib.talk import shown
from delib.wiring import CHECKPOINT

NAMES = {
    "base": "base",
    "base_spec": "base, spec in its prompt",
    "cold_start": "form alone",
    "sft": "SFT",
    "rl_only": "RL only",
    "rl": "SFT + RL",
}
ATTACKED = {"strong_reject": {"attacks": "all"}, "encodings": {}}
"""The suites that ask each prompt under many attacks, and what they must be told for it."""
SUITES = ("toxic_conversations", "xstest", "multilingual", *ATTACKED)
"""The suites of the rows for which a run's own evaluation has no figure."""
SWEPT = ("challenging_refusal", "regulated_advice_style", "policy_overrefusal")
"""The suites of a sweep: safety, the style that rises with compute in the paper, and over-refusal."""


SECOND = "_second_judge"


class Origin(NamedTuple):
    """What a figure was measured on and by whom. `lost`: samples that failed and are in no figure. `part`: whether only
    the first prompts were asked."""

    prompts: str
    judge: str
    shipped: bool
    second: str | None = None
    lost: int = 0
    part: bool = False


class Cell(NamedTuple):
    """`second`: the same figure by the second judge."""

    metric: Metric
    figure: str
    origin: Origin
    second: Metric | None = None


Found = dict[tuple[str, str], Cell]
"""(column, row's suite and first figure) → what stands there."""


class Budget(NamedTuple):
    """One limit of a sweep. `suite`: the suite's name, without `_shipped`."""

    column: str
    suite: str
    origin: Origin
    figure: Metric
    tokens: Metric
    cut_off: Metric
    most: int


def of_run(run: Path, arms: list[str], prompts: int, budgets: list[int]) -> list[str]:
    """Measure these arms by each of `SUITES`, and by `SWEPT` at each of the `budgets`, but for what stands; the files,
    as `write` takes them. `prompts`: how many of the suites that ask each under many attacks. Raises UserError for an
    arm without a model of its own, and as `measure.suite` does."""
    opened = pipeline.open_run(run)
    known = [arm for arm in opened.answers() if arm != "base_spec"]  # suites ask without the spec
    if wrong := [arm for arm in arms if arm not in known]:
        raise UserError(
            f"--measure {','.join(wrong)}: name arms of this run, of {', '.join(known)}, with commas between"
        )
    recipe, made = opened.recipe, []
    how: dict[str, str] = {"engine": recipe.engine, "device": recipe.device, "dtype": recipe.dtype}
    how |= {"quantisation": recipe.evaluate.quantisation}
    options = {"judge": recipe.judge, "spec": str(opened.spec_path)}
    options |= {"second_judge": recipe.evaluate.second_judge} if recipe.evaluate.second_judge else {}
    own = opened.own_inputs("evaluate")
    for arm in arms:
        model, weights = _model(opened, arm)
        inputs = own | {"weights": key_of(weights, 0, {})}
        for suite, most in [
            *((suite, [recipe.evaluate.max_tokens]) for suite in SUITES),
            *((s, budgets) for s in SWEPT),
        ]:
            if not most:
                continue
            told, limit = options | ATTACKED.get(suite, {}), prompts if suite in ATTACKED else None
            key = key_of([suite, told | {"spec": None}, limit, most, how], 0, inputs)
            file = run / "tables" / f"{arm}-{suite}-{key[:8]}.json"
            if not file.exists():
                say(f"tables: {arm} by {suite}")
                if suite in SUITES:
                    told |= {"max_tokens": str(most[0])}
                    measure.suite(suite, model, told, file.parent / "logs", limit, file, how)
                else:
                    measure.sweep(suite, model, told, most, file.parent / "logs", limit, file, how)
            made.append(f"{arm}={file}")
    return made


def _model(opened: Any, arm: str) -> tuple[str, dict[str, str]]:
    """An arm's model by name, and the hashes of its weights."""
    if arm == "base":
        return opened.recipe.model, {}
    folder = opened.folder(arm)
    manifest = folder.manifest()
    if manifest is None:
        raise UserError(f"--measure {arm}: its stage is not finished; run 'delib run' to its end first")
    return str(folder.path / CHECKPOINT), manifest.outputs


def write(run: Path | None, files: list[str], out: Path | None) -> str:
    """The tables as markdown; into `out` too, and then only its name is told. Raises UserError for all that can't be
    read."""
    columns: dict[str, str] = {}
    found: Found = {}
    swept: list[Budget] = []
    problems: list[str] = []
    if run is not None:
        try:
            _of_run(run, columns, found)
        except UserError as error:
            problems += error.problems
    for given in files:
        name, equals, file = given.partition("=")
        try:
            _of_file(name if equals else None, Path(file if equals else given), columns, found, swept)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    parts = [_table(table, columns, found) for table in TABLES]
    text = "\n".join([*parts, *([_sweeps(swept, columns)] if swept else [])])
    if out is None:
        return text
    write_whole(out, text)
    return f"the tables: {out}\n"


def _of_run(run: Path, columns: dict[str, str], found: Found) -> None:
    opened = pipeline.open_run(run)
    answers = opened.answers()  # told in the pipeline's words where the arms are not measured
    stages = ["evaluate", *(["ablate"] if answers.keys() - set(opened.recipe.evaluate.arms) else [])]
    places = [opened.folder(stage).path / "metrics.json" for stage in stages]
    metrics = [m for place in places for m in _metrics(json.loads(place.read_text(encoding="utf-8")))]
    recipe = opened.recipe
    columns.update({arm: name for arm, name in NAMES.items() if arm in answers})
    known = {(m.arm, m.name, str(m.by)): m for m in metrics}
    second = recipe.evaluate.second_judge
    origin = Origin(str(recipe.prompts.heldout), recipe.judge, True, second)
    for line in (line for table in TABLES for line in table.lines if line.arm):
        assert line.arm is not None
        figure, by = line.arm
        for arm in answers:
            metric = known.get((arm, figure, str(by)))
            if metric is not None:
                part = [s for s in answers[arm] if all(getattr(s.prompt, k) == v for k, v in (by or {}).items())]
                others = by_judge(part, opened.spec, arm, second) if second else []
                other = next((m for m in others if m.name == figure), None)
                judge = recipe.judge if figure in JUDGED else "by rule"
                found[arm, _key(line)] = Cell(metric, figure, origin._replace(judge=judge), other)


def _of_file(name: str | None, file: Path, columns: dict[str, str], found: Found, swept: list[Budget]) -> None:
    data = _measured(file)
    if isinstance(data, list):
        swept += [row._replace(column=name or row.column) for row in data]
        return
    about, metrics = data
    column = name or str(about["model"])
    columns.setdefault(column, NAMES.get(column, column))
    suite = str(about["suite"])
    origin = _origin(about)
    suffix = "_shipped" if origin.shipped else ""
    whole = {m.name.removesuffix(suffix): m for m in metrics if m.by is None}
    lines = [line for table in TABLES for line in table.lines if line.suite == suite]
    if not lines:
        raise UserError(f"{file}: {suite} is in none of these tables; name logs of {', '.join(_suites())}")
    for line in lines:
        figure = next((f for f in line.figures if f in whole), None)
        if figure is None:
            raise UserError(f"{file}: has no {' and no '.join(line.figures)}; {_how(line)}")
        found[column, _key(line)] = Cell(whole[figure], figure, origin, whole.get(figure + SECOND))


def _origin(about: dict[str, Any]) -> Origin:
    shipped = str(about["headline"]).endswith("_shipped")
    prompts = "shipped" if shipped else str(about["data"])
    prompts += f" × {len(about['attacks'])} attacks" if "attacks" in about else ""
    judge = about.get("grader") if about["suite"] == "strong_reject" and about.get("grader") else about.get("judge")
    lost, part = about.get("failed", 0), "limit" in about
    return Origin(prompts, str(judge or "by rule"), shipped, about.get("second_judge"), lost, part)


def _how(line: Line) -> str:
    if line.suite == "strong_reject":
        return "ask each prompt under many attacks, by -T attacks=all"
    return "nobody has answered a prompt that it is about"


def _suites() -> list[str]:
    return list(dict.fromkeys(line.suite for table in TABLES for line in table.lines))


def _measured(file: Path) -> tuple[dict[str, Any], list[Metric]] | list[Budget]:
    """What a suite found, or a sweep of one."""
    if file.suffix == ".eval":
        log = measure.read_log(file)
        return measure.about_of(log), measure.metrics_of(log)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if "budgets" in data:
            return [_budget(row) for row in data["budgets"]]
        about = data["about"]
        if "suite" in about:
            return about, _metrics(data["metrics"])
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a run folder first, and then logs and JSON files") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a file that 'delib eval --suite --json' wrote; make it anew") from None
    raise UserError(f"{file}: of prompts of your own, not of a suite; make it with 'delib eval --suite'")


def _budget(row: dict[str, Any]) -> Budget:
    about = row["about"]
    tokens, cut_off, *figures = _metrics([row["tokens"], row["cut_off"], *row["metrics"]])
    main = {m.name: m for m in figures if m.by is None}[about["headline"]]
    return Budget(str(about["model"]), str(about["suite"]), _origin(about), main, tokens, cut_off, row["max_tokens"])


def _metrics(rows: Any) -> list[Metric]:
    try:
        return [Metric.model_validate(row) for row in rows]
    except ValidationError as error:
        raise ValueError(str(error)) from error


def _key(line: Line) -> str:
    return f"{line.suite} {line.figures[0]}"


def _other(line: Line, cell: Cell) -> list[str]:
    """What about this cell is not as in the paper."""
    others = cell.origin.shipped or not line.published
    marks = ["other prompts"] if others else ["a part of the prompts"] if cell.origin.part else []
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
    lost += [f"{cell.origin.lost} failed"] if cell.origin.lost else []
    text = f"{m.value:.2f} [{m.low:.2f}–{m.high:.2f}] ({', '.join([f'n={m.n}', *lost, *marks])})"
    other = cell.second
    if other is None or other.value is None or other.low is None or other.high is None:
        return text
    return f"{text}; {cell.origin.second}: {other.value:.2f} [{other.low:.2f}–{other.high:.2f}]"


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
        behind = dict.fromkeys(f"{c.origin.prompts}; {c.origin.judge}" for c in cells if c is not None)
        there = f"{line.prompts}; {'' if '×' in line.prompts or '250' in line.prompts else 'n not told; '}{line.judge}"
        rows.append([line.name, *(_shown(line, c) for c in cells), " / ".join(behind) or "–", *line.paper, there])
    text = "\n".join("| " + " | ".join(markdown_cell(cell) for cell in row) + " |" for row in rows)
    note = "Here: 95 % intervals, prompts resampled. Paper: arXiv 2412.16339v2, other models than these."
    return f"## {table.title}\n\n{text}\n\n{note}\n"


def _sweeps(rows: list[Budget], columns: dict[str, str]) -> str:
    head = ["", "suite, figure", "most tokens", "tokens of a completion", "cut off", "figure", "prompts, judge"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        m, name = row.figure, columns.get(row.column, NAMES.get(row.column, row.column))
        lost = f", {m.n_ungraded} ungraded" if m.n_ungraded else ""
        lost += f", {row.origin.lost} failed" if row.origin.lost else ""
        cells = [f"{row.suite}, {m.name}", str(row.most), shown(row.tokens), shown(row.cut_off)]
        lines.append([name, *cells, f"{shown(m)} (n={m.n}{lost})", f"{row.origin.prompts}; {row.origin.judge}"])
    text = "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines)
    note = (
        "Most tokens: of reasoning and answer together; what is cut off counts against the model. Paper: StrongREJECT "
        "and the style of regulated advice rise with more reasoning, the rest stays flat."
    )
    return f"## Inference compute\n\n{text}\n\n{note}\n"
