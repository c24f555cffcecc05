"""What a rerun makes anew is told beforehand, and is what it makes: calls are counted at the endpoint."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import scripted
from conftest import SPEC, RunningEndpoint, write_rows
from delib import calls_left, changes, cli, opener, pipeline, recipe
from delib.errors import UserError
from delib.records import Prompt, Sample
from delib.run import RECORDS, key_of

NAMES = ("fraud", "investment", "loans", "cards", "identity", "disputes", "taxes")
WORDS = ("amber", "birch", "cedar", "delta")
CLAUSE = ("No help with fraud, and no excuse.", "No help with fraud, however it is framed.")
SUMMARY = ("All about cards.", "All about cards and PINs.")
MODEL = "openai-api/mock/m"
PROMPTS, SAMPLES, RUNS = 28, 2, 2
WHOLE = {"generate": (PROMPTS * SAMPLES, 0), "filter": (PROMPTS * SAMPLES * RUNS, 0)}


def policy():
    """A spec of seven categories with two clauses each."""
    parts = [SPEC.split("## Category")[0]]
    for letter, name in zip("ABCDEFH", NAMES, strict=True):
        parts.append(
            f"## Category: {name}\nSummary: All about {name}.\n\n"
            f"### {letter}1 (refuse, plain-no): Misuse\nNo help with {name}, and no excuse. Why: it hurts.\n\n"
            f"### {letter}2 (comply): Help\nPlain questions on {name} are answered. Why: people need it.\n\n"
        )
    return "".join(parts)


class Made:
    """A run to filter with a live teacher and judge, four prompts a category, and the endpoint that counted."""

    def __init__(self, folder: Path, server: RunningEndpoint) -> None:
        self.folder, self.server = folder, server

    def start(self, run: Path, *overrides: str, spec: str = "spec.md") -> pipeline.Pipeline:
        return pipeline.start_run(recipe.load(self.folder / "recipe.yaml", [f"spec={spec}", *overrides]), run)

    def edited(self, old: str, new: str) -> str:
        text = (self.folder / "spec.md").read_text()
        assert text.count(old) == 1
        (self.folder / "edited.md").write_text(text.replace(old, new))
        return "edited.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    (folder / "spec.md").write_text(policy())
    rows = []
    for letter, name in zip("ABCDEFH", NAMES, strict=True):
        for number, word in enumerate(WORDS):
            text = f"{word * 3} {letter} {name}: {word[::-1]} {number * 977 + ord(letter)}?"
            labels = {"clause": f"{letter}{1 + number % 2}", "behaviour": ("refuse", "comply")[number % 2]}
            messages = [{"role": "user", "content": text}]
            rows.append({"id": f"{name}-{number}", "messages": messages, "category": name, **labels})
    held = {"id": "held", "messages": [{"role": "user", "content": "Something quite apart."}], "behaviour": "comply"}
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "fewer.jsonl", rows[:-1])
    write_rows(folder / "bare.jsonl", [rows[0] | {"clause": None, "behaviour": None}, *rows[1:]])
    write_rows(folder / "heldout.jsonl", [held])
    (folder / "recipe.yaml").write_text(
        f"""
name: bank
judge: {MODEL}
prompts: {{train: train.jsonl, heldout: heldout.jsonl}}
generate: {{teacher: {MODEL}, samples: {SAMPLES}, max_tokens: 64}}
filter: {{runs: {RUNS}, threshold: 0.0}}
"""
    )
    log = folder / "calls.jsonl"
    script = Path(__file__).parent.parent / "benchmarks" / "endpoint.py"
    process = subprocess.Popen([sys.executable, str(script), "--log", str(log)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["base_url"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOCK_BASE_URL", url)
        one = Made(folder, RunningEndpoint(process, url, log))
        first = one.start(folder / "run")
        assert changes.fates(first, "filter")["generate"] == ("generate", "new", [], [])
        assert foreseen(first) == WHOLE
        pipeline.run_to(first, "filter")
        assert 0 < len(one.server.calls()) <= PROMPTS * SAMPLES * (1 + RUNS)
        yield one
    process.kill()
    process.wait()


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run's folder."""
    return shutil.copytree(made.folder / "run", tmp_path / "run")


