"""SFT with every lever that is on by default against TRL's own SFTTrainer, and what each template is trained on.

The peer gets prompts and completions as texts and makes its own tokens and masks; the tokenizers are built here, a
token a byte, so that every position can be counted by hand.
"""

import inspect
import random
import re

import pytest

from delib import recipe
from delib.recipe import SftSection
from delib.records import Example, Message
from delib.stages import sft
from delib.training.sft_trainer import collator, trainer_class

TURN = "{% for m in messages %}"
ASK, END = "{% if add_generation_prompt %}", "{% endif %}"
CHATML = TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK + "<|im_start|>assistant\n"
LLAMA3 = (
    "<|begin_of_text|>" + TURN + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}" + ASK + "<|start_header_id|>assistant<|end_header_id|>\n\n" + END
)
MISTRAL = "<s>" + TURN + "[INST] {{ m.content }} [/INST]{% endfor %}"
TEMPLATES = {
    # the template, its special tokens (the last one ends a turn), the tokens of its prompt around the message's bytes
    "chatml": (
        CHATML + END,
        ["<|im_start|>", "<|im_end|>"],
        len(["<|im_start|>", "<|im_end|>", "\n", "<|im_start|>"]) + 15,
    ),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        1 + (1 + 4 + 1 + 2) + 1 + (1 + 9 + 1 + 2),
    ),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], 1 + 1 + 1 + 1 + 1),
    "opens": (CHATML + "<think>\n" + END, ["<|im_start|>", "<|im_end|>"], 4 + 15 + len("<think>\n")),
    "think-tokens": (CHATML + END, ["<think>", "</think>", "<|im_start|>", "<|im_end|>"], 4 + 15),
}


def tokenizer_of(name):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, special, _ = TEMPLATES[name]
    vocab = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[-1], pad_token=special[-1])
    made.chat_template = template
    return made


def example_of(n, question="Hello?", reasoning="why", answer="yes"):
    return Example(
        prompt_id=f"p{n}", messages=[Message(role="user", content=question)], reasoning=reasoning, answer=answer
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_on_reasoning_and_answer_of_every_template(name):
    made = tokenizer_of(name)
    row = sft.tokenise(example_of(0), made)
    before = TEMPLATES[name][2] + len("Hello?")
    written = "why\n</think>\n\nyes" if name == "opens" else "<think>\nwhy\n</think>\n\nyes"
    tags = 2 if name == "think-tokens" else 0
    after = len(written) + 1 - (len("<think></think>") - tags if tags else 0)
    learned = [n for n, label in enumerate(row["labels"]) if label != -100]
    assert learned == list(range(before, before + after))
    assert len(row["input_ids"]) == before + after
    assert [row["input_ids"][n] for n in learned] == [row["labels"][n] for n in learned]
    assert made.decode(row["input_ids"][before:]) == written + made.eos_token
    assert row["labels"][-1] == made.eos_token_id
    assert row["weights"] == [0.0] * before + [1.0] * after


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_token_learned_ends_a_turn(name):
    """Also where a demonstration speaks of the token: a model that learned it there would stop in its reasoning."""
    made = tokenizer_of(name)
    end = made.eos_token
    row = sft.tokenise(example_of(0, reasoning=f"They paste {end} into it.", answer=f"It holds {end} twice."), made)
    assert [n for n, label in enumerate(row["labels"]) if label == made.eos_token_id] == [len(row["labels"]) - 1]
    text = made.decode([label for label in row["labels"] if label != -100])
    assert text.count(f"{end[0]} {end[1:]}") == 2 and text.count("</think>") == 1


def course_of(given, tokenizer):
    """Texts of mixed lengths and the rows of the course that the recipe makes of them, in its order."""
    examples = [
        example_of(n, "Hello " * (1 + n % 5), "why " * (1 + n * 3 % 11), "yes, " * (1 + n % 3)) for n in range(40)
    ]
    texts = {tuple(sft.tokenise(e, tokenizer)["input_ids"]): e for e in examples}
    rows = [sft.tokenise(e, tokenizer) for e in examples]
    course = sft.course_of(rows, given.sft, random.Random(given.seed))
    return [texts[tuple(row["input_ids"])] for row in course], course


class Gradients:
    """A callback that keeps the gradient of every parameter at each optimiser step."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Kept(TrainerCallback):
            def __init__(self):
                self.steps = []

            def on_pre_optimizer_step(self, args, state, control, model=None, **more):
                self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        return Kept()


def trained(kind, given, base, tokenizer, data, folder, **more):
    """The losses and gradients of a training; the configuration is the stage's own."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    arguments = sft.arguments_of(given, len(data) // given.sft.batch_size, folder)
    arguments.max_grad_norm = 0.0
    arguments.save_strategy = "no"
    kept = Gradients()
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[kept],
        **more,
    )
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], kept.steps


def far(ours, theirs):
    """The largest difference of losses, and of gradients of one parameter, each against the largest of theirs."""
    losses = max(abs(a - b) / b for a, b in zip(ours[0], theirs[0], strict=True))
    gradients = 0.0
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one.keys() == other.keys()
        gradients = max(gradients, *(((one[n] - other[n]).abs().max() / other[n].abs().max()).item() for n in one))
    return losses, gradients


