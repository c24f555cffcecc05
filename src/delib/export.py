"""`delib export`: a run's training examples as a data set that TRL takes as it is, with its data card.

In: a run whose distill stage is finished. Out: a folder with `data/train.parquet` (conversational prompt and
completion, and what is known of each prompt) and `README.md`, the card; or the same as a data set on the hub.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from delib import chat, made_with, pipeline
from delib.errors import UserError
from delib.judges.agreement import shown
from delib.models.opened import RUN_HERE, is_hosted
from delib.opener import FITTED
from delib.progress import say
from delib.records import Example, Manifest, Prompt, Sample
from delib.rendering import environment
from delib.run import disk_error, sha256
from delib.stages.report import markdown_cell

HUB = "hub:"
HUB_ID = re.compile(r"\w[\w.-]{0,199}/\w[\w.:-]{0,199}", re.ASCII)
PLACES = ("/", "~", ".", "\\")
"""What a path begins with."""
STAGES = ("prompts", "generate", "filter", "distill")


def rows(examples: list[Example], prompts: list[Prompt]) -> list[dict[str, Any]]:
    """A row an example: `prompt` and `completion` are lists of {"role", "content"}, the reasoning in its tags."""
    by_id = {p.id: p for p in prompts}
    return [
        {
            "prompt": [m.model_dump() for m in e.messages],
            "completion": [{"role": "assistant", "content": chat.join(e.reasoning, e.answer)}],
            "prompt_id": e.prompt_id,
            "category": by_id[e.prompt_id].category,
            "clause": by_id[e.prompt_id].clause,
            "behaviour": by_id[e.prompt_id].behaviour,
            "source": by_id[e.prompt_id].source,
        }
        for e in examples
    ]


def export(run: Path, to: str, public: bool = False) -> str:
    """Write the data set to a new folder, or to the hub with `hub:OWNER/NAME`, private unless `public`; returns where.

    Raises UserError when distill is not finished or the run's policy or prompts changed since, when the folder is there
    already, or when the hub refuses.
    """
    check_place(to, public)
    opened = pipeline.open_run(run)
    manifests = finished(opened, STAGES)
    return deliver(to, public, "dataset", lambda folder: f"{_write(opened, manifests, folder)} examples")


def check_place(to: str, public: bool) -> None:
    """Raises UserError for a place that can't take an export."""
    folder = Path(to)
    if to.startswith(HUB):
        _check_name(to.removeprefix(HUB))
    elif "://" in to:
        raise UserError(f"--to {to}: an export goes to a new local folder or to hub:OWNER/NAME; copy it on from there")
    elif public:
        raise UserError("--public is for the hub; write --to hub:OWNER/NAME, or leave it out")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--to {folder}: it is there already; name a new folder")


