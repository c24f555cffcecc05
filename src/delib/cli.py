"""The command line: parse, call, print, exit code. 0 done, 1 a stage stopped, 2 a person's mistake, 130 interrupted."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from delib import __version__, completing
from delib.cli_figures import figures_app
from delib.cli_folders import RunArgument, RunOption, fetched, here, run_folder
from delib.cli_groups import models_app, prompts_app, spec_app
from delib.cli_help import Panels
from delib.errors import StageError, UserError

EXIT_CODES = "Exit codes: 0 done, 1 a stage stopped, 2 a mistake in the input, 130 interrupted."
app = typer.Typer(cls=Panels, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EXIT_CODES)
app.add_typer(figures_app)
app.add_typer(spec_app, name="spec")
app.add_typer(models_app, name="models")
app.add_typer(prompts_app, name="prompts")

SetOption = Annotated[
    list[str],
    typer.Option("--set", help="Change a recipe key, such as sft.epochs=1.", autocompletion=completing.keys),
]
RECIPE = typer.Argument(help="A recipe: a file, or a shipped one, such as small.", autocompletion=completing.recipes)
STAGE_HELP = {
    "generate": "Let the teacher write reasoning and answers, with the spec in its context.",
    "filter": "Judge the completions and keep the best.",
    "distill": "Take the spec out and write the training examples.",
    "sft": "Train on the examples.",
    "rl": "Train with the judge as reward; it does not see the reasoning.",
    "cold_start": "Teach the form alone, for RL without SFT.",
    "rl_only": "Train as rl, from the cold start.",
    "evaluate": "Measure all arms on the held-out prompts.",
    "report": "Write the report.",
}


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Align your own model to your own written policy, by deliberative alignment."""
    if version:
        typer.echo(f"delib {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[Path | None, RECIPE] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=run_folder,
            help="The run folder, here or on object storage (s3://…); runs/NAME when left out.",
        ),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="The last stage to run.", autocompletion=completing.stages)
    ] = "report",
    set_: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
) -> None:
    """Run a recipe from its prompts to its report; the same command again goes on where it stopped."""
    from delib import changes, pipeline, progress
    from delib import recipe as recipes
    from delib.wiring import STAGES

    if to not in STAGES:
        raise UserError(f"--to {to}: no such stage; one of {', '.join(STAGES)}")
    loaded = recipes.load(recipes.shipped(recipe or Path("quickstart")), set_)
    folder = out or Path("runs") / loaded.name
    ready = pipeline.start_run(loaded, folder)
    progress.say(changes.tell(ready, to))
    pipeline.run_to(ready, to)
    if to == "report":
        typer.echo((folder / "report" / "summary.txt").read_text(encoding="utf-8"), nl=False)
        typer.echo(f"The report: {folder / 'report' / 'report.html'}")


