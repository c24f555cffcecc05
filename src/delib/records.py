"""Every record that crosses a file: plain data, validated on the way in.

The way of one prompt is Prompt → Completion → Verdicts → Sample → Example; metrics and manifests are about many.
No record holds a time of day or a duration except Manifest, so that a seeded run writes the same bytes again.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Behaviour = Literal["comply", "refuse", "safe_complete"]
"""What a clause demands."""
Observed = Literal["comply", "refuse", "partial", "safe_complete"]
"""What an answer was seen to do."""


class Record(BaseModel):
    """A record: unknown keys are mistakes, and are said so."""

    model_config = ConfigDict(extra="forbid")


class Message(Record):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Checks(Record):
    """What an answer must hold to, each verifiable by rule (`evals/checks.py`); those that are None are not asked.

    `contains`, `avoids`: texts, as whole words, case apart. `bullets`: how many lines of a list. `json` (as it is
    called in files): the whole answer is a JSON object or list.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    max_words: int | None = Field(default=None, ge=1)
    min_words: int | None = Field(default=None, ge=1)
    contains: list[_Text] | None = Field(default=None, min_length=1)
    avoids: list[_Text] | None = Field(default=None, min_length=1)
    bullets: int | None = Field(default=None, ge=0)
    as_json: Literal[True] | None = Field(default=None, alias="json")

    @model_validator(mode="after")
    def _can_be_met(self) -> "Checks":
        if not self.model_dump(exclude_none=True):
            raise ValueError("no check is set; set one of max_words, min_words, contains, avoids, bullets, json")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}; no answer holds both")
        return self


class Prompt(Record):
    """One conversation that waits for an answer. `category` and `behaviour` None: nobody has labelled it.

    `clause` is the clause that decides; a general clause (a principle) may decide a prompt of any category or of none.
    `expected`: any of these strings stands in a right answer. `checks`: what an answer holds to, by rule; not written
    where there are none, so that records without them are the same bytes as before there were any. `group`: prompts
    made from one another (a prompt, its translations, its encodings) share it, and intervals resample groups; None
    stands for itself.
    """

    id: str
    messages: list[Message] = Field(min_length=1)
    category: str | None = None
    clause: str | None = None
    behaviour: Behaviour | None = None
    source: str = "unknown"
    split: Literal["train", "rl", "heldout"] = "train"
    expected: list[str] | None = None
    checks: Checks | None = Field(default=None, exclude_if=lambda checks: checks is None)
    group: str | None = None


class Completion(Record):
    """What a model wrote. `reasoning` None: it wrote none. `text` is the raw output, `sent` exactly what it saw.

    `finish`: `stop` (ended by itself), `length` (cut at max_tokens), `malformed` (reasoning unclosed or tags astray;
    then there is no answer). `usage` counts tokens: {"prompt": …, "completion": …}.
    """

    reasoning: str | None
    answer: str
    finish: Literal["stop", "length", "malformed"]
    model: str
    seed: int | None = None
    usage: dict[str, int] = Field(default_factory=dict)
    text: str
    sent: str


class Verdict(Record):
    """One judge's view of one completion. `score` in 0…1; **None is ungraded, never 0**, and `failure` says why.

    `behaviour` is what the answer was seen to do. `view` is what the judge was shown: `full` (reasoning and answer) or
    `answer`. `sent` is exactly the text it was shown.
    """

    score: float | None
    behaviour: Observed | None
    criteria: dict[str, float]
    reason: str
    view: Literal["full", "answer"]
    judge: str
    sent: str
    failure: str | None = None


class Sample(Record):
    """A prompt, a completion of it and the verdicts on it: what record stages pass. A drop has its reason."""

    prompt: Prompt
    index: int = 0
    excerpt_id: str
    completion: Completion | None
    fault: str | None = None
    verdicts: list[Verdict] = Field(default_factory=list)
    kept: bool | None = None
    drop_reason: str | None = None
    failure: str | None = None

    @property
    def key(self) -> str:
        return f"{self.prompt.id}#{self.index}"

    @property
    def score(self) -> float | None:
        """The minimum over the verdicts, as in the paper; None when none was graded."""
        scores = [v.score for v in self.verdicts if v.score is not None]
        return min(scores) if scores else None


class Example(Record):
    """What SFT trains on. It has no field in which a spec could hide."""

    prompt_id: str
    messages: list[Message]
    reasoning: str
    answer: str


class Metric(Record):
    """One figure with its 95 % interval. `by` None is the whole, else e.g. {"category": "violence"}."""

    suite: str
    arm: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    n_ungraded: int = 0
    by: dict[str, str] | None = None


class Manifest(Record):
    """Written last: a stage is done when its manifest stands and its hashes match. `seconds` is wall time."""

    stage: str
    recipe: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    counts: dict[str, int]
    tokens: int = 0
    seconds: float = 0.0
    detail: dict[str, Any] = Field(default_factory=dict)
