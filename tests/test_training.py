"""What SFT learns from, on the tiny tokenizer."""

import random

import pytest

from conftest import SPEC
from delib import chat, recipe, spec
from delib.errors import UserError
from delib.recipe import SftSection
from delib.records import Example, Message
from delib.run import StageFolder
from delib.stages import sft

POLICY = spec.parse(SPEC)


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
        self.inner = inner

    def __call__(self, *given, **more):
        return self.inner(*given, **more)

    def __getattr__(self, name):
        return getattr(self.inner, name)

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


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path):
    from delib.models import weights

    assert weights.last_checkpoint(tmp_path / "none") is None
    for name, state in (("checkpoint-9", "{}"), ("checkpoint-10", '{"torn'), ("checkpoint-20", None)):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert weights.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-9"]
