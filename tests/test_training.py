"""What SFT learns from, and what the RL judge is shown: on the tiny tokenizer, and on tags that are special tokens."""

import random

import pytest

from conftest import ROWS, SPEC
from delib import chat, recipe, spec
from delib.errors import UserError
from delib.recipe import EvaluateSection, RlSection, SftSection
from delib.records import Example, Message, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.stages import rl, sft

POLICY = spec.parse(SPEC)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_loss_is_on_reasoning_and_answer_only(tokenizer):
    example = Example(prompt_id="p", messages=[Message(role="user", content="Hello?")], reasoning="why", answer="yes")
    row = sft.tokenise(example, tokenizer)
    assert len(row["input_ids"]) == len(row["labels"])
    start = next(n for n, label in enumerate(row["labels"]) if label != -100)
    assert tokenizer.decode(row["input_ids"][:start]) == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert row["labels"][start:] == row["input_ids"][start:]
    assert tokenizer.decode(row["labels"][start:]) == "<think>\nwhy\n</think>\n\nyes<|im_end|>"


def trainer_of(kind, tiny_model, tokenizer, rows, folder):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    return kind(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=sft.collator(tokenizer),
    )


def test_the_plain_head_has_the_loss_of_trl(tiny_model, tokenizer, tmp_path):
    """One batch, both trainers: the same loss and the same gradients."""
    import torch
    from trl import SFTTrainer

    rows = [
        sft.tokenise(
            Example(
                prompt_id="p", messages=[Message(role="user", content="Hi" * n)], reasoning="why " * n, answer="yes"
            ),
            tokenizer,
        )
        for n in (1, 3, 5)
    ]
    collate = sft.collator(tokenizer)
    results = []
    for kind in (SFTTrainer, sft.trainer_class()):
        trainer = trainer_of(kind, tiny_model, tokenizer, rows, tmp_path / kind.__name__)
        model = trainer.model
        batch = collate(rows)
        if kind is SFTTrainer:
            del batch["weights"]
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (found, ours) = results
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, ours[name], rtol=1e-4, atol=1e-6), name


def test_what_decides_weighs_more(tokenizer):
    """The opening, the conclusion and the answer's opening weigh more, the first word most; the prompt nothing; all
    else one."""
    reasoning = "Harmful: " + "a long weighing of what is asked and why, " * 4 + "it is under K1. I refuse."
    answer = "I'm sorry, but " + "this is something that I can't help you with. " * 3
    example = Example(
        prompt_id="p", messages=[Message(role="user", content="Hello?")], reasoning=reasoning, answer=answer
    )
    row = sft.tokenise(example, tokenizer, 4.0)
    start = next(n for n, label in enumerate(row["labels"]) if label != -100)
    assert len(row["weights"]) == len(row["labels"])
    assert set(row["weights"][:start]) == {0.0}
    most = [i for i, w in zip(row["input_ids"], row["weights"], strict=True) if w == 16.0]
    assert tokenizer.decode(most) == "Harmful:"
    assert set(row["weights"][start : start + sft.OPENING]) == {4.0, 16.0}
    heavy = [i for i, w in zip(row["input_ids"], row["weights"], strict=True) if w == 4.0]
    decided = tokenizer.decode(heavy)
    assert "I refuse.\n</think>\n\nI'm sorry" in decided
    assert " under K1" in decided
    assert len(decided) < 75
    assert row["weights"][-1] == 1.0


def test_the_control_learns_the_answer_alone(tokenizer):
    """Without reasoning the same answer is learned, in a form that reads back as an answer with no reasoning."""
    example = Example(
        prompt_id="p",
        messages=[Message(role="user", content="Hello?")],
        reasoning="Harmful: it is under K1. I refuse.",
        answer="I'm sorry, but I can't help with that.",
    )
    row = sft.tokenise(example, tokenizer, 4.0, reasoning=False)
    learned = tokenizer.decode([i for i in row["labels"] if i != -100])
    assert learned == "I'm sorry, but I can't help with that.<|im_end|>"
    assert chat.split(learned.removesuffix("<|im_end|>")) == (None, example.answer, False)
    most = [i for i, w in zip(row["input_ids"], row["weights"], strict=True) if w == 16.0]
    assert tokenizer.decode(most) == "I'm"
    assert row["weights"].count(4.0) == sft.OPENING - len(most)


