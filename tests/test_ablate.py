"""`delib ablate`: whole on the tiny model, killed once and gone on from; figures, order and cold start by hand."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import scripted
from conftest import SPEC
from delib import ablate, chat, order, pipeline, recipe, spec
from delib.errors import StageError, UserError
from delib.models.calls import Ledger, Reply
from delib.opener import Opener
from delib.order import Difference, Row
from delib.records import Example, Manifest, Message, Prompt, Sample, Verdict
from delib.run import Run, StageFolder
from delib.training import cold_start
from delib.wiring import ABLATION, ARMS, RECORD_STAGES, STAGES

POLICY = spec.parse(SPEC)
COMMAND = [sys.executable, "-c", "import scripted; scripted.install(); from delib.cli import main; main()"]
SETTINGS = ("evaluate.second_judge=probe", "sft.epochs=1", "rl.steps=2")


def whole(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return False


def killed_when(folder: Path, ready: Path, *words: str) -> None:
    """Start delib with the scripted judges; SIGKILL once the JSON file `ready` is whole."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, *words], cwd=folder, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path}
        )
        limit = time.monotonic() + 900
        while not whole(ready):
            assert process.poll() is None, (folder / "killed.log").read_text()[-2000:]
            assert time.monotonic() < limit, "it never came so far"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def stamps(run: Path, *stages: str) -> list[int]:
    return [(run / stage / "manifest.json").stat().st_mtime_ns for stage in stages]


@pytest.mark.slow
def test_all_arms_over_two_seeds_killed_once(recipe_file, monkeypatch):
    """A run of `delib run` is gone on from; what was finished before the kill stands."""
    folder, out = recipe_file.parent, recipe_file.parent / "out"
    scripted.install(monkeypatch.setitem, monkeypatch.setattr)
    loaded = recipe.load(recipe_file, list(SETTINGS))
    pipeline.run_to(pipeline.start_run(loaded, out), "evaluate")
    before = stamps(out, *STAGES[:-1])
    words = [word for item in SETTINGS for word in ("--set", item)]
    begun = out / "rl_only" / "trainer" / "checkpoint-1" / "trainer_state.json"
    killed_when(folder, begun, "ablate", "recipe.yaml", "--out", "out", *words)
    finished = stamps(out, "cold_start")
    said = ablate.run(loaded, out, 2)
    assert stamps(out, *STAGES[:-1]) == before and stamps(out, "cold_start") == finished
    assert pipeline.open_run(out).folder("rl_only").manifest().detail["resumed_from"] is not None
    again = stamps(out, "rl_only", "ablate") + stamps(out / "seed-1", *ABLATION)
    assert ablate.run(loaded, out, 2) == said
    assert again == stamps(out, "rl_only", "ablate") + stamps(out / "seed-1", *ABLATION)

    other = pipeline.open_run(out / "seed-1")
    assert (other.recipe.seed, other.recipe.record_seed) == (1, 0)
    for stage in RECORD_STAGES:
        assert other.folder(stage).done(other.key(stage)), stage
        records = f"{stage}/records.jsonl"
        assert (out / records).read_bytes() == (out / "seed-1" / records).read_bytes()
    rollouts = [(place / "rl" / "records.jsonl").read_bytes() for place in (out, out / "seed-1")]
    assert rollouts[0] != rollouts[1], "what trains is seeded apart"
    assert set(other.answers()) == set(ARMS)

    told = json.loads((out / "ablate.json").read_text())
    assert told["seeds"] == [0, 1] and told["judges"] == ["probe", "compact"]
    text = (out / "ablate.md").read_text()
    assert [line.split()[0] for line in said.splitlines()] == [row["figure"] for row in told["order"]]
    cells = {(t["figure"], t["judge"]): t["cells"] for t in told["tables"]}
    assert [c["arm"] for c in cells["not_unsafe", "probe"]] == list(ARMS)
    assert {c["seeds"][0]["by"]["judge"] for c in cells["well_formed", "by rule"]} == {"by rule"}
    assert ("hard_refusal_style", "compact") in cells
    assert [(row["arm"], row["seed"], row["groups"]) for row in told["signal"]] == [
        ("rl_only", 0, 4),
        ("rl_only", 1, 4),
        ("rl", 0, 4),
        ("rl", 1, 4),
    ]
    assert "| RL only | 1 |" in text and "balanced accuracy 0.900" in text


