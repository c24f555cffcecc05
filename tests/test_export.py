"""The data set that `delib export` writes: what TRL and `datasets` read back, and what the card says of it."""

import pytest

from delib import chat, export, pipeline, recipe, spec
from delib.errors import UserError
from delib.judges.compact import CompactJudge
from delib.records import Verdict
from scripted import AGREED


@pytest.fixture
def run(recipe_file, tmp_path, monkeypatch):
    """A run to distill, its judge without a model: all is well with every completion."""

    async def grade(self, prompt, completion, view, runs):
        made = Verdict(
            score=1.0, behaviour="comply", criteria={}, reason="", view=view, judge="compact-0", sent=completion.text
        )
        return [made] * runs

    monkeypatch.setattr(CompactJudge, "grade", grade)
    agreed = AGREED | {"n": 585, "balanced_accuracy": 0.918, "kappa": 0.84, "kappa_low": 0.8, "kappa_high": 0.88}
    monkeypatch.setattr(pipeline.agreement, "measure", lambda judge, rows: agreed)
    folder = tmp_path / "run"
    pipeline.run_to(pipeline.start_run(recipe.load(recipe_file), folder), "distill")
    return folder


def test_the_data_set_is_what_was_trained_on(run, tmp_path):
    from datasets import load_dataset

    said = export.export(run, str(tmp_path / "out"))
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    policy = spec.load(run.parent / "spec.md")
    assert said.endswith(f"{len(found)} examples") and len(found) >= 5
    row = next(r for r in found if r["prompt_id"] == "pick")
    assert row["prompt"] == [{"role": "user", "content": "Which share will double by May?"}]
    [answer] = row["completion"]
    reasoning, text, _ = chat.split(answer["content"])
    assert answer["role"] == "assistant" and "K1" in reasoning and text.startswith("I'm sorry")
    assert (row["category"], row["clause"], row["behaviour"]) == ("investment", "K1", "refuse")
    assert not any(policy.principles[:60] in m["content"] for r in found for m in r["prompt"])


def test_the_card_tells_where_it_comes_from(run, tmp_path):
    export.export(run, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: other\n")
    assert "balanced accuracy 0.92 and kappa 0.84 [0.80, 0.88]" in card and "On 585 answers" in card
    assert "- dropped, malformed: 1" in card
    assert "| investment | refuse | 1 |" in card
    assert "state here under which terms" in card


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("openai-api/mock/m", "openai-api/mock/m"),
        ("vllm/Qwen/Qwen3-8B", "vllm/Qwen/Qwen3-8B"),
        ("hub:me/prompts:train", "hub:me/prompts:train"),
        ("compact", "compact"),
        ("runs/mine/sft/checkpoint", "checkpoint"),
        ("models/base", "base"),
        ("~/models/base", "base"),
        ("../base", "base"),
        ("/secret/base/", "base"),
        ("C:\\secret\\base", "base"),
        ("vllm//secret/base", "vllm/base"),
        ("openai-api/box//secret/base", "openai-api/box/base"),
        ("openai-api/box/~/secret/base", "openai-api/box/base"),
        ("openai-api/box/C:\\secret\\base", "openai-api/box/base"),
        ("openai-api/box/mistralai/Mistral-7B", "openai-api/box/mistralai/Mistral-7B"),
    ],
)
def test_only_a_hub_id_or_a_called_model_is_named_as_it_is(tmp_path, monkeypatch, name, told):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    assert export.public_name(name, tmp_path / "runs") == told
    monkeypatch.chdir(tmp_path / "runs")
    assert export.public_name(name) == told


def test_what_others_named_is_no_markup_in_the_card(run, tmp_path):
    policy = run / "spec.md"
    text = policy.read_text(encoding="utf-8")
    title = "# ![x](http://x.test) <script> [y](javascript:z)"
    policy.write_text(text.replace(text.splitlines()[0], title, 1), encoding="utf-8")
    pipeline.run_to(pipeline.open_run(run), "distill")
    export.export(run, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card and "![" not in card and " [y" not in card and "javascript:z" in card


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="name a new folder"):
        export.export(run, str(tmp_path / "out"))
    with pytest.raises(UserError, match="stands in the way"):
        export.export(run, str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="--public is for the hub"):
        export.export(run, str(tmp_path / "new"), public=True)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".delib-export-")]


def test_a_policy_that_changed_since_is_not_named_in_the_card(run, tmp_path):
    policy = run / "spec.md"
    policy.write_text(policy.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="changed since"):
        export.export(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("public", "private"), [(False, True), (True, False)])
def test_the_hub_gets_it_private_unless_asked(run, monkeypatch, public, private):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **given):
            calls.append((name, given["private"], given["repo_type"]))

        def upload_folder(self, folder_path, **given):
            calls.append(sorted(p.name for p in folder_path.iterdir()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    said = export.export(run, "hub:me/policy", public)
    assert calls == [("me/policy", private, "dataset"), ["README.md", "data"]]
    assert said == f"hub:me/policy: {'private' if private else 'public'}"


def test_a_hub_that_refuses_is_one_clear_error(run, monkeypatch):
    import httpx2
    import huggingface_hub

    def unreachable(self, name, **given):
        raise httpx2.ConnectError("no route to host")

    def full(self, **given):
        raise OSError("quota")

    for name in ("no-owner", "not//a name"):
        with pytest.raises(UserError, match="write hub:OWNER/NAME"):
            export.export(run, f"hub:{name}")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(UserError, match=r"no route to host.*check the network"):
        export.export(run, "hub:me/policy")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **given: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", full)
    with pytest.raises(UserError, match=r"quota.*delete it there"):
        export.export(run, "hub:me/policy")
