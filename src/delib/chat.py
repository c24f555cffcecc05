"""The one place that renders messages and parts reasoning from answer.

Text in, text out: a model's own chat template (a transformers tokenizer) renders; `<think>…</think>` holds reasoning.
Unclosed reasoning has no answer: nothing that follows an open `<think>` is ever shown as one.
"""

import re
from datetime import date
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from delib.errors import UserError
from delib.records import Completion, Message

OPEN, CLOSE = "<think>", "</think>"
TODAY = date(2024, 7, 26)
"""What a template that writes the day's date is told, so that a run that goes on tomorrow sends the same prompts: the
day that Llama 3's own templates fall back on."""


class Parts(NamedTuple):
    reasoning: str | None
    answer: str
    malformed: bool


def harmless(text: str, tokenizer: Any) -> str:
    """A message in which no special token stands: a space after its first character breaks it.

    Otherwise a message that holds the text of such a token would be read as the end of its turn, or as a turn of the
    system's.
    """
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    for token in sorted(special | set(tokenizer.all_special_tokens)):
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The exact text a model is sent: its chat template with the assistant's turn opened.

    `tokenizer`: a transformers tokenizer. Raises UserError where it has no chat template, or one that does not take
    these roles.
    """
    if not tokenizer.chat_template:
        raise UserError(no_template(tokenizer.name_or_path))
    rows = [{"role": m.role, "content": harmless(m.content, tokenizer)} for m in messages]
    try:
        template = _of_one_day(tokenizer.get_chat_template())
        return str(
            tokenizer.apply_chat_template(rows, chat_template=template, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template does not take a conversation of "
            f"{', '.join(m.role for m in messages)} ({error})"
        ) from error


def _of_one_day(template: str) -> str:
    """A template that is told `TODAY`: transformers hands it the clock and takes no other. Formats are literals."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda found: repr(TODAY.strftime(found[2])), template)


def no_template(model: str) -> str:
    """What is told of a model that no conversation can be written for."""
    return f"{model}: no chat template; name a model that has one, or put a chat_template.jinja beside its tokenizer"


def opened(sent: str) -> bool:
    """Whether the template itself opened the reasoning at the end of the prompt, as some do."""
    return sent.rstrip().endswith(OPEN)


def split(text: str, think_opened: bool = False) -> Parts:
    """Part a raw completion. `think_opened`: the template wrote `<think>` already.

    Malformed: unclosed, closed without being opened, more than one block, text before the block, or an empty answer
    after it. Without any tag the whole text is the answer and there is no reasoning, which is not malformed.
    """
    body = OPEN + text if think_opened else text
    opens, closes = body.count(OPEN), body.count(CLOSE)
    if opens == 0 and closes == 0:
        return Parts(None, body.strip(), False)
    match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", body, re.DOTALL)
    if opens != 1 or closes != 1 or match is None:
        inside = body.split(OPEN, 1)[1].split(CLOSE, 1)[0].strip() if opens else None
        return Parts(inside, "", True)
    reasoning, answer = match.group(1).strip(), match.group(2).strip()
    return Parts(reasoning, answer, not answer)


def join(reasoning: str | None, answer: str) -> str:
    """The text a model is trained to write: the inverse of `split`. Without reasoning it is the answer alone."""
    if reasoning is None:
        return answer.strip()
    return f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{answer.strip()}"


def completion(
    text: str, *, sent: str, model: str, cut: bool, usage: dict[str, int] | None = None, seed: int | None = None
) -> Completion:
    """A Completion from raw text. `cut`: it ended at max_tokens."""
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be written to a file
    parts = split(text, opened(sent))
    finish: Literal["stop", "length", "malformed"] = "stop"
    if parts.malformed:
        finish = "malformed"
    elif cut:
        finish = "length"
    return Completion(
        reasoning=parts.reasoning,
        answer=parts.answer,
        finish=finish,
        model=model,
        seed=seed,
        usage=usage or {},
        text=text,
        sent=sent,
    )


def received(
    text: str,
    reasoning: str | None,
    *,
    sent: str,
    model: str,
    cut: bool,
    usage: dict[str, int] | None = None,
    seed: int | None = None,
) -> Completion:
    """A Completion from what an endpoint gave back, in any of the ways reasoning comes: apart (`reasoning`), in think
    tags, closed without being opened because the template on the server opened it, or both apart and in tags, from a
    model that thinks by itself and was asked for tags too: then both are its reasoning, in that order."""
    if reasoning is not None and reasoning.strip():
        inside = split(text)
        if inside.reasoning is not None and not inside.malformed:
            reasoning, text = f"{reasoning.strip()}\n\n{inside.reasoning}", inside.answer
        text = join(reasoning, text)
    elif not opened(sent) and OPEN not in text and text.count(CLOSE) == 1:
        text = OPEN + text
    return completion(text, sent=sent, model=model, cut=cut, usage=usage, seed=seed)
