"""Stage 5, SFT: TRL's SFTTrainer on the distilled examples; the loss is on reasoning and answer only.

In: Examples, in the order in which distill leaves them, and a model folder. Out: `checkpoint/` (safetensors) and the
curve in the manifest. Resumes from the last trainer checkpoint. Departures from the published method, which does not
disclose sizes: a small model may keep its first layers frozen, may see the reasoning's opening alone for more prompts
than it sees whole examples, and the tokens that decide may weigh more; no separate capability data is mixed in beside
the plain prompts.
"""

import os
import random
import re
from pathlib import Path
from typing import Any

from delib import chat
from delib.errors import UserError
from delib.models import weights
from delib.recipe import Recipe, SftSection
from delib.records import Example, Manifest
from delib.run import StageFolder

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


OPENING = 9
"""Tokens at the start of a completion, `<think>` included, in which a reasoning says how the request stands and under
which category: counted with SmolLM2's tokenizer, where `<think>` and its newline are four."""
CONCLUSION, AFTER = 40, 12
"""Characters: the reasoning's last sentence, at most so many of them, and the answer's opening after `</think>`. Where
many answers open in the same words and the others each in their own, greedy decoding takes the same words for all,
unless the answer's opening is learned to follow the conclusion, and the conclusion to follow the opening."""
CLAUSE = re.compile(r"\s\S+\s[A-Z]{1,4}\d{1,3}\b")
"""A clause's ID and the word before it."""
DECAY = 0.4
"""Share of the steps at the end over which the learning rate falls; a choice, no other value was tried."""

Row = dict[str, list[Any]]
"""One tokenised example: `input_ids`, `labels` and `weights`, lists of one length."""


def tokenise(example: Example, tokenizer: Any, decision_weight: float = 1.0, reasoning: bool = True) -> Row:
    """Token ids, labels and loss weights of one example.

    Labels are -100 over the prompt, so only what the model writes is learned. Prompt and completion are tokenised
    apart, as at generation time, and the end-of-turn token closes the completion. Tokens of the decision (the
    reasoning's opening, its clause, its conclusion and the answer's opening) weigh `decision_weight`, the reasoning's
    first word, on which all the rest hangs, `decision_weight` squared, the others 1. Without `reasoning` the answer
    alone is learned, and its opening and first word weigh the same.
    """
    sent = chat.render(tokenizer, example.messages)
    prompt = tokenizer.encode(sent, add_special_tokens=False)
    text = chat.join(example.reasoning if reasoning else None, example.answer)
    if chat.opened(sent):
        text = text.removeprefix(chat.OPEN)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    completion = [*made["input_ids"], tokenizer.eos_token_id]
    spans = _deciding(text) if reasoning else []
    word = re.compile(r"(?:<think>)?\s*(\S+)").match(text)
    first = range(*word.span(1)) if word else range(0)
    weight = [0.0] * len(prompt)
    for n, (start, _) in enumerate(made["offset_mapping"]):
        decides = n < OPENING or any(begin <= start < end for begin, end in spans)
        weight.append(decision_weight**2 if start in first else decision_weight if decides else 1.0)
    weight.append(1.0)
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion, "weights": weight}


def _deciding(text: str) -> list[tuple[int, int]]:
    """The characters of a completion with reasoning at which its clauses, conclusion and answer's opening stand."""
    close = text.index(chat.CLOSE)
    last = max(text.rfind(". ", 0, close) + 1, close - CONCLUSION)
    return [(last, close + len(chat.CLOSE) + AFTER), *(m.span() for m in CLAUSE.finditer(text, 0, close))]


def grouped(rows: list[Row], batch: int, order: random.Random) -> list[list[Row]]:
    """One pass over the rows in batches whose rows are of like length, so that little is padding."""
    rows = order.sample(rows, len(rows))
    window = 16 * batch
    windows = [sorted(rows[i : i + window], key=lambda r: len(r["input_ids"])) for i in range(0, len(rows), window)]
    return [part[i : i + batch] for part in windows for i in range(0, len(part), batch)]


def course_of(rows: list[Row], section: SftSection, order: random.Random) -> list[Row]:
    """All that training shows, in order: whole examples and openings in batches of their own, in a seeded mix, so that
    neither is forgotten over the other. Batches that are not full come last and may share one.

    `rows` stand in turn from each behaviour, so that the first `whole_examples` are as mixed as they can be.
    """
    whole = rows[: section.whole_examples]
    openings = [opening_of(row) for row in rows]
    batches = [b for _ in range(section.opening_epochs) for b in grouped(openings, section.batch_size, order)]
    batches += [b for _ in range(section.epochs) for b in grouped(whole, section.batch_size, order)]
    mixed = sorted(order.sample(batches, len(batches)), key=len, reverse=True)
    return [row for batch in mixed for row in batch]


