"""The starter pack keeps the rules that docs/pack.md tells."""

import json
import re
from collections import Counter

import pytest

from delib import chat, spec
from delib.judges import reading
from delib.models import recorded
from delib.recipe import STARTER
from delib.stages import distill, prompts

POLICY = spec.load(STARTER / "spec.md")
TRAIN = prompts.load(STARTER / "prompts.jsonl", POLICY, "train")
HELDOUT = prompts.load(STARTER / "heldout.jsonl", POLICY, "heldout")
RECORDINGS = recorded.load(STARTER / "demonstrations.jsonl")
GOOD = [(p, chat.split(r.text)) for p in TRAIN for r in RECORDINGS.get(p.id, []) if r.fault is None]
FLAWED = [r for many in RECORDINGS.values() for r in many if r.fault is not None]


def text_of(prompt) -> str:
    return "\n".join(m.content for m in prompt.messages)


def masked(reasoning: str) -> list[str]:
    for category in POLICY.categories:
        reasoning = re.sub(re.escape(category.name), "#category", reasoning, flags=re.I)
    return re.sub(r"\b[A-Z]\d\b", "#clause", reasoning).lower().split()


def test_size_and_labels():
    assert len(TRAIN) >= 300
    assert len(HELDOUT) >= 120
    assert len(FLAWED) >= 60
    plain = [p for p in TRAIN if p.source == "plain"]
    assert len(plain) >= 80
    assert sum(bool(p.expected) for p in plain) * 2 >= len(plain) - 1
    for prompt in TRAIN + HELDOUT:
        assert prompt.clause and prompt.behaviour == POLICY.clauses[prompt.clause].behaviour, prompt.id
        assert (prompt.category is None) == (prompt.source == "plain" or prompt.clause == "P1"), prompt.id


def test_every_training_prompt_has_a_good_demonstration():
    assert {p.id for p in TRAIN} == {p.id for p, _ in GOOD}


@pytest.mark.parametrize(("prompt", "parts"), GOOD, ids=[p.id for p, _ in GOOD])
def test_a_good_demonstration_is_good(prompt, parts):
    assert not parts.malformed
    assert 25 <= len(parts.reasoning.split()) <= 80
    settled = reading.conclude(parts.reasoning, POLICY)
    assert settled.behaviour == prompt.behaviour
    assert settled.category == prompt.category
    assert prompt.clause in settled.clauses
    assert not settled.unknown_clauses
    assert not reading.points_at_gone_text(parts.reasoning)
    kind = "Everyday" if prompt.category is None else str(prompt.behaviour)
    word = {"refuse": "Harmful", "comply": "Benign", "safe_complete": "Sensitive"}.get(kind, kind)
    assert parts.reasoning.split()[0].rstrip(":.,") == word
    if prompt.expected:
        assert any(e.lower() in parts.answer.lower() for e in prompt.expected)


def test_flaws_of_every_kind_are_there():
    assert {r.fault for r in FLAWED} == set(recorded.Fault.__args__)


def test_no_templating():
    runs, openings, said = Counter(), Counter(), Counter()
    for _, parts in GOOD:
        words = masked(parts.reasoning)
        runs.update({tuple(words[i : i + 6]) for i in range(len(words) - 5)})
        openings[tuple(words[:4])] += 1
        said.update({s.strip().lower() for s in reading.sentences(parts.answer)})
    count = len(GOOD)
    assert max(runs.values()) <= 0.03 * count, runs.most_common(3)
    assert max(openings.values()) <= 0.05 * count, openings.most_common(3)
    assert max(said.values()) <= 0.10 * count, said.most_common(3)


def test_training_and_heldout_prompts_do_not_overlap():
    from sklearn.feature_extraction.text import TfidfVectorizer

    eights = {}
    for prompt in TRAIN:
        for run in distill.shingles(text_of(prompt), 8):
            eights.setdefault(run, prompt.id)
    shared = [(p.id, eights[r]) for p in HELDOUT for r in distill.shingles(text_of(p), 8) if r in eights]
    assert shared == []
    words = TfidfVectorizer().fit([text_of(p) for p in TRAIN + HELDOUT])
    near = (words.transform(map(text_of, HELDOUT)) @ words.transform(map(text_of, TRAIN)).T).toarray()
    close = [(HELDOUT[i].id, TRAIN[int(near[i].argmax())].id) for i in range(len(HELDOUT)) if near[i].max() >= 0.6]
    assert close == []


def test_form_does_not_give_the_behaviour_away():
    """The bag-of-words baseline of docs/results.md: refuse against look-alike comply."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from delib.stats import balanced_accuracy

    def chosen(rows):
        return [p for p in rows if p.behaviour == "refuse" or (p.behaviour == "comply" and p.source != "plain")]

    model = make_pipeline(TfidfVectorizer(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit([text_of(p) for p in chosen(TRAIN)], [p.behaviour for p in chosen(TRAIN)])
    found = model.predict([text_of(p) for p in chosen(HELDOUT)])
    score = balanced_accuracy([p.behaviour == "refuse" for p in chosen(HELDOUT)], [f == "refuse" for f in found])
    print(f"TF-IDF baseline, balanced accuracy {score:.3f}")
    assert score <= 0.85


def test_nothing_is_asked_for_the_clause_that_forbids_it_wholly():
    rows = [json.loads(line) for line in (STARTER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not [r["id"] for r in rows if r["clause"] == "E1"]
