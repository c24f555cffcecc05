"""Stage 5, SFT: TRL's SFTTrainer on the distilled examples; the loss is on reasoning and answer only.

In: Examples, in the order in which distill leaves them, and a model folder. Out: `checkpoint/` (safetensors) and the
curve in the manifest. Resumes from the last trainer checkpoint. Departures from the published method, which does not
disclose sizes: a small model may keep its first layers frozen or train an adapter, and the tokens that decide may weigh
more; capability data is mixed in beside the plain prompts only where the recipe names some.
"""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

from delib import chat
from delib.errors import UserError
from delib.models import weights
from delib.recipe import MixSection, Recipe, SftSection
from delib.records import Example, Manifest, Prompt
from delib.run import StageFolder
from delib.training import fitting, mix, processes, watch
from delib.training.sft_trainer import collator, trainer_class
from delib.training.student import student

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
    apart, as at generation time, and the end-of-turn token closes the completion: the only special token in it, beside
    think tags that are some. Tokens of the decision (the reasoning's opening, its clause, its conclusion and the
    answer's opening) weigh `decision_weight`, the reasoning's first word, on which all the rest hangs,
    `decision_weight` squared, the others 1. Without `reasoning` the answer alone is learned, and its opening and first
    word weigh the same.
    """
    sent = chat.render(tokenizer, example.messages)
    prompt = tokenizer.encode(sent, add_special_tokens=False)
    written = [chat.harmless(part, tokenizer) for part in (example.reasoning, example.answer)]
    text = chat.join(written[0] if reasoning else None, written[1])
    if chat.opened(sent):
        begun = chat.OPEN + "\n" if sent[-1].isspace() else chat.OPEN
        text = text.removeprefix(begun)
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


def course_of(rows: list[Row], section: SftSection, order: random.Random, mixed: list[Row] | None = None) -> list[Row]:
    """All that training shows, in order: the batches of all passes in a seeded mix. Batches that are not full come last
    and may share one.

    `rows` stand in turn from each behaviour, so that the first `limit` are as mixed as they can be. `mixed`: rows of
    ordinary chat, each shown once, parted over the passes.
    """
    passes = [rows[: section.limit] + (mixed or [])[n :: section.epochs] for n in range(section.epochs)]
    if section.batching == "packed":
        batches = [[row] for part in passes for row in packed(part, section.max_tokens, order)]
        return [row for batch in order.sample(batches, len(batches)) for row in batch]
    batches = [batch for part in passes for batch in grouped(part, section.batch_size, order)]
    shuffled = sorted(order.sample(batches, len(batches)), key=len, reverse=True)
    return [row for batch in shuffled for row in batch]


def packed(rows: list[Row], tokens: int, order: random.Random) -> list[Row]:
    """Rows of at most `tokens` tokens, each of several examples one after another (TRL's best-fit decreasing), in a
    seeded order. `seq_lengths` tells the examples apart."""
    from datasets import Dataset
    from trl import pack_dataset

    made: list[Row] = pack_dataset(Dataset.from_list(rows), tokens, "bfd").to_list()
    return order.sample(made, len(made))


def filled(course: list[Row], batch: int, tokenizer: Any, packs: bool) -> list[Row]:
    """The course with its last batch made full by rows that bear no label, so that each process has its part of it,
    and loss and gradients stay what they are."""
    empty: Row = {"input_ids": [tokenizer.eos_token_id], "labels": [-100], "weights": [0.0]}
    return course + [empty | ({"seq_lengths": [1]} if packs else {})] * (-len(course) % batch)


def set_aside(examples: list[Example], share: float, seed: int) -> set[str]:
    """The prompts that are kept out of training: a seeded share of them, each with all its examples."""
    prompts = sorted({e.prompt_id for e in examples})
    return set(random.Random(seed).sample(prompts, max(1, round(len(prompts) * share)))) if share else set()


def drawn(
    section: MixSection, beside: int, longest: int, heldout: list[Prompt], tokenizer: Any, order: random.Random
) -> tuple[list[Row], dict[str, int]]:
    """Rows of ordinary chat that make up the section's share beside `beside` examples, and what was left out."""
    found, malformed = mix.load(section.data)
    sound = mix.clean(found, heldout)
    wanted = round(beside * section.share / (1 - section.share))
    rows: list[Row] = []
    for example in order.sample(sound, len(sound)):
        row = tokenise(example, tokenizer, reasoning=bool(example.reasoning) or _opens(tokenizer, example))
        if len(rows) < wanted and len(row["input_ids"]) <= longest:
            rows.append(row)
        if len(rows) == wanted:
            break
    return rows, {"mixed": len(rows), "mix_in_heldout": len(found) - len(sound), "mix_malformed": malformed}


def _opens(tokenizer: Any, example: Example) -> bool:
    return chat.opened(chat.render(tokenizer, example.messages))


def stopped_early(checkpoint: Path, patience: int) -> int:
    """The step of a checkpoint at which patience was at its end, else 0. The trainer does not look at that itself when
    it goes on after a kill; with a course that ends there it takes no step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    counted = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
    return int(state["global_step"]) if counted >= patience else 0


def arguments_of(recipe: Recipe, steps: int, scratch: Path, held_out: bool = False) -> Any:
    """SFTConfig of a recipe. Every process takes its part of each batch, in the course's order."""
    from trl import SFTConfig

    section = recipe.sft
    rows = processes.rows_at_once(recipe, processes.count())
    measured: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": section.checkpoint_steps,
        "per_device_eval_batch_size": rows,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # how often in a row the loss was not lowered
    }
    return SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=processes.parts_of_a_step(recipe, "sft", processes.count()),
        **processes.summing(recipe),
        learning_rate=section.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(steps * DECAY)},
        warmup_steps=steps // 20,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.dtype == "bfloat16",
        activation_checkpointing=recipe.gradient_checkpointing,
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
        disable_tqdm=True,  # watch.py tells
        **(measured if held_out else {}),
    )


