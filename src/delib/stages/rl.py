"""Stage 6, RL: TRL's GRPOTrainer with one reward function, the judge that holds the spec and sees the answer only.

In: prompts and the SFT model. Out: `checkpoint/`, every graded completion in `records.jsonl`, the curve in the
manifest. The reasoning is hidden from the judge, so that no pressure is put on it (arXiv 2412.16339); what it says is
watched, and never rewarded (`training/monitor.py`). Departures: the paper does not disclose algorithm or sizes; GRPO
here, the three behaviours in equal parts, comply's halved between look-alikes and plain prompts. In several processes
all of them come here, each writes and learns from its part of a step, and the one that leads grades and writes.
"""

import importlib.util
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from delib import chat
from delib.errors import UserError
from delib.models import weights
from delib.progress import say
from delib.recipe import Recipe
from delib.records import Manifest, Prompt, Sample
from delib.run import StageFolder
from delib.spec import Spec
from delib.training import fitting, grpo, llamacpp, processes, rollouts, watch
from delib.training.monitor import kind_of
from delib.training.reward import Judge, Reward, Run, reward_of
from delib.training.student import student

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func; trl is pinned, and tests hold what is used of it


WARM_UP, DECAY = 0.1, 0.4
"""Shares of the steps over which the learning rate rises and falls. Adam's first steps are as long as its rate,
whatever their gradients are worth, so they rise, the first one from 0; the last ones fall, so that no single step
decides. Both are a choice: they were not tried on their own (docs/results.md)."""
VLLM = {"vllm": "colocate", "vllm_server": "server"}
"""TRL's mode for each kind of rollouts by vLLM."""


