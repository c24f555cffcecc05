"""Writes how a recipe's SFT and RL are started on a cluster: for SLURM, for Ray on Kubernetes (KubeRay), for SkyPilot.

In: a recipe, how many nodes and processes, the run folder that all nodes share. Out: one file, from a template in
`launches/`. Each node starts one `accelerate launch`, which learns its rank and where to meet the others from the
scheduler; the program is `delib sft`, and `delib rl` where an arm asks for it. Whatever enters a template is quoted or
refused. Keys stand in it by the names of their variables alone. None of it was ever run on a cluster.
"""

import json
import re
import shlex
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import jinja2
import yaml

from delib import recipe as recipes
from delib.errors import UserError
from delib.models import opened
from delib.opener import called
from delib.recipe import Recipe
from delib.run import write_whole
from delib.training import processes
from delib.wiring import stages_of

TEMPLATES = Path(__file__).parent / "launches"
System = Literal["slurm", "kuberay", "skypilot"]
FILES = {"slurm": "slurm.sh.j2", "kuberay": "kuberay.yaml.j2", "skypilot": "skypilot.yaml.j2"}
SUBMIT = {"slurm": "sbatch", "kuberay": "kubectl apply -f", "skypilot": "sky launch"}
LONGEST = 40
"""KubeRay takes names of up to 47 characters, and a longer one is made from it here."""
PORT = 29500
"""Where SkyPilot's nodes meet; a node there has one job at a time. The others choose a port for each job."""
PLACE = "/etc/delib"
"""Where KubeRay's pods see what is sent along."""


def write(
    named: Path,
    overrides: list[str],
    system: System,
    *,
    nodes: int = 1,
    per_node: int | None = None,
    run: Path | None = None,
    out: Path | None = None,
) -> str:
    """The launch as text, written to `out` too where it is named. Raises UserError with all that is wrong.

    `per_node`: processes of a node, each with a GPU of its own under `device: cuda`; what `accelerate` says by default.
    """
    recipe = recipes.load(recipes.shipped(named), overrides)
    made = render(recipe, system, str(named), overrides, nodes=nodes, per_node=per_node, run=run)
    if out is None:
        return made
    write_whole(out, made)
    return f"{made}\n{out}: written; start it with: {SUBMIT[system]} {shlex.quote(str(out))}\n"


def render(
    recipe: Recipe,
    system: System,
    named: str,
    overrides: list[str],
    *,
    nodes: int,
    per_node: int | None,
    run: Path | None,
) -> str:
    """The launch of a checked recipe, which the person calls `named`."""
    folder = PurePosixPath(run or f"runs/{recipe.name}")
    found = processes.config(recipe)
    each = per_node or max(1, int(found.get("num_processes", 1)) // max(1, int(found.get("num_machines", 1))))
    stages: list[str] = [stage for stage in ("sft", "rl") if stage in stages_of(recipe)]
    problems = _misfits(recipe, nodes * each, stages)
    if system != "slurm" and not folder.is_absolute():
        problems.append(f"--run {folder}: on {system} give an absolute path, in a folder that all nodes share")
    elif system != "slurm" and len(folder.parts) < 3:
        problems.append(f"--run {folder}: on {system} name a folder in one that all nodes share, such as /shared/mine")
    for about, text in [("--run", str(folder)), ("recipe", named), *(("--set", item) for item in overrides)]:
        if not text.isprintable():
            problems.append(f"{about}: {text!r} holds a line break or a control character; leave it out")
    variables = _variables(recipe) if "rl" in stages else []
    if not all(re.fullmatch("[A-Z_][A-Z0-9_]*", name) for name in variables):
        problems.append(
            f"judge: the key of {recipe.judge} can be in no variable; rename the service by letters and digits"
        )
    if problems:
        raise UserError(problems)
    words = [named, *(word for item in overrides for word in ("--set", item))]
    go_on = shlex.join(["delib", "run", *words, "--out", str(folder)])
    cuda = recipe.device == "cuda"
    given = {"nodes": nodes, "processes": each, "gpus": each if cuda else 0, "run": str(folder), "stages": stages}
    return _template(FILES[system]).render(
        name=recipe.name,
        job=_job(recipe.name),
        nodes=nodes,
        processes=each,
        stages=stages,
        cuda=cuda,
        run=str(folder),
        parent=str(folder.parent),
        check=shlex.join(["delib", "check", *words]),
        records=f"{go_on} --to distill",
        rest=f"CUDA_VISIBLE_DEVICES=0 {go_on}" if cuda else go_on,
        config=yaml.safe_dump(_config(recipe, found, nodes, nodes * each), sort_keys=False),
        given=json.dumps(given, ensure_ascii=False),
        program=(TEMPLATES / "each_node.py").read_text(encoding="utf-8"),
        variables=variables,
        launched=processes.LAUNCHED,
        place=PLACE,
        port=PORT,
    )


def _misfits(recipe: Recipe, count: int, stages: list[str]) -> list[str]:
    """What of batch and group can't be parted among so many processes."""
    told = []
    parted = {"sft": processes.rows_at_once, "rl": processes.completions_at_once}
    for stage in stages:
        try:
            parted[stage](recipe, count)
        except UserError as error:
            told += error.problems
    return told


def _config(recipe: Recipe, found: dict[str, Any], nodes: int, count: int) -> dict[str, Any]:
    """What accelerate is told: the recipe's own config file, or plain data parallelism, for so many processes."""
    plain = {
        "compute_environment": "LOCAL_MACHINE",
        "mixed_precision": "bf16" if recipe.dtype == "bfloat16" else "no",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    made = (found or plain) | {"num_machines": nodes, "num_processes": count}
    if made.get("distributed_type", "NO") in ("NO", "MULTI_GPU"):
        made["distributed_type"] = "MULTI_GPU" if count > 1 else "NO"  # accelerate refuses MULTI_GPU for one process
    return made


def _variables(recipe: Recipe) -> list[str]:
    """The environment variables that RL's judge needs, by name. It alone is called while the two stages train."""
    judge = called(recipe).get("judge")
    if judge is None or not opened.is_hosted(judge):
        return []
    provider, _, rest = judge.partition("/")
    service = rest.partition("/")[0] if provider == "openai-api" else provider
    own = service.upper().replace("-", "_")
    if provider in ("openai-api", "vllm"):
        return [f"{own}_BASE_URL", f"{own}_API_KEY"]
    return [] if provider in opened.RUN_HERE else [f"{own}_API_KEY"]


def _job(name: str) -> str:
    """A recipe's name as Kubernetes and SkyPilot take it: small letters, digits and hyphens, a letter first."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"delib-{plain}")[:LONGEST].strip("-")


def _template(file: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["yaml"] = lambda text: json.dumps(text, ensure_ascii=False)  # a string of JSON is one of YAML
    return environment.get_template(file)
