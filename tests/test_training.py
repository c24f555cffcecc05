"""What SFT learns from, on the tiny tokenizer."""

import json
import random

import pytest

from conftest import SPEC
from delib import chat, recipe, spec
from delib.errors import UserError
from delib.recipe import SftSection
from delib.records import Example, Message
from delib.run import StageFolder
from delib.stages import sft
from delib.training.student import student

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


def test_batches_of_like_length_hold_every_row():
    rows = [{"input_ids": [n] * (1 + n * 7 % 50), "labels": []} for n in range(200)]
    found = sft.grouped(rows, 4, random.Random(0))
    assert sorted(r["input_ids"] for batch in found for r in batch) == sorted(r["input_ids"] for r in rows)
    lengths = [[len(r["input_ids"]) for r in batch] for batch in found]
    assert sum(max(s) - min(s) for s in lengths) / len(lengths) < 10
    assert found == sft.grouped(rows, 4, random.Random(0)) != sft.grouped(rows, 4, random.Random(1))


def test_the_batches_of_all_passes_are_mixed(tokenizer):
    examples = [
        Example(
            prompt_id=f"p{n}",
            messages=[Message(role="user", content=f"Hello {n}?")],
            reasoning="Harmful: " + "why " * (10 + n) + "is told. I refuse.",
            answer="I'm sorry, I can't help with that.",
        )
        for n in range(42)
    ]
    rows = [sft.tokenise(e, tokenizer, 4.0) for e in examples]
    section = SftSection(epochs=2, limit=30, batch_size=4)
    course = sft.course_of(rows, section, random.Random(0))
    assert [course.count(row) for row in rows] == [2] * 30 + [0] * 12
    shown = [sorted(map(rows.index, course[i : i + 4])) for i in range(0, 56, 4)]
    assert all(batch == list(range(batch[0], batch[0] + 4)) for batch in shown), "four neighbours in length"
    assert shown != sorted(shown) and shown != sorted(shown, reverse=True)
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
    given = recipe.Recipe(sft=SftSection(epochs=2, batch_size=2, max_tokens=200, decision_weight=2, checkpoint_steps=4))
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
    assert made.counts == {"in": 9, "trained": 8, "dropped": 1, "steps": 8}
    assert (tmp_path / "trainer" / "checkpoint-8").exists()
    again = sft.run(given, examples, tiny_model, StageFolder(tmp_path))
    assert again.counts == made.counts
    assert again.detail["curve"] == made.detail["curve"]
    short = given.model_copy(update={"sft": given.sft.model_copy(update={"max_tokens": 32})})
    with pytest.raises(UserError, match="every example to train on is longer"):
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


def short_examples(count=12):
    return [
        Example(
            prompt_id=f"p{n}",
            messages=[Message(role="user", content=f"Hello {n}?")],
            reasoning="Harmful: " + "why " * (n % 5) + "is told. I refuse.",
            answer="I'm sorry.",
        )
        for n in range(count)
    ]


