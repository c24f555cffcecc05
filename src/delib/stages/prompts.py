"""Stage 1, prompts: load, check against the spec, leave out what is double or stands in the evaluation, label the rest.

In: sets of prompts, one a split, and the spec. Out: Prompt records with their split. The spec is the authority: where
a prompt's clause now demands another behaviour than its label says, the prompt is relabelled, and counted. What is
left out is counted, and the manifest tells each with what it was near to.

A mistake in delib's own JSON lines is an error. Sets of other people (CSV, parquet, hub) can't always be mended: of
those, rows that hold no prompt, copies, and prompts that are held out too are left out and counted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from delib import labelling, overlap, sources
from delib.errors import UserError
from delib.labelling import Ask, ask_all
from delib.overlap import Near
from delib.progress import say
from delib.records import Manifest, Prompt
from delib.run import StageFolder
from delib.spec import BEHAVIOURS, Spec, digest

Split = Literal["train", "rl", "heldout"]
TRAINED: tuple[Split, ...] = ("train", "rl")


class Loaded(NamedTuple):
    """A set as it was read. `unusable`: the places of rows that hold no prompt, with the reason; `repeated`: how many
    copies were left out; `aside`: label columns of which no value is known here, so that they mean something else."""

    prompts: list[Prompt]
    unusable: dict[str, str]
    repeated: int
    aside: list[str]


def content_id(prompt: Prompt) -> str:
    """The hash of a conversation's content."""
    return digest("\n".join(f"{m.role}: {m.content}" for m in prompt.messages))


def load(path: Path | str, spec: Spec | None, split: Split, text: str | None = None) -> list[Prompt]:
    """Read and check one set. Raises UserError listing every problem with its place.

    `spec` None: it could not be read, and only what does not need it is checked. `text`: see `sources.read`.
    """
    return read(path, spec, split, text).prompts


def read(path: Path | str, spec: Spec | None, split: Split, text: str | None = None) -> Loaded:
    """As `load`, with what was left out."""
    foreign = sources.foreign(path)
    rows = list(sources.read(path, text))
    aside = _aside(rows, spec) if foreign else []
    problems: list[str] = []
    prompts: list[Prompt] = []
    unusable: dict[str, str] = {}
    places: dict[str, str] = {}
    contents: set[str] = set()
    repeated = 0
    for place, data, problem in rows:
        if problem is not None:
            problems.append(f"{place}: {problem}")
            continue
        if foreign and (reason := _no_prompt(data["messages"])):
            unusable[place] = reason
            continue
        try:
            # As JSON, which has no place for half a surrogate pair: no file could be written with one.
            prompt = Prompt.model_validate_json(json.dumps({"id": ""} | {k: data[k] for k in data if k not in aside}))
        except ValidationError as error:
            problems.extend(f"{place}: {reason}" for reason in _reasons(error))
            continue
        content = content_id(prompt)
        if foreign and content in contents:
            repeated += 1
            continue
        contents.add(content)
        given = "" if foreign and prompt.id in places else prompt.id
        prompt = prompt.model_copy(update={"split": split, "id": given or content})
        problems.extend(f"{place}: {fault}" for fault in _faults(prompt, spec))
        if prompt.id in places:
            line = places[prompt.id].rpartition(":")[2]
            problems.append(f"{place}: id {prompt.id!r} was used in line {line}; give each its own")
        places.setdefault(prompt.id, place)
        prompts.append(prompt)
    if problems:
        raise UserError(problems)
    if not prompts:
        first = "".join(f"; {place}: {reason}" for place, reason in list(unusable.items())[:1])
        raise UserError(f"{path}: no prompts in this file{first}")
    return Loaded(prompts, unusable, repeated, aside)


def _aside(rows: list[sources.Row], spec: Spec | None) -> list[str]:
    """Label columns of somebody else's: not one of their values is of this spec. Where some are, the others are
    mistakes."""
    known: dict[str, set[str]] = {"behaviour": set(BEHAVIOURS)}
    if spec is not None:
        known |= {"category": {c.name for c in spec.categories}, "clause": set(spec.clauses)}
    found: dict[str, set[str]] = {column: {r.data[column] for r in rows if column in r.data} for column in known}
    return [column for column, values in found.items() if values and not values & known[column]]