def foreseen(run, last="filter"):
    """Calls that are left and that are cached, by stage."""
    found = changes.fates(run, last)
    rows = calls_left.of(run, [s for s, f in found.items() if f.what != "kept"], [])
    return {row.stage: (row.left, row.cached) for row in rows}


def test_an_edited_clause_costs_at_most_its_categorys_calls(made, run):
    before = len(made.server.calls())
    ready = made.start(run, spec=made.edited(*CLAUSE))
    told = changes.tell(ready, "filter")
    assert "A1 (fraud): text" in told and "Excerpts that change: 1 of 8 (fraud)." in told
    assert "generate  made anew: the spec changed; after prompts; 8 calls to openai-api/mock/m at most, 48 are" in told
    left = sum(left for left, _ in foreseen(ready).values())
    assert len(made.server.calls()) == before, "telling calls nothing"
    pipeline.run_to(ready, "filter")
    again = len(made.server.calls()) - before
    assert 0 < again <= left <= PROMPTS / 7 * SAMPLES * (1 + RUNS) * 1.05


def test_up_to_generate_the_judge_is_told_of_too(made, run):
    """A live teacher's samples are judged as they come."""
    edited = made.edited("No help with loans, and no excuse.", "No help with loans, however it is framed.")
    before, ready = len(made.server.calls()), made.start(run, spec=edited)
    both = PROMPTS // 7 * SAMPLES * (1 + RUNS)
    whole = PROMPTS * SAMPLES * (1 + RUNS)
    assert foreseen(ready, "generate")["generate"] == (both, whole - both)
    assert f"after prompts; {both} calls to {MODEL} at most, {whole - both} are" in changes.tell(ready, "generate")
    pipeline.run_to(ready, "generate")
    assert PROMPTS // 7 * SAMPLES < len(made.server.calls()) - before <= both


def test_a_changed_summary_reaches_every_excerpt(made, run):
    ready = made.start(run, spec=made.edited(*SUMMARY))
    told = changes.tell(ready, "filter")
    assert "Every excerpt changes, since these stand in all: the categories' names, summaries or order." in told
    assert foreseen(ready) == WHOLE


def test_reasons_are_the_keys_and_inputs_that_count(made, run):
    assert changes.tell(made.start(run), "filter").count("done already") == 3
    threshold = ["filter.threshold 0.0 → 0.4"]
    ready = made.start(run, "filter.threshold=0.4", "report.samples=1", "limits.concurrency=3")
    found = changes.fates(ready, "filter")
    assert found["generate"].what == "kept" and found["filter"] == ("filter", "anew", threshold, [])
    assert "no call to openai-api/mock/m, all 112 are cached" in changes.tell(ready, "filter")
    ready = made.start(run, "filter.threshold=0.4")
    assert changes.fates(ready, "filter")["filter"].why == threshold, "begun again before it was made"

    ready = made.start(run, "prompts.train=fewer.jsonl")
    found = changes.fates(ready, "filter")
    assert found["prompts"].why[1:] == ["train"] and found["generate"].after == ["prompts"]
    told = changes.tell(ready, "filter")
    assert "fewer.jsonl; the training prompts changed" in told
    assert "generate  made anew, unless prompts comes out the same; no call" in told


def test_unfinished_and_spoilt_stages_and_runs_of_earlier_versions(made, run):
    ready = made.start(run)
    (run / "filter" / "manifest.json").unlink()
    assert changes.fates(ready, "filter")["filter"] == ("filter", "goes on", ["it was not finished"], [])
    shutil.rmtree(run / "filter")
    assert changes.fates(ready, "filter")["filter"].what == "new"
    manifest = json.loads((run / "prompts" / "manifest.json").read_text())
    (run / "prompts" / "manifest.json").write_text(json.dumps(manifest | {"outputs": {}}))
    assert changes.fates(ready, "generate")["generate"].why == ["prompts was made again since"]
    (run / "prompts" / "manifest.json").write_text(json.dumps(manifest))
    with (run / "generate" / RECORDS).open("a") as handle:
        handle.write("\n")
    assert changes.fates(ready, "generate")["generate"].why == ["its files are not as they were written"]

    edited = recipe.load(made.folder / "recipe.yaml", [f"spec={made.edited(*CLAUSE)}"])
    for name in (".", "prompts", "generate"):
        (run / name / "spec.md").unlink()
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("/spec.md", "/edited.md"))
    assert "its earlier text was not kept" in changes.foretold(edited, run)
    assert not (run / "spec.md").exists(), "telling writes nothing"
    manifest = run / "prompts" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"recipe": "of another version"}))
    assert changes.fates(ready, "prompts")["prompts"].why == [changes.OTHER]


