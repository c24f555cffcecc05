"""The command line: parse, call, print, exit code. 0 done, 1 a stage stopped, 2 a person's mistake, 130 interrupted."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from delib import __version__
from delib.errors import StageError, UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split(":")[0]
)
spec_app = typer.Typer(no_args_is_help=True, help="Work on a written policy.")
models_app = typer.Typer(no_args_is_help=True, help="Fetch models.")
prompts_app = typer.Typer(help="Load, check and split the prompts of a run, or check a file of them.")
app.add_typer(spec_app, name="spec")
app.add_typer(models_app, name="models")
app.add_typer(prompts_app, name="prompts")

RunOption = Annotated[Path, typer.Option("--run", help="The run folder.", show_default=False)]
SetOption = Annotated[list[str], typer.Option("--set", help="Change a recipe key, such as sft.epochs=1.")]
STAGE_HELP = {
    "generate": "Let the teacher write reasoning and answers, with the spec in its context.",
    "filter": "Judge the completions and keep the best.",
    "distill": "Take the spec out and write the training examples.",
    "sft": "Train on the examples.",
    "rl": "Train with the judge as reward; it does not see the reasoning.",
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
    recipe: Annotated[Path | None, typer.Argument(help="A recipe: a file, or quickstart or small.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; runs/NAME when left out.")] = None,
    to: Annotated[str, typer.Option("--to", help="The last stage to run.")] = "report",
    set_: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
) -> None:
    """Run a recipe from its prompts to its report; the same command again goes on where it stopped."""
    from delib import pipeline
    from delib import recipe as recipes

    if to not in pipeline.STAGES:
        raise UserError(f"--to {to}: no such stage; one of {', '.join(pipeline.STAGES)}")
    loaded = recipes.load(recipes.shipped(recipe or Path("quickstart")), set_)
    folder = out or Path("runs") / loaded.name
    pipeline.run_to(pipeline.start_run(loaded, folder), to)
    if to == "report":
        typer.echo((folder / "report" / "summary.txt").read_text(encoding="utf-8"), nl=False)
        typer.echo(f"The report: {folder / 'report' / 'report.html'}")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a file, or quickstart or small.")],
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Check a recipe and everything it names, before any compute, and print what it will ask of models."""
    from delib import pipeline, plan
    from delib import recipe as recipes

    loaded = recipes.load(recipes.shipped(recipe), set_)
    problems = pipeline.check(loaded)
    if problems:
        raise UserError(problems)
    typer.echo(f"{recipe}: sound")
    typer.echo(plan.table(loaded), nl=False)


def _stage(name: str) -> None:
    @app.command(name, help=STAGE_HELP[name])
    def command(run: RunOption) -> None:
        from delib import pipeline

        pipeline.open_run(run).execute(name)


for _name in STAGE_HELP:
    _stage(_name)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompt_id: Annotated[str, typer.Argument(help="A prompt's id.")],
) -> None:
    """Print one prompt's life: what was sent, written, judged, kept, trained on and answered."""
    from delib import life

    typer.echo(life.tell(run, prompt_id))


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub id, smollm2, a GGUF file or an inspect_ai name.")
    ],
    max_tokens: Annotated[int, typer.Option(help="The most tokens of one answer.")] = 256,
    hide_reasoning: Annotated[bool, typer.Option("--hide-reasoning", help="Show the answers alone.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.", show_default=False)] = None,
) -> None:
    """Talk with a model; its reasoning is shown dimmed. An empty line or Ctrl-D ends it."""
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
    suite: Annotated[str | None, typer.Option("--suite", help="A suite, such as xstest (docs/evaluation.md).")] = None,
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
def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="RUN:ARM, an .eval log of a suite, or a JSON file that 'delib eval' wrote, each of a model."
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


@app.command()
def tables(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A run folder, and .eval logs or JSON files of suites, such as sft=FILE for a run's column."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write the markdown here.")] = None,
) -> None:
    """Lay out the paper's tables: these models with their intervals, beside the paper's figures."""
    from delib import tables as laying

    folders = [Path(source) for source in sources if Path(source).is_dir()]
    if len(folders) > 1:
        raise UserError(f"tables: {', '.join(map(str, folders))}; one run at a time")
    files = [source for source in sources if not Path(source).is_dir()]
    typer.echo(laying.write(folders[0] if folders else None, files, out), nl=False)


@app.command()
def label(
    run: Annotated[Path, typer.Argument(help="A run folder whose arms are evaluated.")],
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
    run: Annotated[Path, typer.Argument(help="A run folder, or a model folder.")],
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
    data: Annotated[Path, typer.Option("--data", help="JSON lines of labelled answers.")],
    judge: Annotated[str, typer.Option("--judge", help="The judge: compact, probe, or a model.")] = "compact",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a judge against labelled answers."""
    from delib import talk

    typer.echo(talk.judge_check(judge, data, as_json), nl=False)


@prompts_app.callback(invoke_without_command=True)
def prompts_(
    context: typer.Context,
    run: Annotated[Path | None, typer.Option("--run", help="The run folder.", show_default=False)] = None,
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
