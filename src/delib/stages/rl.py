"""Stage 6, RL: TRL's GRPOTrainer with one reward function, the judge that holds the spec and sees the answer only.

In: prompts and the SFT model. Out: `checkpoint/`, every graded completion in `records.jsonl`, the curve in the
manifest. The reasoning is hidden from the judge, so that no pressure is put on it (arXiv 2412.16339). Departures: the
paper does not disclose algorithm or sizes; GRPO here, harmful, look-alike and plain prompts in equal parts.
"""

import itertools
import os
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from delib import chat
from delib.models import weights
from delib.models.calls import together
from delib.recipe import Recipe
from delib.records import Completion, Manifest, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.spec import Spec

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

MALFORMED_REWARD = 0.0
"""The lowest reward, given without a judge call: malformed or truncated completions have no answer to judge."""


class Judge(Protocol):
    async def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]: ...


Grade = Callable[[list[tuple[Prompt, Completion]]], list[list[Verdict]]]
"""Grades the answers of one step; `run` makes it of a Judge, whose calls then run side by side."""


def mixed(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts, in turn from each behaviour and from the plain ones, so that no kind's reward rules a step."""
    order = random.Random(seed)
    piles: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kind = "plain" if prompt.category is None else str(prompt.behaviour)
        piles.setdefault(kind, []).append(prompt)
    for pile in piles.values():
        order.shuffle(pile)
    turns = itertools.cycle(sorted(piles))
    places = {kind: itertools.cycle(pile) for kind, pile in piles.items()}
    return [next(places[next(turns)]) for _ in range(count)]


def reward_function(
    prompts: dict[str, Prompt], grade: Grade, spec: Spec, tokenizer: Any, ends: set[int], folder: StageFolder
) -> Callable[..., list[float | None]]:
    """The one reward: minimum of the judge's verdict on the ANSWER; None (no reward) when the judge failed.

    Reasoning and answer are parted from the completion's own tokens, decoded with special tokens and with what the
    template opened, so that no tag can vanish and let the judge read the reasoning. A completion that ends on none of
    the tokens `ends` was cut off.
    """

    def judged_answer(
        prompts_sent: list[str], completion_ids: list[list[int]], prompt_id: list[str], trainer_state: Any, **_: Any
    ) -> list[float | None]:
        made: list[Completion] = []
        for sent, ids in zip(prompts_sent, completion_ids, strict=True):
            ended = bool(ids) and ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
            made.append(
                chat.completion(text, sent=sent, model="student", cut=not ended, usage={"completion": len(ids)})
            )
        whole = [place for place, completion in enumerate(made) if completion.finish == "stop"]
        shown = [
            (prompts[prompt_id[p]], made[p].model_copy(update={"reasoning": None, "text": made[p].answer}))
            for p in whole
        ]
        found = dict(zip(whole, grade(shown) if shown else [], strict=True))
        rewards: list[float | None] = []
        for place, (completion, ident) in enumerate(zip(made, prompt_id, strict=True)):
            verdicts = found.get(place, [])
            reward: float | None = MALFORMED_REWARD
            if place in found:
                reward = None if any(v.score is None for v in verdicts) else min(v.score or 0.0 for v in verdicts)
            sample = Sample(
                prompt=prompts[ident],
                index=trainer_state.global_step * len(completion_ids) + place,
                excerpt_id=spec.excerpt_id(prompts[ident].category),
                completion=completion,
                verdicts=verdicts,
                failure=None if reward is not None else "ungraded",
            )
            folder.append(sample)
            rewards.append(reward)
        return rewards

    def judged(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return judged_answer(prompts_sent=prompts, **columns)

    judged.__name__ = "judged_answer"
    return judged


def run(
    recipe: Recipe,
    prompts: list[Prompt],
    opened: Callable[[], AbstractAsyncContextManager[Judge]],
    spec: Spec,
    start: Path,
    folder: StageFolder,
) -> Manifest:
    """Train from the SFT model, and leave the result in `checkpoint/`. `opened` gives the judge.

    The judge lives in a loop of its own, in another thread, for the whole stage: a server behind it starts once.
    """
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(opened()) as judge:

        async def each(shown: list[tuple[Prompt, Completion]]) -> list[list[Verdict]]:
            return await together(*(judge.grade(prompt, made, "answer", 1) for prompt, made in shown))

        return _train(recipe, prompts, lambda shown: portal.call(each, shown), spec, start, folder)


def _train(
    recipe: Recipe, prompts: list[Prompt], grade: Grade, spec: Spec, start: Path, folder: StageFolder
) -> Manifest:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    section = recipe.rl
    tokenizer = AutoTokenizer.from_pretrained(start)
    chosen = mixed(prompts, section.steps * section.prompts, recipe.seed)
    rows = [{"prompt": chat.render(tokenizer, p.messages), "prompt_id": p.id} for p in chosen]
    model = AutoModelForCausalLM.from_pretrained(start, dtype=getattr(torch, recipe.dtype))
    weights.freeze(model, section.frozen_layers)
    scratch = folder.path / weights.TRAINER
    arguments = GRPOConfig(
        output_dir=str(scratch),
        max_steps=section.steps,
        per_device_train_batch_size=section.prompts * section.group,
        num_generations=section.group,
        max_completion_length=section.max_tokens,
        temperature=section.temperature,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        beta=section.beta,
        scale_rewards=section.scale_rewards,
        # What is cut off before evaluate's own limit might still have ended well: it lowers its group's baseline and
        # stays out of the loss. At that limit a cut-off is a failure, and learned from (docs/results.md).
        mask_truncated_completions=section.max_tokens < recipe.evaluate.max_tokens,
        shuffle_dataset=False,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.dtype == "bfloat16",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=section.checkpoint_steps,
        save_total_limit=1,
        report_to="none",
        dataloader_pin_memory=recipe.device != "cpu",
    )
    by_id = {p.id: p for p in prompts}
    declared = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *([declared] if isinstance(declared, int) else declared or [])}
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=reward_function(by_id, grade, spec, tokenizer, ends, folder),
    )
    last = weights.last_checkpoint(scratch)
    graded_steps = int(last.name.rsplit("-", 1)[1]) if last else 0
    per_step = section.prompts * section.group
    # Completions of steps after the checkpoint are made again; what was graded for them is taken back.
    folder.replace(s for s in folder.records(Sample) if s.index < graded_steps * per_step)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    weights.save(model, tokenizer, start, folder.path / "checkpoint")
    history = [h for h in trainer.state.log_history if "reward" in h]
    made = folder.records(Sample)
    counts = {
        "in": len(chosen),
        "out": len(made),
        "steps": trainer.state.global_step,
        "ungraded": sum(s.failure == "ungraded" for s in made),
        "malformed": sum(s.completion is not None and s.completion.finish != "stop" for s in made),
    }
    detail = {
        "curve": [
            {
                "step": h["step"],
                "reward": h["reward"],
                "reward_std": h["reward_std"],
                "no_variance": h["frac_reward_zero_std"],
                "completion_tokens": h["completions/mean_length"],
            }
            for h in history
        ],
        "groups_without_variance": round(sum(h["frac_reward_zero_std"] * section.prompts for h in history)),
        "resumed_from": last.name if last else None,
    }
    tokens = sum(s.completion.usage["completion"] for s in made if s.completion)
    return Manifest(stage="rl", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens, detail=detail)