def test_a_run_whose_recipe_this_version_can_not_read_is_told_of_all_the_same(made, run):
    for folder in (run, run / "prompts", run / "generate", run / "filter"):
        (folder / "recipe.yaml").write_text("gone: 1\n")
    loaded = recipe.load(made.folder / "recipe.yaml", ["spec=spec.md", "filter.threshold=0.4"])
    assert f"filter    made anew: {changes.OTHER}" in changes.foretold(loaded, run)


def test_blind_labels_that_are_gone_make_a_stage_anew(made, run):
    ready = made.start(run)
    manifest = ready.folder("filter").manifest()
    more = manifest.model_copy(update={"inputs": manifest.inputs | {"labels": "l"}})
    key = key_of(*ready.basis("filter"), more.inputs)
    (run / "filter" / "manifest.json").write_text(more.model_copy(update={"recipe": key}).model_dump_json())
    assert changes.fates(ready, "filter")["filter"] == ("filter", "anew", ["labels"], [])


def test_a_spec_that_is_not_the_runs_is_not_overwritten(made, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "spec.md").write_text("# A draft\n")
    with pytest.raises(UserError, match=r"spec.md: another spec than the recipe's.* name another --out"):
        made.start(folder)
    assert [p.name for p in folder.iterdir()] == ["spec.md"] and (folder / "spec.md").read_text() == "# A draft\n"
    (folder / "spec.md").write_text(policy())
    pipeline.run_to(made.start(folder), "prompts")
    edited = made.start(folder, spec=made.edited(*CLAUSE))
    assert CLAUSE[1] not in (folder / "spec.md").read_text(), "nothing has begun yet"
    pipeline.run_to(edited, "prompts")
    assert CLAUSE[1] in (folder / "spec.md").read_text(), "the run's own copy follows"


def test_a_stage_by_hand_goes_by_the_policy_that_the_run_was_started_with(made, run):
    file = made.folder / "spec.md"
    text, finished = file.read_text(), (run / "filter" / "manifest.json").read_text()
    file.write_text(text.replace(*CLAUSE))
    try:
        opened = pipeline.open_run(run)
        opened.execute("filter")
        assert (run / "filter" / "manifest.json").read_text() == finished and CLAUSE[0] in opened.spec_path.read_text()
        pipeline.run_to(made.start(run), "prompts")
        assert CLAUSE[1] in pipeline.open_run(run).spec_path.read_text(), "a new start takes the edited file"
        (checkpoint := run / "sft" / "checkpoint").mkdir(parents=True)
        assert opener.recipe_of(str(checkpoint)).spec == str(run / "spec.md"), "and so does chat with a model of it"
        assert opener.recipe_of(str(checkpoint), [f"spec={file}"]).spec == str(file)
    finally:
        file.write_text(text)


def test_a_run_without_the_stages_own_copies_is_told_by_its_last_start(made, run):
    for stage in ("prompts", "generate", "filter"):
        (run / stage / "recipe.yaml").unlink()
    ready = made.start(run, "filter.threshold=0.4")
    assert changes.fates(ready, "filter")["filter"].why == ["filter.threshold 0.0 → 0.4"]


def test_calls_for_labels_are_at_most_what_is_told(made, tmp_path):
    def start(*more):
        return made.start(tmp_path / "run", "prompts.train=bare.jsonl", f"prompts.labeller={MODEL}", *more)

    ready, before = start(), len(made.server.calls())
    left, cached = foreseen(ready, "prompts")["prompts"]
    assert (left, cached) == (4, 0), "two prompts have no label, each of a category and a clause"
    assert foreseen(ready)["generate"] == (SAMPLES, (PROMPTS - 1) * SAMPLES), "the one without a label may come on top"
    pipeline.run_to(ready, "prompts")
    assert len(made.server.calls()) > before
    assert foreseen(start("prompts.near_duplicates=0.9"), "prompts")["prompts"][0] == 0


