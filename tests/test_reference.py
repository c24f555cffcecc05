"""The recipe's reference, the help, what the shell completes, and the docs' site: each follows from the code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from delib import cli, cli_help, completing, recipe, reference
from delib.errors import UserError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def keys() -> dict[str, reference.Key]:
    return {key.name: key for part in reference.parts() for key in part.keys}


def leaves(data: dict[str, Any], before: str = "") -> set[str]:
    return {
        name
        for key, value in data.items()
        for name in (leaves(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}"})
    }


def test_the_page_is_what_the_code_gives():
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "recipe.py changed: run 'delib recipe --markdown > docs/recipe.md'"


def test_every_key_of_a_recipe_is_told_with_its_default():
    told = keys()
    resolved = recipe.Recipe().model_dump()
    assert leaves(resolved) <= set(told)
    assert all(key.about for key in told.values()), "each field of recipe.py has its docstring"
    for name in leaves(resolved):
        value = resolved
        for part in name.split("."):
            value = value[part]
        assert yaml.safe_load(told[name].default or "") == value, name


def test_types_and_bounds_are_in_words():
    told = keys()
    assert told["sft.epochs"].kind == "whole number, at least 1"
    assert told["distill.plain_share"].kind == "number, at least 0, below 1"
    assert told["rl.cut_off"].kind == "`baseline` or `out`"
    assert told["evaluate.second_judge"].kind == "text or null"
    assert told["sft.lora.targets"].kind == "list of text or null"
    assert told["limits.prices"].kind == "a section for each name"
    assert told["limits.prices.MODEL.prompt"].default is None
    assert told["rl.lora.rank"].default == "16"


def test_the_terminal_shows_all_or_a_section_or_a_key():
    assert all(f"{name}: " in reference.text() for name in keys())
    section = reference.text("sft")
    assert "sft.epochs: whole number, at least 1 [2]" in section and "sft.lora.rank" in section
    assert "rl." not in section and "sft.mix.data: text (required)" in section
    assert reference.text("sft.epochs") == ("sft.epochs: whole number, at least 1 [2]\n    Passes over the examples.\n")
    with pytest.raises(UserError, match=r"no such key; name a section \(limits, prompts"):
        reference.text("sft.epoch")


def test_shipped_recipes_are_listed_and_sound():
    for name, about in reference.shipped():
        assert recipe.load(recipe.shipped(Path(name))) and about
    assert {"quickstart", "small", "gpu-24gb"} <= {name for name, _ in reference.shipped()}
    assert not {"accelerate-fsdp-8", "accelerate-zero3-8"} & {name for name, _ in reference.shipped()}


def commands() -> tuple[Any, Any]:
    group = typer.main.get_command(cli.app)
    return group, group.make_context("delib", [], resilient_parsing=True)


def test_every_command_has_a_panel_and_one_sentence():
    group, context = commands()
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command.rich_help_panel in cli_help.PANELS, f"{name}: give it a panel in cli_help.py"
        said = command.help.strip().split("\n\n")[0]
        assert said.endswith(".") and not re.search(r"\.\s", said), f"{name}: one sentence, not {said!r}"


@pytest.mark.parametrize("line", [line for lines in cli_help.EXAMPLES.values() for line in lines])
def test_examples_are_commands_that_parse(line):
    group, context = commands()
    program, name, *words = shlex.split(line)
    assert program == "delib" and line in group.get_command(context, name).epilog
    group.get_command(context, name).make_context(name, words, parent=context)


def test_what_is_completed_is_what_there_is():
    from delib.evals.registry import SUITES
    from delib.wiring import STAGES

    assert tuple(SUITES) == completing.SUITES
    assert tuple(STAGES) == completing.STAGES


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("delib run q", {"quickstart"}),
        ("delib check sm", {"small"}),
        ("delib run small --to f", {"filter"}),
        ("delib eval --suite xs", {"xstest"}),
        ("delib run --set sft.lora.r", {"sft.lora.rank"}),
        ("delib recipe li", {"limits", "limits.prices.MODEL"}),
        ("delib compare runs/mine:sf", {"runs/mine:sft"}),
        ("delib compare runs/m", {f"runs/mine:{arm}" for arm in recipe.ARMS}),
        ("delib compare runs/mine : sf", {"sft"}),
        ("delib compare runs/mine :", {""}),
    ],
)
def test_the_shell_completes(typed, offered, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    words = typed.split()
    asked = {"_DELIB_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.app(prog_name="delib")
    assert ended.value.code == 0
    assert set(capsys.readouterr().out.strip().split("\n")) == offered


def test_every_page_is_in_the_site_and_every_link_leads_somewhere():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["strict"] and site["theme"]["font"] is False, "no page asks anything of another host"
    pages = {page for entry in site["nav"] for part in entry.values() for page in _pages(part)}
    assert pages == {file.name for file in DOCS.glob("*.md")}
    broken = []
    for file in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://", "#")) and not (file.parent / link.split("#")[0]).exists():
                broken.append(f"{file.name}: {link}")
    assert broken == []


def _pages(part: str | list[dict[str, str]]) -> list[str]:
    return [part] if isinstance(part, str) else [page for entry in part for page in entry.values()]
