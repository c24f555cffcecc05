"""What SFT learns from, and what the RL judge is shown: on the tiny tokenizer, and on tags that are special tokens."""

import pytest

from conftest import SPEC
from delib import spec
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
    row = sft.tokenise(example, tokenizer, 999)
    assert len(row["input_ids"]) == len(row["labels"])
    start = next(n for n, label in enumerate(row["labels"]) if label != -100)
    assert tokenizer.decode(row["input_ids"][:start]) == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert row["labels"][start:] == row["input_ids"][start:]
    assert tokenizer.decode(row["labels"][start:]) == "<think>\nwhy\n</think>\n\nyes<|im_end|>"


def test_the_plain_head_has_the_loss_of_trl(tiny_model, tokenizer, tmp_path):
    """One batch, both trainers: the same loss and the same gradients."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq
    from trl import SFTConfig, SFTTrainer

    rows = [
        sft.tokenise(
            Example(
                prompt_id="p", messages=[Message(role="user", content="Hi" * n)], reasoning="why " * n, answer="yes"
            ),
            tokenizer,
            999,
        )
        for n in (1, 3, 5)
    ]
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding=True)
    results = []
    for kind in (SFTTrainer, sft.trainer_class()):
        arguments = SFTConfig(
            output_dir=str(tmp_path / kind.__name__),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            data_collator=collate,
        )
        loss = trainer.compute_loss(model, dict(collate(rows)))
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (found, ours) = results
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, ours[name], rtol=1e-4, atol=1e-6), name


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
    function = rl.reward_function({"p": prompt}, judge, POLICY, tokenizer, folder)
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
