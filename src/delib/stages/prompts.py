"""Stage 1, prompts: load, check against the spec, remove duplicates, keep training and evaluation apart.

In: JSON-lines files, one a split, and the spec. Out: Prompt records with their split. The spec is the authority: where
a prompt's clause now demands another behaviour than its label says, the prompt is relabelled, and counted.
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from delib.errors import UserError
from delib.records import Manifest, Prompt
from delib.run import StageFolder
from delib.spec import Spec, digest, read_text

Split = Literal["train", "rl", "heldout"]


def content_id(prompt: Prompt) -> str:
    """The hash of a conversation's content."""
    return digest("\n".join(f"{m.role}: {m.content}" for m in prompt.messages))


def load(path: Path, spec: Spec | None, split: Split) -> list[Prompt]:
    """Read and check one file. Raises UserError listing every problem with its line.

    `spec` None: it could not be read, and only what does not need it is checked.
    """
    problems: list[str] = []
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            prompt = Prompt.model_validate_json(_with_id(line))
        except (ValidationError, ValueError) as error:
            problems.extend(f"{place}: {text}" for text in _reasons(error))
            continue
        prompt = prompt.model_copy(update={"split": split, "id": prompt.id or content_id(prompt)})
        problems.extend(f"{place}: {text}" for text in _faults(prompt, spec))
        if prompt.id in lines:
            problems.append(f"{place}: id {prompt.id!r} was used in line {lines[prompt.id]}; give each its own")
        lines.setdefault(prompt.id, number)
        prompts.append(prompt)
    if problems:
        raise UserError(problems)
    if not prompts:
        raise UserError(f"{path}: no prompts in this file")
    return prompts


def _with_id(line: str) -> bytes:
    import json

    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("each line must be a JSON object")
    row.setdefault("id", "")
    if isinstance(row.get("expected"), str):
        row["expected"] = [row["expected"]]
    return json.dumps(row).encode()


def _reasons(error: Exception) -> list[str]:
    if not isinstance(error, ValidationError):
        return [f"not a JSON object ({error})"]
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        found.append(f"{key}: {item['msg']}")
    return found


def _faults(prompt: Prompt, spec: Spec | None) -> list[str]:
    found = []
    if prompt.messages[-1].role != "user":
        found.append(f"ends on a turn of {prompt.messages[-1].role}; a prompt must end on a user turn")
    elif not prompt.messages[-1].content.strip():
        found.append("the last user turn is empty")
    if spec is None:
        return found
    names = [c.name for c in spec.categories]
    if prompt.category is not None and prompt.category not in names:
        found.append(f"category {prompt.category!r} is not in the spec; it has {', '.join(names)}")
    if prompt.clause is not None:
        clause = spec.clauses.get(prompt.clause)
        if clause is None:
            found.append(f"clause {prompt.clause!r} is not in the spec")
        elif clause.category is not None and clause.category != prompt.category:
            found.append(f"clause {prompt.clause} belongs to {clause.category!r}, the prompt to {prompt.category!r}")
    return found


def run(files: dict[Split, Path], spec: Spec, folder: StageFolder) -> Manifest:
    """Write the Prompt records of all splits. `files`: those to train on first, those held out last."""
    problems: list[str] = []
    loaded: list[Prompt] = []
    for split, path in files.items():
        try:
            loaded.extend(load(path, spec, split))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    seen: dict[str, Prompt] = {}
    kept: list[Prompt] = []
    relabelled = duplicates = 0
    for prompt in loaded:
        content = content_id(prompt)
        first = seen.get(content)
        if first is not None and first.split != prompt.split:
            here, there = files[prompt.split], files[first.split]
            problems.append(f"{here}: prompt {prompt.id!r} is {first.id!r} of {there}; remove one of them")
            continue
        if first is not None:
            duplicates += 1
            continue
        seen[content] = prompt
        behaviour = spec.required(prompt.clause, prompt.behaviour)
        if behaviour != prompt.behaviour:
            relabelled += prompt.behaviour is not None
            prompt = prompt.model_copy(update={"behaviour": behaviour})
        kept.append(prompt)
    ids = [p.id for p in kept]
    problems.extend(
        f"id {i!r} stands in two files; give each its own" for i in sorted({i for i in ids if ids.count(i) > 1})
    )
    if problems:
        raise UserError(problems)
    folder.replace(kept)
    counts = {"in": len(loaded), "out": len(kept), "dropped": duplicates, "relabelled": relabelled}
    counts |= {split: sum(p.split == split for p in kept) for split in files}
    return Manifest(stage="prompts", recipe="", inputs={}, outputs={}, counts=counts)
