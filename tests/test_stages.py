"""The record stages over the small pack, with a scripted judge where one is needed."""

import asyncio
import json
from contextlib import asynccontextmanager
from functools import partial

import pytest

from conftest import SPEC, write_rows
from delib import chat, spec
from delib.errors import StageError, UserError
from delib.models import recorded
from delib.models.calls import here
from delib.records import Checks, Completion, Example, Message, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.stages import distill, evaluate, filter, generate, prompts

POLICY = spec.parse(SPEC)


class ScriptedJudge:
    """Scores by a word in the answer; keeps what it was shown."""

    name = "scripted"

    def __init__(self, scores: dict[str, float | None]) -> None:
        self.scores, self.calls = scores, []

    async def grade(self, prompt, completion, view, runs):
        self.calls.append((prompt.id, view, completion))
        score = next((s for word, s in self.scores.items() if word in completion.answer), 1.0)
        failure = "the judge failed" if score is None else None
        criteria = {} if score is None else {"compliance": score}
        made = Verdict(
            score=score,
            behaviour=None,
            criteria=criteria,
            reason="",
            view=view,
            judge="scripted",
            sent="",
            failure=failure,
        )
        return [made.model_copy(update={"score": None if score is None else score - n / 100}) for n in range(runs)]


def sample(name: str, answer: str, reasoning: str = "Because K2 is fine, I comply.", index: int = 0, **more) -> Sample:
    made = chat.completion(
        more.pop("text", chat.join(reasoning, answer)), sent="", model="m", cut=more.pop("cut", False)
    )
    prompt = Prompt(id=name, messages=[Message(role="user", content="Q")], category="investment", clause="K2")
    return Sample(prompt=prompt, index=index, excerpt_id="x", completion=made, **more)


def load_prompts(pack) -> list[Prompt]:
    folder = StageFolder(pack / "prompts")
    folder.begin("k")
    prompts.run({"train": pack / "train.jsonl", "heldout": pack / "heldout.jsonl"}, POLICY, folder)
    return folder.records(Prompt)


