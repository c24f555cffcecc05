"""What the RL judge is shown, and what moves the weights: on the tiny model, and on tags that are special tokens."""

import asyncio
import itertools
import json
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from conftest import ROWS, SPEC
from delib import pipeline, recipe, spec
from delib.errors import UserError
from delib.models import embedded
from delib.recipe import EvaluateSection, LoraSection, RlSection, SftSection
from delib.records import Message, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.stages import rl
from delib.training import rollouts
from delib.training.reward import Reward

POLICY = spec.parse(SPEC)
BARE = SftSection(reasoning=False)
"""For models of random weights, which write no reasoning: the judge grades what ended by itself."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices: a second thread only waits."""
    import torch

    inner = embedded.parameters

    def parameters(*given):
        made = inner(*given)
        made.cpuparams.n_threads = made.cpuparams_batch.n_threads = 1
        return made

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    embedded.parameters = parameters
    yield
    embedded.parameters = inner
    torch.set_num_threads(threads)


class WatchingJudge:
    name = "watching"

    def __init__(self, score: float | None = 0.7) -> None:
        self.score, self.shown = score, []

    async def grade(self, prompt, completion, view, runs):
        self.shown.append((view, completion.model_dump_json()))
        made = Verdict(
            score=self.score, behaviour=None, criteria={}, reason="", view=view, judge=self.name, sent=completion.answer
        )
        return [made] * runs


def opened(judge):
    @asynccontextmanager
    async def enter():
        yield judge

    return enter


def reward(tokenizer, tmp_path, judge, texts, sent="<|im_start|>assistant\n", asked=None, **more):
    """The rewards of one step's completions to one prompt, the samples on disk, and what was logged."""

    class State:
        global_step = 0

    given = {"id": "p", "messages": [{"role": "user", "content": "Q"}], "clause": "K1", "category": "investment"}
    prompt = Prompt.model_validate(given | (asked or {}))
    tmp_path.mkdir(exist_ok=True)
    folder = StageFolder(tmp_path)
    function = Reward(
        [prompt],
        judge,
        asyncio.run,
        POLICY,
        tokenizer,
        {tokenizer.eos_token_id},
        folder,
        per_step=len(texts),
        **more,
    )
    ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    logged = {}
    found = function(
        prompts=[sent] * len(texts),
        completions=["not looked at"] * len(texts),
        completion_ids=ids,
        prompt_id=["p"] * len(texts),
        trainer_state=State(),
        log_metric=logged.__setitem__,
    )
    return found, folder.records(Sample), logged


SECRET = "SECRET-REASONING"


def test_the_rl_judge_never_sees_the_reasoning(tokenizer, tmp_path):
    judge = WatchingJudge()
    texts = [
        f"<think>\n{SECRET}\n</think>\n\nSorry.<|im_end|>",
        f"<think>\n{SECRET} and never closed: Sorry.<|im_end|>",
        f"{SECRET}</think>Sorry.<|im_end|>",
        f"<think>{SECRET}</think><think>{SECRET}</think>Sorry.<|im_end|>",
        f"<think>\n{SECRET}\n</think>\n\nSorry, cut",
    ]
    found, samples, _ = reward(tokenizer, tmp_path, judge, texts)
    assert found == [0.7, 0.0, 0.0, 0.0, 0.0]
    assert len(judge.shown) == 1, "malformed and truncated completions cost no judge call"
    assert all(view == "answer" and SECRET not in shown for view, shown in judge.shown)
    assert all(SECRET not in v.sent for s in samples for v in s.verdicts)
    assert SECRET in samples[0].completion.reasoning, "it is kept for people"


