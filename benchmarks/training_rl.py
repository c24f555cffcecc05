"""Seconds of an RL step on this machine: delib's beside TRL's GRPOTrainer with `generate()`, in one run, turn by turn.

    python benchmarks/training.py --stage rl [--repeats 3] [--prompts 4] [--group 4] [--tokens 50]
        [--latencies 0,50,500] [--model smollm2] [--json FILE]

Every variant takes the same prompts, in float32, all weights, with the same group, limit of tokens, temperature and
learning rate, and is given the same asynchronous judge, which answers each call after a latency (milliseconds) and
scores every completion, one that was cut off too, by a hash of it: so no group agrees, and no row is skipped. A run is
a process of its own: one step to warm up, and one at each latency. A step is from its begin to the optimiser's end:
writing (with the weights' export for llama.cpp, and for it with the judging that runs beside), judging that is waited
for, learning. Checkpoints are not counted. What is exact and what approximates stands in rows of its own. The file is
written after each run; medians are printed at the end. Needs a machine that does nothing else.
"""

import argparse
import asyncio
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

DEFAULTS = "GRPOTrainer, its defaults"
FLAGS = "GRPOTrainer, tuned by flags"
LEFT_OFF = {"delib, prompts not shared": {"share": False}, "delib, as TRL writes": {"write": False}}
"""Variants without one of the levers."""
VARIANTS = {
    DEFAULTS: "exact",
    FLAGS: "exact",
    **dict.fromkeys(LEFT_OFF, "exact"),
    "delib, rollouts: transformers": "exact",
    "delib, rollouts: llamacpp": "8-bit rollouts, weighted",
}
Step = dict[str, float]


def score_of(text: str) -> float:
    return hashlib.sha256(text.encode()).digest()[0] / 255


class Judge:
    """Takes `seconds` a call. It has no limit of calls at once."""

    name = "slow"
    seconds = 0.0

    async def grade(self, prompt: Any, completion: Any, view: Any, runs: int) -> list[Any]:
        from delib.records import Verdict

        await asyncio.sleep(self.seconds)
        score, answer = score_of(completion.answer), completion.answer
        return [
            Verdict(score=score, behaviour=None, criteria={}, reason="", view=view, judge=self.name, sent=answer)
        ] * runs


def timed(kind: type, judge: Judge, latencies: list[int], steps: list[Step]) -> type:
    """The trainer's class with a clock; step n is judged at the nth latency."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            latency = latencies[state.global_step]
            judge.seconds = latency / 1000
            steps.append({"latency": latency, "begin": time.perf_counter()})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps[-1]["seconds"] = time.perf_counter() - steps[-1].pop("begin")

    class Timed(kind):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.add_callback(Clock())

        def _generate(self, prompts: list[Any]) -> Any:
            start = time.perf_counter()
            made = super()._generate(prompts)
            steps[-1] |= {"writing": time.perf_counter() - start, "tokens": float(sum(map(len, made[1])))}
            return made

        def _calculate_rewards(self, *given: Any) -> Any:
            start = time.perf_counter()
            made = super()._calculate_rewards(*given)
            steps[-1]["judging"] = time.perf_counter() - start
            return made

    return Timed


def recipe_of(given: argparse.Namespace, writer: Any) -> Any:
    from delib.recipe import EvaluateSection, Recipe, RlSection, SftSection

    section = RlSection(
        steps=1 + len(given.latencies),
        prompts=given.prompts,
        group=given.group,
        max_tokens=given.tokens,
        rollouts=writer,
        checkpoint_steps=10**6,
    )
    # At evaluate's own limit what is cut off is learned from; and each completion is judged, with reasoning or without.
    return Recipe(sft=SftSection(reasoning=False), rl=section, evaluate=EvaluateSection(max_tokens=given.tokens))


def prompts_of() -> list[Any]:
    from delib import recipe
    from delib.records import Prompt
    from delib.run import read_jsonl

    return read_jsonl(recipe.path_of("starter:prompts.jsonl"), Prompt)


def by_delib(
    variant: str, given: argparse.Namespace, judge: Judge, steps: list[Step], base: Path, scratch: Path
) -> None:
    """`delib rl`, its judge and its trainer's class exchanged for those that are timed."""
    from delib import recipe, spec
    from delib.models import memory
    from delib.records import Completion
    from delib.run import StageFolder
    from delib.stages import rl
    from delib.training import grpo
    from delib.training.reward import Reward

    memory.keep()
    inner, writer = grpo.trainer_class, "transformers" if variant in LEFT_OFF else variant.rsplit(" ", 1)[1]

    class Every(Reward):
        def completion(self, sent: str, ids: Any) -> Completion:
            text, usage = self.tokenizer.decode(ids), {"completion": len(ids)}
            return Completion(
                reasoning=None, answer=text, text=text, finish="stop", model="student", usage=usage, sent=sent
            )

    @asynccontextmanager
    async def opened() -> AsyncIterator[Judge]:
        yield judge

    rl.Reward = Every  # type: ignore[misc]
    grpo.trainer_class = lambda levers: timed(
        inner(levers._replace(**LEFT_OFF.get(variant, {}))), judge, [0, *given.latencies], steps
    )
    policy = spec.load(recipe.path_of("starter:spec.md"))
    rl.run(recipe_of(given, writer), prompts_of(), opened, policy, base, StageFolder(scratch))


