"""Data sets as inspect_ai samples, each with its delib Prompt in the metadata: published layouts and the shipped sets.

In: a file, or `hub:OWNER/NAME`, whose columns are those of the published set. Out: Samples, in an order drawn by the
hash of their ids, so that the first N of them (`--limit N`) are a fair share of all. Raises UserError with every
problem that a file has.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessage
from pydantic import TypeAdapter

from delib import sources
from delib.errors import UserError
from delib.recipe import path_of
from delib.records import Behaviour, Message, Prompt
from delib.spec import Spec, digest
from delib.stages import prompts as prompts_stage

Cells = dict[str, Any]
REQUESTS = (
    "forbidden_prompt",
    "goal",
    "behavior",
    "mutated_prompt",
    "prompt",
    "question",
    "instruction",
    "query",
    "text",
)
"""Columns of published sets that hold the request, the first that is there: StrongREJECT's, JailbreakBench's and
AdvBench's (the first of which also has behavior, a topic), HarmBench's, CyberSecEval's, and common ones. Case does not
matter."""
TURNS: TypeAdapter[list[ChatMessage]] = TypeAdapter(list[ChatMessage])


def sample(prompt: Prompt, target: str | list[str] = "", **more: Any) -> Sample:
    """A Sample of a prompt. `more`: what its scorer needs beside it."""
    turns = TURNS.validate_python([m.model_dump() for m in prompt.messages])
    kept = {"prompt": prompt.model_dump(exclude_none=True), **more}
    return Sample(id=prompt.id, input=turns, target=target, metadata=kept)


def samples_of(prompts: Iterable[Prompt]) -> list[Sample]:
    return mixed([sample(prompt) for prompt in prompts])


def mixed(samples: list[Sample]) -> list[Sample]:
    """In the order of their ids' hashes; an id that stands twice gets a number."""
    seen: dict[str, int] = {}
    for one in samples:
        number = seen[str(one.id)] = seen.get(str(one.id), 0) + 1
        one.id = f"{one.id}-{number}" if number > 1 else one.id
    return sorted(samples, key=lambda one: digest(str(one.id)))


def starter(keep: Callable[[Prompt], bool], spec: Spec, *files: str) -> list[Sample]:
    """The shipped prompts that are kept. Raises UserError where the spec is not the one that they are about."""
    try:
        found = [p for f in files for p in prompts_stage.load(path_of(f"starter:{f}"), spec, "heldout")]
    except UserError as error:
        hint = "the shipped prompts are about the starter's spec; measure another with delib/policy, or give data"
        raise UserError([hint, *error.problems[:3]]) from None
    return samples_of(p for p in found if keep(p))


def own(name: str, spec: Spec) -> list[Sample]:
    """A set in delib's own layout (docs/prompts.md)."""
    return samples_of(prompts_stage.load(name if sources.is_hub(name) else path_of(name), spec, "heldout"))


def requests(name: str, behaviour: Behaviour, spec: Spec) -> list[Sample]:
    """Requests that are all to be met alike, by a column of REQUESTS; or a set in delib's own layout, by its labels."""
    rows = _rows(name)
    if any("messages" in row.data for row in rows):
        return own(name, spec)
    columns = {column for row in rows for column in row.data}
    column = next((c for c in REQUESTS if c in columns), None)
    if column is None:
        raise UserError(f"{name}: no column of requests; call it {', '.join(REQUESTS)}. It has {_listed(columns)}")

    def make(cells: Cells) -> Sample:
        text = _text(cells, column)
        if cells.get("contextstring"):  # HarmBench: the behaviour is about this text
            text = f"{cells['contextstring']}\n\n{text}"
        kind = cells.get("semanticcategory") or cells.get("category")
        return sample(_prompt(text, name, behaviour), published_category=kind)

    return _made(name, rows, make)


def strong_reject(name: str) -> list[Sample]:
    """StrongREJECT: category, source, forbidden_prompt."""

    def make(cells: Cells) -> Sample:
        prompt = _prompt(_text(cells, "forbidden_prompt"), "strong_reject", "refuse")
        return sample(prompt, published_category=cells.get("category"), published_source=cells.get("source"))

    return _made(name, _rows(name, "StrongREJECT", "forbidden_prompt"), make)


def xstest(name: str) -> list[Sample]:
    """XSTest: prompt, type, and label (safe or unsafe), which older files tell by types that begin with "contrast"."""
    rows = _rows(name, "XSTest", "prompt", "type")
    labelled = any("label" in row.data for row in rows)

    def make(cells: Cells) -> Sample:
        kind = _text(cells, "type")
        label = _text(cells, "label").lower() if labelled else "unsafe" if kind.startswith("contrast") else "safe"
        if label not in ("safe", "unsafe"):
            raise ValueError(f"label {label!r} is neither safe nor unsafe")
        prompt = _prompt(_text(cells, "prompt"), "xstest", "comply" if label == "safe" else "refuse")
        return sample(prompt, published_category=kind)

    return _made(name, rows, make)


def wildchat(name: str) -> list[Sample]:
    """WildChat: conversation and toxic; only toxic ones, up to the last user turn. Nobody has labelled what each
    demands, so `behaviour` is None, and the judge says whether the answer complies with the spec."""
    rows = _rows(name, "WildChat", "conversation", "toxic")

    def make(cells: Cells) -> Sample | None:
        if not _true(cells.get("toxic")):
            return None
        turns = sources.conversation(cells.get("conversation"))
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            return None
        messages = [Message.model_validate(turn) for turn in turns]
        made = Prompt(id="", messages=messages, source="wildchat", split="heldout")
        given = cells.get("conversation_hash") or prompts_stage.content_id(made)
        return sample(made.model_copy(update={"id": str(given)}), language=cells.get("language"))

    return _made(name, rows, make)


