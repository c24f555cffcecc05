"""Instruction checks: each kind by hand, what is no check, and that prompts without them are written as before."""

import json

import pytest

from conftest import SPEC, write_rows
from delib import chat, spec
from delib.errors import UserError
from delib.evals.checks import failed, unmet
from delib.records import Checks, Message, Prompt
from delib.stages import prompts

POLICY = spec.parse(SPEC)
NAMES = ("max_words", "min_words", "contains", "avoids", "bullets", "json")


def checks(**asked) -> Checks:
    return Checks.model_validate(asked)


@pytest.mark.parametrize(
    ("answer", "asked", "held"),
    [
        ("one two three", {"max_words": 3}, True),
        ("one two three four", {"max_words": 3}, False),
        ("- one\n- two — … three", {"max_words": 3}, True),  # dashes and dots are no words
        ("A well-known 3.5 metre", {"max_words": 3}, False),
        ("A well-known 3.5", {"max_words": 3, "min_words": 3}, True),
        ("one two", {"min_words": 3}, False),
        ("one two *** ---", {"min_words": 3}, False),
        ("Down at the HARBOUR.", {"contains": ["harbour"]}, True),
        ("down at the _harbour_", {"contains": ["Harbour"]}, True),
        ("down at the harbourside", {"contains": ["harbour"]}, False),
        ("New\n  York", {"contains": ["new york"]}, True),
        ("It doesn’t rain", {"contains": ["doesn't"]}, True),
        ("I use C++, mostly", {"contains": ["c++"]}, True),
        ("salt", {"contains": ["salt", "pepper"]}, False),
        ("Pepper and salt", {"contains": ["salt", "pepper"]}, True),
        ("Every morning", {"avoids": ["very"]}, True),
        ("Very early", {"avoids": ["very", "quite"]}, False),
        ("**very** early", {"avoids": ["very"]}, False),
        ("- a\n* b\n\u2022 c", {"bullets": 3}, True),
        ("1. a\n2) b\n  10. c", {"bullets": 3}, True),
        ("Three:\n\n- a\n- b\n- c\n\nThat is all.", {"bullets": 3}, True),
        ("- a\n- b", {"bullets": 3}, False),
        ("- a\n  - a1\n- b", {"bullets": 2}, False),
        ("**Bold**\n---\n-5 degrees\n2024 was dry\n3.5 metres\n-\n- ", {"bullets": 0}, True),
        ("- a", {"bullets": 0}, False),
        ('{"a": [1, 2]}', {"json": True}, True),
        (' [\n"a",\n"b"\n]\n', {"json": True}, True),
        ('```json\n{"a": 1}\n```', {"json": True}, False),
        ('Here: {"a": 1}', {"json": True}, False),
        ("{'a': 1}", {"json": True}, False),
        ('{"a": NaN}', {"json": True}, False),
        ('"text"', {"json": True}, False),
        ("42", {"json": True}, False),
        ("[" * 100_000, {"json": True}, False),
        ("", {"min_words": 1}, False),
    ],
)
def test_each_kind_by_hand(answer, asked, held):
    assert (failed(answer, checks(**asked)) == []) == held, failed(answer, checks(**asked))


def test_all_that_failed_is_named():
    asked = {"max_words": 2, "contains": ["harbour", "boat"], "avoids": ["sea"], "bullets": 3, "json": True}
    assert failed("The boat on the sea", checks(**asked)) == [
        "max_words (5)",
        "contains (harbour)",
        "avoids (sea)",
        "bullets (0)",
        "json",
    ]


def test_an_answer_that_is_none_passes_nothing():
    def told(text, cut=False):
        return unmet(chat.completion(text, sent="", model="m", cut=cut), checks(contains=["harbour"]))

    assert told(chat.join("Why.", "The harbour.")) == []
    assert told(chat.join("Why.", "I'm sorry, no word of the harbour.")) == ["opens as a refusal"]
    assert told(chat.join("Why.", "the harbour " * 20)) == ["looping"]
    assert told(chat.join("Why.", "The harbour"), cut=True) == ["truncated"]
    assert told("<think>The harbour") == ["malformed", "contains (harbour)"]


def test_what_is_no_check_is_an_error_with_its_place(tmp_path):
    wrong = {
        "empty": ({}, "checks: no check is set; set one of max_words, min_words, contains, avoids, bullets, json"),
        "none": ({"max_words": 0}, "checks.max_words: Input should be greater than or equal to 1"),
        "unknown": ({"max_word": 3}, "checks.max_word: Extra inputs are not permitted"),
        "blank": ({"contains": [" "]}, "checks.contains.0: String should have at least 1 character"),
        "no texts": ({"avoids": []}, "checks.avoids: List should have at least 1 item after validation, not 0"),
        "off": ({"json": False}, "checks.json: Input should be True"),
        "both": ({"min_words": 9, "max_words": 3}, "checks: min_words 9 is above max_words 3; no answer holds both"),
    }
    rows = [{"messages": [{"role": "user", "content": name}], "checks": one} for name, (one, _) in wrong.items()]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prompts.load(file, POLICY, "train")
    assert caught.value.problems == [f"{file}:{n}: {said}" for n, (_, said) in enumerate(wrong.values(), 1)]


def test_prompts_without_checks_are_written_as_before():
    """Byte for byte, so that no finished stage is made anew."""
    keys = ("id", "messages", "category", "clause", "behaviour", "source", "split", "expected", "group")
    plain = Prompt(id="a", messages=[Message(role="user", content="Q")])
    assert tuple(json.loads(plain.model_dump_json())) == keys
    asked = plain.model_copy(update={"checks": checks(json=True, max_words=9)})
    again = Prompt.model_validate_json(asked.model_dump_json())
    assert again == asked and set(json.loads(asked.model_dump_json())["checks"]) == set(NAMES)
    assert prompts.content_id(plain) == prompts.content_id(asked)