def test_reasoning_tags_that_are_special_tokens_do_not_vanish(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    judge = WatchingJudge()
    found, _, _ = reward(tokenizer, tmp_path, judge, [f"<think>\n{SECRET}\n</think>\n\nSorry.<|im_end|>"])
    assert found == [0.7]
    assert SECRET not in judge.shown[0][1]


def test_a_template_that_opens_the_reasoning(tokenizer, tmp_path):
    judge = WatchingJudge()
    opened = "<|im_start|>assistant\n<think>\n"
    texts = [f"{SECRET}\n</think>\n\nSorry.<|im_end|>", f"{SECRET} Sorry.<|im_end|>"]
    found, _, _ = reward(tokenizer, tmp_path, judge, texts, sent=opened)
    assert found == [0.7, 0.0]
    assert len(judge.shown) == 1
    assert SECRET not in judge.shown[0][1]


def test_without_reasoning_the_reward_is_the_lowest_where_sft_taught_it(tokenizer, tmp_path):
    """The format reward; and what an earlier rule had graded otherwise is not read back as done."""
    judge = WatchingJudge()
    texts = ["Sorry.<|im_end|>", "<think>\n\n</think>\n\nSorry.<|im_end|>", *texts_of("Sorry.")]
    found, samples, logged = reward(tokenizer, tmp_path, judge, texts, reasoning=False)
    assert (found, len(judge.shown)) == ([0.7, 0.7, 0.7], 3)
    found, samples, logged = reward(tokenizer, tmp_path, judge, texts)
    assert (found, len(judge.shown)) == ([0.0, 0.0, 0.7], 3), "no judge call, and what stands is as it was"
    assert [s.completion.finish for s in samples] == ["stop"] * 5, "they ended properly"
    assert [s.failure for s in samples] == [None] * 5
    assert logged["monitor/well_formed"] == pytest.approx(1 / 3)
    assert reward(tokenizer, tmp_path, judge, texts)[0] == found and len(judge.shown) == 3
    opened = "<|im_start|>assistant\n<think>\n"
    found, _, _ = reward(tokenizer, tmp_path / "opened", judge, ["</think>\n\nSorry.<|im_end|>"], sent=opened)
    assert found == [0.0]


@pytest.mark.parametrize("reasoning", [True, False])
def test_rl_asks_for_reasoning_where_the_recipe_trains_with_it(tiny_model, tmp_path, reasoning):
    model_that(True, tiny_model, tmp_path / "start")
    section = RlSection(steps=1, prompts=2, group=2, max_tokens=16)
    given, judge = recipe.Recipe(sft=SftSection(reasoning=reasoning), rl=section), WatchingJudge()
    asked = [Prompt(id=row[0], messages=[Message(role="user", content=row[1])], behaviour=row[4]) for row in ROWS]
    made = rl.run(given, asked, opened(judge), POLICY, tmp_path / "start", StageFolder(tmp_path))
    assert len(judge.shown) == (0 if reasoning else 4)
    assert made.counts["malformed"] == (4 if reasoning else 0)
    assert made.detail["curve"][0]["reward"] == pytest.approx(0.0 if reasoning else 0.7)


def test_a_judge_failure_is_no_reward_and_not_zero(tokenizer, tmp_path):
    found, samples, _ = reward(tokenizer, tmp_path, WatchingJudge(None), ["<think>a</think>Sorry.<|im_end|>"])
    assert found == [None]
    assert samples[0].failure == "ungraded"


def test_rl_draws_each_behaviour_alike_and_half_of_those_to_help_from_plain_prompts():
    made = []
    for number in range(40):
        kind = ("refuse", "comply", "safe_complete", "comply")[number % 4]
        category = None if number % 4 == 3 else "fraud"
        made.append(
            Prompt(id=str(number), messages=[Message(role="user", content="Q")], category=category, behaviour=kind)
        )
    chosen = rl.mixed(made, 24, seed=1)
    drawn = Counter((str(p.behaviour), p.category) for p in chosen)
    assert drawn == {
        ("refuse", "fraud"): 8,
        ("safe_complete", "fraud"): 8,
        ("comply", "fraud"): 4,
        ("comply", None): 4,
    }
    assert rl.mixed(made, 24, seed=1) == chosen
    assert len({p.id for p in chosen}) == 24, "no prompt twice before its pile is through"


def test_rl_that_was_killed_after_its_last_step_makes_no_other(tiny_model, tmp_path):
    prompts = [
        Prompt(
            id=name,
            messages=[Message(role="user", content=text)],
            category=category,
            clause=clause,
            behaviour=behaviour,
        )
        for name, text, category, clause, behaviour in ROWS
    ]
    given = recipe.Recipe(sft=BARE, rl=RlSection(steps=2, prompts=2, group=2, max_tokens=16))
    judge = WatchingJudge()
    made = rl.run(given, prompts, opened(judge), POLICY, tiny_model, StageFolder(tmp_path))
    records = (tmp_path / "records.jsonl").read_bytes()
    assert (tmp_path / "trainer" / "checkpoint-2").exists()
    shown = len(judge.shown)
    again = rl.run(given, prompts, opened(judge), POLICY, tiny_model, StageFolder(tmp_path))
    assert again.counts == made.counts
    assert made.counts["out"] == 8
    assert (tmp_path / "records.jsonl").read_bytes() == records
    assert len(judge.shown) == shown


def test_a_device_learns_from_a_part_of_a_step_at_once(tiny_model, tmp_path, monkeypatch):
    """In parts, or in parts after a failure of all at once, the weights and completions of all at once; a part that
    does not divide the step is told."""
    import torch
    from safetensors.torch import load_file
    from trl import GRPOTrainer

    fails_at, sizes, inner = 3, [], GRPOTrainer._prepare_inputs

    def rewards(self, prompts, completions, trainer_state, **_):
        if trainer_state.global_step == fails_at:
            raise MemoryError
        return [n % 3 / 2 for n in range(len(prompts))]

    def prepared(self, batch):
        found = inner(self, batch)
        sizes.append(len(found["completion_ids"]))
        return found

    monkeypatch.setattr(Reward, "__call__", rewards)
    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", prepared)
    prompts = [
        Prompt(id=name, messages=[Message(role="user", content=text)], category=about, clause=clause, behaviour=kind)
        for name, text, about, clause, kind in ROWS
    ]
    start = tmp_path / "start"
    model = model_that(False, tiny_model, start)

    def made(name, part):
        section = RlSection(steps=3, prompts=2, group=4, max_tokens=16, learning_rate=1e-3, device_batch=part)
        given, folder = recipe.Recipe(rl=section, evaluate=EvaluateSection(max_tokens=16)), tmp_path / name
        rl.run(given, prompts, opened(WatchingJudge()), POLICY, start, StageFolder(folder))
        journal = StageFolder(folder / "trainer" / rollouts.JOURNAL).records(rollouts.Rollout)
        return load_file(folder / "checkpoint" / "model.safetensors"), [(r.step, r.place, r.ids) for r in journal]

    weights, written = made("whole", None)
    moved = max((weights[name] - value).abs().max() for name, value in model.state_dict().items() if name in weights)
    assert moved > 1e-3 and len(written) == 3 * 8
    parts = made("parts", 2)
    fails_at = 1
    with pytest.raises(MemoryError):
        made("broken", None)
    fails_at = 3
    went_on = made("broken", 2)
    assert sizes == [8] * 3 + [2] * 12 + [8] + [2] * 8
    for found, told in (parts, went_on):
        assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in weights.items())
        assert told in (written, written[8:])  # a journal begins at the checkpoint
    with pytest.raises(UserError, match=r"rl.device_batch: 3 does not divide the 8 completions .* take a divisor of 8"):
        made("none", 3)


