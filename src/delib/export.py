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
from delib.records import Example, Prompt, Sample
from delib.run import disk_error, sha256
from delib.spec import digest

HUB = "hub:"
CARD = Path(__file__).parent / "templates" / "card.md"


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
    """Write the data set to a folder, or to the hub with `hub:owner/name`, private unless `public`; returns where.

    Raises UserError when distill is not finished, the folder holds something, or the hub refuses.
    """
    opened = pipeline.open_run(run)
    examples = opened.run.finished("distill", Example)
    prompts = opened.run.finished("prompts", Prompt)
    if to.startswith(HUB):
        with tempfile.TemporaryDirectory() as scratch:
            _write(opened, rows(examples, prompts), Path(scratch))
            return _push(Path(scratch), to.removeprefix(HUB), public)
    folder = Path(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: there is something already; name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
        try:
            _write(opened, rows(examples, prompts), Path(scratch))
            Path(scratch).chmod(0o755)
            Path(scratch).replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return f"{folder}: {len(examples)} examples"


def _write(opened: pipeline.Pipeline, found: list[dict[str, Any]], folder: Path) -> None:
    from datasets import Dataset

    (folder / "data").mkdir()
    Dataset.from_list(found).to_parquet(folder / "data" / "train.parquet")
    (folder / "README.md").write_text(_card(opened, found), encoding="utf-8")


def _card(opened: pipeline.Pipeline, found: list[dict[str, Any]]) -> str:
    import jinja2

    recipe, samples = opened.recipe, opened.run.finished("filter", Sample)
    manifests = {m.stage: m for m in opened.run.manifests(["generate", "filter", "distill"])}
    drops = Counter(s.drop_reason or s.failure or "dropped" for s in samples if not s.kept)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        recipe=recipe,
        spec=opened.spec,
        spec_hash=sha256(opened.spec_path),
        rows_hash=digest(str(found)),
        count=len(found),
        shipped=all(
            name.startswith("starter:") for name in (recipe.prompts.train, recipe.generate.recordings, recipe.spec)
        )
        and recipe.generate.teacher == "recorded",
        writers=sorted({s.completion.model for s in samples if s.completion and s.kept}),
        kinds=Counter((r["category"] or "everyday", r["behaviour"] or "unlabelled") for r in found),
        manifests=manifests,
        drops=drops,
        agreements=opened.agreements(),
    )


def _push(folder: Path, name: str, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=not public, exist_ok=False)
        api.upload_folder(folder_path=folder, repo_id=name, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--to {HUB}{name}: {str(error).splitlines()[0]}; write hub:OWNER/NAME, a name that is not taken yet, and "
            "log in with 'hf auth login'"
        ) from None
    return f"{HUB}{name}: {'public' if public else 'private'}"
