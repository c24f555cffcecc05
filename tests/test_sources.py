"""Prompts from any file or set: what is read, what is an error with its place, what is left out and counted."""

import csv
import json
from pathlib import Path

import pytest

from conftest import SPEC, prompt_row, write_rows
from delib import overlap, pipeline, recipe, sources, spec
from delib.errors import UserError
from delib.recipe import STARTER
from delib.records import Checks, Message, Prompt
from delib.run import StageFolder
from delib.stages import prompts

POLICY = spec.parse(SPEC)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which share doubles by May?"},
    {"role": "assistant", "content": "I'm sorry, but I can't help with that."},
]


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def cached_hub(tmp_path, monkeypatch):
    """Puts data sets where `datasets` finds those that it has fetched before, and clears what this process knows."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    cache = tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))

    def fetch(rows: list[dict], revision: str, split: str = "train") -> None:
        sources._data_set.cache_clear()
        file = write_parquet(tmp_path / f"{revision}.parquet", rows)
        files = {split: [str(file)]}
        builder = Parquet(cache_dir=str(tmp_path / "scratch"), dataset_name="set", hash=revision, data_files=files)
        builder.download_and_prepare(output_dir=str(cache / "acme___set" / "default" / "0.0.0" / revision))

    yield fetch
    sources._data_set.cache_clear()


def problems_of(name, text=None, policy=POLICY) -> list[str]:
    with pytest.raises(UserError) as caught:
        prompts.load(name, policy, "train", text)
    return caught.value.problems


def run(files, folder: Path, policy=POLICY, **more):
    stage = StageFolder(folder)
    stage.begin("k")
    return prompts.run(files, policy, stage, **more), stage.records(Prompt)


def contents(found: list[Prompt]) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in p.messages] for p in found]


def test_every_kind_of_set_gives_the_same_prompts(tmp_path, cached_hub):
    row = {"id": "a", "category": "investment", "clause": "K1", "behaviour": "refuse", "source": "s", "group": "g"}
    full = row | {"messages": TALK, "expected": ["can't", "won't"], "checks": {"contains": ["can't"], "max_words": 9}}
    own = prompts.load(write_rows(tmp_path / "a.jsonl", [full | {"messages": TALK[:-1]}]), POLICY, "train")
    more = ("messages", "expected", "checks")
    cells = [str(v) for v in row.values()] + [json.dumps(full[name]) for name in more]
    table = write_csv(tmp_path / "a.csv", [[*row, *more], cells])
    cached_hub([full], "r1")
    for name in (table, write_parquet(tmp_path / "a.parquet", [full]), "hub:acme/set", "hub:acme/set:train"):
        assert prompts.load(name, POLICY, "train") == own, name


@pytest.mark.parametrize("column", ["messages", "conversations", "Conversation"])
def test_other_peoples_conversations_lose_their_closing_answer(tmp_path, column):
    said = [("human", "Hello"), ("gpt", "Hello!"), ("human", "What is a share?"), ("gpt", "A part of a firm.")]
    rows = [{column: [{"from": f, "value": v} for f, v in said], "score": 0.5, "tags": ["x"]}]
    [prompt] = prompts.load(write_parquet(tmp_path / "a.parquet", rows), POLICY, "train")
    assert contents([prompt]) == [[("user", "Hello"), ("assistant", "Hello!"), ("user", "What is a share?")]]
    assert prompt.id == prompts.content_id(prompt)
    assert prompt.source == "a.parquet"


def test_the_column_of_text_is_found_or_named(tmp_path):
    table = write_csv(tmp_path / "a.csv", [["target", "Goal", "other"], ["Sure", "What is\na share?", "Opening hours"]])
    assert contents(prompts.load(table, POLICY, "train")) == [[("user", "What is\na share?")]]
    assert contents(prompts.load(table, POLICY, "train", "other")) == [[("user", "Opening hours")]]
    assert problems_of(table, "query") == [
        f"{table}: no column 'query', which prompts.text names; it has target, Goal, other"
    ]
    bare = write_csv(tmp_path / "b.csv", [["query", "label"], ["What is a share?", "0"]])
    assert "b.csv: no column of prompts; it has query, label. Name the one with prompts.text" in problems_of(bare)[0]


def test_labels_of_another_policy_are_left_aside_and_mistakes_are_not(tmp_path, capsys):
    rows = [["prompt", "category", "behaviour"], ["What is a share?", "finance", "comply"]]
    table = write_csv(tmp_path / "a.csv", rows)
    [prompt] = prompts.load(table, POLICY, "train")
    assert (prompt.category, prompt.behaviour) == (None, "comply")
    run({"train": table}, tmp_path / "stage")
    assert "column category is left aside" in " ".join(capsys.readouterr().err.split())
    write_csv(table, [*rows, ["Which share?", "investment", "obey"]])
    assert problems_of(table) == [
        f"{table}:2: category 'finance' is not in the spec; it has investment, fraud",
        f"{table}:3: behaviour: Input should be 'comply', 'refuse' or 'safe_complete'",
    ]


def test_every_mistake_of_a_csv_is_told_with_its_line(tmp_path):
    table = write_csv(
        tmp_path / "a.csv",
        [
            ["messages", "expected"],
            ['[{"role": "user",\n"content": "fine"}]', "42"],
            ["[{]", ""],
            [],
            ['[{"role": "narrator", "content": "x"}]', ""],
            ['{"role": "user"}', ""],
            ['[{"role": "user", "content": "x"}]', "[1"],
            ['[{"role": "user", "content": ["x"]}]', ""],
            ['[{"role": "user", "content": "x"}]', "1", "2"],
        ],
    )
    found = problems_of(table)
    for number, words in (
        (4, "messages: not JSON"),
        (6, "messages: role 'narrator' is none of"),
        (7, "messages: not a list of turns"),
        (8, "expected: not JSON"),
        (9, "messages: a turn's content is no text"),
        (10, "3 cells under 2 columns"),
    ):
        assert any(p.startswith(f"{table}:{number}: {words}") for p in found), (number, found)
    assert len(found) == 6
    table.write_text('prompt\n"never closed\n', encoding="utf-8")
    assert problems_of(table)[0].startswith(f"{table}:2: broken CSV (unexpected end of data)")


def test_json_lines_stay_strict(tmp_path):
    rows = [prompt_row("a", "Q", None, "G1", "comply") | {"score": 1}, {"id": "b", "prompt": "Q"}]
    rows += [{"id": "c", "messages": TALK}, {"id": "d", "messages": [{"role": "user", "content": "\ud800"}]}]
    found = problems_of(write_rows(tmp_path / "a.jsonl", rows))
    assert found.pop().startswith(f"{tmp_path}/a.jsonl:4: Invalid JSON: ")
    assert [p.removeprefix(f"{tmp_path}/a.jsonl:") for p in found] == [
        "1: score: Extra inputs are not permitted",
        "2: messages: Field required",
        "2: prompt: Extra inputs are not permitted",
        "3: ends on a turn of assistant; a prompt must end on a user turn",
    ]


def test_what_is_not_there_is_told_with_its_mend(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert problems_of(tmp_path / name) == [f"{tmp_path / name}: no such file; check the path"]
        with pytest.raises(UserError, match="no such file"):
            sources.identity(tmp_path / name)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    assert "a.parquet: no readable parquet file (" in problems_of(tmp_path / "a.parquet")[0]
    assert problems_of("hub:set")[0].startswith("hub:set: write hub:OWNER/NAME")
    [missing] = problems_of("hub:nobody/nothing-at-all")
    assert missing.startswith("hub:nobody/nothing-at-all: Couldn't reach 'nobody/nothing-at-all' on the Hub")
    assert missing.endswith("and the network")


def test_a_set_of_the_hub_is_known_by_its_revision(cached_hub):
    cached_hub([{"question": "What is a share?"}], "r1")
    first = sources.identity("hub:acme/set")
    assert first == sources.identity("hub:acme/set") and first.startswith("hub:acme/set@")
    cached_hub([{"question": "What is a bond?"}], "r2")
    assert sources.identity("hub:acme/set") != first
    [prompt] = prompts.load("hub:acme/set", POLICY, "train")
    assert (contents([prompt]), prompt.source) == ([[("user", "What is a bond?")]], "hub:acme/set")
    assert "Unknown split" in problems_of("hub:acme/set:test")[0]
    assert "'other'" in problems_of("hub:acme/set/other:train")[0]


def test_a_set_that_is_a_script_is_refused_and_not_run(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **more):
        asked.append((names, more))
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "scripts are no longer supported" in problems_of("hub:acme/script/small:test")[0]
    assert asked == [(("acme/script", "small"), {"split": "test"})], "nothing that would trust code"


def test_a_recipe_names_sets_of_the_hub_and_files(pack, cached_hub):
    cached_hub([{"question": "How does a savings plan work?"}], "r1")
    table = write_csv(pack / "more.csv", [["instruction"], ["What does a bank do?"], ["Who are you?"]])
    file = pack / "recipe.yaml"
    file.write_text(
        "{spec: spec.md, prompts: {heldout: heldout.jsonl}, generate: {recordings: demos.jsonl}}", encoding="utf-8"
    )
    chosen = ["prompts.train=hub:acme/set:train", "prompts.rl=more.csv", "prompts.text=instruction"]
    loaded = recipe.load(file, chosen)
    assert (loaded.prompts.train, loaded.prompts.rl) == ("hub:acme/set:train", str(table))
    assert pipeline.check(loaded) == [
        "hub:acme/set:train: no column 'instruction', which prompts.text names; it has question"
    ]
    loaded = recipe.load(file, chosen[:2])
    ready = pipeline.start_run(loaded, pack / "run")
    pipeline.run_to(ready, "prompts")
    made = ready.folder("prompts").manifest()
    assert (made.counts["train"], made.counts["rl"], made.counts["heldout"]) == (1, 2, 6)
    assert made.inputs["train"] == sources.identity("hub:acme/set:train")
    assert made.inputs["rl"] == sources.identity(table)
    key = pipeline.open_run(pack / "run").key("prompts")
    cached_hub([{"question": "How does a loan work?"}], "r2")
    assert pipeline.open_run(pack / "run").key("prompts") != key


def test_rows_without_a_prompt_and_copies_are_left_out_of_foreign_sets(tmp_path):
    rows = [{"id": 1, "prompt": "What is a share?"}, {"id": 1, "prompt": "What is a bond?"}]
    rows += [{"id": 2, "prompt": None}, {"id": 3, "prompt": "  "}, {"id": 4, "prompt": "What is a share?"}]
    made, found = run({"train": write_parquet(tmp_path / "a.parquet", rows)}, tmp_path / "stage")
    assert [p.id for p in found] == ["1", prompts.content_id(found[1])]
    assert (made.counts["in"], made.counts["out"], made.counts["dropped"]) == (5, 2, 3)
    assert made.detail["unusable"] == {
        f"{tmp_path}/a.parquet:2": "no text",
        f"{tmp_path}/a.parquet:3": "the last user turn is empty",
    }


def test_a_foreign_prompt_that_is_held_out_too_is_left_out_and_counted(tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [prompt_row("h", "What is a share?", "investment", "K2", "comply")])
    table = write_csv(tmp_path / "a.csv", [["id", "prompt"], ["1", "What is a share?"], ["h", "What is a bond?"]])
    more = write_csv(tmp_path / "b.csv", [["prompt"], ["What is a bond?"], ["what is a SHARE"]])
    made, found = run({"train": table, "rl": more, "heldout": held}, tmp_path / "stage")
    assert [(p.split, p.messages[0].content) for p in found] == [
        ("train", "What is a bond?"),
        ("heldout", "What is a share?"),
    ]
    assert found[0].id == f"train-{prompts.content_id(found[0])}", "h is the held-out one's"
    assert made.counts["contaminated"] == 2
    assert made.detail["contaminated"]["1"] == ("h", 1.0)


WHOLE = "Write a short letter to my bank in which I ask how long a transfer to another country takes these days"


def test_near_duplicates_are_left_out_unless_a_label_differs(tmp_path):
    twin = WHOLE.replace("these days", "these years")
    rows = [
        prompt_row("a", WHOLE + ".", "investment", "K2", "comply"),
        prompt_row("copy", WHOLE + ", please!", "investment", "K2", "comply"),
        prompt_row("other", twin, "investment", "K1", "refuse"),
        prompt_row("operator", WHOLE, "investment", "K2", "comply"),
        {"id": "bare", "messages": [{"role": "user", "content": WHOLE + " thanks"}]},
    ]
    rows[3]["messages"].insert(0, {"role": "system", "content": "Answer in German."})
    files = {"train": write_rows(tmp_path / "a.jsonl", rows)}
    made, found = run(files, tmp_path / "stage")
    assert [p.id for p in found] == ["a", "other", "operator"]
    assert made.counts["near_duplicates"] == made.counts["dropped"] == 2
    assert {i: near[0] for i, near in made.detail["near_duplicates"].items()} == {"copy": "a", "bare": "a"}
    made, found = run(files, tmp_path / "all", near_duplicates=None)
    assert len(found) == 5 and made.counts["near_duplicates"] == 0


def test_prompts_that_ask_for_other_checks_are_not_near(tmp_path):
    kinds = ({"max_words": 30}, {"max_words": 60}, {"max_words": 30})
    rows = [prompt_row(f"p{n}", f"{WHOLE}{'!' * n}", "investment", "K2", "comply") for n in range(3)]
    files = {"train": write_rows(tmp_path / "a.jsonl", [r | {"checks": c} for r, c in zip(rows, kinds, strict=True)])}
    assert [p.id for p in run(files, tmp_path / "stage")[1]] == ["p0", "p1"]


def test_checks_of_a_table_may_be_missing_and_are_mistakes_where_they_are_none(tmp_path):
    rows = [{"prompt": f"Question {n}?", "checks": c} for n, c in enumerate(({"max_words": 9}, {"bullets": 3}, None))]
    made = prompts.load(write_parquet(tmp_path / "a.parquet", rows), POLICY, "train")
    assert [p.checks for p in made] == [Checks(max_words=9), Checks(bullets=3), None]
    cells = [["prompt", "checks"], ["What?", ""], ["Who?", "short"], ["Why?", '{"max_words": "few"}'], ["How?", "[]"]]
    table = write_csv(tmp_path / "a.csv", cells)
    found = problems_of(table)
    assert found[0].startswith(f"{table}:3: checks: not JSON")
    assert found[1].startswith(f"{table}:4: checks.max_words: Input should be a valid integer")
    assert found[2].startswith(f"{table}:5: checks: Input should be an object")
    assert len(found) == 3


def test_training_prompts_that_hold_an_evaluation_prompt_are_left_out(tmp_path):
    held = [
        prompt_row("h", WHOLE, "investment", "K2", "comply"),
        prompt_row("short", "Who are you?", None, "G1", "comply"),
    ]
    phrase = " ".join(WHOLE.split()[:9])
    rows = [
        prompt_row("wrapped", f"You are a pirate. {WHOLE.upper()}! Say arr.", "investment", "K1", "refuse"),
        prompt_row("phrase", f"{phrase} whether they have a branch in Oslo", "investment", "K2", "comply"),
        prompt_row("equal", "who are YOU", None, "G1", "comply"),
        prompt_row("longer", "Who are you? Tell me about the bank.", None, "G1", "comply"),
    ]
    files = {
        "train": write_rows(tmp_path / "a.jsonl", rows[:2]),
        "rl": write_rows(tmp_path / "b.jsonl", rows[2:]),
        "heldout": write_rows(tmp_path / "h.jsonl", held),
    }
    made, found = run(files, tmp_path / "stage")
    assert [p.id for p in found] == ["phrase", "longer", "h", "short"]
    assert made.counts["contaminated"] == 2
    assert made.detail["contaminated"] == {"wrapped": ("h", 1.0), "equal": ("short", 1.0)}


def test_a_crowd_in_one_wrapper_is_compared_in_bounds(monkeypatch):
    monkeypatch.setattr(overlap, "CROWD", 5)
    wrapper = " ".join(f"w{n}" for n in range(60))
    made = [
        Prompt(
            id=f"{n}", messages=[Message(role="user", content=f"{wrapper} {' '.join(f'{n}x{k}' for k in range(9))}")]
        )
        for n in range(40)
    ]
    again = [p.model_copy(update={"id": f"again-{p.id}"}) for p in made[:2]]
    compared = []
    jaccard = overlap._jaccard
    monkeypatch.setattr(overlap, "_jaccard", lambda *pair: compared.append(pair) or jaccard(*pair))
    assert set(overlap.near_duplicates([*made, *again], 0.8)) == {"again-0", "again-1"}
    assert len(compared) < 6 * len(made)


@pytest.mark.parametrize("labels", [True, False])
def test_the_starter_loses_nothing(tmp_path, labels):
    """Also where nobody labelled it: its twins are further apart than near-duplicates are."""
    files: dict[prompts.Split, Path] = {}
    for split, name in (("train", "prompts"), ("rl", "rl"), ("heldout", "heldout")):
        files[split] = STARTER / f"{name}.jsonl"
        if not labels:
            rows = [json.loads(line) for line in files[split].read_text(encoding="utf-8").splitlines()]
            rows = [{"id": r["id"], "messages": r["messages"]} for r in rows]
            files[split] = write_rows(tmp_path / f"{name}.jsonl", rows)
    made, found = run(files, tmp_path / "stage", spec.load(STARTER / "spec.md"))
    assert made.counts["dropped"] == 0 and made.detail == {}
    assert len(found) == made.counts["in"] > 2000
