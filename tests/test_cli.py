"""The command line as a process: exit codes, one clear error, no traceback, and quick help."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROWS, prompt_row, write_rows


def delib(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from delib.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_answers_at_once():
    delib("--help")
    started = time.monotonic()
    done = delib("--help")
    assert done.returncode == 0
    assert "judge-check" in done.stdout
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import delib.cli"], capture_output=True, text=True, check=True
        ).stderr
    ), f"help took {time.monotonic() - started:.1f} s"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["spec", "check", "none.md"], 2, "none.md: no such file"),
        (["run", "none.yaml"], 2, "none.yaml: no such file"),
        (["run", "--to", "everything"], 2, "no such stage"),
        (["filter", "--run", "nowhere"], 2, "no recipe.yaml here"),
        (["show", "nowhere", "x"], 2, "not finished"),
        (["check", "recipe.yaml", "--set", "sft.speed=1"], 2, "sft.speed: no such key"),
        (["eval", "--model", "./nothing", "--prompts", "heldout.jsonl"], 2, "error:"),
        (["frobnicate"], 2, "No such command"),
        (["judge-check", "--judge", "oracle", "--data", "x"], 2, "no such judge"),
    ],
)
def test_mistakes_exit_with_2_and_one_clear_message(recipe_file, words, code, message):
    done = delib(*words, cwd=recipe_file.parent)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sound_recipe_is_said_sound_and_a_broken_one_tells_all(recipe_file):
    assert delib("check", recipe_file).returncode == 0
    (recipe_file.parent / "spec.md").write_text("# Empty\n", encoding="utf-8")
    (recipe_file.parent / "demos.jsonl").write_text('{"prompt_id": "x"}\n', encoding="utf-8")
    (recipe_file.parent / "heldout.jsonl").write_bytes(b"\xff\xfe")
    (recipe_file.parent / "train.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "Hello."}], "behaviour": "comply"}\n', encoding="utf-8"
    )
    done = delib("check", recipe_file)
    assert done.returncode == 2
    assert "no clauses" in done.stderr
    assert "demos.jsonl:1: text" in done.stderr
    assert "heldout.jsonl: not UTF-8" in done.stderr
    assert "train.jsonl:1: ends on a turn of assistant" in done.stderr


def test_the_record_stages_and_show(recipe_file):
    folder = recipe_file.parent
    done = delib("run", recipe_file, "--out", "out", "--to", "generate", cwd=folder)
    assert done.returncode == 0, done.stderr
    shown = delib("show", "out", "pick", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "This never ends" in shown.stdout
    assert "marked fault: malformed" in shown.stdout
    lost = delib("show", "out", "pic", cwd=folder)
    assert lost.returncode == 2
    assert "near it: pick" in lost.stderr
    manifest = json.loads((folder / "out" / "generate" / "manifest.json").read_text())
    assert manifest["counts"] == {"in": 6, "out": 7, "failed": 0}
    (folder / "out" / "generate" / "trainer").mkdir()
    again = delib("run", recipe_file, "--out", "out", "--to", "generate", cwd=folder)
    assert not (folder / "out" / "generate" / "trainer").exists(), "a kill left it beside a manifest that stands"
    assert "generate: done already" in again.stderr


def test_prompts_check(pack):
    held = [prompt_row(*row) for row in ROWS]
    held[0]["messages"][0]["content"] = "I wonder: which share will double by May?"
    train = write_rows(
        pack / "train.jsonl", [prompt_row(*ROWS[0]), prompt_row("again", *ROWS[0][1:]), prompt_row(*ROWS[3])]
    )
    spec, apart = pack / "spec.md", write_rows(pack / "apart.jsonl", held[:1])
    bad = delib("prompts", "check", train, "--spec", spec, "--against", apart)
    assert bad.returncode == 2
    assert "again is the same conversation as pick" in bad.stderr
    assert "pick is too near to pick of" in bad.stderr and "TF-IDF cosine" in bad.stderr
    write_rows(pack / "train.jsonl", [prompt_row(*ROWS[3]) | {"clause": None, "behaviour": None}])
    assert "1 prompts name neither" in delib("prompts", "check", train, "--spec", spec).stdout
    write_rows(pack / "train.jsonl", [prompt_row(*ROWS[3])])
    good = delib("prompts", "check", train, "--spec", spec)
    assert good.returncode == 0, good.stderr
    assert "fraud: nothing to comply with" in good.stdout
    assert "no prompt is decided by K1, K2, K3, F2" in good.stdout
    nothing = delib("prompts")
    assert nothing.returncode == 2 and "--run" in nothing.stderr


def test_compare_reads_what_eval_wrote(tmp_path):
    def rows(values):
        found = [
            {"prompt": f"p{i}", "source": f"s{i % 2}", "group": f"p{i}", "figures": {"not_unsafe": v}}
            for i, v in enumerate(values)
        ]
        return json.dumps({"metrics": [], "rows": found})

    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(rows([0.0] * 30 + [None]))
    two.write_text(rows([1.0] * 20 + [0.0] * 10 + [1.0]))
    found = delib("compare", one, two)
    assert found.returncode == 0, found.stderr
    line = next(x for x in found.stdout.splitlines() if x.startswith("not_unsafe"))
    assert "not_unsafe (s1)" in found.stdout
    assert "0.000" in line and "0.667" in line and "+0.667" in line and "*" in line and line.endswith(" 30, 1 ungraded")
    one.write_text("{}")
    assert delib("compare", one, two).returncode == 2
    assert "RUN:ARM" in delib("compare", "runs", two).stderr


def test_shipped_recipes_are_sound_by_name(tmp_path):
    for name in ("quickstart", "small"):
        done = delib("check", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert delib("check", "smal", cwd=tmp_path).returncode == 2
