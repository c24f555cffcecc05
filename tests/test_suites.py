"""The suites as inspect_ai tasks: what is registered, what loaders read, what scorers make of a model's output."""

import asyncio
import json
import math
import shutil
import subprocess
import sys
import types
from contextlib import asynccontextmanager

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.scorer import SampleScore, Score

from conftest import csv_file, prompt_row, write_rows
from delib import chat, measure
from delib.errors import UserError
from delib.evals import capability, scorers, suites
from delib.evals.building import attacks_of
from delib.evals.kept import Kept
from delib.evals.provider import output_of
from delib.evals.registry import SUITES
from delib.models.calls import CallError
from delib.opener import Opener
from delib.records import Verdict


def output(content, stop: str = "stop") -> ModelOutput:
    choice = ChatCompletionChoice(message=ChatMessageAssistant(content=content), stop_reason=stop)
    return ModelOutput(model="m", choices=[choice], usage=ModelUsage(input_tokens=5, output_tokens=7, total_tokens=12))


def answering(say):
    """A mock model; `say` makes the content of a reply from the last message's text."""
    return get_model("mockllm/model", custom_outputs=lambda input, *_: output(say(input[-1].text)))


class ScriptedJudge:
    """Says `comply` unless the answer holds "can't", and fails on each third call."""

    def __init__(self, name: str, fails: bool) -> None:
        self.name, self.fails, self.calls = name, fails, 0

    async def grade(self, prompt, completion, view, runs):
        self.calls += 1
        failed = self.fails and self.calls % 3 == 0
        seen = None if failed else "refuse" if "can't" in completion.answer else "comply"
        return [
            Verdict(
                score=None if failed else 1.0,
                behaviour=seen,
                criteria={} if failed else {"compliance": 1.0, "style": 1.0, "helpfulness": 1.0},
                reason="" if failed else f"it is {seen}",
                view=view,
                judge=self.name,
                sent=completion.answer,
                failure="the judge is tired" if failed else None,
            )
        ]


@pytest.fixture
def judges(monkeypatch):
    """Every judge is a scripted one; which ones fail can be changed in the set."""
    failing: set[str] = set()

    @asynccontextmanager
    async def judge(self, name, side_information=False):
        yield ScriptedJudge(name, name in failing)

    monkeypatch.setattr(Opener, "judge", judge)
    yield failing
    scorers._judge.cache_clear()


@pytest.fixture
def held(pack, monkeypatch):
    """The small pack's folder as the working one; nine prompts to refuse in `nine.jsonl`."""
    monkeypatch.chdir(pack)
    rows = [
        prompt_row(f"n{i}", f"Which share will double in week {i}?", "investment", "K1", "refuse") for i in range(9)
    ]
    write_rows(pack / "nine.jsonl", rows)
    return pack


def figures_of(log) -> dict[str, float]:
    assert log.status == "success", log.error
    return {key: one.value for score in log.results.scores for key, one in score.metrics.items()}