def test_the_rate_rises_and_falls_and_smaller_parts_make_nothing_anew(tmp_path):
    import torch
    from transformers import get_scheduler

    loaded = recipe.load(recipe.RECIPES / "small.yaml")
    made, steps = rl._arguments(loaded, tmp_path, False, 400), loaded.rl.steps
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=made.learning_rate)
    more = {"num_warmup_steps": made.warmup_steps, "num_training_steps": steps}
    scheduler = get_scheduler(
        made.lr_scheduler_type, optimiser, scheduler_specific_kwargs=made.lr_scheduler_kwargs, **more
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0] / made.learning_rate)
        optimiser.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and rates[3:18] == [1.0] * 15
    assert all(one > two for one, two in itertools.pairwise(rates[17:])) and rates[-1] < 0.05

    def basis(stage, given=loaded, **more):
        section = getattr(given, stage).model_copy(update=more)
        return pipeline.start_run(given.model_copy(update={stage: section}), tmp_path / "run").basis(stage)

    assert basis("rl", device_batch=16, report_to="none") == basis("rl") != basis("rl", prompts=8)
    other = loaded.model_copy(update={"engine": "transformers"})
    assert basis("sft", other, device_batch=1) == basis("sft") != basis("sft", batch_size=8)
    assert basis("sft", device_batch=1, held_out_share=0.1) != basis("sft", held_out_share=0.1)


