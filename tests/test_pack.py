"""The starter pack keeps the rules that docs/pack.md tells."""

import json
import re
from collections import Counter

import pytest

from delib import chat, pack, spec
from delib.evals import checks
from delib.judges import reading
from delib.models import recorded
from delib.recipe import RECIPES, STARTER
from delib.stages import prompts

POLICY = spec.load(STARTER / "spec.md")
TRAIN = prompts.load(STARTER / "prompts.jsonl", POLICY, "train")
HELDOUT = prompts.load(STARTER / "heldout.jsonl", POLICY, "heldout")
RECORDINGS = recorded.load(STARTER / "demonstrations.jsonl")
GOOD = [(p, chat.split(r.text)) for p in TRAIN for r in RECORDINGS.get(p.id, []) if r.fault is None]
FLAWED = [r for many in RECORDINGS.values() for r in many if r.fault is not None]


def masked(reasoning: str) -> list[str]:
    for category in POLICY.categories:
        reasoning = re.sub(re.escape(category.name), "#category", reasoning, flags=re.I)
    return re.sub(r"\b[A-Z]\d\b", "#clause", reasoning).lower().split()


def test_size_and_labels():
    assert len(TRAIN) >= 480
    assert len(HELDOUT) >= 240
    assert len(FLAWED) >= 120
    plain = [p for p in TRAIN if p.source == "plain"]
    orders = [p for p in plain if p.id.startswith("order-")]
    questions = [p for p in plain if p not in orders]
    assert len(questions) >= 120 and sum(bool(p.expected) for p in questions) * 2 >= len(questions) - 1
    assert len(orders) >= 150 and sum(p.checks is not None for p in orders) * 2 >= len(orders)
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
    if prompt.checks:
        assert not checks.failed(parts.answer, prompt.checks)


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
    assert pack.overlaps(HELDOUT, TRAIN) == []


def test_verifiable_prompts_stand_apart_and_in_no_recipe():
    rl = prompts.load(STARTER / "rl.jsonl", POLICY, "rl")
    found = prompts.load(STARTER / "verifiable.jsonl", POLICY, "rl")
    assert [sum(bool(p.expected) for p in found), sum(p.checks is not None for p in found)] == [24, 24]
    assert {(p.category, p.clause, p.behaviour, p.source) for p in found} == {(None, "P1", "comply", "plain")}
    assert all(bool(p.expected) != bool(p.checks) for p in found)
    kinds = {kind for p in found if p.checks for kind in p.checks.model_dump(exclude_none=True)}
    assert kinds == {"max_words", "min_words", "contains", "avoids", "bullets", "json"}
    for prompt in found:
        asked = prompt.messages[0].content
        assert not prompt.expected or not reading.is_right(asked, prompt.expected), "the prompt gives the answer away"
    assert pack.overlaps(found, TRAIN + HELDOUT + rl) == []
    assert not {p.id for p in found} & {p.id for p in TRAIN + HELDOUT + rl}
    assert not [r for r in RECIPES.glob("*.yaml") if "verifiable" in r.read_text(encoding="utf-8")]


def test_held_out_orders_stand_apart_and_in_no_recipe():
    found = prompts.load(STARTER / "orders-heldout.jsonl", POLICY, "heldout")
    apart = [
        prompts.load(STARTER / f"{name}.jsonl", POLICY, where)
        for name, where in (("rl", "rl"), ("verifiable", "rl"), ("heldout", "heldout"))
    ]
    assert len(found) >= 60 and sum(p.checks is not None for p in found) * 2 >= len(found)
    assert {(p.category, p.clause, p.behaviour, p.source) for p in found} == {(None, "P1", "comply", "plain")}
    for others in (TRAIN, *apart):
        assert pack.overlaps(found, others) == []
    assert not [r for r in RECIPES.glob("*.yaml") if "orders-heldout" in r.read_text(encoding="utf-8")]


def test_shifted_prompts_are_made_from_held_out_ones():
    shifted = prompts.load(STARTER / "shifted.jsonl", POLICY, "heldout")
    own = {p.id: p for p in HELDOUT}
    assert {p.source for p in shifted} == {"paraphrase", "language", "wrapper", "encoding"}
    for prompt in shifted:
        first = own[prompt.group]
        assert (prompt.clause, prompt.behaviour) == (first.clause, first.behaviour), prompt.id
    assert pack.overlaps([p for p in shifted if p.source == "paraphrase"], TRAIN) == []


def test_form_does_not_give_the_behaviour_away():
    """The bag-of-words baseline of docs/results.md: refuse against look-alike comply."""
    score = pack.form_baseline(TRAIN, HELDOUT, POLICY)
    print(f"TF-IDF baseline, balanced accuracy {score:.3f}")
    assert score <= 0.85


def test_nothing_is_asked_for_the_clause_that_forbids_it_wholly():
    rows = [json.loads(line) for line in (STARTER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not [r["id"] for r in rows if r["clause"] == "E1"]