def opening_of(row: Row) -> Row:
    """An example cut off after its reasoning's opening: the prompt, how it stands and under which category."""
    end = row["labels"].count(-100) + OPENING
    return {name: values[:end] for name, values in row.items()}


def collator(tokenizer: Any) -> Any:
    """Batches of `tokenise`'s rows, padded at the right; the weights of padding are 0."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding=True)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]))
        width = batch["labels"].shape[1]
        fill = [[0.0] * (width - len(r["weights"])) for r in rows]
        right = tokenizer.padding_side == "right"
        batch["weights"] = torch.tensor(
            [r["weights"] + f if right else f + r["weights"] for r, f in zip(rows, fill, strict=True)]
        )
        return batch

    return collate


def trainer_class() -> type:
    """SFTTrainer with the loss projected by one plain matrix product, and with weights.

    TRL's fused head works in chunks to save memory, and on a CPU that costs more than the model's own forward
    (docs/results.md). With weights of 1 the loss is the same: cross-entropy over label-bearing positions, divided by
    their count. Otherwise it is the weighted mean, so that the size of a step does not change with the weight.
    """
    import torch
    from trl import SFTTrainer

    class PlainHeadTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            learned = labels != -100
            core = self.accelerator.unwrap_model(model)
            hidden = core.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            logits = core.lm_head(hidden.last_hidden_state[:, :-1][learned])
            weight = inputs["weights"][:, 1:][learned]
            each = torch.nn.functional.cross_entropy(logits.float(), labels[learned], reduction="none")
            total = (each * weight).sum() * learned.sum() / weight.sum()
            count = learned.sum() if num_items_in_batch is None else num_items_in_batch
            self._metrics["train"]["mean_token_accuracy"].append(
                (logits.argmax(-1) == labels[learned]).float().mean().item()
            )
            loss = total / count
            return (loss, hidden) if return_outputs else loss

    return PlainHeadTrainer


def run(recipe: Recipe, examples: list[Example], base: Path, folder: StageFolder) -> Manifest:
    """Train, and leave the model in `checkpoint/`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    section = recipe.sft
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not section.reasoning and examples and chat.opened(chat.render(tokenizer, examples[0].messages)):
        raise UserError(
            f"sft.reasoning: false needs a chat template that leaves {chat.OPEN} to the model; that of {recipe.model} "
            "opens it, so that answers alone would stand inside the reasoning"
        )
    made = [tokenise(e, tokenizer, section.decision_weight, section.reasoning) for e in examples]
    rows = [row for row in made if len(row["input_ids"]) <= section.max_tokens]
    if not rows:
        raise UserError(f"sft.max_tokens {section.max_tokens}: every example is longer than that; raise it")
    course = course_of(rows, section, random.Random(recipe.seed))
    tokens = sum(len(r["input_ids"]) for r in course)
    # The last trainable layers start from the same weights after a kill: the trainer's checkpoint holds them all.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, recipe.dtype))
    weights.freeze(model, section.frozen_layers)
    steps = -(-len(course) // section.batch_size)
    scratch = folder.path / weights.TRAINER
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,
        per_device_train_batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(steps * DECAY)},
        warmup_steps=steps // 20,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.dtype == "bfloat16",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        logging_steps=1,
        save_strategy="steps",
        save_steps=section.checkpoint_steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=recipe.device != "cpu",
        disable_tqdm=False,
    )
    trainer = trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(course),
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
    )
    last = weights.last_checkpoint(scratch)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    weights.save(model, tokenizer, base, folder.path / "checkpoint")
    curve = [h for h in trainer.state.log_history if "loss" in h]
    counts = {
        "in": len(examples),
        "whole": len(rows[: section.whole_examples]),
        "openings": len(rows) if section.opening_epochs else 0,
        "dropped": len(made) - len(rows),
        "steps": trainer.state.global_step,
    }
    detail = {
        "curve": [{"step": h["step"], "loss": h["loss"], "accuracy": h.get("mean_token_accuracy")} for h in curve],
        "resumed_from": last.name if last else None,
    }
    return Manifest(stage="sft", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens, detail=detail)