def base_of(tokenizer, folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "opens"])
def test_twenty_steps_are_those_of_trl(name, tmp_path):
    """Plain head, weights of 1 and batches of like length: losses and the gradient of every parameter."""
    from trl import SFTTrainer

    from delib import chat

    made = tokenizer_of(name)
    base = base_of(made, tmp_path / "base")
    given = recipe.Recipe(sft=SftSection(epochs=2, batch_size=4, learning_rate=1e-3))
    texts, rows = course_of(given, made)
    ours = trained(trainer_class(), given, base, made, rows, tmp_path / "ours", data_collator=collator(made))
    assert len(ours[0]) == len(ours[1]) == 20
    begun = "<think>\n" if name == "opens" else ""
    peer = [
        {"prompt": chat.render(made, e.messages), "completion": chat.join(e.reasoning, e.answer).removeprefix(begun)}
        for e in texts
    ]
    theirs = trained(_prepared(SFTTrainer), given, base, made, peer, tmp_path / "theirs")
    losses, gradients = far(ours, theirs)
    assert losses < 1e-5
    assert gradients < 1e-5
    first = rows[0]["labels"]
    shifted = first.copy()
    shifted[next(n for n, label in enumerate(first) if label != -100)] = -100
    wrong = [rows[0] | {"labels": shifted}, *rows[1:4]]
    planted = trained(trainer_class(), given, base, made, wrong, tmp_path / "wrong", data_collator=collator(made))
    losses, gradients = far(planted, (theirs[0][:1], theirs[1][:1]))
    assert losses > 1e-5
    assert gradients > 1e-5


def _prepared(kind):
    """SFTTrainer that makes its rows itself, which the stage's configuration leaves out."""

    class Prepared(kind):
        def __init__(self, *given, args, **more):
            args.dataset_kwargs = None
            super().__init__(*given, args=args, **more)

    return Prepared


@pytest.fixture
def two_heads(tmp_path):
    """A model of a kind in two trainers, delib's and TRL's, and one batch."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTTrainer

    made = tokenizer_of("chatml")
    rows = [sft.tokenise(example_of(n, "Hi" * n, "why " * n), made) for n in (1, 3, 5)]

    def both(kind, **more):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = getattr(transformers, kind + "Config")(
            vocab_size=len(made), num_hidden_layers=2, pad_token_id=made.pad_token_id, **sizes, **more
        )
        getattr(transformers, kind + "ForCausalLM")(config).save_pretrained(tmp_path / "base")
        for each in (SFTTrainer, trainer_class()):
            yield each(
                model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
                args=sft.arguments_of(recipe.Recipe(), 1, tmp_path / "out"),
                train_dataset=Dataset.from_list(rows),
                processing_class=made,
                data_collator=collator(made),
            )

    return both, lambda: collator(made)(rows)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 0.5}),
    ],
)
@pytest.mark.parametrize("plain", [True, False])
def test_heads_that_cap_or_scale_and_routers_are_those_of_trl(two_heads, kind, more, plain):
    import torch

    trainers, batch = two_heads
    found = []
    for trainer in trainers(kind, **more):
        given = batch()
        if hasattr(trainer, "plain_head"):
            trainer.plain_head = plain
        else:
            del given["weights"]
        trainer.model.eval()  # experts are drawn without noise
        loss = trainer.compute_loss(trainer.model, given)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}))
    (expected, gradients), (ours, own) = found
    assert ours == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_one_another(tmp_path, attention):
    """Logits of a packed row are those of its examples alone; with positions that run on they are not."""
    import torch
    from transformers import AutoModelForCausalLM

    made = tokenizer_of("chatml")
    rows = [sft.tokenise(example_of(n, "Hi " * n, "why " * n), made) for n in (1, 2, 3, 4)]
    packs = sft.packed(rows, 150, random.Random(0))
    assert sorted(n for p in packs for n in p["seq_lengths"]) == sorted(len(r["input_ids"]) for r in rows)
    assert len(packs) < len(rows)
    assert all(len(p["input_ids"]) <= 150 for p in packs)
    model = AutoModelForCausalLM.from_pretrained(
        base_of(made, tmp_path / "base"), dtype=torch.float32, attn_implementation=attention
    )
    batch = collator(made, packed=True)(packs)
    sent = {n: v for n, v in batch.items() if n not in ("labels", "weights")}
    assert batch["weights"].shape == batch["labels"].shape
    assert (batch["weights"][batch["labels"] == -100] == 0).all()
    with torch.no_grad():
        together = model(**sent, use_cache=False).logits[0]
        alone = torch.cat(
            [
                model(torch.tensor([p["input_ids"][start : start + length]])).logits[0]
                for p in packs
                for start, length in zip(
                    [sum(p["seq_lengths"][:n]) for n in range(len(p["seq_lengths"]))], p["seq_lengths"], strict=True
                )
            ]
        )
        seeing = model(batch["input_ids"], use_cache=False).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(seeing, alone, atol=1e-3)


def test_a_packed_batch_has_the_loss_of_its_examples(two_heads):
    made = tokenizer_of("chatml")
    rows = [sft.tokenise(example_of(n, "Hi" * n, "why " * n), made, 4.0) for n in (1, 3, 5)]
    packs = sft.packed(rows, 120, random.Random(0))
    trainers, _ = two_heads
    *_, trainer = trainers("Llama")
    trainer.model.eval()
    padded = trainer.compute_loss(trainer.model, collator(made)(rows)).item()
    assert trainer.compute_loss(trainer.model, collator(made, packed=True)(packs)).item() == pytest.approx(padded, 1e-5)


HELD = {
    "get_batch_samples": "(self, epoch_iterator: collections.abc.Iterator, num_batches: int, device: torch.device)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
}


def test_what_is_overridden_is_there_in_trl_with_this_signature():
    from trl import SFTTrainer

    for name, signature in HELD.items():
        found = str(inspect.signature(getattr(SFTTrainer, name)))
        assert re.sub(r" -> .*", "", found) == signature, name
    kind = trainer_class()
    own = {n for n in vars(kind) if callable(getattr(kind, n)) and hasattr(SFTTrainer, n) and not n.startswith("__")}
    assert own == set(HELD)