def mixed(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts, in turn from each behaviour, and within one in turn from each kind: helping, which look-alikes
    and plain prompts share, weighs no more than refusing (docs/results.md tells what four equal kinds did)."""
    order = random.Random(seed)
    piles: dict[str, dict[str, list[Prompt]]] = {}
    for prompt in prompts:
        piles.setdefault(prompt.behaviour or "comply", {}).setdefault(kind_of(prompt), []).append(prompt)

    def endless(kinds: dict[str, list[Prompt]]) -> Iterator[Prompt]:
        pile = itertools.cycle([itertools.cycle(order.sample(kinds[k], len(kinds[k]))) for k in sorted(kinds)])
        while True:
            yield next(next(pile))

    turns = itertools.cycle([endless(piles[behaviour]) for behaviour in sorted(piles)])
    return [next(next(turns)) for _ in range(count)]


def problems(recipe: Recipe) -> list[str]:
    """What of the section can't be carried out here."""
    section, found = recipe.rl, []
    if section.report_to != "none" and importlib.util.find_spec(section.report_to) is None:
        found.append(
            f"rl.report_to: {section.report_to} is not installed; pip install {section.report_to}, or set it to none"
        )
    if section.lora is not None and section.rollouts == "llamacpp":
        found.append(
            "rl.rollouts: llamacpp takes whole weights, no adapter; set it to transformers, or rl.lora to null"
        )
    if section.lora is not None and section.lora.dropout:
        found.append("rl.lora.dropout: the judge would reward what other units write than are measured; set it to 0")
    return found + fitting.layers(recipe, "rl", section) + fitting.rollouts(recipe)


def _counted(record: logging.LogRecord) -> bool:
    """Not TRL's warning about each step with a completion that has no reward: it prints the conversation, and the
    manifest counts them."""
    return "All reward functions returned None" not in record.getMessage()


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

    found = problems(recipe)
    if found:
        raise UserError(found)
    processes.devices(recipe)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(_led(opened)) as judge:

        async def awaited(work: Any) -> Any:
            return await work

        return _train(recipe, prompts, judge, lambda work: portal.call(awaited, work), spec, start, folder)


@asynccontextmanager
async def _led(opened: Callable[[], AbstractAsyncContextManager[Judge]]) -> AsyncIterator[Judge | None]:
    """The judge in the process that leads; None in the others, which are told its verdicts."""
    if not processes.leads():
        yield None
        return
    async with opened() as judge:
        yield judge


def _train(
    recipe: Recipe, prompts: list[Prompt], judge: Judge | None, run: Run, spec: Spec, start: Path, folder: StageFolder
) -> Manifest:
    from datasets import Dataset
    from transformers import AutoTokenizer

    section = recipe.rl
    tokenizer = AutoTokenizer.from_pretrained(start)
    chosen = mixed(prompts, section.steps * section.prompts, recipe.seed)
    rows = [{"prompt": chat.render(tokenizer, p.messages), "prompt_id": p.id} for p in chosen]
    scratch = folder.path / weights.TRAINER
    masked = section.max_tokens < recipe.evaluate.max_tokens
    context_tokens = max(map(len, rollouts.encoded(tokenizer, [row["prompt"] for row in rows]))) + section.max_tokens
    # DeepSpeed must be known before a model is loaded, so that its parts go where they belong.
    arguments = _arguments(recipe, scratch, masked, context_tokens)
    model = student(recipe, section, start)
    if processes.leads():
        weights.last_checkpoint(scratch)  # one that was cut off goes, before another process looks
    processes.wait(recipe)
    last = weights.last_checkpoint(scratch)
    steps = weights.step_of(last)
    reward = Reward(
        prompts,
        judge,
        run,
        spec,
        tokenizer,
        weights.turn_ends(model, tokenizer),
        folder,
        per_step=section.prompts * section.group,
        steps=steps,
        exact=section.exact_answers,
        cut_off_leaves=masked and section.cut_off == "out",
        reasoning=recipe.sft.reasoning,
    )
    served = section.rollouts == "llamacpp"
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(_counted)
    trainer = grpo.trainer_class(grpo.EXACT._replace(correct=served))(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=reward,
        rollout_func=_rollout(
            recipe, rows, tokenizer, model, reward, run, start, rollouts.Journal(scratch, steps), context_tokens
        ),
    )
    watch.train(trainer, folder.path.name, section.steps, last)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if processes.count() > 1 else None
    if not processes.leads():
        return processes.spread(None)
    dtype = recipe.dtype if recipe.dtype != "float32" else None
    weights.save(model, tokenizer, start, folder.path / "checkpoint", state, dtype)
    return processes.spread(_manifest(recipe, reward, trainer.state, len(chosen), last))


def _arguments(recipe: Recipe, scratch: Path, masked: bool, context_tokens: int) -> Any:
    from trl import GRPOConfig

    section, count = recipe.rl, processes.count()
    return GRPOConfig(
        output_dir=str(scratch),
        max_steps=section.steps,
        per_device_train_batch_size=processes.completions_at_once(recipe, count),
        # One generation a step: TRL makes it for so many parts as gradients are summed over.
        gradient_accumulation_steps=processes.parts_of_a_step(recipe, "rl", count),
        **processes.summing(recipe),
        num_generations=section.group,
        max_completion_length=section.max_tokens,
        temperature=section.temperature,
        learning_rate=section.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(section.steps * DECAY)},
        warmup_steps=round(section.steps * WARM_UP),
        loss_type="dapo",  # what grpo.py leaves out is counted in its denominator
        beta=section.beta,
        scale_rewards=section.scale_rewards,
        # What is cut off before evaluate's own limit might still have ended well: it stays out of the loss. At that
        # limit a cut-off is a failure, and learned from (docs/results.md).
        mask_truncated_completions=masked,
        use_vllm=section.rollouts in VLLM,
        vllm_mode=VLLM.get(section.rollouts, "colocate"),
        vllm_max_model_length=context_tokens,
        # Only where a server or vLLM writes: each token's importance, at most TRL's bound.
        vllm_importance_sampling_mode="token_truncate",
        shuffle_dataset=False,
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.dtype == "bfloat16",
        activation_checkpointing=recipe.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=section.checkpoint_steps,
        save_total_limit=1,
        report_to=section.report_to,
        project="delib",  # trackio's name for the folder of runs
        run_name=recipe.name,
        dataloader_pin_memory=recipe.device != "cpu",
        disable_tqdm=True,  # watch.py tells
    )