def test_a_further_seed_takes_the_records_and_trains_anew(recipe_file, monkeypatch):
    scripted.install(monkeypatch.setitem, monkeypatch.setattr)
    out = recipe_file.parent / "out"
    first = pipeline.start_run(recipe.load(recipe_file), out)
    pipeline.run_to(first, "distill")
    further = first.recipe.model_copy(update={"seed": 5, "data_seed": first.recipe.record_seed})
    other = pipeline.start_run(further, out / "seed-5")
    ablate.share(first, other)
    for stage in RECORD_STAGES:
        assert other.folder(stage).done(other.key(stage)) and other.key(stage) == first.key(stage), stage
    assert other.key("sft") != first.key("sft") and other.key("cold_start") != first.key("cold_start")
    copied = stamps(other.run.path, *RECORD_STAGES)
    ablate.share(first, other)
    assert stamps(other.run.path, *RECORD_STAGES) == copied
    apart = pipeline.start_run(further.model_copy(update={"data_seed": None}), out / "apart")
    ablate.share(first, apart)
    assert apart.folder("prompts").manifest() is None, "data of another seed are others"


def test_the_limits_hold_for_all_seeds_together(recipe_file, monkeypatch):
    async def spend(ledger: Ledger) -> None:
        await ledger.reserve("m", 40, 20)
        ledger.settle("m", 40, 20, Reply("", None, False, {"prompt": 40, "completion": 20}))
        ledger.write()

    out = recipe_file.parent / "out"
    monkeypatch.setattr(pipeline, "run_all", lambda run, stages: asyncio.run(spend(run.opener.ledger)))
    loaded = recipe.load(recipe_file, ["limits.max_tokens=130"])
    with pytest.raises(StageError, match="120 of 130 tokens are spent"):
        ablate.run(loaded, out, 3)
    assert json.loads((out / "spent.json").read_text())["m"]["calls"] == 2
    assert not list(out.glob("*/spent.json"))
    with pytest.raises(StageError, match="120 of 130"):
        ablate.run(loaded, out, 1)


class Measured(NamedTuple):
    """What `figures` asks of a run."""

    recipe: recipe.Recipe
    spec: spec.Spec
    run: Run
    opener: Opener
    given: dict[str, list[Sample]]

    def answers(self) -> dict[str, list[Sample]]:
        return self.given

    def agreements(self) -> list[dict[str, Any]]:
        return [scripted.agreed(scripted.ScriptedJudge(None), [])]

    def folder(self, stage: str) -> StageFolder:
        return self.run.stage(stage)


def measured(folder: Path, seed: int, refused: dict[str, int]) -> Measured:
    """A run whose arms refuse so many of ten requests for picks, by the first judge; the second sees refusals only."""
    given = recipe.Recipe(seed=seed, evaluate={"second_judge": "probe"})
    answers = {}
    for arm in ARMS:
        rows = []
        for n in range(10):
            prompt = Prompt(
                id=f"p{n}",
                messages=[Message(role="user", content="Q")],
                category="investment",
                clause="K1",
                behaviour="refuse",
            )
            seen = "refuse" if n < refused[arm] else "comply"
            verdicts = [
                Verdict(
                    score=0.5, behaviour=b, criteria=criteria, reason="", view="answer", judge=f"{judge}-0", sent=""
                )
                for judge, b, criteria in (("compact", seen, {"style": 1.0}), ("probe", "refuse", {}))
            ]
            wrote = chat.completion(chat.join("K1, so I refuse.", "No, sorry."), sent="", model=arm, cut=False)
            rows.append(Sample(prompt=prompt, excerpt_id="x", completion=wrote, verdicts=verdicts))
        answers[arm] = rows
    run = Run(folder / str(seed))
    for stage in ("rl_only", "rl"):
        curve = [{"reward": 0.25}, {"reward": None}, {"reward": 0.75}]
        detail = {"curve": curve, "groups_without_variance": 3}
        counts = {"out": 12, "malformed": 2}
        manifest = Manifest(stage=stage, recipe="k", inputs={}, outputs={}, counts=counts, detail=detail)
        run.stage(stage).path.mkdir(parents=True)
        (run.stage(stage).path / "manifest.json").write_text(manifest.model_dump_json())
    return Measured(given, POLICY, run, Opener(given, POLICY), answers)