def test_run_and_check_say_it(made, run):
    words = [str(made.folder / "recipe.yaml"), "--set", f"spec={made.edited(*CLAUSE)}"]
    done = CliRunner().invoke(cli.app, ["check", *words, "--run", str(run)])
    assert "filter    made anew: the spec changed; after generate;" in done.output and "A1 (fraud): text" in done.output
    done = CliRunner().invoke(cli.app, ["run", *words, "--out", str(run), "--to", "prompts"])
    assert done.exit_code == 0
    assert "no recipe.yaml here" in str(CliRunner().invoke(cli.app, ["check", *words, "--run", "nowhere"]).exception)


def test_verdicts_on_answers_that_stand_are_looked_up(made, run):
    ready = made.start(run)
    kept = next(s for s in ready.folder("generate").records(Sample) if s.completion)
    held = next(p for p in ready.run.finished("prompts", Prompt) if p.split == "heldout")
    ready.run.stage("evaluate/base").path.mkdir(parents=True)
    ready.run.stage("evaluate/base").replace([kept.model_copy(update={"prompt": held})])
    stages = ["rl", "evaluate", "report"]

    def left():
        return {row.stage: row[2:] for row in calls_left.of(ready, stages, ["base"])}

    section = ready.recipe.rl
    writes = section.steps * section.prompts * section.group
    assert left() == {"rl": (writes, None), "evaluate": (4, 0), "report": (pipeline.ASKED, 0)}

    async def judge():
        async with ready.opener.judge(MODEL) as asked:
            await asked.grade(held, kept.completion, "answer", 1)

    asyncio.run(judge())
    assert left()["evaluate"] == (3, 1), "base has its verdict; the other arms will write new answers"


def test_of_a_model_that_runs_here_the_most_is_told(made, run):
    rows = calls_left.of(made.start(run, "judge=smollm2", "filter.runs=1"), ["generate", "filter"], [])
    assert rows == [
        ("generate", MODEL, 0, PROMPTS * SAMPLES),
        ("filter", "smollm2", PROMPTS * SAMPLES, None),
    ]
    assert calls_left.told(rows[1]) == "56 calls to smollm2 at most"
    rows = calls_left.of(made.start(run, "generate.teacher=smollm2"), ["generate", "filter"], [])
    assert rows == [
        ("generate", "smollm2", PROMPTS * SAMPLES, None),
        ("filter", MODEL, PROMPTS * SAMPLES * RUNS, None),
    ]


def test_an_edit_that_changes_no_example_trains_nothing_anew_by_sft(recipe_file, monkeypatch):
    scripted.install(monkeypatch.setitem, monkeypatch.setattr)
    out = recipe_file.parent / "out"
    pipeline.run_to(pipeline.start_run(recipe.load(recipe_file, ["sft.epochs=1"]), out), "sft")
    trained = (out / "sft" / "manifest.json").stat().st_mtime_ns
    (recipe_file.parent / "edited.md").write_text(SPEC.replace("Opening hours, forms", "Opening hours, all forms"))
    edited = pipeline.start_run(recipe.load(recipe_file, ["sft.epochs=1", "spec=edited.md"]), out)
    found = changes.fates(edited, "rl")
    assert found["distill"].why == ["spec"] and found["sft"] == ("sft", "anew", [], ["distill"])
    assert "sft       made anew, unless distill comes out the same" in changes.tell(edited, "sft")
    assert [name for name in ("sft", "cold_start", "rl") if "spec" in edited.own_inputs(name)] == ["cold_start", "rl"]
    pipeline.run_to(edited, "sft")
    assert (out / "sft" / "manifest.json").stat().st_mtime_ns == trained

    manifest = edited.folder("sft").manifest()
    counted = manifest.model_copy(update={"inputs": manifest.inputs | {"spec": "of before"}})
    key = key_of(*edited.basis("sft"), counted.inputs)
    (out / "sft" / "manifest.json").write_text(counted.model_copy(update={"recipe": key}).model_dump_json())
    assert changes.fates(edited, "sft")["sft"].why == [changes.OTHER]