def _rollout(
    recipe: Recipe,
    rows: list[dict[str, str]],
    tokenizer: Any,
    model: Any,
    reward: Reward,
    run: Run,
    start: Path,
    journal: rollouts.Journal,
    context_tokens: int,
) -> Callable[[list[str], Any], dict[str, Any]]:
    section = recipe.rl

    def ids_of(step: int) -> list[str]:
        part = rows[step * section.prompts : (step + 1) * section.prompts]
        return [row["prompt_id"] for row in part for _ in range(section.group)]

    if section.rollouts != "llamacpp":
        return rollouts.by_trainer(tokenizer, ids_of, journal)
    return llamacpp.by_server(
        tokenizer,
        ids_of,
        journal,
        llamacpp.LiveGguf(start, model, journal.folder.path / "weights.gguf") if processes.leads() else None,
        run,
        lambda step, place, *made: reward.grade(reward.indices(step)[place], *made),
        ends=reward.ends,
        context_tokens=context_tokens,
        max_tokens=section.max_tokens,
        temperature=section.temperature,
        seed=recipe.seed,
    )


def without_variance(made: list[Sample], size: int) -> list[int]:
    """The groups whose rewards teach nothing: no two of them differ (1e-8 is TRL's measure). TRL's own share of them,
    `frac_reward_zero_std`, leaves out groups with fewer than two rewards, and is about the whole step where
    `scale_rewards` is batch."""
    rewards: dict[int, list[float]] = {}
    for sample in made:
        known, reward = rewards.setdefault(sample.index // size, []), reward_of(sample)
        known += [] if reward is None else [reward]
    return [group for group, known in rewards.items() if not known or max(known) - min(known) < 1e-8]


def _manifest(recipe: Recipe, reward: Reward, state: Any, prompts: int, last: Path | None) -> Manifest:
    history = [h for h in state.log_history if "reward" in h]
    watched = {row["step"]: row for row in reward.monitor.rows}
    made: list[Sample] = reward.close()
    nothing_to_learn = Counter(group // recipe.rl.prompts for group in without_variance(made, recipe.rl.group))
    counts = {
        "in": prompts,
        "out": len(made),
        "steps": state.global_step,
        "ungraded": sum(s.failure == "ungraded" for s in made),
        "malformed": sum(not s.verdicts for s in made),  # what had nothing to judge, or no reasoning
    }
    alarms = reward.monitor.alarms()
    for alarm in alarms:
        say(f"rl: look at this: {alarm}")
    if not reward.monitor.compared:
        say(f"rl: {state.global_step} steps are too few for its monitors to compare; that none gave alarm says nothing")
    detail = {
        "curve": [
            {
                "step": h["step"],
                "loss": h["loss"],
                "reward": h["reward"],
                "reward_std": h["reward_std"],
                "no_variance": nothing_to_learn[h["step"] - 1] / recipe.rl.prompts,
                "completion_tokens": h["completions/mean_length"],
            }
            | ({"importance": h[IMPORTANCE]} if h.get(IMPORTANCE) is not None else {})
            | ({"kl": h["kl"]} if h.get("kl") is not None else {})
            | {"monitor": {k: v for k, v in watched.get(h["step"] - 1, {}).items() if k != "step"}}
            for h in history
        ],
        "alarms": alarms,
        "compared": reward.monitor.compared,
        "groups_without_variance": nothing_to_learn.total(),
        "resumed_from": last.name if last else None,
    }
    if processes.count() > 1:
        detail["processes"] = processes.count()
    tokens = sum(s.completion.usage["completion"] for s in made if s.completion)
    return Manifest(stage="rl", recipe="", inputs={}, outputs={}, counts=counts, tokens=tokens, detail=detail)


IMPORTANCE = "sampling/importance_sampling_ratio/mean"
"""TRL's name for the mean importance weight: 1 where the server's weights sample as the trained ones would."""
