"""The command line's groups: `delib spec …`, `delib prompts …` and `delib models …`. As cli.py: no logic."""

from pathlib import Path
from typing import Annotated

import typer

from delib.cli_folders import run_folder
from delib.errors import UserError

spec_app = typer.Typer(no_args_is_help=True, help="Work on a written policy.")
models_app = typer.Typer(no_args_is_help=True, help="Fetch models.")
prompts_app = typer.Typer(help="Load, check and split the prompts of a run, or check a file of them.")


@prompts_app.callback(invoke_without_command=True)
def prompts_(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Option("--run", parser=run_folder, help="The run folder.", show_default=False)
    ] = None,
) -> None:
    if context.invoked_subcommand is None:
        from delib import pipeline

        if run is None:
            raise UserError("prompts: name a run folder with --run, or a file with 'delib prompts check FILE'")
        pipeline.open_run(run).execute("prompts")


@prompts_app.command("check")
def prompts_check(
    file: Annotated[Path, typer.Argument(help="Prompts: a file, or hub:OWNER/NAME:SPLIT.")],
    spec: Annotated[Path | None, typer.Option("--spec", help="Their spec; the starter's when left out.")] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Prompts that must stay apart, such as those held out.")
    ] = None,
) -> None:
    """List every problem of a file of prompts with its line; print what it holds, and what to weigh."""
    from delib import pack
    from delib import recipe as recipes
    from delib import spec as specs

    loaded = specs.load(spec or recipes.path_of("starter:spec.md"))
    typer.echo(pack.check(file, loaded, against), nl=False)


@spec_app.command("new")
def spec_new(
    file: Annotated[Path, typer.Argument(help="The spec to write; it must not be there yet.")],
    outline: Annotated[
        str | None, typer.Option("--outline", help="Start from an outline, ailuminate or agents, without questions.")
    ] = None,
) -> None:
    """Start a spec: answer a few questions, or take an outline; what is left to you is marked TODO."""
    from delib.authoring import draft

    typer.echo(draft.create(file, outline), nl=False)


@spec_app.command("check")
def spec_check(
    file: Annotated[Path, typer.Argument(help="A spec in markdown.")],
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors too.")] = False,
) -> None:
    """List every structural problem of a spec with its line; of a sound one, what to look at again."""
    from delib import recipe as recipes
    from delib.authoring import check as checking

    typer.echo(checking.report(recipes.path_of(str(file)), strict), nl=False)


@spec_app.command("show")
def spec_show(
    file: Annotated[Path, typer.Argument(help="A spec in markdown, or a shipped one, such as starter:agents.md.")],
    category: Annotated[
        str | None, typer.Option("--category", help="Only this category, with its clauses' texts.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page here, with an anchor a clause.")] = None,
) -> None:
    """Show a spec: categories, clauses, behaviours and styles."""
    from delib import recipe as recipes
    from delib.authoring import show as showing

    typer.echo(showing.report(recipes.path_of(str(file)), category, html), nl=False)


@spec_app.command("diff")
def spec_diff(
    old: Annotated[Path, typer.Argument(help="The spec before.")],
    new: Annotated[Path, typer.Argument(help="The spec after.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Tell what changed, clause by clause, and which categories' prompts it touches."""
    from delib.authoring import diff

    typer.echo(diff.report(old, new, as_json), nl=False)


@spec_app.command("import")
def spec_import(
    file: Annotated[Path, typer.Argument(help="A policy document in markdown.")],
    form: Annotated[str, typer.Option("--format", help="model-spec (OpenAI's layout) or markdown.")],
    to: Annotated[Path, typer.Option("--to", help="The spec to write; it must not be there yet.")],
) -> None:
    """Make a policy document into a spec; tells of every heading what it became, or why it was left out."""
    from delib.authoring import importing

    typer.echo(importing.report(file, form, to), nl=False)


@models_app.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(help="smollm2, or a hub id.")] = "smollm2",
) -> None:
    """Fetch a model (and the compact judge's sentence encoder) into the cache, and print its folder."""
    from delib.judges import encoder
    from delib.models import weights

    encoder.pull()
    typer.echo(weights.resolve(name))
