"""The second judge: what an answer does, read off the hidden states of a language model.

It is kept apart from the compact judge, which filters and rewards, in what it is fitted on and in what it sees. It is
fitted on `labelled.jsonl` and `labelled-arms.jsonl`, real completions to held-out prompts with blind labels, of which
the compact judge saw none; its features are the states of the untrained SmolLM2 over an answer that stands in its
conversation, with no counted words and no sentence vectors. Members are fitted on different folds of these prompts:
none grades a prompt that it was fitted on, nor one that was made from it (`Prompt.group`). It reads no style.
"""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from delib import chat
from delib.judges import agreement
from delib.judges.data import FOLDS, LabelledAnswer, conversation, fold_of, load_answers
from delib.judges.reading import broken, echo, looping
from delib.models.weights import cache_dir, resolve, without_bars
from delib.progress import bar
from delib.records import Completion, Message, Observed, Prompt, Verdict
from delib.run import sha256
from delib.spec import Spec, digest

FILES = (agreement.LABELS, agreement.ARMS)
"""What it is fitted on."""
LABELS: tuple[Observed, ...] = get_args(Observed)
LAYERS = 14
"""Layers that are run, of 30: chosen of five by cross-validation on the fitted rows (docs/results.md)."""
MAX_PROMPT, MAX_ANSWER, OPENING = 160, 160, 12
"""Tokens of the conversation's end, of the answer's beginning, and of its opening that are read."""
PENALTY = 0.01
"""Inverse strength C of the regression, chosen with LAYERS."""


def fitted() -> list[LabelledAnswer]:
    """The labelled answers that it is fitted on."""
    return [row for file in FILES for row in load_answers(file)]


def _prompt_of(row: LabelledAnswer) -> str:
    """The prompt's id: a row's own is that and the model's name."""
    return row.id.split("/")[0]


@lru_cache(maxsize=1)
def _model() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = resolve("smollm2")
    without_bars()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.layers = model.layers[:LAYERS]
    model.norm = torch.nn.Identity()
    return AutoTokenizer.from_pretrained(folder), model


def read(messages: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the part of the conversation and of the answer that is read."""
    tokenizer, _ = _model()
    asked = tokenizer.encode(chat.render(tokenizer, messages), add_special_tokens=False)[-MAX_PROMPT:]
    return asked, tokenizer.encode(answer or " ", add_special_tokens=False)[:MAX_ANSWER]


def states(asked: list[int], said: list[int]) -> np.ndarray:
    """Shape (1728,): the mean state over the answer's tokens, its last state, and the mean over its opening."""
    import torch

    with torch.inference_mode():
        found = _model()[1](input_ids=torch.tensor([asked + said])).last_hidden_state[0, len(asked) :]
    return torch.cat([found.mean(0), found[-1], found[:OPENING].mean(0)]).numpy()


@lru_cache(maxsize=1)
def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States (n, 1728), labels (n,) and folds (n,) of the labelled rows; the states are kept in the cache."""
    rows = fitted()
    made_of = [*map(sha256, FILES), sha256(resolve("smollm2")), LAYERS, MAX_PROMPT, MAX_ANSWER, OPENING]
    kept = cache_dir() / "vectors" / f"probe-{digest(str(made_of))[:16]}.npy"
    if kept.exists():
        features = np.load(kept, allow_pickle=False)
    else:
        with bar("probe: read what it is fitted on", len(rows)) as ticker:
            found = []
            for row in rows:
                found.append(states(*read(row.messages, row.answer)))
                ticker.step()
        features = np.stack(found)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".part", delete=False) as scratch:
            np.save(scratch, features, allow_pickle=False)
        Path(scratch.name).replace(kept)
    folds = [fold_of(_prompt_of(r)) for r in rows]
    return features, np.array([LABELS.index(r.label) for r in rows]), np.array(folds)


@lru_cache(maxsize=FOLDS + 1)
def _member(left_out: int | None) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels, folds = _table()
    used = folds != left_out
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=500))
    return model.fit(features[used], labels[used])


class ProbeJudge:
    """See the module's text. One deterministic verdict an answer."""

    name = "probe"

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        rows = fitted()
        self._fitted_on = {_prompt_of(r) for r in rows}
        self._known = {conversation(r.messages): _prompt_of(r) for r in rows}
        self._row = {(conversation(r.messages), r.answer): n for n, r in enumerate(rows)}
        resolve("smollm2")

    def observe(
        self, messages: list[Message], answer: str, prompt_id: str | None = None
    ) -> tuple[Observed, dict[str, float]]:
        """What an answer does, by the member that was not fitted on its prompt. `prompt_id`: that of the prompt it was
        made from; without it the conversation itself is looked up."""
        if looping(answer) or echo(messages[-1].content, answer):
            # docs/labelling.md: the same words over and over, or a bare echo, is no answer.
            return "partial", {label: float(label == "partial") for label in LABELS}
        asked = conversation(messages)
        owner = prompt_id if prompt_id in self._fitted_on else self._known.get(asked)
        member = _member(fold_of(owner) if owner is not None else None)
        row = self._row.get((asked, answer))
        seen = _table()[0][row] if row is not None else states(*read(messages, answer))
        found = np.zeros(len(LABELS))
        found[member.classes_] = member.predict_proba(seen[None])[0]
        return LABELS[int(found.argmax())], dict(zip(LABELS, found.tolist(), strict=True))

    async def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]:
        """`runs` times the same verdict, on the answer alone. Ungraded when nothing says which behaviour it needs."""
        required = self.spec.required(prompt.clause, prompt.behaviour)
        asked, said = read(prompt.messages, completion.answer)
        verdict = Verdict(
            score=None,
            behaviour=None,
            criteria={},
            reason="",
            view="answer",
            judge=self.name,
            sent=_model()[0].decode(asked + said),
        )
        if required is None:
            failure = "the probe needs the prompt's behaviour or clause; label the prompt"
            return [verdict.model_copy(update={"failure": failure})] * runs
        observed, chances = self.observe(prompt.messages, completion.answer, prompt.group or prompt.id)
        fault = broken(completion)
        score = 0.0 if fault else round(chances[required], 4)
        reason = f"{required} is required, the answer was seen to {observed.replace('_', ' ')}"
        told = {
            "score": score,
            "behaviour": observed,
            "criteria": {"compliance": score},
            "reason": reason + (f"; broken: {fault}" if fault else ""),
        }
        return [verdict.model_copy(update=told)] * runs
