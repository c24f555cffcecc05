"""What becomes of RL where the judge fails: on one completion, on all of a step; through `run`, on a model of random
weights."""

import re

import pytest

from delib import recipe
from delib.errors import StageError
from delib.recipe import RlSection
from delib.records import Checks, Completion, Message, Prompt, Sample
from delib.run import StageFolder
from delib.stages import rl
from delib.training.reward import by_checks, by_expected, unheard
from test_rl import BARE, POLICY, one_thread, opened  # noqa: F401 - a fixture that is used by itself
from test_rollouts import DyingJudge, HashJudge, Killed, prompts_of_rows, scored, wide_model  # noqa: F401 - fixtures


class SoundJudge(HashJudge):
    fails_above = 1.0


class DeadJudge(HashJudge):
    fails_above = -1.0


class OnceSilent(SoundJudge):
    """Its third call fails."""

    async def grade(self, prompt, completion, view, runs):
        made = await super().grade(prompt, completion, view, runs)
        if len(self.shown) != 3:
            return made
        return [v.model_copy(update={"score": None, "failure": "nobody answers"}) for v in made]


def test_a_row_whose_judge_call_failed_is_in_no_baseline(wide_model, tmp_path, scored):  # noqa: F811
    """Through the real reward and trainer: its advantage is 0, and its siblings' are less their own mean."""
    section = RlSection(steps=1, prompts=2, group=8, max_tokens=16, scale_rewards="none")
    folder = StageFolder(tmp_path)
    made = rl.run(
        recipe.Recipe(sft=BARE, rl=section), prompts_of_rows(), opened(OnceSilent()), POLICY, wide_model, folder
    )
    samples = folder.records(Sample)
    [failed] = [n for n, s in enumerate(samples) if s.failure == "ungraded"]
    [(advantages, learned)] = scored
    assert made.counts["ungraded"] == 1 and learned[failed]
    assert advantages[failed] == 0.0
    group = range(8) if failed < 8 else range(8, 16)
    siblings = [n for n in group if samples[n].verdicts and n != failed]
    rewards = [samples[n].verdicts[0].score for n in siblings]
    mean = sum(rewards) / len(rewards)
    assert len(rewards) > 1 and mean > 0.1, "with a reward of 0 for it the mean would be another"
    assert [advantages[n] for n in siblings] == pytest.approx([r - mean for r in rewards], abs=1e-6)


def test_a_judge_that_grades_nothing_stops_rl_and_is_asked_again(wide_model, tmp_path):  # noqa: F811
    def run(judge, steps=3):
        section = RlSection(steps=steps, prompts=2, group=4, max_tokens=24, learning_rate=1e-3)
        given = recipe.Recipe(sft=BARE, rl=section)
        return rl.run(given, prompts_of_rows(), opened(judge), POLICY, wide_model, folder)

    folder = StageFolder(tmp_path)
    run(SoundJudge(), steps=1)
    dead = DeadJudge()
    told = r"rl: step 2: the judge left all (\d+) completions .* first: nobody answers; .* run the same command again"
    for _ in range(2):
        with pytest.raises(StageError, match=told) as error:
            run(dead)
    count = int(re.search(told, str(error.value))[1])
    assert len(dead.shown) == 2 * count > 2
    assert sorted(s.index for s in folder.records(Sample)) == list(range(16)), "one for each, and no third step"
    with pytest.raises(Killed):
        run(DyingJudge(1, fails_above=1.0))
    judge = SoundJudge()
    made = run(judge)
    samples = folder.records(Sample)
    assert [s.index for s in samples] == list(range(24))
    assert (made.counts["ungraded"], made.counts["steps"], made.detail["resumed_from"]) == (0, 3, "checkpoint-1")
    assert len(judge.shown) == sum(bool(s.verdicts) for s in samples[8:]) - 1, (
        "what was graded is not asked about again"
    )


def test_a_judge_is_unheard_where_it_was_asked_twice_and_graded_nothing():
    made = Completion(reasoning="why", answer="It is 42.", finish="stop", model="student", text="", sent="")
    right = by_expected(made, ["42"])
    lost = right.model_copy(update={"judge": "hash", "score": None})

    def sample(*verdicts):
        asked = Prompt(id="p", messages=[Message(role="user", content="Q")])
        failure = "ungraded" if any(v.score is None for v in verdicts) else None
        return Sample(prompt=asked, excerpt_id="", completion=made, verdicts=list(verdicts), failure=failure)

    failed, expected, malformed = sample(lost), sample(right), sample()
    assert unheard([failed, malformed, expected, failed]) == [failed, failed], (
        "an expected answer is no judge's verdict"
    )
    checked = sample(by_checks(made, Checks(max_words=9)))
    assert unheard([failed, checked, failed]) == [failed, failed], "nor are checks"
    assert unheard([failed, malformed, expected]) == [], "one alone is that sample's own failure"
    assert unheard([failed, failed, sample(right.model_copy(update={"judge": "hash"}))]) == []
    assert unheard([malformed, expected]) == []
