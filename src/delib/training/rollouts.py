"""Rollouts: who writes the completions of a step, and the journal that lets a killed run go on without asking twice.

In: the prompts of a step, already repeated for their groups, and the trainer with the current weights. Out: what TRL's
`rollout_func` returns: `prompt_ids`, `completion_ids`, `logprobs` (None where the trainer's own model sampled them).
Several processes each write a part of a step. The one that leads keeps the journal of all of it, so that the file has
one writer, and a run goes on in another number of processes.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from delib.records import Record
from delib.run import StageFolder
from delib.training import processes

JOURNAL = "rollouts"
"""The journal's folder among the trainer's checkpoints; it goes with them."""


class Rollout(Record):
    """One completion as it was sampled. `rng`: the sampler's state after its generation, with the last one of a step
    that a process wrote by the trainer's own model, so that a replayed step leaves the same draws to the next. `ended`:
    a server stopped at the last token because it ends the turn."""

    step: int
    place: int
    prompt_id: str
    ids: list[int]
    logprobs: list[float | None] | None = None
    rng: str | None = None
    ended: bool = False

    @property
    def key(self) -> str:
        return f"{self.step}#{self.place}"


class Journal:
    """What was sampled since the last checkpoint, by step and place."""

    def __init__(self, scratch: Path, steps: int) -> None:
        """`steps`: how many are in the checkpoint; what was sampled for them is not needed any more."""
        self.folder = StageFolder(scratch / JOURNAL)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        rows = [r for r in self.folder.stream(Rollout) if r.step >= steps]
        if processes.leads():
            self.folder.replace(rows)
        self.made = {(r.step, r.place): r for r in rows}

    def of(self, step: int, prompt_ids: Sequence[str]) -> list[Rollout | None]:
        """What stands for these prompts of a step, None where nothing does."""
        found = [self.made.get((step, place)) for place in range(len(prompt_ids))]
        return [r if r and r.prompt_id == ident else None for r, ident in zip(found, prompt_ids, strict=True)]

    def add(self, rollout: Rollout) -> None:
        if processes.leads():
            self.folder.append(rollout)
        self.made[rollout.step, rollout.place] = rollout


Ids = Callable[[int], list[str]]
"""The prompt ids of a step, repeated for their groups."""


def encoded(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Rendered prompts as token ids. The template wrote the special tokens; none is added."""
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]


def by_trainer(tokenizer: Any, ids_of: Ids, journal: Journal) -> Callable[[list[str], Any], dict[str, Any]]:
    """The trainer samples, as TRL does it without a rollout function: by its own model, or by vLLM."""
    import torch

    def sampled(step: int, names: list[str], sent: list[list[int]], trainer: Any) -> list[Rollout]:
        """This process's part of a step."""
        completions, logprobs = trainer._generate_single_turn(sent, None, {}, trainer.num_generations)
        state = base64.b64encode(_rng(torch)).decode()
        places = processes.part(list(enumerate(names)))
        rows = zip(places, completions, logprobs or [None] * len(sent), strict=True)
        made = [Rollout(step=step, place=n, prompt_id=name, ids=ids, logprobs=p) for (n, name), ids, p in rows]
        return [*made[:-1], made[-1].model_copy(update={"rng": state})]

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        step = trainer.state.global_step
        names, sent = ids_of(step), encoded(tokenizer, prompts)
        made = [r for r in journal.of(step, names) if r]
        if len(made) < len(names):  # in all processes alike: each read the journal when it started
            made = processes.gathered(sampled(step, names, sent, trainer))
            for row in made:
                journal.add(row)
        own = processes.part(made)
        if own[-1].rng is not None:
            _set_rng(own[-1].rng)
        return result(sent, own)

    return rollout


def _rng(torch: Any) -> bytes:
    """The state of the generator on which sampling draws: the CPU's, and the GPU's behind it where there is one."""
    state = torch.get_rng_state()
    if torch.cuda.is_available():
        state = torch.cat([state, torch.cuda.get_rng_state()])
    return bytes(state.numpy())


def _set_rng(text: str) -> None:
    import torch

    state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    own = len(torch.get_rng_state())
    torch.set_rng_state(state[:own])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[own:])


def result(sent: list[list[int]], made: Sequence[Rollout]) -> dict[str, Any]:
    logprobs = [r.logprobs for r in made] if all(r.logprobs is not None for r in made) else None
    return {"prompt_ids": sent, "completion_ids": [r.ids for r in made], "logprobs": logprobs}