def model_that(ends, tiny_model, folder):
    """The tiny model, in `folder`: every token ends its completions, or none may."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size)) if ends else [1]
    model.generation_config.suppress_tokens = None if ends else [1]
    model.save_pretrained(folder)
    for file in [*tiny_model.glob("*token*"), *tiny_model.glob("chat_template*")]:
        (folder / file.name).write_bytes(file.read_bytes())
    return model


@pytest.mark.parametrize(("ending", "limit", "moved"), [(False, 32, False), (False, 16, True), (True, 32, True)])
def test_what_was_cut_off_before_evaluates_limit_moves_no_weight(
    tiny_model, tmp_path, monkeypatch, ending, limit, moved
):
    """Rewards differ within each group; the weights move where completions ended by themselves, or were cut off where
    evaluate would cut them off too."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        Reward, "__call__", lambda self, prompts, completions, **_: [float(n % 2) for n in range(len(prompts))]
    )
    prompts = [
        Prompt(id=name, messages=[Message(role="user", content=text)], category=about, clause=clause, behaviour=kind)
        for name, text, about, clause, kind in ROWS
    ]
    start = tmp_path / "start"
    model = model_that(ending, tiny_model, start)
    section = RlSection(steps=1, prompts=2, group=2, max_tokens=16, learning_rate=1e-2)
    given = recipe.Recipe(rl=section, evaluate=EvaluateSection(max_tokens=limit))
    rl.run(given, prompts, opened(WatchingJudge()), POLICY, start, StageFolder(tmp_path))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").state_dict()
    same = all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert same is not moved


def test_a_group_without_two_rewards_that_differ_teaches_nothing(tokenizer, tiny_model, tmp_path):
    texts = [
        *texts_of("A.", "B."),
        "<think>\ncut",
        *texts_of("C."),
        "<think>\ncut",
        "<think>\ncut",
        *texts_of("D."),
        "</think><|im_end|>",
    ]
    found, samples, _ = reward(tokenizer, tmp_path / "graded", WatchingJudge(), texts, cut_off_leaves=True)
    assert found == [0.7, 0.7, None, 0.7, None, None, 0.7, 0.0]
    assert rl.without_variance(samples, 2) == [0, 1, 2] and rl.without_variance(samples, 4) == [0]

    model_that(False, tiny_model, tmp_path / "start")
    given = recipe.Recipe(rl=RlSection(steps=2, prompts=2, group=2, max_tokens=16, cut_off="out"))
    asked = [Prompt(id=row[0], messages=[Message(role="user", content=row[1])], behaviour=row[4]) for row in ROWS]
    made = rl.run(given, asked, opened(WatchingJudge()), POLICY, tmp_path / "start", StageFolder(tmp_path))
    assert made.counts["malformed"] == 8, "all were cut off"
    assert made.detail["groups_without_variance"] == 4
    assert [row["no_variance"] for row in made.detail["curve"]] == [1.0, 1.0]


def texts_of(*answers):
    return [f"<think>\nwhy\n</think>\n\n{answer}<|im_end|>" for answer in answers]


def test_expected_answers_reward_without_the_judge(tokenizer, tmp_path):
    judge = WatchingJudge(0.3)
    answers = ("It is 42.", "It is 142.", "I'm sorry, I can't say 42.", "42 " * 40)
    texts = [*texts_of(*answers), "<think>\n42"]
    found, samples, logged = reward(tokenizer, tmp_path, judge, texts, asked={"expected": ["42"]}, exact=True)
    assert found == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert judge.shown == []
    assert [v.judge for s in samples for v in s.verdicts] == ["expected answer"] * 4
    assert logged["monitor/well_formed"] == 0.8
    found, _, _ = reward(tokenizer, tmp_path / "judged", judge, texts, asked={"expected": ["42"]})
    assert found == [0.3, 0.3, 0.3, 0.3, 0.0], "by default the judge decides"


def test_checks_reward_without_the_judge(tokenizer, tmp_path):
    judge = WatchingJudge(0.3)
    answers = ("The harbour is near.", "The sea is very near indeed.", "I'm sorry, no harbour.", "harbour " * 40)
    texts = [*texts_of(*answers), "<think>\nharbour"]
    asked = {"checks": {"max_words": 5, "contains": ["harbour"]}}
    found, samples, _ = reward(tokenizer, tmp_path, judge, texts, asked=asked, exact=True)
    assert found == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert judge.shown == []
    verdicts = [v for s in samples for v in s.verdicts]
    assert {(v.judge, v.view) for v in verdicts} == {("checks", "answer")}
    assert [v.reason for v in verdicts] == [
        "all checks hold",
        "not held: max_words (6), contains (harbour)",
        "not held: opens as a refusal",
        "not held: looping, max_words (40)",
    ]
    found, _, _ = reward(tokenizer, tmp_path / "judged", judge, texts, asked=asked)
    assert found == [0.3, 0.3, 0.3, 0.3, 0.0], "by default the judge decides"