@app.command()
def ablate(
    recipe: Annotated[Path, RECIPE],
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=here, help="The run folder; runs/NAME when left out."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds, from the recipe's on.")] = 1,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Train and measure SFT only, RL only, both and neither, over seeds; the same command goes on where it stopped."""
    from delib import ablate as ablating
    from delib import recipe as recipes

    loaded = recipes.load(recipes.shipped(recipe), set_)
    folder = out or Path("runs") / loaded.name
    typer.echo(ablating.run(loaded, folder, seeds), nl=False)
    typer.echo(f"The report: {folder / 'ablate.md'}")


@app.command()
def doctor(
    recipe: Annotated[Path | None, RECIPE] = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Look at this machine, and at whether the models that a recipe names can be reached; nothing is spent."""
    from delib import doctor as looking

    found = looking.examine(recipe, set_)
    typer.echo(looking.report(found), nl=False)
    raise typer.Exit(2 if any(finding.level == "problem" for finding in found) else 0)


@app.command("recipe")
def recipe_(
    key: Annotated[
        str | None, typer.Argument(help="A section or a key of it, such as sft.", autocompletion=completing.sections)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of it, as docs/recipe.md has it.")] = False,
) -> None:
    """Tell of every key that a recipe may hold what it takes, its default and what it does."""
    from delib import reference

    typer.echo(reference.markdown() if markdown else reference.text(key), nl=False)


@app.command()
def check(
    recipe: Annotated[Path, RECIPE],
    set_: SetOption = [],  # noqa: B006
    run: Annotated[
        Path | None,
        typer.Option("--run", parser=run_folder, help="Tell what of this run folder it would make anew."),
    ] = None,
) -> None:
    """Check a recipe and everything it names, before any compute, and print what it will ask of models."""
    from delib import changes, pipeline, plan
    from delib import recipe as recipes

    loaded = recipes.load(recipes.shipped(recipe), set_)
    problems = pipeline.check(loaded)
    if problems:
        raise UserError(problems)
    typer.echo(f"{recipe}: sound")
    typer.echo(plan.table(loaded), nl=False)
    if run is not None:
        typer.echo(changes.foretold(loaded, fetched(run)), nl=False)


@app.command()
def plan(
    recipe: Annotated[Path, RECIPE],
    cluster: Annotated[Path, typer.Option("--cluster", help="Rates and prices, as docs/capacity.md tells.")],
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, help="Training prompts; as many as the recipe has when left out.")
    ] = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Foretell calls, tokens, hours and money of each stage on a cluster, and what limits it."""
    from delib import capacity
    from delib import recipe as recipes

    loaded = recipes.load(recipes.shipped(recipe), set_)
    typer.echo(capacity.table(loaded, capacity.load(cluster), prompts), nl=False)


@app.command()
def launch(
    recipe: Annotated[Path, RECIPE],
    on: Annotated[Literal["slurm", "kuberay", "skypilot"], typer.Option("--on", help="What starts the nodes.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", min=1, help="Processes of each; as many as accelerate's file says, or one."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", parser=here, help="The run folder, which all nodes share; runs/NAME on SLURM."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write it here too.")] = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Write how SFT and RL of a recipe are started on several machines, and show it."""
    from delib import launch as launching

    typer.echo(
        launching.write(recipe, set_, on, nodes=nodes, per_node=gpus_per_node, run=run, out=out),
        nl=False,
    )


def _stage(name: str) -> None:
    @app.command(name, help=STAGE_HELP[name])
    def command(run: RunOption) -> None:
        from delib import pipeline

        pipeline.open_run(run).execute(name)


for _name in STAGE_HELP:
    _stage(_name)


@app.command()
def show(
    run: RunArgument,
    prompt_id: Annotated[str, typer.Argument(help="A prompt's id.")],
) -> None:
    """Print one prompt's life: what was sent, written, judged, kept, trained on and answered."""
    from delib import life

    typer.echo(life.tell(fetched(run), prompt_id))


@app.command()
def view(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder that the page goes to; RUN/view when left out.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Write the page, and open no browser.")] = False,
) -> None:
    """Write a page about a run, its figures, samples and spec, which needs nothing else, and open it."""
    from delib import view as viewing

    page = viewing.write(fetched(run), out)
    typer.echo(page)
    if not no_open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub id, smollm2, a GGUF file or an inspect_ai name.")
    ],
    max_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
    hide_reasoning: Annotated[bool, typer.Option("--hide-reasoning", help="Show the answers alone.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.", show_default=False)] = None,
) -> None:
    """Talk with a model, its reasoning shown dimmed, until an empty line or Ctrl-D."""
    from delib import talk

    talk.chat(model, max_tokens, hide_reasoning, system)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, smollm2 or a GGUF file.")],
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The port to listen on.")] = 8080,
    context: Annotated[int, typer.Option("--context", min=64, help="Room for a prompt and its answer, tokens.")] = 4096,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", help="Where it runs: cpu by llama.cpp, cuda by vLLM.")
    ] = "cpu",
) -> None:
    """Serve a model to OpenAI's clients, its reasoning in a field of its own; Ctrl-C ends it."""
    from delib import serving

    serving.serve(model, host, port, context, device)