def test_an_opening_is_an_example_cut_off(tokenizer):
    example = Example(
        prompt_id="p",
        messages=[Message(role="user", content="Hello?")],
        reasoning="Harmful: " + "why " * 30 + "is told. I refuse.",
        answer="I'm sorry, I can't help with that, not even a little.",
    )
    row = sft.tokenise(example, tokenizer, 4.0)
    cut = sft.opening_of(row)
    start = next(n for n, label in enumerate(row["labels"]) if label != -100)
    assert {name: values[: start + sft.OPENING] for name, values in row.items()} == cut


def test_batches_of_like_length_hold_every_row():
    rows = [{"input_ids": [n] * (1 + n * 7 % 50), "labels": []} for n in range(200)]
    found = sft.grouped(rows, 4, random.Random(0))
    assert sorted(r["input_ids"] for batch in found for r in batch) == sorted(r["input_ids"] for r in rows)
    lengths = [[len(r["input_ids"]) for r in batch] for batch in found]
    assert sum(max(s) - min(s) for s in lengths) / len(lengths) < 10
    assert found == sft.grouped(rows, 4, random.Random(0)) != sft.grouped(rows, 4, random.Random(1))


def test_whole_examples_and_openings_are_mixed_but_not_within_a_batch(tokenizer):
    examples = [
        Example(
            prompt_id=f"p{n}",
            messages=[Message(role="user", content=f"Hello {n}?")],
            reasoning="Harmful: " + "why " * 30 + "is told. I refuse.",
            answer="I'm sorry, I can't help with that.",
        )
        for n in range(42)
    ]
    rows = [sft.tokenise(e, tokenizer, 4.0) for e in examples]
    section = SftSection(opening_epochs=2, epochs=2, whole_examples=30, batch_size=4, decision_weight=4)
    course = sft.course_of(rows, section, random.Random(0))
    whole = [row in rows for row in course]
    assert (len(course), sum(whole)) == (144, 60)
    assert all(row in rows[:30] for row, is_whole in zip(course, whole, strict=True) if is_whole)
    full = [whole[i : i + 4] for i in range(0, 136, 4)]
    assert all(len(set(batch)) == 1 for batch in full)
    for half in (full[:17], full[17:]):
        assert 3 < sum(batch[0] for batch in half) < 14
    assert course == sft.course_of(rows, section, random.Random(0)) != sft.course_of(rows, section, random.Random(1))


def test_the_trainer_shows_the_course_in_its_order(tiny_model, tokenizer, tmp_path):
    """`run` on nine examples, one of them too long: what the data loader gave, batch by batch."""
    examples = [
        Example(
            prompt_id=f"p{n}",
            messages=[Message(role="user", content=f"Hello {n}?")],
            reasoning="Harmful: " + "why " * (200 if n == 8 else n) + "is told. I refuse.",
            answer="I'm sorry.",
        )
        for n in range(9)
    ]
    given = recipe.Recipe(
        sft=SftSection(opening_epochs=1, epochs=1, batch_size=2, max_tokens=200, decision_weight=2, checkpoint_steps=4)
    )
    seen = []
    kind = sft.trainer_class()

    class Watching(kind):
        def compute_loss(self, model, inputs, **more):
            seen.append(inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "trainer_class", lambda: Watching)
        made = sft.run(given, examples, tiny_model, StageFolder(tmp_path))
    rows = [sft.tokenise(e, tokenizer, 2) for e in examples[:8]]
    course = [r["input_ids"] for r in sft.course_of(rows, given.sft, random.Random(0))]
    shown = [ids for batch in seen for ids in batch]
    assert [ids[: len(want)] for ids, want in zip(shown, course, strict=True)] == course
    assert made.counts == {"in": 9, "whole": 8, "openings": 8, "dropped": 1, "steps": 8}
    assert (tmp_path / "trainer" / "checkpoint-8").exists()
    again = sft.run(given, examples, tiny_model, StageFolder(tmp_path))
    assert again.counts == made.counts
    assert again.detail["curve"] == made.detail["curve"]
    short = given.model_copy(update={"sft": given.sft.model_copy(update={"max_tokens": 32})})
    with pytest.raises(UserError, match="every example is longer"):
        sft.run(short, examples, tiny_model, StageFolder(tmp_path))