def deliver(to: str, public: bool, kind: Literal["dataset", "model"], write: Callable[[Path], str]) -> str:
    """Let `write` fill a folder, whole or not at all, or a new repository on the hub; returns where it is and what
    `write` says of it."""
    hub, folder = to.startswith(HUB), Path(to)
    parent = Path(tempfile.gettempdir()) if hub else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".delib-export-", dir=parent))
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--to {folder}: a file stands in the way; name another folder") from None
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        said = write(scratch)
        if hub:
            return _push(scratch, to.removeprefix(HUB), public, kind)
        scratch.chmod(0o755)
        scratch.replace(folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"{folder}: {said}"


def finished(opened: pipeline.Pipeline, stages: Sequence[str]) -> dict[str, Manifest]:
    """The stages' manifests, each finished and none of them older than what it was made from."""
    made = {}
    for stage in stages:
        inputs, manifest = opened.inputs(stage), opened.folder(stage).manifest()
        if manifest is None or manifest.inputs != inputs:
            raise UserError(
                f"{opened.run.path}: {stage} is not finished, or what it was made from changed since; run "
                f"'delib run {opened.run.path / 'recipe.yaml'} --out {opened.run.path} --to {stages[-1]}' first"
            )
        made[stage] = manifest
    return made


def _write(opened: pipeline.Pipeline, manifests: dict[str, Manifest], folder: Path) -> int:
    from datasets import Dataset

    found = rows(opened.run.finished("distill", Example), opened.run.finished("prompts", Prompt))
    data = folder / "data" / "train.parquet"
    data.parent.mkdir()
    Dataset.from_list(found).to_parquet(data)
    (folder / "README.md").write_text(_card(opened, manifests, found, sha256(data)), encoding="utf-8")
    return len(found)


def _card(
    opened: pipeline.Pipeline, manifests: dict[str, Manifest], found: list[dict[str, Any]], data_hash: str
) -> str:
    recipe, samples = made_with.recipe_of(opened.run.path, "filter"), opened.run.finished("filter", Sample)
    drops = Counter(s.drop_reason or s.failure or "dropped" for s in samples if not s.kept)
    own = (recipe.prompts.train, recipe.generate.recordings, recipe.spec)
    return card(
        "card.md",
        recipe=recipe,
        judge=public_name(recipe.judge, opened.run.path),
        spec=opened.spec,
        spec_hash=sha256(opened.spec_path),
        data_hash=data_hash,
        count=len(found),
        shipped=recipe.generate.teacher == "recorded" and all(name.startswith("starter:") for name in own),
        writers=writers(samples, opened.run.path),
        kinds=Counter((r["category"] or "everyday", r["behaviour"] or "unlabelled") for r in found),
        manifests=manifests,
        drops=drops,
        agreed=agreed(opened),
    )


def agreed(opened: pipeline.Pipeline) -> dict[str, Any] | None:
    """How far the judge that filtered and rewarded agrees with the shipped labels: as the run's report tells it, or
    measured here. None where no report does and the judge is a model, whose calls may cost."""
    recipe = made_with.recipe_of(opened.run.path, "filter")
    report, filtered = opened.folder("report").manifest(), opened.folder("filter").manifest()
    if report is not None and filtered is not None and report.inputs.get("spec") == filtered.inputs.get("spec"):
        kept: list[dict[str, Any]] = report.detail.get("agreements", [])
        for found in kept:
            if found["judge"] == recipe.judge:
                return found
    if recipe.judge not in FITTED:
        return None
    say("measuring the judge, for the card")
    alone = recipe.evaluate.model_copy(update={"second_judge": None})
    return pipeline.Pipeline(
        recipe.model_copy(update={"evaluate": alone}), opened.run, spec=opened.spec_path
    ).agreements()[0]


def card(template: str, **told: Any) -> str:
    """A card from its template, in which the filter `cell` makes markup of others harmless, and `kappa` tells a judge's
    with its interval."""
    templates = environment()
    templates.filters |= {"cell": markdown_cell, "kappa": shown}
    return templates.get_template(template).render(**told)


def writers(samples: list[Sample], run: Path) -> list[str]:
    """Who wrote the completions that were kept."""
    return sorted({public_name(s.completion.model, run) for s in samples if s.completion and s.kept})


def public_name(model: str, beside: Path | None = None) -> str:
    """A hub id, or the name of what is called elsewhere, as it is; all else is told by its last part: where a folder
    lies is nobody's business. `beside`: a further folder from which a relative path may have been meant."""
    if model.startswith(HUB) or is_hub_id(model, beside):
        return model
    if is_hosted(model):
        provider, _, rest = model.partition("/")
        if provider == "openai-api":  # the service stands before the model's name, which may be a path there
            service, _, rest = rest.partition("/")
            provider = f"{provider}/{service}"
            return (
                f"{provider}/{public_name(rest)}" if rest.startswith(PLACES) or PureWindowsPath(rest).drive else model
            )
        return f"{provider}/{public_name(rest, beside)}" if provider in RUN_HERE else model
    return PureWindowsPath(model).name or model  # which parts by both kinds of slash


def is_hub_id(name: str, beside: Path | None = None) -> bool:
    """Whether it reads OWNER/NAME and no such folder lies here, or beside, or in a folder above: a run's paths count
    from where it was started."""
    if not HUB_ID.fullmatch(name):
        return False
    near = [place.resolve() for place in (Path.cwd(), beside) if place is not None]
    return not any((above / name).exists() for place in near for above in (place, *place.parents))


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--to {HUB}{name}: {error}; write hub:OWNER/NAME") from None
    if name.count("/") != 1:
        raise UserError(f"--to {HUB}{name}: no owner; write hub:OWNER/NAME")


def _push(folder: Path, name: str, public: bool, kind: Literal["dataset", "model"]) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def refused(error: Exception, mend: str) -> UserError:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"--to {HUB}{name}: {cause}; {mend}")

    passing = (HfHubHTTPError, httpx2.HTTPError, OSError)
    api = HfApi()
    try:
        api.create_repo(name, repo_type=kind, private=not public, exist_ok=False)
    except passing as error:
        raise refused(error, "name one that is not taken yet, log in with 'hf auth login', check the network") from None
    try:
        api.upload_folder(folder_path=folder, repo_id=name, repo_type=kind)
    except passing as error:
        raise refused(error, f"the {kind} was made and is not filled; delete it there, then try again") from None
    return f"{HUB}{name}: {'public' if public else 'private'}"