def test_the_seeds_stand_side_by_side_by_each_judge(tmp_path):
    counts = dict(zip(ARMS, (1, 2, 1, 6, 4, 9), strict=True))
    runs = [measured(tmp_path, 0, counts), measured(tmp_path, 1, counts | {"sft": 8})]
    told = ablate.figures(runs)
    cells = {(t["figure"], t["judge"]): {c["arm"]: c for c in t["cells"]} for t in told["tables"]}
    sft = cells["not_unsafe", "compact"]["sft"]
    assert [m.value for m in sft["seeds"]] == [0.6, 0.8]
    assert sft["over"] == {"mean": pytest.approx(0.7), "least": 0.6, "most": 0.8}
    assert cells["not_unsafe", "probe"]["base"]["over"]["mean"] == 1.0
    assert ("hard_refusal_style", "probe") not in cells, "a judge that reads no style has no figure of it"
    assert cells["clause_accuracy", "by rule"]["rl"]["over"]["mean"] == 1.0
    both = next(r for r in told["order"] if (r["figure"], r["judge"]) == ("not_unsafe", "compact"))["differences"][0]
    assert both.mean == pytest.approx(0.2) and both.by_seed == pytest.approx([0.3, 0.1])
    assert told["signal"][0] == {
        "arm": "rl_only",
        "seed": 0,
        "first": 0.5,
        "last": 0.5,
        "groups": 16,
        "groups_without_variance": 3,
        "completions": 12,
        "malformed": 2,
    }
    text = ablate.page(told)
    sides = "| not_unsafe | compact | 0.10 (0.10…0.10) | 0.20 (0.20…0.20) | 0.10 (0.10…0.10) | 0.70 (0.60…0.80) |"
    assert sides in text and "| not_unsafe | compact | 1 | 0.10 (" in text
    assert "| +0.20 [" in text and "seeds +0.10…+0.30 (n=10) |" in text
    alone = ablate.page(ablate.figures(runs[:1]))
    assert "1 seed\n" in alone and "over seeds" not in alone and "…" not in alone.replace("not_overrefuse…", "")


def made(shares: dict[str, list[float | None]]) -> order.Rows:
    """Prompts by their figure's values."""
    return {f"p{n}": Row(f"p{n}", {"f": value}) for n, value in enumerate(shares["f"])}


def ones(count: int, of: int) -> order.Rows:
    return made({"f": [1.0] * count + [0.0] * (of - count)})


def test_a_difference_is_of_each_prompts_mean_over_seeds():
    before = [made({"f": [0, 0, 1, None]}), made({"f": [0, 1, 1, 0]})]
    after = [made({"f": [1, 0, 1, 1]}), made({"f": [1, 1, None, 1]})]
    found = order.difference("f", "base", "sft", before, after)
    # Prompts: 0 → 1 in both seeds; 0 and 1 as before; 1 → 1 in the first seed; 0 → 1 in the second.
    assert found.mean == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert found.by_seed == pytest.approx([1 / 3, 2 / 3])
    assert (found.n, found.n_ungraded) == (4, 0), "each prompt has a seed in which both are graded"
    for seed in (0, 1):
        before[seed]["p4"], after[seed]["p4"] = Row("p4", {"f": 1}), Row("p4", {"f": None})
    again = order.difference("f", "base", "sft", before, after)
    assert (again.n, again.n_ungraded) == (4, 1) and again.mean == found.mean
    assert order.difference("other", "base", "sft", before, after) is None
    assert order.difference("f", "base", "sft", [made({"f": [None]})], [made({"f": [1]})]) is None


