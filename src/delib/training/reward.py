"""The one reward of RL: the judge's verdict on the ANSWER, or the expected answer and checks where there are such.

In: the token ids of completions. Out: a reward in 0…1 for each, or None (it leaves its group), every graded completion
in the stage's `records.jsonl`, and figures for the log. Rewards are computed here alone, since TRL takes a None beside
another function's number as 0. What was graded is never graded again: samples are on disk one by one, and after a kill
they are read back by step, prompt and place. In several processes the one that leads grades for all: one judge, one
budget, one writer.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal, Protocol

from delib import chat
from delib.errors import StageError
from delib.evals.answers import refuses
from delib.evals.checks import unmet
from delib.judges.reading import broken, is_right
from delib.models.calls import together
from delib.records import Checks, Completion, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.spec import Spec
from delib.training import processes
from delib.training.monitor import Graded, Monitor

MALFORMED_REWARD = 0.0
"""The lowest reward, given without a judge call: malformed or truncated completions have no answer to judge. Where the
recipe trains with reasoning it is the format reward too: a completion that ended properly without any reasoning gets
it, since the judge sees the answer alone, and RL could lose the reasoning at no cost."""
CUT_OFF = "cut off"
"""The drop reason of a completion that is out of its group's baseline."""
EXPECTED = "expected answer"
"""The judge's name in a verdict that the prompt's expected answers gave."""
CHECKS = "checks"
"""The same where its checks gave it."""


class Judge(Protocol):
    async def grade(
        self, prompt: Prompt, completion: Completion, view: Literal["full", "answer"], runs: int
    ) -> list[Verdict]: ...


Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine in the loop in which the judge lives, and waits for its end."""


def reward_of(sample: Sample) -> float | None:
    """The minimum of the verdicts; None where the judge failed, or where the completion is out of its group."""
    if sample.failure is not None or sample.drop_reason == CUT_OFF:
        return None
    return MALFORMED_REWARD if sample.score is None else sample.score


def unheard(samples: Sequence[Sample]) -> list[Sample]:
    """All that the judge was asked about in a step, where it graded none of them: nothing is learned from such a step.
    One alone is that sample's own failure."""
    asked = [s for s in samples if any(v.judge not in (EXPECTED, CHECKS) for v in s.verdicts)]
    return asked if len(asked) > 1 and all(s.failure == "ungraded" for s in asked) else []


def by_expected(completion: Completion, expected: list[str]) -> Verdict:
    """1 where an expected answer stands in an answer that neither loops nor opens as a refusal; else 0."""
    right = broken(completion) is None and is_right(completion.answer, expected) and not refuses(completion.answer)
    return Verdict(
        score=float(right),
        behaviour=None,
        criteria={},
        reason="an expected answer stands in it" if right else "no expected answer stands in it",
        view="answer",
        judge=EXPECTED,
        sent=completion.answer,
    )


def by_checks(completion: Completion, checks: Checks) -> Verdict:
    """1 where an answer holds to all checks, and neither loops nor opens as a refusal; else 0."""
    found = unmet(completion, checks)
    return Verdict(
        score=float(not found),
        behaviour=None,
        criteria={},
        reason=f"not held: {', '.join(found)}" if found else "all checks hold",
        view="answer",
        judge=CHECKS,
        sent=completion.answer,
    )


def by_rule(completion: Completion, prompt: Prompt) -> list[Verdict]:
    """The verdicts of a prompt's expected answers and checks, of which the lowest counts. None for a prompt without
    either, nor for one that is not to be complied with: that is for the judge."""
    if prompt.behaviour not in (None, "comply"):
        return []
    found = [by_expected(completion, prompt.expected)] if prompt.expected else []
    return found + ([by_checks(completion, prompt.checks)] if prompt.checks else [])