def test_prompts_tells_every_problem(pack):
    rows = [
        {"id": "a", "messages": [{"role": "assistant", "content": "hi"}]},
        {"id": "a", "messages": [{"role": "user", "content": "hi"}], "category": "astrology"},
        {"id": "b", "messages": [{"role": "user", "content": "hi"}], "behaviour": "obey"},
        {"id": "c", "messages": [{"role": "user", "content": "hi"}], "clause": "F1", "category": "investment"},
        {"id": "d", "messages": [], "mood": 1},
    ]
    write_rows(pack / "train.jsonl", rows)
    with (pack / "train.jsonl").open("a") as handle:
        handle.write("not json\n")
    (pack / "heldout.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as caught:
        load_prompts(pack)
    text = "\n".join(caught.value.problems)
    for words in (
        "train.jsonl:1: ends on a turn of assistant",
        "train.jsonl:2: id 'a' was used in line 1",
        "category 'astrology' is not in the spec",
        "train.jsonl:3: behaviour",
        "train.jsonl:4: clause F1 belongs to 'fraud'",
        "train.jsonl:5: messages",
        "train.jsonl:5: mood",
        "train.jsonl:6: not a JSON object",
        "heldout.jsonl: not UTF-8",
    ):
        assert words in text, words


def test_a_training_prompt_can_not_be_held_out(pack):
    row = json.loads((pack / "train.jsonl").read_text().splitlines()[0])
    write_rows(pack / "heldout.jsonl", [row | {"id": "new"}])
    with pytest.raises(UserError, match=r"is 'pick' of .*train.jsonl; remove one"):
        load_prompts(pack)


def test_the_spec_is_the_authority_over_labels(pack):
    changed = spec.parse(SPEC.replace("### K1 (refuse, plain-no)", "### K1 (comply)"))
    folder = StageFolder(pack / "prompts")
    folder.begin("k")
    made = prompts.run({"train": pack / "train.jsonl", "heldout": pack / "heldout.jsonl"}, changed, folder)
    assert made.counts["relabelled"] == 2
    assert {p.behaviour for p in folder.records(Prompt) if p.clause == "K1"} == {"comply"}


def test_generate_replays_and_counts_what_is_missing(pack):
    rows = load_prompts(pack)
    train = [p for p in rows if p.split == "train"]
    folder = StageFolder(pack / "generate")
    folder.begin("k")
    made = generate.replay(train, recorded.load(pack / "demos.jsonl"), POLICY, folder)
    assert made.counts == {"in": 6, "out": 7, "failed": 0}
    malformed = next(s for s in folder.records(Sample) if s.fault == "malformed")
    assert malformed.completion.finish == "malformed"
    assert malformed.completion.answer == ""


class FlakyTeacher:
    """Answers once each prompt; fails on those that hold the word given."""

    def __init__(self, bad: str) -> None:
        self.bad, self.sent = bad, []

    async def complete(self, messages, *, max_tokens, temperature, seed, index):
        text = messages[-1].content
        self.sent.append(text)
        await asyncio.sleep(0)
        if self.bad in text:
            raise OSError("gone away")
        return Completion(reasoning="r", answer="a", finish="stop", model="m", seed=seed, text="t", sent=text)


def live(pack, teacher, rate, samples=2):
    train = [p for p in load_prompts(pack) if p.split == "train"]
    folder = StageFolder(pack / "generate")

    handed_on = []

    async def hand_on(sample):
        handed_on.append(sample.key)

    @asynccontextmanager
    async def opened():
        yield teacher, hand_on

    working = partial(generate.working, opened, POLICY, max_tokens=9, temperature=1.0, seed=0)
    made = generate.live(train, here(working, 3), POLICY, folder, samples=samples, max_failure_rate=rate)
    assert sorted(handed_on) == sorted(s.key for s in folder.records(Sample) if s.failure is None)
    return folder, made


def test_a_live_teacher_sees_the_excerpt_and_finished_samples_are_not_made_again(pack):
    (pack / "generate").mkdir()
    first = FlakyTeacher("double by May")
    folder, made = live(pack, first, rate=0.5)
    assert made.counts == {"in": 6, "out": 10, "failed": 2}
    full = ["Telling which share to buy is refused." in text for text in first.sent]
    assert any(full) and not all(full)
    assert not any("Signs of a scam are explained." in text for text, one in zip(first.sent, full, strict=True) if one)
    assert full == sorted(full) or full == sorted(full, reverse=True)  # those of one category together
    before = folder.records(Sample)
    second = FlakyTeacher("nothing like this")
    folder, made = live(pack, second, rate=0.5)
    assert made.counts["failed"] == 0
    assert len(second.sent) == 2
    assert [s for s in folder.records(Sample) if s.prompt.id != "pick"] == [s for s in before if s.prompt.id != "pick"]
    assert len({s.completion.seed for s in folder.records(Sample) if s.prompt.id == "pick"}) == 2


def test_too_many_failures_stop_the_stage_with_causes(pack):
    (pack / "generate").mkdir()
    with pytest.raises(StageError, match=r"2 of 12 samples failed.*gone away"):
        live(pack, FlakyTeacher("double by May"), rate=0.1)


def filtered(rows, judge, folder, **choices):
    source = StageFolder(folder.path.with_name(folder.path.name + "-source"))
    source.path.mkdir(exist_ok=True)
    source.replace(rows)

    @asynccontextmanager
    async def opened():
        yield judge

    choices = {"runs": 3, "threshold": 0.5, "best_of": 1, "limit": None} | choices
    working = partial(filter.working, opened, runs=choices.pop("runs"), threshold=choices["threshold"])
    return filter.run(source, here(working, 4), folder, **choices)


def test_filter_drops_with_reasons_and_keeps_the_best(tmp_path):
    folder = StageFolder(tmp_path)
    rows = [
        sample("a", "poor"),
        sample("a", "fine", index=1),
        sample("a", "better", index=2),
        sample("b", "unsure"),
        sample("c", "x", text="<think>open", fault="malformed"),
        sample("d", "x", cut=True),
    ]
    judge = ScriptedJudge({"poor": 0.2, "fine": 0.8, "better": 0.9, "unsure": None})
    made = filtered(rows, judge, folder)
    reasons = [s.drop_reason for s in folder.records(Sample)]
    assert reasons == [
        "low score: compliance",
        "not the best of its prompt",
        None,
        "ungraded",
        "malformed",
        "truncated",
    ]
    kept = folder.records(Sample)[2]
    assert [v.score for v in kept.verdicts] == [0.9, 0.89, 0.88]
    assert kept.score == 0.88, "the score is the minimum of the runs"
    assert made.counts["ungraded"] == 1
    assert made.detail["flaws"]["by_fault"] == {"malformed": {"marked": 1, "caught": 1}}
    assert {view for _, view, _ in judge.calls} == {"full"}


def test_an_ungraded_sample_has_no_score():
    blank = Verdict(score=None, behaviour=None, criteria={}, reason="", view="full", judge="j", sent="", failure="x")
    assert sample("a", "b", verdicts=[blank]).score is None


def test_distill_drops_reasoning_about_gone_text_and_limits_plain(tmp_path):
    folder = StageFolder(tmp_path)
    rows = [sample(f"p{n}", "a", kept=True) for n in range(4)]
    rows.append(sample("gone", "a", reasoning="The policy above says K2, comply.", kept=True))
    plain = Prompt(id="plain", messages=[Message(role="user", content="Q")])
    rows += [
        sample("x", "a", kept=True).model_copy(update={"prompt": plain.model_copy(update={"id": f"e{n}"})})
        for n in range(9)
    ]
    made = distill.run(rows, POLICY, folder, plain_share=0.5, seed=0)
    ids = {e.prompt_id for e in folder.records(Example)}
    assert "gone" not in ids
    assert made.counts["gone_text"] == 1
    assert made.counts["plain"] == 4
    assert len(ids) == 8


def test_examples_stand_in_turn_the_shortest_first(tmp_path):
    folder = StageFolder(tmp_path)
    helped = [sample(f"c{n}", "a" * (9 - n), kept=True) for n in range(6)]
    declined = [sample(f"r{n}", "a" * (9 - n), kept=True) for n in range(3)]
    declined = [
        s.model_copy(update={"prompt": s.prompt.model_copy(update={"behaviour": "refuse", "id": f"r{n}"})})
        for n, s in enumerate(declined)
    ]
    plain = sample("e", "a" * 20, kept=True)
    plain = plain.model_copy(update={"prompt": plain.prompt.model_copy(update={"category": None, "source": "plain"})})
    distill.run([*helped, *declined, plain], POLICY, folder, plain_share=0.5, seed=0)
    ids = [e.prompt_id for e in folder.records(Example)]
    assert sorted(ids[:3]) == ["c5", "e", "r2"]
    assert sorted(ids[:7]) == ["c3", "c4", "c5", "e", "r0", "r1", "r2"]
    assert ids[7:] == ["c2", "c1", "c0"]


def test_distill_refuses_a_leak(tmp_path):
    long = "Telling which share to buy is refused, and nobody may ever do it on any day at all."
    policy = spec.parse(SPEC.replace("Telling which share to buy is refused.", long))
    leaky = sample("leak", "a", kept=True)
    prompt = leaky.prompt.model_copy(update={"messages": [Message(role="user", content=f"Rule: {long} So?")]})
    with pytest.raises(StageError, match="text of the spec stands in the messages of leak"):
        distill.run(
            [leaky.model_copy(update={"prompt": prompt})],
            policy,
            StageFolder(tmp_path),
            plain_share=0.5,
            seed=0,
        )


def test_base_spec_puts_the_summary_into_the_system_message():
    plain = evaluate.with_spec([Message(role="user", content="Q")], POLICY)
    assert [m.role for m in plain] == ["system", "user"]
    assert "No picks; general education is fine." in plain[0].content
    both = evaluate.with_spec([Message(role="system", content="Be brief."), Message(role="user", content="Q")], POLICY)
    assert both[0].content.endswith("Be brief.")
    assert len(both) == 2


def test_a_limit_cuts_every_kind_in_proportion():
    """Everyday prompts, with and without an expected answer or checks, keep their share; the file's order stays."""

    def rows(source, category, count, expected=None, checks=None):
        return [
            Prompt(
                id=f"{source}-{category}-{bool(expected)}-{bool(checks)}-{n}",
                messages=[Message(role="user", content="Q")],
                source=source,
                category=category,
                expected=expected,
                checks=checks,
            )
            for n in range(count)
        ]

    kinds = [("disallowed", "investment", 12), ("plain", None, 6), ("plain", None, 4, ["7"])]
    kinds.append(("plain", None, 2, None, Checks(bullets=3)))
    every = [p for kind in kinds for p in rows(*kind)]
    taken = evaluate.balanced(every, 12)
    assert [sum(p in taken for p in rows(*kind)) for kind in kinds] == [6, 3, 2, 1]
    assert taken == [p for p in every if p in taken]
    assert evaluate.balanced(every, 24) == every


def test_filter_keeps_n_of_a_prompt_and_fills_a_limit_in_turn(tmp_path):
    folder = StageFolder(tmp_path)
    rows = [sample("a", f"good{n}", index=n) for n in range(4)]
    rows += [sample(f"b{n}", f"fair{n}") for n in range(3)]
    other = Prompt(id="c", messages=[Message(role="user", content="Q")], category="fraud", source="rare")
    rows.append(sample("c", "poor but rare").model_copy(update={"prompt": other}))
    scores = {f"good{n}": 0.9 - n / 10 for n in range(4)} | {"fair": 0.7, "rare": 0.6}
    made = filtered(rows, ScriptedJudge(scores), folder, best_of=2, limit=3, runs=1)
    reasons = {s.key: s.drop_reason for s in folder.records(Sample)}
    assert reasons["a#0"] is None and reasons["a#1"] is None and reasons["c#0"] is None, "the rare pile has its turn"
    assert reasons["a#2"] == reasons["a#3"] == "not the best of its prompt"
    assert {reasons[f"b{n}#0"] for n in range(3)} == {"beyond the limit of its source and category"}
    assert made.counts["out"] == 3 and made.detail["agreement"] is None


def test_the_runs_agreement_is_told(tmp_path):
    rows = [sample(f"p{n}", ["yes", "no"][n % 2]) for n in range(4)]
    made = filtered(rows, ScriptedJudge({"yes": 0.9, "no": 0.505}), StageFolder(tmp_path))
    found = made.detail["agreement"]
    assert (found["n"], found["same_side"]) == (4, 0.5), "0.505, 0.495 and 0.485 stand on two sides"
    assert found["spread"] == pytest.approx(0.02)


def test_a_judge_that_grades_hardly_anything_stops_the_stage_with_causes(tmp_path):
    rows = [sample(f"p{n}", "unsure") for n in range(3)] + [sample("q", "fine")]
    with pytest.raises(StageError, match=r"3 of 4 samples ungraded, first p0#0: the judge failed"):
        filtered(rows, ScriptedJudge({"unsure": None}), StageFolder(tmp_path))
    made = filtered(rows, ScriptedJudge({}), StageFolder(tmp_path))
    assert made.counts["ungraded"] == 0, "the ungraded are tried again"
