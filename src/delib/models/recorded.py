"""A teacher whose completions were recorded: the same interface as a live one, without any call."""

from pathlib import Path
from typing import Literal

from delib import chat
from delib.errors import UserError
from delib.records import Completion, Record
from delib.run import read_jsonl

Fault = Literal["wrong_behaviour", "over_refusal", "lecture", "wrong_clause", "policy_above", "malformed", "truncated"]


class Recording(Record):
    """One recorded completion. `fault` marks a flawed one on purpose; `stand_in`: a harmless one in place of harm."""

    prompt_id: str
    text: str
    finish: Literal["stop", "length"] = "stop"
    fault: Fault | None = None
    stand_in: bool = False

    def completion(self) -> Completion:
        """As a Completion; nothing was sent, since no model was called."""
        return chat.completion(self.text, sent="", model="recorded", cut=self.finish == "length")


def load(path: Path) -> dict[str, list[Recording]]:
    """Recordings by prompt id, in file order. Raises UserError listing every bad line."""
    found: dict[str, list[Recording]] = {}
    for recording in read_jsonl(path, Recording):
        found.setdefault(recording.prompt_id, []).append(recording)
    if not found:
        raise UserError(f"{path}: no recordings in this file")
    return found