def _no_prompt(messages: list[dict[str, str]]) -> str | None:
    """Why a conversation waits for no answer."""
    if not messages:
        return "no text"
    if messages[-1]["role"] != "user":
        return f"ends on a turn of {messages[-1]['role']}"
    return None if messages[-1]["content"].strip() else "the last user turn is empty"


def _reasons(error: ValidationError) -> list[str]:
    found = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        said = item["msg"].removeprefix("Value error, ")
        found.append(f"{key}: {said}" if key else said)
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


def run(
    files: Mapping[Split, Path | str],
    spec: Spec,
    folder: StageFolder,
    *,
    text: str | None = None,
    near_duplicates: float | None = 0.8,
    ask: Ask | None = None,
) -> Manifest:
    """Write the Prompt records of all splits. `files`: those to train on first, those held out last."""
    loaded = _load_all(files, spec, text)
    gone: dict[str, dict[str, Any]] = {"near_duplicates": {}, "contaminated": {}, "unusable": {}, "aside": {}}
    for split, one in loaded.items():
        gone["unusable"] |= one.unusable
        gone["aside"] |= {split: one.aside} if one.aside else {}
    kept = _distinct(files, _named_apart(files, loaded), gone["contaminated"])
    given = [p.behaviour for p in kept]
    kept = [p.model_copy(update={"behaviour": spec.required(p.clause, p.behaviour)}) for p in kept]
    relabelled = sum(old not in (None, p.behaviour) for old, p in zip(given, kept, strict=True))
    kept = _uncontaminated(kept, gone["contaminated"])
    counts = {"in": sum(len(r.prompts) + len(r.unusable) + r.repeated for r in loaded.values())}
    made: dict[str, int] = {}
    if ask is None:
        kept = _thinned(kept, near_duplicates, gone["near_duplicates"])
    else:
        kept, made = _asked(kept, spec, folder, near_duplicates, ask, gone)
    folder.replace(kept)
    counts |= {"out": len(kept), "dropped": counts["in"] + made.get("lookalikes", 0) - len(kept)}
    counts |= {reason: len(gone[reason]) for reason in ("near_duplicates", "contaminated", "unusable")}
    counts |= {"relabelled": relabelled, **made}
    counts |= {split: sum(p.split == split for p in kept) for split in files}
    detail = {reason: found for reason, found in gone.items() if found}
    return Manifest(stage="prompts", recipe="", inputs={}, outputs={}, counts=counts, detail=detail)


def _load_all(files: Mapping[Split, Path | str], spec: Spec, text: str | None) -> dict[Split, Loaded]:
    problems: list[str] = []
    loaded: dict[Split, Loaded] = {}
    for split, path in files.items():
        try:
            loaded[split] = read(path, spec, split, text)
        except UserError as error:
            problems.extend(error.problems)
            continue
        for column in loaded[split].aside:
            say(f"note: {path}: column {column} is left aside; none of its values is one of the spec's")
    if problems:
        raise UserError(problems)
    return loaded


def _named_apart(files: Mapping[Split, Path | str], loaded: dict[Split, Loaded]) -> list[Prompt]:
    """All prompts, each id once: where two sets share one (rows of other people's are often just numbered), a foreign
    set's prompt is named by its split and its content's hash. Raises UserError where both are a person's own."""
    used: dict[str, Split] = {}
    problems = []
    for split, one in loaded.items():
        for prompt in one.prompts if not sources.foreign(files[split]) else []:
            if prompt.id in used:
                problems.append(f"id {prompt.id!r} stands in two files; give each its own")
            used[prompt.id] = split
    if problems:
        raise UserError(problems)
    found = []
    for split, one in loaded.items():
        for prompt in one.prompts:
            if used.setdefault(prompt.id, split) != split:
                prompt = prompt.model_copy(update={"id": f"{split}-{content_id(prompt)}"})
            found.append(prompt)
    return found