def test_expected_answers_and_checks_must_both_hold(tokenizer, tmp_path):
    texts = texts_of('{"sum": 42}', "It is 42.", '{"sum": 43}')
    asked = {"expected": ["42"], "checks": {"json": True}}
    found, samples, _ = reward(tokenizer, tmp_path, None, texts, asked=asked, exact=True)
    assert found == [1.0, 0.0, 0.0]
    assert [[(v.judge, v.score) for v in s.verdicts] for s in samples] == [
        [("expected answer", 1.0), ("checks", 1.0)],
        [("expected answer", 1.0), ("checks", 0.0)],
        [("expected answer", 0.0), ("checks", 1.0)],
    ]


@pytest.mark.parametrize("asked", [{"expected": ["42"]}, {"checks": {"max_words": 9}}])
def test_a_prompt_that_is_not_to_be_complied_with_is_the_judges(tokenizer, tmp_path, asked):
    """Else it would be paid for the very help that the policy forbids."""
    judge = WatchingJudge(0.3)
    for behaviour, paid in (("refuse", 0.3), ("safe_complete", 0.3), ("comply", 1.0)):
        told = asked | {"behaviour": behaviour}
        assert reward(tokenizer, tmp_path / behaviour, judge, texts_of("42."), asked=told, exact=True)[0] == [paid]


def test_what_was_cut_off_leaves_the_baseline_where_it_is_out(tokenizer, tmp_path):
    texts = [
        *texts_of("Yes."),
        "<think>\nnever closed",
        "<think>\nwhy\n</think>\n\nYes, and",
        "</think> astray<|im_end|>",
    ]
    found, samples, _ = reward(tokenizer, tmp_path, WatchingJudge(), texts, cut_off_leaves=True)
    assert found == [0.7, None, None, 0.0], "what ended by itself and is malformed has the lowest reward"
    assert [s.drop_reason for s in samples] == [None, "cut off", "cut off", None]
    assert [s.failure for s in samples] == [None] * 4, "nobody failed to grade them"
    found, _, _ = reward(tokenizer, tmp_path / "in", WatchingJudge(), texts)
    assert found == [0.7, 0.0, 0.0, 0.0]


def test_curves_go_only_where_the_package_is(tmp_path):
    given = recipe.Recipe(rl=RlSection(report_to="trackio"))
    if rl.problems(given):
        with pytest.raises(UserError, match=r"rl\.report_to: trackio is not installed; pip install trackio"):
            rl.run(given, [], opened(WatchingJudge()), POLICY, tmp_path, StageFolder(tmp_path))
    assert rl.problems(recipe.Recipe()) == []


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_no_unit_is_dropped_and_the_curve_tells_how_far_it_went(tiny_model, tmp_path, monkeypatch, lora):
    def rewards(self, prompts, completions, trainer_state, **_):
        return [n % 3 / 2 for n in range(len(prompts))]

    monkeypatch.setattr(Reward, "__call__", rewards)
    start = tmp_path / "start"
    model = model_that(False, tiny_model, start)
    model.config.attention_dropout = 0.3
    model.config.save_pretrained(start)
    rows = [("r", "weapons", "W2", "refuse"), ("s", "weapons", "W2", "refuse")]
    prompts = [
        Prompt(id=n, messages=[Message(role="user", content=n)], category=a, clause=c, behaviour=b)
        for n, a, c, b in rows
    ]
    section = RlSection(steps=4, prompts=2, group=2, max_tokens=16, learning_rate=1e-2, beta=0.5, lora=lora)
    given, folder = recipe.Recipe(rl=section, evaluate=EvaluateSection(max_tokens=16)), tmp_path / "rl"
    made = rl.run(given, prompts, opened(WatchingJudge()), POLICY, start, StageFolder(folder))
    far = [row["kl"] for row in made.detail["curve"]]
    assert far[0] == pytest.approx(0, abs=1e-6) and far[-1] > 1e-4
    told = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert told["attention_dropout"] == 0.3
    assert not [p for p in (folder / "checkpoint").rglob("*") if p.is_dir() and p.name != "adapter"]
    dropping = recipe.Recipe(rl=section.model_copy(update={"lora": LoraSection(dropout=0.1)}))
    assert any(p.startswith("rl.lora.dropout: ") for p in rl.problems(dropping)) and rl.problems(given) == []