def test_the_loss_is_a_weighted_mean(tiny_model, tokenizer, tmp_path):
    import torch

    rows = [
        sft.tokenise(
            Example(prompt_id="p", messages=[Message(role="user", content="Hi")], reasoning="why " * n, answer="yes"),
            tokenizer,
            4.0,
        )
        for n in (1, 9)
    ]
    trainer = trainer_of(sft.trainer_class(), tiny_model, tokenizer, rows, tmp_path)
    model = trainer.model
    found = trainer.compute_loss(model, sft.collator(tokenizer)(rows)).item()
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            odds = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for n in range(1, len(row["labels"])):
            if row["labels"][n] != -100:
                total -= row["weights"][n] * odds[n - 1, row["labels"][n]].item()
                count += row["weights"][n]
    assert {1.0, 4.0, 16.0} <= {w for row in rows for w in row["weights"]}
    assert found == pytest.approx(total / count, rel=1e-4)


class Opened:
    """A tokenizer whose template opens the reasoning, as some do."""

    def __init__(self, inner):
        self.inner, self.eos_token_id = inner, inner.eos_token_id

    def __call__(self, *given, **more):
        return self.inner(*given, **more)

    def encode(self, *given, **more):
        return self.inner.encode(*given, **more)

    def apply_chat_template(self, *given, **more):
        return self.inner.apply_chat_template(*given, **more) + "<think>\n"


def test_a_template_that_opens_the_reasoning_is_not_answered_with_another_tag(tokenizer):
    example = Example(
        prompt_id="p", messages=[Message(role="user", content="Hello?")], reasoning="Harmful: why", answer="yes"
    )
    row = sft.tokenise(example, Opened(tokenizer), 4.0)
    assert tokenizer.decode(row["input_ids"]).count("<think>") == 1
    most = [i for i, w in zip(row["input_ids"], row["weights"], strict=True) if w == 16.0]
    assert tokenizer.decode(most) == "Harmful:"


class WatchingJudge:
    name = "watching"

    def __init__(self, score: float | None = 0.7) -> None:
        self.score, self.shown = score, []

    def grade(self, prompt, completion, view, runs):
        self.shown.append((view, completion.model_dump_json()))
        made = Verdict(
            score=self.score, behaviour=None, criteria={}, reason="", view=view, judge=self.name, sent=completion.answer
        )
        return [made] * runs


def reward(tokenizer, tmp_path, judge, texts, sent="<|im_start|>assistant\n"):
    class State:
        global_step = 0

    prompt = Prompt(id="p", messages=[Message(role="user", content="Q")], clause="K1", category="investment")
    folder = StageFolder(tmp_path)
    function = rl.reward_function({"p": prompt}, judge, POLICY, tokenizer, {tokenizer.eos_token_id}, folder)
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    found = function(
        prompts=[sent] * len(texts),
        completions=["not looked at"] * len(texts),
        completion_ids=ids,
        prompt_id=["p"] * len(texts),
        trainer_state=State(),
    )
    return found, folder.records(Sample)


SECRET = "SECRET-REASONING"


def test_the_rl_judge_never_sees_the_reasoning(tokenizer, tmp_path):
    judge = WatchingJudge()
    texts = [
        f"<think>\n{SECRET}\n</think>\n\nSorry.<|im_end|>",
        f"<think>\n{SECRET} and never closed: Sorry.<|im_end|>",
        f"{SECRET}</think>Sorry.<|im_end|>",
        f"<think>{SECRET}</think><think>{SECRET}</think>Sorry.<|im_end|>",
        f"<think>\n{SECRET}\n</think>\n\nSorry, cut",
    ]
    found, samples = reward(tokenizer, tmp_path, judge, texts)
    assert found == [0.7, 0.0, 0.0, 0.0, 0.0]
    assert len(judge.shown) == 1, "malformed and truncated completions cost no judge call"
    assert all(view == "answer" and SECRET not in shown for view, shown in judge.shown)
    assert all(SECRET not in v.sent for s in samples for v in s.verdicts)
    assert SECRET in samples[0].completion.reasoning, "it is kept for people"