def by_trl(tuned: bool, given: argparse.Namespace, judge: Judge, steps: list[Step], base: Path, scratch: Path) -> None:
    """Plain GRPOTrainer with the recipe's settings; the rest are its own defaults; `tuned` keeps the activations."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from delib import chat
    from delib.stages import rl

    recipe = recipe_of(given, "transformers")
    section, tokenizer = recipe.rl, AutoTokenizer.from_pretrained(base)
    chosen = rl.mixed(prompts_of(), section.steps * section.prompts, recipe.seed)

    async def judged(completions: list[str], **_: Any) -> list[float]:
        async def one(text: str) -> float:
            await asyncio.sleep(judge.seconds)
            return score_of(text)

        return await asyncio.gather(*map(one, completions))

    arguments = GRPOConfig(
        output_dir=str(scratch),
        use_cpu=True,
        bf16=False,
        max_steps=section.steps,
        per_device_train_batch_size=section.prompts * section.group,
        num_generations=section.group,
        max_completion_length=section.max_tokens,
        temperature=section.temperature,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        beta=section.beta,
        scale_rewards=section.scale_rewards,
        shuffle_dataset=False,
        seed=recipe.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=not tuned,
    )
    trainer = timed(GRPOTrainer, judge, [0, *given.latencies], steps)(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": chat.render(tokenizer, p.messages)} for p in chosen]),
        processing_class=tokenizer,
        reward_funcs=judged,
    )
    trainer.train()


def measure(variant: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run of a variant, in this process: its steps but the first, and the peak of its memory."""
    from delib.models import weights

    judge, base = Judge(), weights.resolve(given.model)
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as folder:
        if variant in (DEFAULTS, FLAGS):
            by_trl(variant == FLAGS, given, judge, steps, base, Path(folder))
        else:
            by_delib(variant, given, judge, steps, base, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"variant": variant, "steps": steps[1:], "peak_megabytes": peak}


def apart(variant: str, given: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    settings = {name: getattr(given, name) for name in ("prompts", "group", "tokens", "model")}
    settings["latencies"] = ",".join(map(str, given.latencies))
    command = [sys.executable, __file__, "--variant", variant]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{variant}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(runs: list[dict[str, Any]], latencies: list[int]) -> None:
    def median(variant: str, latency: int, figure: str) -> float:
        steps = [s for run in runs if run["variant"] == variant for s in run["steps"] if s["latency"] == latency]
        return float(statistics.median(step[figure] for step in steps))

    print(
        f"{'judge':>6}  {'variant':30} {'':25} {'s a step':>8} {'writing':>8} {'judging':>8} {'tokens':>7} {'MiB':>6} "
        f"{'of defaults':>11} {'of flags':>8}"
    )
    for latency in latencies:
        first, tuned = (median(name, latency, "seconds") for name in (DEFAULTS, FLAGS))
        for name, kind in VARIANTS.items():
            seconds = median(name, latency, "seconds")
            parts = (median(name, latency, figure) for figure in ("writing", "judging"))
            peak = statistics.median(run["peak_megabytes"] for run in runs if run["variant"] == name)
            print(
                f"{latency:>3} ms  {name:30} {kind:25} {seconds:>8.1f} {' '.join(f'{p:>8.1f}' for p in parts)} "
                f"{median(name, latency, 'tokens'):>7.0f} {peak:>6.0f} {seconds / first:>10.2f}x "
                f"{seconds / tuned:>7.2f}x"
            )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=4, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=50, help="the most of a completion")
    parser.add_argument("--latencies", type=numbers, default=[0, 50, 500], help="milliseconds of a judge call")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path, help="write every measurement here, after each run")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.variant:
        print(json.dumps(measure(given.variant, given)))
        return
    print(
        f"{given.prompts} prompts x {given.group} completions of at most {given.tokens} tokens, {given.model}, "
        f"float32, {given.repeats} repeats"
    )
    runs: list[dict[str, Any]] = []
    for repeat in range(given.repeats):
        for name in VARIANTS:
            runs.append(apart(name, given))
            seconds = ", ".join(f"{step['seconds']:.1f}" for step in runs[-1]["steps"])
            print(f"{repeat + 1}/{given.repeats}  {name:30} {seconds} s a step", flush=True)
            if given.json:
                given.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    table(runs, given.latencies)


if __name__ == "__main__":
    main()