def test_an_adapter_is_merged_into_the_checkpoint_and_lies_beside_it(tiny_model, tmp_path):
    """The checkpoint is a whole model that answers as base with the adapter does; frozen layers get none; the training
    goes on after a kill."""
    import json

    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    given = recipe.Recipe(
        sft=SftSection(epochs=1, batch_size=2, learning_rate=0.01, checkpoint_steps=3, frozen_layers=1, lora=lora)
    )
    made = sft.run(given, short_examples(), tiny_model, StageFolder(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint"
    told = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"]) == (4, 8)
    tensors = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(".layers.1." in name and "lm_head" not in name for name in tensors)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain, whole = base(ids).logits, merged(ids).logits
        beside = PeftModel.from_pretrained(base, str(checkpoint / "adapter"))(ids).logits
    assert torch.allclose(whole, beside, atol=1e-5)
    assert not torch.allclose(whole, plain, atol=1e-3)
    kind, steps = sft.trainer_class(), []

    class Killed(kind):
        def compute_loss(self, *given, **more):
            steps.append(1)
            if len(steps) == 5:
                raise KeyboardInterrupt
            return super().compute_loss(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "trainer_class", lambda: Killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(given, short_examples(), tiny_model, StageFolder(tmp_path / "broken"))
    again = sft.run(given, short_examples(), tiny_model, StageFolder(tmp_path / "broken"))
    assert again.detail == made.detail | {"resumed_from": "checkpoint-3"}
    assert (tmp_path / "broken/checkpoint/model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors"
    ).read_bytes()


def test_targets_that_are_not_there_are_told(tiny_model):
    from transformers import AutoModelForCausalLM

    from delib.models import weights

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"no linear layer is called qq; this model has down_proj, .*, v_proj"):
        weights.adapted(model, recipe.LoraSection(targets=["qq", "q_proj"]))
    found = weights.adapted(model, recipe.LoraSection(targets=["q_proj"]))
    assert {n.split(".")[-4] for n, p in found.named_parameters() if p.requires_grad} == {"q_proj"}


def test_the_best_of_the_held_out_checkpoints_is_kept(tiny_model, tmp_path):
    """A rate that wrecks the model: the held-out loss rises, training stops, and what is kept is the lowest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    examples = [*short_examples(40), *short_examples(40)]
    section = SftSection(
        epochs=3, batch_size=4, learning_rate=0.3, checkpoint_steps=2, held_out_share=0.2, patience=2, max_tokens=200
    )
    given = recipe.Recipe(sft=section)
    made = sft.run(given, examples, tiny_model, StageFolder(tmp_path))
    aside = sft.set_aside(examples, 0.2, 0)
    assert (len(aside), made.counts["held_out"]) == (8, 16)
    assert sft.set_aside(examples, 0.2, 1) != aside
    measured = {m["step"]: m["loss"] for m in made.detail["held_out"]}
    kept = made.detail["kept_step"]
    assert measured[kept] == min(measured.values())
    assert made.counts["steps"] == max(measured) == kept + 4 < 48
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    own = [sft.tokenise(e, tokenizer) for e in examples if e.prompt_id not in aside]
    course = [len(row["input_ids"]) for row in sft.course_of(own, section, random.Random(0))]
    assert made.tokens == sum(course[: 4 * made.counts["steps"]]) < sum(course), "what was not shown is not counted"
    rows = [sft.tokenise(e, tokenizer) for e in examples if e.prompt_id in aside]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    batches = [sft.collator(tokenizer)(rows[i : i + 4]) for i in range(0, 16, 4)]
    with torch.no_grad():
        losses = [model(b["input_ids"], attention_mask=b["attention_mask"], labels=b["labels"]).loss for b in batches]
    assert torch.stack(losses).mean().item() == pytest.approx(measured[kept], rel=1e-4)
    with pytest.raises(ValueError, match="patience needs a held-out loss"):
        SftSection(patience=2)


@pytest.mark.parametrize("when", ["in its patience", "at its end"])
def test_patience_goes_on_after_a_kill(tiny_model, tmp_path, when):
    """Killed between two measurements that did not lower the loss, or after the last one: the steps, the losses and the
    model are those of the unbroken run."""
    section = SftSection(
        epochs=3, batch_size=4, learning_rate=0.3, checkpoint_steps=2, held_out_share=0.2, patience=2, max_tokens=200
    )
    given, examples = recipe.Recipe(sft=section), [*short_examples(40), *short_examples(40)]
    made = sft.run(given, examples, tiny_model, StageFolder(tmp_path / "whole"))
    kind, kept = sft.trainer_class(), made.detail["kept_step"]
    assert made.counts["steps"] == kept + 4

    class Killed(kind):
        def compute_loss(self, model, *given, **more):
            if when == "in its patience" and model.training and self.state.global_step == kept + 3:
                raise KeyboardInterrupt
            return super().compute_loss(model, *given, **more)

        def _finalize_training(self, *given):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "trainer_class", lambda: Killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(given, examples, tiny_model, StageFolder(tmp_path / "broken"))
    again = sft.run(given, examples, tiny_model, StageFolder(tmp_path / "broken"))
    last = kept + (2 if when == "in its patience" else 4)
    assert again.detail == made.detail | {"resumed_from": f"checkpoint-{last}"}
    assert (again.counts, again.tokens) == (made.counts, made.tokens)
    weights = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("whole", "broken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_examples_of_one_prompt_cannot_be_held_out(tiny_model, tmp_path):
    def run(examples, **more):
        section = SftSection(held_out_share=0.1, **more)
        sft.run(recipe.Recipe(sft=section), examples, tiny_model, StageFolder(tmp_path))

    with pytest.raises(UserError, match=r"sft\.held_out_share: all examples are of one prompt"):
        run(short_examples(1) * 3)
    with pytest.raises(UserError, match=r"sft\.max_tokens 64: every example to train on is longer than that"):
        run([e.model_copy(update={"answer": "word " * 99}) for e in short_examples(3)], max_tokens=64)


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_content": ["a", "list"]},
        {"reasoning": {"effort": "high"}},
        {"reasoning_content": "<think>\ncount\n</think>"},
        {"reasoning_content": "count</think>"},
    ],
)
def test_reasoning_that_is_no_text_or_holds_tags_is_no_row(tmp_path, more):
    import pandas

    from conftest import write_rows
    from delib.training import mix

    rows = [chat_row("And three?", "Four."), chat_row("And four?", "Five.", **more)]
    with pytest.raises(UserError, match=r"bad\.jsonl:2: messages: the assistant's"):
        mix.load(str(write_rows(tmp_path / "bad.jsonl", rows)))
    pandas.DataFrame({"messages": [json.dumps(r["messages"]) for r in rows]}).to_parquet(tmp_path / "chat.parquet")
    found, malformed = mix.load(str(tmp_path / "chat.parquet"))
    assert ([e.answer for e in found], malformed) == (["Four."], 1)


def chat_row(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return {"messages": turns}


def test_ordinary_chat_is_mixed_in_by_share_and_without_held_out_prompts(tiny_model, tokenizer, tmp_path):
    from conftest import write_rows
    from delib.records import Prompt
    from delib.training import mix

    held = "Please tell me in a few plain words how the tides come about"
    rows = [chat_row(f"Which number comes after {n}?", f"It is {n + 1}.") for n in range(30)]
    rows += [chat_row(held, "By the moon."), chat_row("And two?", "<think>\ncount\n</think>\n\nThree.")]
    rows += [chat_row("And three?", "Four.", reasoning_content="count on")]
    write_rows(tmp_path / "chat.jsonl", rows)
    found, malformed = mix.load(str(tmp_path / "chat.jsonl"))
    assert (len(found), malformed) == (33, 0)
    assert [e.reasoning for e in found[-3:]] == ["", "count", "count on"]
    assert found[0].answer == "It is 1."
    heldout = [Prompt(id="h", messages=[Message(role="user", content=held)])]
    assert len(mix.clean(found, heldout)) == 32
    section = recipe.MixSection(data=str(tmp_path / "chat.jsonl"), share=0.25)
    drawn, counts = sft.drawn(section, 24, 384, heldout, tokenizer, random.Random(0))
    assert counts == {"mixed": 8, "mix_in_heldout": 1, "mix_malformed": 0}
    assert any("<think>" not in tokenizer.decode(r["input_ids"]) for r in drawn)
    given = recipe.Recipe(sft=SftSection(epochs=2, batch_size=2, decision_weight=2, mix=section))
    made = sft.run(given, short_examples(), tiny_model, StageFolder(tmp_path / "run"), heldout)
    assert made.counts == {
        "in": 12, "trained": 12, "dropped": 0, "steps": 16,
        "mixed": 8, "mix_in_heldout": 1, "mix_malformed": 0,
    }  # fmt: skip
    opened = sft.tokenise(found[0], Opened(tokenizer))
    assert tokenizer.decode(opened["input_ids"]).endswith("assistant\n<think>\n\n</think>\n\nIt is 1.<|im_end|>")
    write_rows(tmp_path / "bad.jsonl", [chat_row("a", ""), {"messages": []}, chat_row("b", "<think>\nnever ends")])
    with pytest.raises(UserError) as caught:
        mix.load(str(tmp_path / "bad.jsonl"))
    assert len(caught.value.problems) == 3
    assert all(f"bad.jsonl:{n}: messages" in p for n, p in enumerate(caught.value.problems, 1))


def test_packed_training_ends_in_a_model(tiny_model, tmp_path):
    section = SftSection(epochs=3, batch_size=2, max_tokens=200, batching="packed", device_batch=1, held_out_share=0.2)
    made = sft.run(recipe.Recipe(sft=section), short_examples(), tiny_model, StageFolder(tmp_path))
    assert made.counts["steps"] < 9
    assert made.detail["kept_step"] == made.counts["steps"]
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_bfloat16_computes_and_float32_is_trained(tiny_model):
    import torch

    given = recipe.Recipe(dtype="bfloat16")
    model = student(given, given.sft, tiny_model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    lora = recipe.Recipe(dtype="bfloat16", sft=SftSection(lora=recipe.LoraSection(rank=2)))
    dtypes = {(p.requires_grad, p.dtype) for p in student(lora, lora.sft, tiny_model).parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_saves_memory_leaves_the_losses(tiny_model, tmp_path, lora):
    """Small parts of a batch summed up, and layers that are computed again."""
    curves = []
    for name, more in (("plain", {}), ("parts", {"device_batch": 1}), ("again", {"gradient_checkpointing": True})):
        section = {"batch_size": 3, "epochs": 1, "decision_weight": 3, "lora": lora, "device_batch": None}
        section |= {k: v for k, v in more.items() if k in section}
        rest = {k: v for k, v in more.items() if k not in section}
        given = recipe.Recipe.model_validate({"sft": section} | rest)
        made = sft.run(given, short_examples(8), tiny_model, StageFolder(tmp_path / name))
        curves.append([row["loss"] for row in made.detail["curve"]])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
