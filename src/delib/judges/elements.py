"""The part of the compact judge that sees whether an answer shows an element of a style, for any style of any spec."""

import re
from functools import lru_cache

import numpy as np

from delib.judges.data import DATA, STARTER, LabelledElement, demonstrations, fold_of, load_elements
from delib.judges.encoder import encode, remember
from delib.judges.reading import sentences
from delib.models.recorded import Recording
from delib.records import Prompt
from delib.spec import Element, Spec
from delib.spec import load as load_spec

MAX_SENTENCES = 24
SIMILARITIES = 6


class Elements:
    """Whether an answer shows a style element, for any element that has a description and examples.

    The mean of two logistic regressions: one over a few similarities, which carries over to elements never seen, and
    one over the products of the vectors as well, which knows the common ones better.
    """

    def __init__(self, features: np.ndarray, present: np.ndarray) -> None:
        """`features`: shape (n, 774), from element_features; `present`: shape (n,), of bool."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._near = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, class_weight="balanced"))
        self._near.fit(features[:, :SIMILARITIES], present)
        self._whole = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, class_weight="balanced"))
        self._whole.fit(features, present)

    def predict(self, element: Element, answer: str) -> float:
        features = element_features(element.text, tuple(element.examples), answer)[None]
        near = self._near.predict_proba(features[:, :SIMILARITIES])[0, 1]
        return float(near + self._whole.predict_proba(features)[0, 1]) / 2


def parts(answer: str) -> list[str]:
    """The sentences of an answer whose vectors are used, at most MAX_SENTENCES and at least one."""
    return (sentences(answer) or [""])[:MAX_SENTENCES]


@lru_cache(maxsize=4096)
def element_features(text: str, examples: tuple[str, ...], answer: str) -> np.ndarray:
    """Between an element and an answer's sentences: SIMILARITIES by sentence vector and by shared words, then the
    products of the vectors of the nearest sentence with the element's text and with its examples."""
    said_parts = parts(answer)
    said, shown, told = encode(said_parts), encode(list(examples)), encode([text])
    to_examples = said @ shown.T
    nearest = said[to_examples.max(axis=1).argmax()]
    best = np.sort(to_examples.max(axis=1))[::-1]
    words = [_stems(p) for p in said_parts]
    overlap = max(len(w & _stems(e)) / max(1, len(_stems(e))) for w in words for e in examples)
    phrase = max(_longest_run(e, answer) for e in examples)
    similarities = [
        best[0],
        best[1] if len(best) > 1 else 0.0,
        to_examples.mean(axis=1).max(),
        (said @ told.T).max(),
        overlap,
        phrase,
    ]
    return np.concatenate([similarities, nearest * told[0], nearest * shown.mean(axis=0)], dtype=np.float32)


def _stems(text: str) -> set[str]:
    return {w[:5] for w in re.findall(r"[a-z']+", text.lower().replace("’", "'"))}


def _longest_run(example: str, answer: str) -> float:
    """The share of an example's words that stand in a row in the answer."""
    words = re.findall(r"[a-z']+", example.lower())
    flat = " " + " ".join(re.findall(r"[a-z']+", answer.lower().replace("’", "'"))) + " "
    for size in range(len(words), 0, -1):
        if any(f" {' '.join(words[i : i + size])} " in flat for i in range(len(words) - size + 1)):
            return size / len(words)
    return 0.0


def _shown_elements(policy: Spec, prompt: Prompt, recording: Recording) -> list[LabelledElement]:
    """What a recorded answer shows of styles: a good one has each `must` of its style and no `avoid`, a lecture has
    the `avoid`s, and an everyday or complying answer has no `must` of a refusal."""
    answer = recording.completion().answer
    style = policy.style_for(prompt.clause, prompt.behaviour) if prompt.behaviour else None
    told: list[tuple[Element, bool]] = []
    if recording.fault is None and style is not None:
        told = [(e, e.kind == "must") for e in style.elements]
    elif recording.fault == "lecture" and style is not None:
        told = [(e, True) for e in style.elements if e.kind == "avoid"]
    elif recording.fault is None and prompt.behaviour == "comply":
        told = [(e, False) for s in policy.styles if s.behaviour == "refuse" for e in s.elements]
    return [LabelledElement(text=e.text, examples=e.examples, answer=answer, present=p) for e, p in told]


@lru_cache(maxsize=1)
def _element_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, 774) of float32, presence (n,) and the prompt's fold (n,; -1 for written rows)."""
    rows = [(-1, row) for file in sorted(DATA.glob("elements*.jsonl")) for row in load_elements(file)]
    policy = load_spec(STARTER / "spec.md")
    for prompt, recording in demonstrations():
        rows += [(fold_of(prompt.id), row) for row in _shown_elements(policy, prompt, recording)]
    remember([t for _, r in rows for t in (r.text, *r.examples, *parts(r.answer))])
    features = np.stack([element_features(r.text, tuple(r.examples), r.answer) for _, r in rows])
    return features, np.array([r.present for _, r in rows]), np.array([fold for fold, _ in rows])


@lru_cache(maxsize=16)
def elements(left_out: frozenset[int]) -> Elements:
    features, present, folds = _element_table()
    used = ~np.isin(folds, list(left_out))
    return Elements(features[used], present[used])