def _distinct(files: Mapping[Split, Path | str], prompts: list[Prompt], contaminated: dict[str, Near]) -> list[Prompt]:
    """Each conversation once. Raises UserError where two files of a person's own share one."""
    held = {content_id(p): p for p in reversed(prompts) if p.split == "heldout"}
    seen: dict[str, Prompt] = {}
    kept, problems = [], []
    for prompt in prompts:
        content = content_id(prompt)
        first = seen.get(content)
        if first is not None and first.split != prompt.split:
            here, there = files[prompt.split], files[first.split]
            if not sources.foreign(here) and not sources.foreign(there):
                problems.append(f"{here}: prompt {prompt.id!r} is {first.id!r} of {there}; remove one of them")
        elif first is None and prompt.split != "heldout" and content in held:
            here, there = files[prompt.split], files["heldout"]
            if sources.foreign(here) or sources.foreign(there):
                contaminated[prompt.id] = Near(held[content].id, 1.0)
                continue
        if first is None:
            seen[content] = prompt
            kept.append(prompt)
    if problems:
        raise UserError(problems)
    return kept


def _uncontaminated(prompts: list[Prompt], contaminated: dict[str, Near]) -> list[Prompt]:
    """Without the training prompts that hold an evaluation prompt, which are added to `contaminated`."""
    held = [p for p in prompts if p.split == "heldout"]
    found = overlap.contaminated((p for p in prompts if p.split != "heldout"), held)
    contaminated |= found
    return [p for p in prompts if p.id not in found]


def _thinned(prompts: list[Prompt], similarity: float | None, near: dict[str, Near]) -> list[Prompt]:
    """Without near-duplicates within a split that is trained on, which are added to `near`."""
    if similarity is None:
        return prompts
    found: dict[str, Near] = {}
    for split in TRAINED:
        found |= overlap.near_duplicates([p for p in prompts if p.split == split], similarity)
    near |= found
    return [p for p in prompts if p.id not in found]


def unlabelled(prompt: Prompt) -> bool:
    """Whether a labeller is asked about a prompt."""
    return prompt.behaviour is None or (prompt.category is None and prompt.clause is None)


def _asked(
    prompts: list[Prompt],
    spec: Spec,
    folder: StageFolder,
    near_duplicates: float | None,
    ask: Ask,
    gone: dict[str, dict[str, Any]],
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts labelled, thinned, and with their look-alikes; the counts of that. Labels come before thinning:
    without them a prompt and its look-alike may count as one."""
    bare = [p for p in prompts if unlabelled(p)]
    answers = ask_all("label", bare, ask.label, folder.sub("labels"), ask.max_failure_rate)
    named = {i: a.prompt for i, a in answers.items() if a.prompt is not None}
    prompts = [named.get(p.id, p) for p in prompts]
    gone["unlabelled"] = {
        p.id: answers[p.id].failure or f"no readable label in {labelling.READINGS} replies"
        for p in prompts
        if p.behaviour is None
    }
    prompts = [p for p in prompts if p.behaviour is not None or p.split == "heldout"]
    prompts = _thinned(prompts, near_duplicates, gone["near_duplicates"])
    counts = {
        "labelled": sum(named.get(p.id, p) != p for p in bare),
        "unlabelled": len(gone["unlabelled"]),
    }
    if ask.lookalikes is None:
        return prompts, counts
    ids = {p.id for p in prompts}
    refused = [p for p in prompts if p.behaviour == "refuse" and p.split != "heldout"]
    refused = [p for p in refused if f"{p.id}-lookalike" not in ids]
    place = folder.sub("lookalikes")
    written = ask_all("look-alikes", refused, ask.lookalikes, place, ask.max_failure_rate)
    gone["no_lookalike"] = {
        i: a.failure or "none that the labeller complies with" for i, a in written.items() if a.prompt is None
    }
    contents = {content_id(p) for p in prompts}
    new: dict[str, Prompt] = {}
    for i in (p.id for p in refused):
        made = written[i].prompt
        if made is not None and content_id(made) not in contents:
            contents.add(content_id(made))
            new[i] = made
    counts["lookalikes"] = len(new)
    whole = _uncontaminated([*prompts, *new.values()], gone["contaminated"])
    stay = {p.id for p in _thinned(whole, near_duplicates, gone["near_duplicates"])}
    # A look-alike stands after what it looks like.
    pairs = [q for p in prompts for q in (p, new.get(p.id)) if q is not None]
    return [p for p in pairs if p.id in stay], counts