def short_facts(name: str) -> list[Sample]:
    """SimpleQA: problem, answer."""

    def make(cells: Cells) -> Sample:
        right = _text(cells, "answer")
        prompt = _prompt(_text(cells, "problem"), "simple_qa").model_copy(update={"expected": [right]})
        return sample(prompt, target=[right])

    return _made(name, _rows(name, "SimpleQA", "problem", "answer"), make)


def bbq(name: str) -> list[Sample]:
    """BBQ: context, question, ans0, ans1, ans2, label, context_condition. Those made from one template are a group."""

    def make(cells: Cells) -> Sample:
        options = {letter: _text(cells, f"ans{i}") for i, letter in enumerate("ABC")}
        if str(cells.get("label")) not in ("0", "1", "2"):
            raise ValueError(f"label {cells.get('label')!r} is none of 0, 1, 2")
        right = "ABC"[int(cells["label"])]
        condition = "ambiguous" if str(cells.get("context_condition", "")).startswith("ambig") else "disambiguated"
        text = f"{_text(cells, 'context')} {_text(cells, 'question')}"
        group = f"{cells.get('category')}-{cells.get('question_index')}" if cells.get("question_index") else None
        prompt = _prompt(_choice(text, options), "bbq").model_copy(update={"group": group})
        return sample(prompt, right, options=options, condition=condition, published_category=cells.get("category"))

    columns = ("context", "question", "ans0", "ans1", "ans2", "label", "context_condition")
    return _made(name, _rows(name, "BBQ", *columns), make)


def gsm8k(name: str) -> list[Sample]:
    """GSM8K: question, and answer with the number after ####."""

    def make(cells: Cells) -> Sample:
        right = re.search(r"####\s*(-?[\d,.]*\d)\s*$", _text(cells, "answer"))
        if right is None:
            raise ValueError("answer: no number after ####")
        ask = "Work it out step by step. End with a line of its own: ANSWER: and the number alone."
        return sample(_prompt(f"{_text(cells, 'question')}\n\n{ask}", "gsm8k"), right.group(1).replace(",", ""))

    return _made(name, _rows(name, "GSM8K", "question", "answer"), make)


def mmlu(name: str) -> list[Sample]:
    """MMLU: question, choices (a list) or A to D, and answer (a letter or the place of it); or prompt, which holds the
    lettered choices, and answer."""
    rows = _rows(name, "MMLU", "answer")

    def make(cells: Cells) -> Sample:
        if "prompt" in cells:
            text = _text(cells, "prompt")
            options = {k: v.strip() for k, v in re.findall(r"^([A-E])[.)]\s*(.+)$", text, re.M)}
            text = f"{text}\n\nReply with the letter of the right choice."
        else:
            given = cells.get("choices") or [cells[c] for c in "abcd" if cells.get(c) is not None]
            options = dict(zip("ABCDE", map(str, given), strict=False))
            text = _choice(_text(cells, "question"), options)
        right = str(cells["answer"]).strip()
        right = "ABCDE"[int(right)] if right in tuple("01234") else right
        if len(options) < 2 or right not in options:
            raise ValueError(f"answer {cells['answer']!r} is none of the choices {', '.join(options) or '(none)'}")
        return sample(_prompt(text, "mmlu"), right, options=options, published_category=cells.get("subject"))

    return _made(name, rows, make)


def _choice(text: str, options: dict[str, str]) -> str:
    listed = "\n".join(f"({letter}) {option}" for letter, option in options.items())
    return f"{text}\n\n{listed}\n\nReply with the letter of the right choice."


def _prompt(text: str, source: str, behaviour: Behaviour | None = None) -> Prompt:
    source = Path(source).name if not sources.is_hub(source) else source
    made = Prompt(id="", messages=[Message(role="user", content=text)], source=source, split="heldout")
    return made.model_copy(update={"id": prompts_stage.content_id(made), "behaviour": behaviour})


def _rows(name: str, layout: str = "", *columns: str) -> list[sources.Row]:
    """A set's rows, their columns in lower case. Raises UserError where it has none, or not the layout's columns."""
    place = name if sources.is_hub(name) else path_of(name)
    rows = [row._replace(data={c.strip().lower(): v for c, v in row.data.items()}) for row in sources.table(place)]
    if not rows:
        raise UserError(f"{name}: no rows in this file")
    known = {column for row in rows for column in row.data}
    missing = [c for c in columns if c not in known]
    if missing and known:
        raise UserError(
            f"{name}: no column {', '.join(missing)}; {layout} has {', '.join(columns)}, and this file {_listed(known)}"
        )
    return rows


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns))


def _made(name: str, rows: list[sources.Row], make: Callable[[Cells], Sample | None]) -> list[Sample]:
    """A Sample of each row; None leaves it out. Raises UserError with the place of every row that is broken."""
    problems: list[str] = []
    found: list[Sample] = []
    for place, cells, problem in rows:
        try:
            if problem is not None:
                raise ValueError(problem)
            if (one := make(cells)) is not None:
                found.append(one)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError(problems)
    if not found:
        raise UserError(f"{name}: no row of this set is one of this suite's")
    return mixed(found)


def _text(cells: Cells, column: str) -> str:
    value = cells.get(column)
    if value is None or not str(value).strip():
        raise ValueError(f"{column}: empty")
    return str(value)


def _true(value: Any) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1")