class Reward:
    """The reward function that TRL is given, and what may grade a completion before TRL asks.

    Reasoning and answer are parted from the completion's own tokens, decoded with special tokens and with what the
    template opened, so that no tag can vanish and let the judge read the reasoning. A completion that ends on none of
    the tokens `ends` was cut off. `cut_off_leaves`: then it has no reward; otherwise the lowest. `exact`: prompts with
    expected answers or checks are rewarded by them and cost no judge call. `reasoning`: a completion without any has
    the lowest reward. `steps`: those that are done for good; their samples are the monitor's start. `judge`: None in a
    process that does not lead.
    """

    __name__ = "judged_answer"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        judge: Judge | None,
        run: Run,
        spec: Spec,
        tokenizer: Any,
        ends: set[int],
        folder: StageFolder,
        *,
        per_step: int,
        steps: int = 0,
        exact: bool = False,
        cut_off_leaves: bool = False,
        reasoning: bool = True,
    ) -> None:
        self.prompts = {p.id: p for p in prompts}
        self.judge, self.run, self.spec, self.tokenizer, self.ends = judge, run, spec, tokenizer, ends
        self.folder, self.per_step, self.exact, self.cut_off_leaves = folder, per_step, exact, cut_off_leaves
        self.reasoning = reasoning
        self.monitor = Monitor(spec, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
        self.made = {s.index: s for s in folder.stream(Sample)}
        for step in range(steps):
            samples = [self.made[n] for n in self.indices(step) if n in self.made]
            self.monitor.step(step, [Graded(s, reward_of(s)) for s in samples])
        self._ask_again(steps)

    def _ask_again(self, steps: int) -> None:
        """Drop the ungraded samples of steps after the first `steps`, where the judge graded none of a step."""
        later = {index // self.per_step for index in self.made} - set(range(steps))
        lost = [
            s.index for step in later for s in unheard([self.made[n] for n in self.indices(step) if n in self.made])
        ]
        for index in lost:
            del self.made[index]
        if lost and processes.leads():
            self.close()

    def indices(self, step: int) -> range:
        return range(step * self.per_step, (step + 1) * self.per_step)

    def completion(self, sent: str, ids: Sequence[int]) -> Completion:
        ended = bool(ids) and ids[-1] in self.ends
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        return chat.completion(text, sent=sent, model="student", cut=not ended, usage={"completion": len(ids)})

    async def grade(self, index: int, prompt_id: str, sent: str, ids: Sequence[int]) -> Sample:
        """The graded sample of one completion: the one on disk where it is the same, else graded and written."""
        prompt, completion = self.prompts[prompt_id], self.completion(sent, ids)
        judged = completion.finish == "stop" and (bool(completion.reasoning) or not self.reasoning)
        stored = self.made.get(index)
        if (
            stored is not None
            and stored.prompt.id == prompt_id
            and stored.completion == completion
            and bool(stored.verdicts) == judged
        ):
            return stored
        cut = not (ids and ids[-1] in self.ends)
        verdicts: list[Verdict] = []
        if judged:
            verdicts = by_rule(completion, prompt) if self.exact else []
            if not verdicts:
                assert self.judge is not None
                shown = completion.model_copy(update={"reasoning": None, "text": completion.answer})
                verdicts = await self.judge.grade(prompt, shown, "answer", 1)
        sample = Sample(
            prompt=prompt,
            index=index,
            excerpt_id=self.spec.excerpt_id(prompt.category),
            completion=completion,
            verdicts=verdicts,
            drop_reason=CUT_OFF if cut and self.cut_off_leaves else None,
            failure="ungraded" if any(v.score is None for v in verdicts) else None,
        )
        self.folder.append(sample)
        self.made[index] = sample
        return sample

    def __call__(
        self,
        prompts: list[str],
        completion_ids: list[list[int]],
        prompt_id: list[str],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        rows = processes.gathered(list(zip(prompt_id, prompts, completion_ids, strict=True)))
        made = self.graded(trainer_state.global_step, rows) if processes.leads() else None
        rewards, figures = processes.spread(made)
        for name, value in figures.items():
            log_metric(f"monitor/{name}", value)
        return processes.part(rewards)

    def graded(
        self, step: int, rows: Sequence[tuple[str, str, list[int]]]
    ) -> tuple[list[float | None], dict[str, float]]:
        """The rewards of a whole step, and the monitor's figures. A row: prompt id, what was sent, the completion."""
        samples = self.run(together(*(self.grade(n, *row) for n, row in zip(self.indices(step), rows, strict=True))))
        if lost := unheard(samples):
            cause = next((v.failure or v.reason for v in lost[0].verdicts if v.score is None), "")
            raise StageError(
                f"rl: step {step + 1}: the judge left all {len(lost)} completions that it was asked about ungraded, "
                f"first: {cause or lost[0].key}; mend it and run the same command again, which goes on and asks about "
                "them anew"
            )
        graded = [Graded(sample, reward_of(sample)) for sample in samples]
        figures = self.monitor.step(step, graded)
        told = {name: value for name, value in figures.items() if name != "step" and not isinstance(value, str)}
        return [reward for _, reward in graded], told

    def close(self) -> list[Sample]:
        """All samples, in the order of steps; on disk too, whatever order they were graded in."""
        made = [self.made[n] for n in sorted(self.made)]
        self.folder.rewrite([s.key for s in made], Sample)
        return made
