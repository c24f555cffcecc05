"""The commands that set figures side by side: compare, coverage, diff, tables. As cli.py: no logic."""

from pathlib import Path
from typing import Annotated

import typer

from delib import completing
from delib.cli_folders import RunArgument, fetched, run_folder
from delib.errors import UserError

figures_app = typer.Typer()


@figures_app.command()
def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="RUN:ARM, an .eval log of a suite, or a JSON file that 'delib eval' wrote, each of a model.",
            autocompletion=completing.run_arms,
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw robustness against over-refusal, as .svg or .png.")
    ] = None,
    changed: Annotated[int, typer.Option("--changed", min=0, help="Show N prompts that changed sides.")] = 0,
) -> None:
    """Compare models on the same prompts, each with the first: paired differences of each figure, with intervals."""
    from delib import compare as comparing

    if len(sources) < 2:
        raise UserError(f"compare: {sources[0]} alone; name at least two models' figures")
    models = [comparing.read(source) for source in sources]
    typer.echo(comparing.table(sources, models), nl=False)
    if changed:
        typer.echo(comparing.changed(sources, models, changed), nl=False)
    if plot is not None:
        from delib import pareto

        typer.echo(pareto.draw(sources, models, plot), nl=False)


@figures_app.command()
def coverage(
    run: RunArgument,
    arm: Annotated[
        str | None,
        typer.Option(
            "--arm", help="Whose answers to tell beside the teacher's; the last arm's.", autocompletion=completing.arms
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all arms' figures here.")] = None,
) -> None:
    """Tell of each clause what exercises it, how often reasoning cites it and rightly so, and what nothing tests."""
    from delib import coverage as covering

    typer.echo(covering.report(fetched(run), arm, json_out), nl=False)


@figures_app.command()
def diff(
    first: Annotated[Path, typer.Argument(parser=run_folder, help="The run folder before the edit.")],
    second: Annotated[Path, typer.Argument(parser=run_folder, help="The run folder after it.")],
    arm: Annotated[
        str | None,
        typer.Option("--arm", help="Whose answers; the last arm that both have.", autocompletion=completing.arms),
    ] = None,
    changed: Annotated[int, typer.Option("--changed", min=0, help="Show N prompts that changed sides.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Tell what an edit of the policy did: the spec's difference, then each figure's, and what changed sides."""
    from delib import diff as differing

    typer.echo(differing.report(fetched(first), fetched(second), arm, changed, as_json), nl=False)


@figures_app.command()
def tables(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A run folder, and .eval logs or JSON files of suites, such as sft=FILE for a run's column."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write the markdown here.")] = None,
    measured: Annotated[
        str | None,
        typer.Option("--measure", help="Arms of the run to measure by the suites that it lacks, such as base,sft,rl."),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option("--prompts", min=1, help="With --measure: prompts of a suite that asks each under many attacks."),
    ] = 10,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="With --measure: a sweep over lengths, such as 64,128,256.")
    ] = None,
) -> None:
    """Lay out the paper's tables: these models with their intervals, beside the paper's figures."""
    from delib import measure
    from delib import tables as laying

    folders = [Path(source) for source in sources if Path(source).is_dir()]
    if len(folders) > 1:
        raise UserError(f"tables: {', '.join(map(str, folders))}; one run at a time")
    files = [source for source in sources if not Path(source).is_dir()]
    if measured is not None:
        if not folders:
            raise UserError("tables: --measure is about a run; name its folder")
        lengths = measure.budgets_of(budgets) if budgets is not None else []
        arms = [arm.strip() for arm in measured.split(",")]
        files = [*laying.of_run(folders[0], arms, prompts, lengths), *files]
    elif budgets is not None:
        raise UserError("tables: --budgets is about --measure; name arms there, or name the files of sweeps")
    typer.echo(laying.write(folders[0] if folders else None, files, out), nl=False)