def test_reasoning_tags_that_are_special_tokens_do_not_vanish(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    judge = WatchingJudge()
    found, _ = reward(tokenizer, tmp_path, judge, [f"<think>\n{SECRET}\n</think>\n\nSorry.<|im_end|>"])
    assert found == [0.7]
    assert SECRET not in judge.shown[0][1]


def test_a_template_that_opens_the_reasoning(tokenizer, tmp_path):
    judge = WatchingJudge()
    opened = "<|im_start|>assistant\n<think>\n"
    texts = [f"{SECRET}\n</think>\n\nSorry.<|im_end|>", f"{SECRET} Sorry.<|im_end|>"]
    found, _ = reward(tokenizer, tmp_path, judge, texts, sent=opened)
    assert found == [0.7, 0.0]
    assert len(judge.shown) == 1
    assert SECRET not in judge.shown[0][1]


def test_a_judge_failure_is_no_reward_and_not_zero(tokenizer, tmp_path):
    found, samples = reward(tokenizer, tmp_path, WatchingJudge(None), ["<think>a</think>Sorry.<|im_end|>"])
    assert found == [None]
    assert samples[0].failure == "ungraded"


def test_rl_prompts_are_mixed_in_equal_parts():
    made = []
    for number in range(40):
        kind = ("refuse", "comply", "safe_complete", "comply")[number % 4]
        category = None if number % 4 == 3 else "fraud"
        made.append(
            Prompt(id=str(number), messages=[Message(role="user", content="Q")], category=category, behaviour=kind)
        )
    chosen = rl.mixed(made, 16, seed=1)
    assert sum(p.category is None for p in chosen) == 4
    assert sum(p.behaviour == "refuse" for p in chosen) == 4
    assert rl.mixed(made, 16, seed=1) == chosen


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path):
    from delib.models import weights

    assert weights.last_checkpoint(tmp_path / "none") is None
    for name, state in (("checkpoint-9", "{}"), ("checkpoint-10", '{"torn'), ("checkpoint-20", None)):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert weights.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-9"]


def test_rl_that_was_killed_after_its_last_step_makes_no_other(tiny_model, tmp_path):
    prompts = [
        Prompt(
            id=name,
            messages=[Message(role="user", content=text)],
            category=category,
            clause=clause,
            behaviour=behaviour,
        )
        for name, text, category, clause, behaviour in ROWS
    ]
    given = recipe.Recipe(rl=RlSection(steps=2, prompts=2, group=2, max_tokens=16))
    judge = WatchingJudge()
    made = rl.run(given, prompts, judge, POLICY, tiny_model, StageFolder(tmp_path))
    records = (tmp_path / "records.jsonl").read_bytes()
    assert (tmp_path / "trainer" / "checkpoint-2").exists()
    shown = len(judge.shown)
    again = rl.run(given, prompts, judge, POLICY, tiny_model, StageFolder(tmp_path))
    assert again.counts == made.counts
    assert made.counts["out"] == 8
    assert (tmp_path / "records.jsonl").read_bytes() == records
    assert len(judge.shown) == shown


@pytest.mark.parametrize(("ending", "limit", "moved"), [(False, 32, False), (False, 16, True), (True, 32, True)])
def test_what_was_cut_off_before_evaluates_limit_moves_no_weight(
    tiny_model, tmp_path, monkeypatch, ending, limit, moved
):
    """Rewards differ within each group; the weights move where completions ended by themselves, or were cut off where
    evaluate would cut them off too."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        rl, "reward_function", lambda *_: lambda prompts, completions, **__: [float(n % 2) for n in range(len(prompts))]
    )
    prompts = [
        Prompt(id=name, messages=[Message(role="user", content=text)], category=about, clause=clause, behaviour=kind)
        for name, text, about, clause, kind in ROWS
    ]
    start = tmp_path / "start"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    # Where nothing may end a completion all are cut off; where every token ends it none is.
    model.generation_config.eos_token_id = list(range(model.config.vocab_size)) if ending else [1]
    model.generation_config.suppress_tokens = None if ending else [1]
    model.save_pretrained(start)
    for file in tiny_model.glob("*token*"):
        (start / file.name).write_bytes(file.read_bytes())
    for file in tiny_model.glob("chat_template*"):
        (start / file.name).write_bytes(file.read_bytes())
    section = RlSection(steps=1, prompts=2, group=2, max_tokens=16, learning_rate=1e-2)
    given = recipe.Recipe(rl=section, evaluate=EvaluateSection(max_tokens=limit))
    rl.run(given, prompts, WatchingJudge(), POLICY, start, StageFolder(tmp_path))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").state_dict()
    same = all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert same is not moved
