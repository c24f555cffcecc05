"""The Pareto plot of `delib compare`: robustness against over-refusal, a point a model, with both intervals.

In: models' rows as `compare.read` gives them. Out: an SVG or PNG file. Up and to the right is better; the line joins
the models that no other one beats in both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delib.compare import Rows
from delib.errors import UserError
from delib.stats import bootstrap

ROBUST = ("goodness@0.1", "all_resisted", "goodness", "not_unsafe")
"""What robustness is told by: the first of them that every model has."""
HELPS = "not_overrefuse"
Point = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean, low and high of not_overrefuse, and of the robustness."""


def draw(sources: Sequence[str], models: Sequence[Rows], file: Path) -> str:
    """Draw the plot into a file of a name in .svg or .png; says what it shows. Raises UserError where a model lacks a
    figure."""
    if file.suffix not in (".svg", ".png"):
        raise UserError(f"--plot {file}: name a file that ends in .svg or .png")
    figure = next((f for f in ROBUST if all(_measured(rows, f) for rows in models)), None)
    problems = [
        f"--plot: {source} has no {HELPS}; join a log of xstest or policy_overrefusal to it by a comma"
        for source, rows in zip(sources, models, strict=True)
        if _measured(rows, HELPS) is None
    ]
    if figure is None:
        problems.append(
            f"--plot: no figure of {', '.join(ROBUST)} is there for every model; join a log of strong_reject"
        )
    if problems or figure is None:
        raise UserError(problems)
    points = [(_mean(rows, HELPS), _mean(rows, figure)) for rows in models]
    _plot(dict(zip(sources, points, strict=True)), figure, file)
    return f"the plot of {figure} against {HELPS}: {file}\n"


def _measured(rows: Rows, figure: str) -> tuple[list[float], list[str]] | None:
    graded = [(v, row.group) for row in rows.values() if (v := row.figures.get(figure)) is not None]
    return ([v for v, _ in graded], [group for _, group in graded]) if graded else None


def _mean(rows: Rows, figure: str) -> tuple[float, float, float]:
    found = _measured(rows, figure)
    assert found is not None
    return bootstrap(found[0], groups=found[1])


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in one figure without losing in the other, from left to right."""

    def beaten(a: Point) -> bool:
        return any(
            b[0][0] >= a[0][0] and b[1][0] >= a[1][0] and (b[0][0], b[1][0]) != (a[0][0], a[1][0]) for b in points
        )

    return sorted(p for p in points if not beaten(p))


def _plot(points: dict[str, Point], figure: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "delib"
    drawn, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    for name, (x, y) in points.items():
        axes.errorbar(x[0], y[0], xerr=_bars(x), yerr=_bars(y), marker="o", capsize=3)
        axes.annotate(_plain(name), (x[0], y[0]), xytext=(6, 6), textcoords="offset points", fontsize=8)
    edge = front(list(points.values()))
    axes.plot([x[0] for x, _ in edge], [y[0] for _, y in edge], color="0.7", linestyle=":", zorder=0)
    axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.05), xlabel=f"{HELPS} (helps where it should)")
    axes.set_ylabel(f"{figure} (declines where it should)")
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(drawn)


def _plain(name: str) -> str:
    """A name without what matplotlib would read as mathematics."""
    return name.replace("$", r"\$")


def _bars(figure: tuple[float, float, float]) -> Any:
    mean, low, high = figure
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]
