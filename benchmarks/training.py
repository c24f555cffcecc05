"""Speed and memory of training on this machine: delib's SFT beside TRL's SFTTrainer, in one run, turn by turn.

    python benchmarks/training.py --stage sft [--repeats 3] [--rows 64] [--batch 8] [--model smollm2] [--json FILE]
    python benchmarks/training.py --stage sft --curve [--lengths 256,1024,4096] [--batches 1,4]
    python benchmarks/training.py --stage rl ...            (benchmarks/training_rl.py tells how)

Every variant trains the same rows (shipped prompts with their good demonstrations) in float32 with the same batch size
and all weights, `--repeats` times in turn, each in a process of its own; the first optimiser step warms up and does
not count. A row of the table is a median: tokens/s without padding, tokens/s that bear a label, the share of padding,
the peak of the process's memory, and the ratio to SFTTrainer with `use_cpu`, no bf16 and else its defaults. All levers
are exact: tests/test_sft_parity.py holds losses and gradients. `--curve` measures rows of one length each instead.
Needs a machine that does nothing else.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULTS = "SFTTrainer, its defaults"
FLAGS = "SFTTrainer, tuned by flags"
VARIANTS: dict[str, dict[str, bool]] = {
    DEFAULTS: {},
    FLAGS: {"flags": True},
    "delib: plain head": {"plain": True},
    "and batches of like length": {"plain": True, "grouped": True},
    "and memory kept (delib sft)": {"plain": True, "grouped": True, "keep": True},
}
WHOLE = list(VARIANTS)[-1]


def examples_of(count: int) -> list[Any]:
    """A seeded draw of the shipped training prompts, each with its good demonstration."""
    from delib import chat, recipe
    from delib.records import Example, Prompt
    from delib.run import read_jsonl

    prompts = {p.id: p for p in read_jsonl(recipe.path_of("starter:prompts.jsonl"), Prompt)}
    found = []
    for line in recipe.path_of("starter:demonstrations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = chat.split(row["text"])
        if "fault" not in row and parts.reasoning and row["prompt_id"] in prompts:
            messages = prompts[row["prompt_id"]].messages
            found.append(
                Example(prompt_id=row["prompt_id"], messages=messages, reasoning=parts.reasoning, answer=parts.answer)
            )
    return random.Random(0).sample(found, min(count, len(found)))


def rows_of(tokenizer: Any, given: argparse.Namespace, peer: bool) -> list[dict[str, Any]]:
    """The rows: delib's, or texts of which SFTTrainer makes its own; with a length, made-up tokens for both."""
    from delib import chat
    from delib.stages import sft

    if given.length:
        order = random.Random(0)
        third, top = given.length // 3, len(tokenizer)
        ids = [[order.randrange(top) for _ in range(given.length)] for _ in range(given.rows)]
        rows = [{"input_ids": row, "labels": [-100] * third + row[third:]} for row in ids]
        return rows if peer else [row | {"weights": [1.0] * given.length} for row in rows]
    examples = examples_of(given.rows)
    if not peer:
        return [sft.tokenise(e, tokenizer) for e in examples]
    sent = [chat.render(tokenizer, e.messages) for e in examples]
    return [{"prompt": s, "completion": chat.join(e.reasoning, e.answer)} for s, e in zip(sent, examples, strict=True)]


