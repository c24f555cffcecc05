"""Seconds of an SFT step on the CPU: delib's trainer against TRL's SFTTrainer, in one run, turn by turn.

    python benchmarks/sft_step.py [--turns 3] [--rows 4] [--tokens 120]

Each variant runs in a process of its own, `--turns` times in turn; a process makes two steps to warm up and five that
count. A step is loss and gradients, without the optimiser. The loss is the same (a test holds it). Prints the median
and the ratio to TRL's. Needs a machine that does nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

VARIANTS = {
    "TRL's SFTTrainer": {"plain": False, "keep": False, "frozen": False},
    "plain head": {"plain": True, "keep": False, "frozen": False},
    "plain head, memory kept": {"plain": True, "keep": True, "frozen": False},
    "the quickstart's (and frozen layers)": {"plain": True, "keep": True, "frozen": True},
}


def measure(variant: str, rows: int, tokens: int) -> list[float]:
    """Seconds of five steps of a variant, in this process."""
    from delib.models import memory, weights

    given = VARIANTS[variant]
    if given["keep"]:
        memory.keep()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from delib import recipe
    from delib.stages import sft

    base = weights.pull_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    collate = sft.collator(tokenizer)
    ids = torch.randint(100, 40000, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [
        {"input_ids": row, "labels": [-100] * (tokens // 3) + row[tokens // 3 :], "weights": [1.0] * tokens}
        for row in ids
    ]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    weights.freeze(model, recipe.load(recipe.QUICKSTART).sft.frozen_layers if given["frozen"] else 0)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        trainer = (sft.trainer_class() if given["plain"] else SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            data_collator=collate,
        )
        for _ in range(7):
            start = time.perf_counter()
            batch = collate(examples)
            if not given["plain"]:
                del batch["weights"]
            trainer.compute_loss(trainer.model, batch).backward()
            trainer.model.zero_grad()
            seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print(json.dumps(measure(given.variant, given.rows, given.tokens)))
        return
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(given.turns):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--variant", name, "--rows", given.rows, "--tokens", given.tokens]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
            seconds[name] += json.loads(done.stdout.splitlines()[-1])
    peer = statistics.median(seconds["TRL's SFTTrainer"])
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"{name:38} {middle:6.2f} s  {given.rows * given.tokens / middle:5.0f} tokens/s  {peer / middle:5.2f}x")


if __name__ == "__main__":
    main()