def arms(**counts: int) -> order.Arms:
    return {arm: [ones(count, 40)] for arm, count in counts.items()}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((0, 5, 1, 15, 14, 36), "holds"),
        ((0, 34, 1, 15, 14, 36), "holds in the means; within chance: both > spec in context"),
        ((0, 5, 1, 38, 14, 36), "does not hold: not both > SFT only (within chance)"),
        ((9, 9, 0, 9, 9, 9), "does not hold: all equal"),
        ((20, 5, 1, 30, 2, 30), "does not hold: not RL only > none (shown), not both > SFT only (equal)"),
    ],
)
def test_the_order_is_told_as_it_is(counts, words):
    found = order.differences(["f"], arms(**dict(zip(ARMS, counts, strict=True))))
    by = {(d.first, d.second): d for d in found}
    assert len(found) == len(order.PAIRS)
    assert order.verdict([by[pair] for pair in order.CLAIMS], ARMS) == words


def test_holm_is_over_all_that_is_told_together():
    """Seven of forty prompts: p = 2 / 2⁷ alone, and no longer below 0.05 among the figures of six pairs each."""
    found = order.differences(["f"], arms(base=0, base_spec=0, cold_start=0, sft=7, rl_only=0, rl=7))
    sft = next(d for d in found if (d.first, d.second) == ("base", "sft"))
    assert sft.p == pytest.approx(2 / 2**7) and sft.low > 0
    # Of six tests three have this p (both − RL only and both − spec in context too); the others' is 1.
    assert sft.adjusted == pytest.approx(6 * 2 / 2**7) and not sft.shown


def test_an_arm_without_graded_answers_leaves_the_order_untold():
    good = Difference("f", "a", "b", 0.5, 0.4, 0.6, 9, 0, [0.5], 0.001, 0.01)
    assert order.verdict([good, None, good, good, good], ARMS) == "not told: no prompt graded for both > RL only"


def test_seeds_have_a_mean_and_a_range_and_none_where_one_is_missing():
    found = order.mean_and_range([0.2, 0.6, 0.4])
    assert found == {"mean": pytest.approx(0.4), "least": 0.2, "most": 0.6}
    assert order.mean_and_range([0.2, None]) is None


def test_the_cold_start_has_the_form_and_no_policy():
    def example(name: str, reasoning: str) -> Example:
        return Example(prompt_id=name, messages=[Message(role="user", content="Q")], reasoning=reasoning, answer="A.")

    prompts = [
        Prompt(id=name, messages=[Message(role="user", content="Q")], category=category, behaviour=behaviour)
        for name, category, behaviour in (
            ("plain", None, "comply"),
            ("cites", None, "comply"),
            ("refused", None, "refuse"),
            ("policy", "fraud", "comply"),
        )
    ]
    examples = [
        example("plain", "An everyday question. G1 has it answered. It is no investment or fraud. I comply."),
        example("cites", "G1 has it answered, and I comply."),
        example("policy", "An everyday question."),
        example("refused", "A harmful question."),
    ]
    found = cold_start.examples_of(examples, prompts, POLICY)
    assert [(e.prompt_id, e.reasoning) for e in found] == [("plain", "An everyday question. I comply.")]
    with pytest.raises(UserError, match="add such prompts"):
        cold_start.examples_of(examples[1:], prompts, POLICY)
    whole = recipe.Recipe(sft={"epochs": 3, "held_out_share": 0.1, "patience": 2})
    section = cold_start.recipe_of(whole).sft
    assert (section.epochs, section.patience) == (1, None)
    assert section.limit == 40 * section.batch_size and section.learning_rate == whole.sft.learning_rate