def trainer_of(levers: dict[str, bool], model: Any, tokenizer: Any, given: argparse.Namespace, folder: str) -> Any:
    """The variant's trainer over its rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from delib.recipe import Recipe, SftSection
    from delib.stages import sft
    from delib.training.sft_trainer import collator, trainer_class

    rows = rows_of(tokenizer, given, peer=not levers.get("plain"))
    steps = -(-len(rows) // given.batch)
    if levers.get("plain"):
        recipe = Recipe(sft=SftSection(epochs=1, batch_size=given.batch, checkpoint_steps=10**6))
        order = random.Random(0)
        grouped = levers.get("grouped")
        course = sft.course_of(rows, recipe.sft, order) if grouped else order.sample(rows, len(rows))
        arguments = sft.arguments_of(recipe, steps, Path(folder))
        more = {"data_collator": collator(tokenizer)}
    else:
        tuned = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
        made = {"dataset_kwargs": {"skip_prepare_dataset": True}} if given.length else {}
        course, more = rows, {}
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            num_train_epochs=1,
            per_device_train_batch_size=given.batch,
            max_length=None if given.length else 4096,
            report_to="none",
            **(tuned if levers.get("flags") else {}),
            **made,
        )
    arguments.save_strategy = "no"
    kind = trainer_class() if levers.get("plain") else SFTTrainer
    return kind(
        model=model, args=arguments, train_dataset=Dataset.from_list(course), processing_class=tokenizer, **more
    )


def measure(variant: str, given: argparse.Namespace) -> dict[str, float]:
    """One training of a variant, in this process."""
    levers = VARIANTS[variant]
    if levers.get("keep"):
        from delib.models import memory

        memory.keep()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from delib.models import weights

    base = weights.resolve(given.model)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends: list[float] = []
    seen: list[tuple[int, int, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        trainer = trainer_of(levers, model, tokenizer, given, folder)
        trainer.add_callback(Clock())
        step = trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *more: Any, **others: Any) -> Any:
            labels = inputs["labels"]
            shown = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(labels.numel())
            seen.append((int(shown), int((labels != -100).sum()), labels.numel()))
            return step(model, inputs, *more, **others)

        trainer.training_step = counted
        trainer.train()
    seconds = ends[-1] - ends[0]
    tokens, learned, width = (sum(part) for part in zip(*seen[1:], strict=True))
    return {
        "seconds": seconds,
        "tokens_a_second": tokens / seconds,
        "learned_a_second": learned / seconds,
        "padding": 1 - tokens / width,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def apart(variant: str, given: argparse.Namespace, **changed: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    settings = {"rows": given.rows, "batch": given.batch, "model": given.model, "length": 0} | changed
    command = [sys.executable, __file__, "--stage", "sft", "--variant", variant]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{variant}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def beside(given: argparse.Namespace) -> dict[str, Any]:
    """All variants, turn by turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(given.repeats):
        for name in VARIANTS:
            found[name].append(apart(name, given))
    assert len({row["trainable"] for rows in found.values() for row in rows}) == 1
    print(f"{given.rows} rows, batch {given.batch}, {given.model}, float32, medians of {given.repeats}")
    print(
        f"{'variant':30} {'tokens/s':>9} {'learned/s':>10} {'padding':>8} {'peak MiB':>9} {'ratio':>6} {'to flags':>9}"
    )
    first, tuned = (medians(found[name])["tokens_a_second"] for name in (DEFAULTS, FLAGS))
    for name, rows in found.items():
        row = medians(rows)
        speed = row["tokens_a_second"]
        print(
            f"{name:30} {speed:>9.1f} {row['learned_a_second']:>10.1f} {row['padding']:>8.1%} "
            f"{row['peak_megabytes']:>9.0f} {speed / first:>5.2f}x {speed / tuned:>8.2f}x"
        )
    return found


def curve(given: argparse.Namespace) -> dict[str, Any]:
    """Three steps of rows of one length each, two of which count: SFTTrainer tuned by flags, and delib."""
    found: dict[str, Any] = {}
    print(f"{'length':>6} {'batch':>5}  {'variant':30} {'s a step':>9} {'tokens/s':>9} {'peak MiB':>9}")
    for length in given.lengths:
        for batch in given.batches:
            for name in (FLAGS, WHOLE):
                rows = [apart(name, given, rows=3 * batch, batch=batch, length=length) for _ in range(given.repeats)]
                row = found[f"{length} {batch} {name}"] = medians(rows)
                print(
                    f"{length:>6} {batch:>5}  {name:30} {row['seconds'] / 2:>9.2f} "
                    f"{row['tokens_a_second']:>9.1f} {row['peak_megabytes']:>9.0f}",
                    flush=True,
                )
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    stages = argparse.ArgumentParser(add_help=False)
    stages.add_argument("--stage", choices=["sft", "rl"], default="sft")
    chosen, words = stages.parse_known_args()
    if chosen.stage == "rl":
        import training_rl

        training_rl.main(words)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[stages])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measure(given.variant, given)))
        return
    found = curve(given) if given.curve else beside(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