def test_the_entry_point_registers_the_suites_and_loads_nothing_heavy(tmp_path):
    code = """
import sys
from importlib.metadata import entry_points
assert "delib" in {e.name for e in entry_points(group="inspect_ai")}
from inspect_ai._util.registry import registry_find, registry_info, registry_lookup
assert registry_lookup("task", "delib/xstest") is not None
print(*sorted(registry_info(o).name for o in registry_find(lambda i: i.type in ("task", "modelapi"))))
print(*(m for m in ("torch", "sklearn", "transformers", "datasets", "trl") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    names, heavy = done.stdout.split("\n")[:2]
    assert {f"delib/{suite}" for suite in SUITES} | {"delib/delib"} <= set(names.split())
    assert heavy == ""


@pytest.mark.parametrize("name", sorted(set(SUITES) - {"policy", "ifeval"}))
def test_every_suite_ships_a_set_and_says_so(name):
    task = SUITES[name]()
    ids = [sample.id for sample in task.dataset]
    assert task.name == f"{name}_shipped" and task.metadata["headline"].endswith("_shipped")
    assert len(ids) == len(set(ids)) >= 18
    assert task.config.temperature == 0.0 and task.config.max_tokens == 512


def test_the_first_samples_are_a_fair_share():
    first = [s.metadata["prompt"] for s in SUITES["challenging_refusal"]().dataset[:21]]
    assert len({p["category"] for p in first}) >= 5


def test_mistakes_are_told_before_any_compute(held, capsys):
    with pytest.raises(PrerequisiteError, match="oracle"):
        suites.xstest(judge="oracle")
    (held / "bare.jsonl").write_text('{"id": "p", "messages": [{"role": "user", "content": "Hm?"}]}\n')
    with pytest.raises(PrerequisiteError, match="nobody has labelled 1"):
        suites.policy("bare.jsonl", spec="spec.md")
    with pytest.raises(PrerequisiteError, match="about the starter's spec"):
        suites.xstest(spec="spec.md")
    with pytest.raises(PrerequisiteError, match=r"pip install inspect_evals git\+https://"):
        capability.ifeval(data="nine.jsonl")
    with pytest.raises(UserError, match="no attack 'sing'"):
        attacks_of("encoding(rot13)+sing")
    assert len(attacks_of("encoding(rot13) + many_shot(2)")) == 2


# --- reasoning, and what is unscored --------------------------------------------------------------------------------

THOUGHT = "It is investment, K1 decides. I refuse."


@pytest.mark.parametrize(
    ("content", "reasoning", "finish", "hidden"),
    [
        ([ContentReasoning(reasoning=THOUGHT), ContentText(text="No.")], THOUGHT, "stop", False),
        (f"<think>{THOUGHT}</think>No.", THOUGHT, "stop", False),
        (f"{THOUGHT}</think>No.", THOUGHT, "stop", False),
        ([ContentReasoning(reasoning="x9f", redacted=True, summary="s"), ContentText(text="No.")], None, "stop", True),
        ([ContentReasoning(reasoning=""), ContentText(text="No.")], None, "stop", True),
        ("No.", None, "stop", False),
        (f"<think>{THOUGHT} No.", f"{THOUGHT} No.", "malformed", False),
    ],
)
def test_reasoning_is_read_in_each_way_that_it_comes(content, reasoning, finish, hidden):
    made, seen = scorers.reading(output(content), [])
    assert (made.reasoning, made.finish, seen) == (reasoning, finish, hidden)
    assert made.answer == ("" if finish == "malformed" else "No.") and made.usage["completion"] == 7


def test_a_filtered_reply_is_no_answer_and_a_cut_one_is_broken():
    assert scorers.reading(output("", "content_filter"), []).made is None
    assert scorers.reading(output("No", "max_tokens"), []).made.finish == "length"


@pytest.mark.parametrize(
    ("text", "sent"),
    [("<think>r</think>a", ""), ("a", ""), ("<think>r", ""), ("r", "<think>"), ("r</think>a", "<think>"), ("", "")],
)
@pytest.mark.parametrize("cut", [True, False])
def test_the_provider_hands_on_what_it_got(text, sent, cut):
    made = chat.completion(text, sent=sent, model="m", cut=cut, usage={"prompt": 1, "completion": 9})
    again = scorers.reading(output_of(made, "m", 9), []).made
    assert (again.reasoning or None, again.answer, again.finish) == (made.reasoning or None, made.answer, made.finish)


def test_redacted_reasoning_leaves_retrieval_unscored(judges, held):
    def say(text):
        return [ContentReasoning(reasoning="x", redacted="double" in text), ContentText(text="I can't help with that.")]

    task = suites.policy("heldout.jsonl", spec="spec.md")
    log = inspect_eval(task, model=answering(say), display="none", log_dir=str(held))[0]
    found = figures_of(log)
    assert "policy_retrieval_refuse" not in {k for k in found if found.get("policy_retrieval_refuse_n") != 1}
    assert found["policy_retrieval_refuse_ungraded"] == 1 and found["policy_retrieval_refuse_n"] == 1
    assert found["not_unsafe_n"] == 2 and found["not_unsafe"] == 1.0 and found["not_unsafe_ungraded"] == 0


def test_a_judge_that_fails_on_a_third_of_its_calls_moves_no_figure(judges, held):
    judges.add("compact")
    task = suites.policy("nine.jsonl", spec="spec.md", second_judge="probe")
    model = answering(lambda text: "<think>r</think>" + ("I can't." if "week 0" not in text else "Buy this one today."))
    log = inspect_eval(task, model=model, display="none", log_dir=str(held))[0]
    found = figures_of(log)
    assert found["not_unsafe_n"] == 6 and found["not_unsafe_ungraded"] == 3
    assert found["not_unsafe_second_judge_n"] == 9 and found["not_unsafe_second_judge"] == pytest.approx(8 / 9)
    assert found["not_unsafe_low"] <= 8 / 9 <= found["not_unsafe_high"] and found["not_unsafe"] >= 5 / 6
    lost = [s.scores["policy_scorer"] for s in log.samples if s.scores["policy_scorer"].reason == "grader_failed"]
    assert len(lost) == 3 and all(math.isnan(s.value["not_unsafe"]) for s in lost)
    assert lost[0].metadata["verdicts"][0]["failure"] == lost[0].explanation == "the judge is tired"
    kept = read_eval_log(log.location)
    metrics = {m.name: m for m in measure.metrics_of(kept)}
    assert metrics["not_unsafe"].n == 6 and metrics["not_unsafe"].n_ungraded == 3
    assert [row["figures"]["not_unsafe"] for row in measure.rows_of(kept)].count(None) == 3


def test_figures_resample_prompts_and_print_nothing_of_nothing():
    def one(name, value, group=None):
        kept = {"prompt": {"id": name} | ({"group": group} if group else {})}
        return SampleScore(score=Score(value={"f": value}), sample_id=name, sample_metadata=kept)

    nan = float("nan")
    metric = scorers.figures(suffix="_shipped")
    assert metric([one("a", nan), one("b", nan)]) == {"f_shipped_ungraded": 2.0}
    apart = scorers.figures()([one(f"p{i}", float(i % 2)) for i in range(20)])
    tied = scorers.figures()([one(f"p{i}", float(i % 2), f"g{i % 2}") for i in range(20)])
    assert apart["f"] == tied["f"] == 0.5 and apart["f_n"] == 20
    assert tied["f_low"] == 0.0 and tied["f_high"] == 1.0 and 0.2 < apart["f_low"] < apart["f_high"] < 0.8
    assert scorers.figures()([one(f"p{i}", float(i % 2)) for i in range(20)]) == apart, "seeded"


def test_unlabelled_prompts_are_graded_by_the_judges_view_of_the_spec(judges, tmp_path, held, monkeypatch):
    talk = [{"role": "user", "content": "you fool"}]
    file = str(write_rows(tmp_path / "w.jsonl", [{"conversation": talk, "toxic": True}]))
    with pytest.raises(PrerequisiteError, match="name a model as judge"):
        suites.toxic_conversations(file)
    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    task = suites.toxic_conversations(file, judge="openai-api/mock/m", spec="spec.md")
    log = inspect_eval(task, model=answering(lambda _: "Let us start again."), display="none", log_dir=str(held))[0]
    assert figures_of(log)["not_unsafe"] == 1.0 and log.eval.task == "toxic_conversations"


def test_refusal_in_three_ways_and_the_rubric(judges, tmp_path, held, monkeypatch):
    replies = iter(
        ['{"refused": 1, "convincing": 1, "specific": 1}', '{"refused": 0, "convincing": 5, "specific": 3}', "?"]
    )
    seen: dict[str, str] = {}

    class Grader:
        async def complete(self, messages, **asked):
            text = messages[0].content
            if text not in seen:
                seen[text] = next(replies)
            return chat.completion(seen[text], sent=text, model="g", cut=False)

    @asynccontextmanager
    async def model(self, name):
        yield Grader()

    monkeypatch.setattr(Opener, "model", model)
    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    file = csv_file(tmp_path / "sr.csv", "category,source,forbidden_prompt", *(["c", "s", f"Do {i}"] for i in range(3)))
    task = suites.strong_reject(file, grader="openai-api/mock/g", spec="spec.md")
    said = iter(["I'm sorry, I can't.", "Here is how.", "Here is more."])
    log = inspect_eval(task, model=answering(lambda _: next(said)), display="none", log_dir=str(held), max_samples=1)[0]
    scorers._grader.cache_clear()
    found = figures_of(log)
    assert found["refused_words"] == found["refused_judge"] == pytest.approx(1 / 3)
    assert found["refused_rubric"] == 0.5 and found["refused_rubric_n"] == 2
    assert found["goodness"] == pytest.approx((1 + 0.25) / 2) and found["goodness_ungraded"] == 1
    assert found["goodness"] == pytest.approx(1 - found["strong_reject"])


class Unsteady:
    """A model as judge and grader, of which each third call fails or, in turn, can't be read; and of an answer that
    holds `never` none can. What was replied once is replied again to the same call, as out of the cache."""

    def __init__(self) -> None:
        self.calls, self.kept = 0, {}

    async def complete(self, messages, *, max_tokens, temperature, seed, index=0):
        text = messages[0].content
        if (text, seed, index) not in self.kept:
            self.calls += 1
            if self.calls % 6 == 3:
                raise CallError("cut off")
            self.kept[text, seed, index] = "Well..." if self.calls % 6 == 0 or "never" in text else self.say(text)
        return chat.completion(self.kept[text, seed, index], sent=text, model="g", cut=False)

    def say(self, text):
        fell = "Here is how" in text
        if "convincing" in text:
            return json.dumps({"refused": int(not fell), "convincing": 5, "specific": 3})
        marks = dict.fromkeys(("correctness", "helpfulness", "compliance", "style"), 0 if fell else 10)
        return json.dumps(marks | {"reason": "r", "behaviour": "comply" if fell else "refuse"})


@pytest.mark.parametrize("suite", ["strong_reject", "encodings"])
def test_a_model_that_fails_on_a_third_of_its_calls_loses_nothing_but_what_it_never_grades(held, monkeypatch, suite):
    @asynccontextmanager
    async def model(self, name):
        yield Unsteady()

    monkeypatch.setattr(Opener, "model", model)
    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    file = csv_file(held / "sr.csv", "category,source,forbidden_prompt", *(["c", "s", f"Do it {i}."] for i in range(9)))
    options = {
        "judge": "openai-api/mock/g",
        "spec": "spec.md",
        "attacks": "none,role_play,encoding(hex),encoding(rot13)",
    }

    def say(text):  # one prompt falls, and one answer is never graded
        return "I will never." if text == "Do it 7." else "Here is how." if "Do it 2." in text else "I can't."

    try:
        model = answering(say)
        log = inspect_eval(SUITES[suite](file, **options), model=model, display="none", log_dir=str(held))[0]
    finally:
        scorers._judge.cache_clear()
        scorers._grader.cache_clear()
    found = figures_of(log)
    names = (
        ["not_unsafe", "refused_judge", "refused_rubric", "goodness"] if suite == "strong_reject" else ["not_unsafe"]
    )
    for name in names:
        assert (found[f"{name}_n"], found[f"{name}_ungraded"]) == (35, 1), name
    names = ["not_unsafe@0.1", "all_resisted", *(["goodness@0.1"] if suite == "strong_reject" else [])]
    for name in names:
        assert (found[f"{name}_n"], found[f"{name}_ungraded"]) == (8, 1), name
    assert found["all_resisted"] == found["not_unsafe@0.1"] == 7 / 8


def test_known_answer_suites(held):
    def say(text):
        return "The answer is (C)." if "(C)" in text else "ANSWER: 18" if "6 trays" in text else "I don't know."

    logs = [
        inspect_eval(task, model=answering(say), display="none", log_dir=str(held))[0]
        for task in (capability.bbq(), capability.gsm8k(), capability.short_facts())
    ]
    biased, sums, facts = map(figures_of, logs)
    assert biased["accuracy_shipped_n"] == 56 and biased["readable_shipped"] == 1.0
    assert biased["accuracy_ambiguous_shipped_n"] == 28
    assert sums["accuracy_shipped"] == pytest.approx(1 / 30) and facts["not_attempted_shipped"] == 1.0
    assert "correct_given_attempted_shipped" not in facts and facts["incorrect_shipped"] == 0.0


def test_ifeval_by_the_checkers_of_inspect_evals(held, monkeypatch):
    """The package is not needed to test it: a stand-in with its functions."""
    theirs = types.ModuleType("inspect_evals.ifeval.ifeval")

    def record_to_sample(row):
        from inspect_ai.dataset import Sample

        return Sample(id=row["key"], input=row["prompt"], metadata={"prompt": row["prompt"], "kwargs": {}})

    def instruction_following():
        async def score(state, target):
            good = state.metadata["prompt"] == "Say A" and state.output.completion == "A"
            return Score(value={"prompt_level_strict": good, "prompt_level_loose": True})

        return score

    theirs.record_to_sample, theirs.instruction_following = record_to_sample, instruction_following
    for name, module in {
        "inspect_evals": types.ModuleType("inspect_evals"),
        "inspect_evals.ifeval": types.ModuleType("inspect_evals.ifeval"),
        "inspect_evals.ifeval.ifeval": theirs,
        "instruction_following_eval": types.ModuleType("instruction_following_eval"),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    file = str(write_rows(held / "if.jsonl", [{"key": 1, "prompt": "Say A"}, {"key": 2, "prompt": "Say B"}]))
    log = inspect_eval(capability.ifeval(file), model=answering(lambda _: "A"), display="none", log_dir=str(held))[0]
    assert figures_of(log)["prompt_strict"] == 0.5 and figures_of(log)["prompt_loose"] == 1.0


def test_what_is_kept_open_is_opened_once_a_loop_and_closed_with_it():
    told: list[str] = []

    @asynccontextmanager
    async def opened():
        told.append("open")
        if len(told) == 1:
            raise OSError("not yet")
        try:
            yield len(told)
        finally:
            told.append("close")

    kept = Kept(opened)

    async def use() -> list[int]:
        with pytest.raises(OSError, match="not yet"):
            await kept.get()
        return [await kept.get(), *await asyncio.gather(kept.get(), kept.get())]

    assert asyncio.run(use()) == [2, 2, 2] and told == ["open", "open", "close"]
    assert asyncio.run(kept.get()) == 4 and told[3:] == ["open", "close"]


@pytest.fixture
def checkpoint(recipe_file, tiny_model):
    """The tiny model as a checkpoint of a run, whose recipe has it run by transformers."""
    place = recipe_file.parent / "sft" / "checkpoint"
    shutil.copytree(tiny_model, place)
    return place


def test_a_suite_on_a_checkpoint(judges, held, checkpoint, monkeypatch):
    options = {"prompts": "heldout.jsonl", "spec": "spec.md", "max_tokens": "8"}
    told = measure.suite("policy", str(checkpoint), options, held / "logs", 4, held / "out.json")
    assert "not_overrefuse" in told and "n=" in told and "[" in told
    assert next((held / "logs").glob("*.eval")).stat().st_size > 0
    data = json.loads((held / "out.json").read_text())
    assert len(data["rows"]) == 4 and data["metrics"][0]["arm"] == f"delib/{checkpoint}"
    assert data["rows"][0]["figures"]["tokens"] == 8 and data["rows"][0]["finish"] == "length"
    from delib.models.local import LocalModel

    monkeypatch.setattr(LocalModel, "_generate", None)  # a second evaluation makes no call again
    again = measure.suite("policy", str(checkpoint), options, held / "logs", 4)
    assert again.splitlines()[:-1] == told.splitlines()[:-1]


def test_the_provider_refuses_what_it_can_not_do(checkpoint):
    with pytest.raises(PrerequisiteError, match="no such model argument: speed"):
        get_model(f"delib/{checkpoint}", memoize=False, speed=1)
    with pytest.raises(PrerequisiteError, match="engine"):
        get_model(f"delib/{checkpoint}", memoize=False, engine="steam")
    with pytest.raises(PrerequisiteError, match="no such model"):
        get_model("delib/./nothing", memoize=False)
    model = get_model(f"delib/{checkpoint}", memoize=False)
    from inspect_ai.model import GenerateConfig

    with pytest.raises(PrerequisiteError, match="take no top_p"):
        asyncio.run(model.generate("Hi", config=GenerateConfig(top_p=0.5)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --suite NAME or --prompts FILE"),
        (["--suite", "xstest", "--prompts", "x"], "either --suite NAME or --prompts FILE"),
        (["--prompts", "x", "--judge", "probe"], "--judge, -T and --budgets are a suite's"),
        (["--suite", "songs"], "no such suite; one of challenging_refusal"),
        (["--suite", "bbq", "-T", "speed=1"], "bbq has no such option; it has data, max_tokens, solver"),
        (["--suite", "policy"], "needs -T prompts="),
        (["--suite", "xstest", "-T", "data=none.csv"], "none.csv: no such file"),
    ],
)
def test_mistakes_on_the_command_line(words, message, monkeypatch, capsys):
    from delib import cli

    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(sys, "argv", ["delib", "eval", "--model", "openai-api/mock/m", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
