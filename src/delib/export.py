"""`delib export`: a run's training examples as a data set that TRL takes as it is, with its data card.

In: a run whose distill stage is finished. Out: a folder with `data/train.parquet` (conversational prompt and
completion, and what is known of each prompt) and `README.md`, the card; or the same as a data set on the hub.
"""

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from delib import chat, pipeline
from delib.errors import UserError
from delib.records import Example, Manifest, Prompt, Sample
from delib.run import disk_error, sha256
from delib.stages.report import markdown_cell

HUB = "hub:"
CARD = Path(__file__).parent / "templates" / "card.md"
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

    Raises UserError when distill is not finished or the policy or prompts changed since, when the folder is there
    already, or when the hub refuses.
    """
    hub, folder = to.startswith(HUB), Path(to)
    if hub:
        _check_name(to.removeprefix(HUB))
    elif public:
        raise UserError("--public is for the hub; write --to hub:OWNER/NAME, or leave it out")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"--to {folder}: it is there already; name a new folder")
    opened = pipeline.open_run(run)
    manifests = _manifests(opened)
    parent = Path(tempfile.gettempdir()) if hub else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".delib-export-", dir=parent))
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--to {folder}: a file stands in the way; name another folder") from None
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        count = _write(opened, manifests, scratch)
        if hub:
            return _push(scratch, to.removeprefix(HUB), public)
        scratch.chmod(0o755)
        scratch.replace(folder)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"{folder}: {count} examples"


def _manifests(opened: pipeline.Pipeline) -> dict[str, Manifest]:
    """Those of the data stages, each finished and none of them older than what it was made from."""
    made = {}
    for stage in STAGES:
        inputs, manifest = opened.inputs(stage), opened.folder(stage).manifest()
        if manifest is None or manifest.inputs != inputs:
            raise UserError(
                f"{opened.run.path}: {stage} is not finished, or what it was made from changed since; run "
                f"'delib run {opened.run.path / 'recipe.yaml'} --out {opened.run.path} --to distill' first"
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
    import jinja2

    recipe, samples = opened.recipe, opened.run.finished("filter", Sample)
    drops = Counter(s.drop_reason or s.failure or "dropped" for s in samples if not s.kept)
    own = (recipe.prompts.train, recipe.generate.recordings, recipe.spec)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = markdown_cell
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        recipe=recipe,
        judge=_public(recipe.judge),
        spec=opened.spec,
        spec_hash=sha256(opened.spec_path),
        data_hash=data_hash,
        count=len(found),
        shipped=recipe.generate.teacher == "recorded" and all(name.startswith("starter:") for name in own),
        # A local model is told by its folder's name: where it lies is nobody's business.
        writers=sorted({_public(s.completion.model) for s in samples if s.completion and s.kept}),
        kinds=Counter((r["category"] or "everyday", r["behaviour"] or "unlabelled") for r in found),
        manifests=manifests,
        drops=drops,
        agreed=opened.agreements()[0],
    )


def _public(model: str) -> str:
    return Path(model).name if model.startswith(("/", ".")) else model


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--to {HUB}{name}: {error}; write hub:OWNER/NAME") from None
    if name.count("/") != 1:
        raise UserError(f"--to {HUB}{name}: no owner; write hub:OWNER/NAME")


def _push(folder: Path, name: str, public: bool) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def refused(error: Exception, mend: str) -> UserError:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"--to {HUB}{name}: {cause}; {mend}")

    passing = (HfHubHTTPError, httpx2.HTTPError, OSError)
    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=not public, exist_ok=False)
    except passing as error:
        raise refused(error, "name one that is not taken yet, log in with 'hf auth login', check the network") from None
    try:
        api.upload_folder(folder_path=folder, repo_id=name, repo_type="dataset")
    except passing as error:
        raise refused(error, "the data set was made and is not filled; delete it there, then try again") from None
    return f"{HUB}{name}: {'public' if public else 'private'}"