@app.command("eval")
def eval_(
    model: Annotated[
        str, typer.Option("--model", help="A checkpoint folder, a hub id, smollm2, a GGUF file or an inspect_ai name.")
    ],
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Prompts: a file, hub:OWNER/NAME:SPLIT or starter:NAME.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="A suite, such as xstest (docs/evaluation.md).", autocompletion=completing.suites),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="A suite's judge: compact, probe, or a model; compact when left out.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write figures and rows here.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N prompts.")] = None,
    option: Annotated[list[str], typer.Option("-T", help="A suite's own option, such as -T data=FILE.")] = [],  # noqa: B006
    log_dir: Annotated[Path, typer.Option("--log-dir", help="Where a suite's .eval log goes.")] = Path("logs"),
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="A suite at several lengths of completion, such as 64,128,256.")
    ] = None,
) -> None:
    """Measure any model, by a suite or on prompts of your own, rendered and graded as in the evaluate stage."""
    from delib import recipe as recipes

    if (prompts is None) == (suite is None):
        raise UserError("eval: name what to measure by, either --suite NAME or --prompts FILE")
    if suite is not None:
        from delib import measure

        options = measure.options_of([*option, *([f"judge={judge}"] if judge else [])])
        if budgets is not None:
            lengths = measure.budgets_of(budgets)
            typer.echo(measure.sweep(suite, model, options, lengths, log_dir, limit, json_out), nl=False)
            return
        typer.echo(measure.suite(suite, model, options, log_dir, limit, json_out), nl=False)
        return
    if judge is not None or option or budgets is not None:
        raise UserError(
            "eval: --judge, -T and --budgets are a suite's; --prompts takes the judge of the model's recipe"
        )
    from delib import talk

    typer.echo(talk.evaluate_file(model, recipes.path_of(prompts or ""), json_out, limit), nl=False)


@app.command()
def label(
    run: RunArgument,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts, all arms' answers to each.")] = 36,
) -> None:
    """Write a sheet of answers, arms hidden, for blind labels; once they are filled in, `delib report` reads them."""
    from delib import pipeline

    file, rows = pipeline.open_run(run).draw_labels(prompts)
    typer.echo(
        f'{file}: {rows} answers. Set each "label" to comply, refuse, partial or safe_complete by '
        f"docs/labelling.md, then run 'delib report --run {run}'."
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(parser=run_folder, help="A run folder, or a model folder.")],
    to: Annotated[str, typer.Option("--to", help="A new folder, or hub:OWNER/NAME.", show_default=False)],
    what: Annotated[
        Literal["data", "sft", "rl"] | None,
        typer.Option("--what", help="Of a run: its training examples, or a stage's model; data when left out."),
    ] = None,
    form: Annotated[
        Literal["safetensors", "gguf", "adapter"] | None,
        typer.Option("--form", help="Of a model; safetensors when left out."),
    ] = None,
    quantisation: Annotated[
        Literal["f16", "q8_0", "q4_0"] | None,
        typer.Option("--quantisation", help="Of a GGUF file; q8_0 when left out."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="On the hub for all to see; private when left out.")] = False,
) -> None:
    """Write a run's training examples as a data set that TRL takes, or a model, with a card."""
    from delib import export_model

    typer.echo(export_model.export_any(run, to, public, what, form, quantisation))


@app.command("judge-check")
def judge_check(
    data: Annotated[Path, typer.Option("--data", help="Labelled answers: JSON lines, or JailbreakBench's artifacts.")],
    judge: Annotated[str, typer.Option("--judge", help="The judge: compact, probe, or a model.")] = "compact",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a judge against labelled answers."""
    from delib import talk

    typer.echo(talk.judge_check(judge, data, as_json), nl=False)


def main() -> None:
    """Run the command line with delib's errors and exit codes."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except StageError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)