def run(
    recipe: Recipe, examples: list[Example], base: Path, folder: StageFolder, heldout: list[Prompt] | None = None
) -> Manifest:
    """Train, and leave the model in `checkpoint/`. `heldout`: the prompts that no mixed-in chat may hold.

    In several processes all of them call this; the one that leads writes.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, EarlyStoppingCallback

    processes.devices(recipe)
    section = recipe.sft
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.eos_token is None:
        raise UserError(fitting.no_end(recipe.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not section.reasoning and examples and _opens(tokenizer, examples[0]):
        raise UserError(
            f"sft.reasoning: false needs a chat template that leaves {chat.OPEN} to the model; that of {recipe.model} "
            "opens it, so that answers alone would stand inside the reasoning"
        )
    aside = set_aside(examples, section.held_out_share, recipe.seed)
    made = [tokenise(e, tokenizer, section.decision_weight, section.reasoning) for e in examples]
    fits = [len(row["input_ids"]) <= section.max_tokens for row in made]
    out = [e.prompt_id in aside for e in examples]
    rows = [row for row, fit, held in zip(made, fits, out, strict=True) if fit and not held]
    held = [row for row, fit, held in zip(made, fits, out, strict=True) if fit and held]
    if aside and all(out):
        raise UserError("sft.held_out_share: all examples are of one prompt, which is held out; set it to 0")
    if not rows:
        raise UserError(f"sft.max_tokens {section.max_tokens}: every example to train on is longer than that; raise it")
    if aside and not held:
        raise UserError(f"sft.held_out_share {section.held_out_share}: no example short enough is held out; raise it")
    order = random.Random(recipe.seed)
    beside = len(rows[: section.limit]) * section.epochs
    mixed, left_out = (
        drawn(section.mix, beside, section.max_tokens, heldout or [], tokenizer, order) if section.mix else ([], {})
    )
    course = course_of(rows, section, order, mixed)
    shown = [len(row["input_ids"]) for row in course]
    steps = -(-len(course) // section.batch_size)
    scratch = folder.path / weights.TRAINER
    # DeepSpeed must be known before a model is loaded, so that its parts go where they belong.
    arguments = arguments_of(recipe, steps, scratch, bool(held))
    if arguments.world_size * arguments.gradient_accumulation_steps > 1:
        course = filled(course, section.batch_size, tokenizer, section.batching == "packed")
    if processes.leads():
        weights.last_checkpoint(scratch)  # one that was cut off goes, before another process looks
    processes.wait(recipe)
    last = weights.last_checkpoint(scratch)
    if last and section.patience:
        course = course[: stopped_early(last, section.patience) * section.batch_size or None]
    model = student(recipe, section, base)
    trainer = trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(course),
        eval_dataset=Dataset.from_list(held) if held else None,
        processing_class=tokenizer,
        data_collator=collator(tokenizer, section.batching == "packed"),
        callbacks=[EarlyStoppingCallback(section.patience)] if section.patience else None,
    )
    watch.train(trainer, folder.path.name, steps, last)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if processes.count() > 1 else None
    if processes.leads():
        kept = recipe.dtype if recipe.dtype != "float32" else None
        weights.save(model, tokenizer, base, folder.path / "checkpoint", state, kept)
    history = trainer.state.log_history
    tokens = sum(shown[: trainer.state.global_step * section.batch_size])  # of the course, where patience ended it
    counts = {
        "in": len(examples),
        "trained": len(rows[: section.limit]),
        "dropped": fits.count(False),
        "steps": trainer.state.global_step,
        **left_out,
        **({"held_out": len(held)} if held else {}),
    }
    detail: dict[str, Any] = {
        "curve": [
            {"step": h["step"], "loss": h["loss"], "accuracy": h.get("mean_token_accuracy")}
            for h in history
            if "loss" in h
        ],
        "resumed_from": last.name if last else None,
    }
    if held:
        detail["held_out"] = [{"step": h["step"], "loss": h["eval_loss"]} for h in history if "eval_loss" in h]
        detail["kept_step"] = trainer.state.best_global_step
    if processes.count() > 1:
        detail["processes"] = processes.count()
    return Manifest(stage="sft", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens, detail=detail)
