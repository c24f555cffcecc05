"""Models that `delib export` writes: the weights that were trained, in each form, and what the card says of them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import tiny
from delib import cli, export_model, pipeline, recipe
from delib.errors import UserError
from delib.judges.compact import CompactJudge
from delib.models import weights
from delib.records import Manifest, Metric, Verdict
from scripted import AGREED


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """With merges, without which llama.cpp takes no tokenizer."""
    folder = tmp_path_factory.mktemp("merged")
    tiny.save(folder, "llama", "gpt-2")
    return folder


def close(opened: pipeline.Pipeline, stage: str, outputs: list[str]) -> None:
    """End a stage whose outputs were put there by hand."""
    made = Manifest(stage=stage, recipe="", inputs=opened.inputs(stage), outputs={}, counts={"out": 1})
    opened.folder(stage).finish(made, outputs)


def adapted(base, place) -> None:
    """A checkpoint as training with LoRA leaves it: the merged model, and the adapter beside."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    weights.save(model, AutoTokenizer.from_pretrained(base), base, place)


@pytest.fixture
def run(recipe_file, tmp_path, tiny_model, monkeypatch):
    """A run whose checkpoints stand: SFT by LoRA, RL of all weights, evaluated; the judge and the training are none."""

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
    opened = pipeline.open_run(folder)
    (folder / "sft").mkdir()
    adapted(tiny_model, folder / "sft" / "checkpoint")
    close(opened, "sft", ["checkpoint"])
    shutil.copytree(tiny_model, folder / "rl" / "checkpoint")
    opened.folder("rl").replace([])
    close(opened, "rl", ["records.jsonl", "checkpoint"])
    found = [
        Metric(suite="heldout", arm=arm, name="not_unsafe", value=value, low=value - 0.1, high=value + 0.1, n=94)
        for arm, value in (("base", 0.2), ("sft", 0.6), ("rl", 0.8))
    ]
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "metrics.json").write_text(json.dumps([m.model_dump() for m in found]), encoding="utf-8")
    close(opened, "evaluate", ["metrics.json"])
    return folder


def logits(folder, adapter=None):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


def test_safetensors_are_the_checkpoint_and_nothing_else(run, tmp_path):
    said = export_model.export_any(run, str(tmp_path / "out"), what="sft")
    out = tmp_path / "out"
    assert said == f"{out}: safetensors"
    assert (out / "model.safetensors").read_bytes() == (run / "sft/checkpoint/model.safetensors").read_bytes()
    assert (logits(out) == logits(run / "sft" / "checkpoint")).all()
    names = {p.name for p in out.iterdir()}
    assert {"README.md", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [n for n in names if n.startswith("adapter") or n.endswith((".bin", ".gguf", ".pt"))]
    assert not [p.name for p in out.glob("*.json") if str(tmp_path.parent) in p.read_text(encoding="utf-8")]


def test_the_format_of_the_numbers_is_kept(tmp_path, tiny_model):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    export_model.export_any(tmp_path / "model", str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as handle:
        assert {str(handle.get_tensor(n).dtype) for n in handle.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    assert "say it here before you publish it" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_adapter_on_its_base_is_the_merged_checkpoint(run, tmp_path, tiny_model):
    said = export_model.export_any(run, str(tmp_path / "out"), what="sft", form="adapter")
    out = tmp_path / "out"
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == tiny_model.name and said == f"{out}: an adapter of {tiny_model.name}"
    assert not (out / "model.safetensors").exists()
    merged = logits(run / "sft" / "checkpoint")
    assert (logits(tiny_model, out) - merged).abs().max() < 1e-4 < (logits(tiny_model) - merged).abs().max()
    assert f"goes onto {tiny_model.name}" in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="holds no LoRA adapter, since rl trained the weights themselves"):
        export_model.export_any(run, str(tmp_path / "other"), what="rl", form="adapter")


def test_an_adapter_alone_is_merged_with_the_base_that_it_names(run, tmp_path):
    shutil.copytree(run / "sft" / "checkpoint" / "adapter", tmp_path / "alone")
    export_model.export_any(tmp_path / "alone", str(tmp_path / "out"), form="safetensors")
    assert (logits(tmp_path / "out") - logits(run / "sft" / "checkpoint")).abs().max() < 1e-5


def test_an_adapter_alone_keeps_its_own_template_and_must_fit_its_base(run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run / "sft" / "checkpoint" / "adapter", alone)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "sft" / "checkpoint" / name, alone)
    (alone / "chat_template.jinja").write_text("its own", encoding="utf-8")
    export_model.export_any(alone, str(tmp_path / "out"), form="safetensors")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == "its own"
    other = tmp_path / "other"
    change(alone / "adapter_config.json", base_model_name_or_path=str(other))
    for shape, said in (
        ({"hidden_size": 48}, "size mismatch"),
        ({"num_hidden_layers": 1}, "one of them alone has .*layers.1"),
        ({"num_hidden_layers": 3}, "one of them alone has .*layers.2"),
    ):
        shutil.rmtree(other, ignore_errors=True)
        tiny.save(other, "llama", "smollm", **shape)
        with pytest.raises(UserError, match=f"this adapter does not fit {other} .*{said}.*export the whole model"):
            export_model.export_any(alone, str(tmp_path / "never"), form="safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("never", "tmp"))]


def test_a_gguf_is_one_file_that_llama_cpp_answers_from(run, tmp_path):
    from delib import serving

    said = export_model.export_any(run, str(tmp_path / "out"), what="rl", form="gguf", quantisation="f16")
    assert said == f"{tmp_path / 'out'}: tiny-rl-f16.gguf"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tiny-rl-f16.gguf", "README.md"}
    server = serving.start(str(tmp_path / "out" / "tiny-rl-f16.gguf"), "127.0.0.1", 0, 256)
    assert server.listening_address.startswith("http://127.0.0.1:")
    del server


def test_the_card_tells_what_was_made_measured_and_never_run(run, tmp_path, tiny_model):
    export_model.export_any(run, str(tmp_path / "out"), what="rl")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: other\nlibrary_name: transformers\n"), "a base whose licence nobody knows"
    assert f"| base | {tiny_model.name} |" in card and str(tiny_model.parent) not in card
    assert "| its categories | investment, fraud |" in card
    assert "| not_unsafe (by compact) | refuse prompts answered safely | 0.20 (0.10–0.30, n=94) | 0.80" in card
    assert "balanced accuracy 0.92 and kappa 0.84 [0.80, 0.88]" in card and "gave the rewards" in card
    assert "| rl | steps 3, prompts 2, group 2," in card and "| written by | recorded |" in card
    assert "Never run: anything on a GPU" in card
    examples = pipeline.open_run(run).folder("distill").manifest()
    assert f"{examples.counts['out']}, sha256 `{examples.outputs['records.jsonl']}`" in card


def test_a_judge_that_took_no_part_stands_first_in_the_card(run, tmp_path):
    file = run / "evaluate" / "metrics.json"
    rows = json.loads(file.read_text())
    rows += [row | {"value": row["value"] - 0.05, "by": {"judge": "probe"}} for row in rows]
    file.write_text(json.dumps(rows))
    given = run / "recipe.yaml"
    given.write_text(recipe.dump(recipe.load(given, ["evaluate.second_judge=probe"])))
    close(pipeline.open_run(run), "evaluate", ["metrics.json"])
    export_model.export_any(run, str(tmp_path / "out"), what="rl")
    lines = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| not_unsafe")]
    assert "(by probe, which took no part in the training)" in rows[0] and "| 0.75 (" in rows[0]
    assert "(by compact)" in rows[1] and "| 0.80 (" in rows[1] and len(rows) == 2


def restarted(run, place: str, *changes: str) -> None:
    """The run begun once more, with another recipe; `place`: of which folder it is the recipe."""
    given = run / place / "recipe.yaml"
    given.write_text(recipe.dump(recipe.load(run / "recipe.yaml", list(changes))))


def test_a_second_judge_that_labelled_the_prompts_took_part(run, tmp_path):
    file = run / "evaluate" / "metrics.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(rows + [row | {"by": {"judge": "openai-api/box/j"}} for row in rows]))
    restarted(run, ".", "evaluate.second_judge=openai-api/box/j", "prompts.labeller=openai-api/box/j")
    close(pipeline.open_run(run), "evaluate", ["metrics.json"])
    export_model.export_any(run, str(tmp_path / "out"), what="rl")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "(by openai-api/box/j)" in card and "took no part" not in card


def test_the_card_tells_the_recipe_of_each_stage_and_not_of_a_later_start(run, tmp_path):
    for stage in ("sft", "rl", "evaluate"):
        restarted(run, stage)
    restarted(run, ".", "sft.epochs=9", "rl.steps=200", "evaluate.max_tokens=512", "filter.threshold=0.9")
    export_model.export_any(run, str(tmp_path / "out"), what="rl")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| sft | epochs 2" in card and "| rl | steps 3" in card and "at most 16 tokens" in card
    assert "kept from 0.0 on" in card


def test_a_judge_that_is_a_model_is_not_asked_for_the_card(run, tmp_path, monkeypatch):
    """What the run's report tells of it stands there; without one, that nothing was measured."""
    monkeypatch.delenv("BOX_BASE_URL", raising=False)
    restarted(run, "filter", "judge=openai-api/box//srv/models/j")
    export_model.export_any(run, str(tmp_path / "a"), what="rl")
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "How far openai-api/box/j agrees with labelled answers is not kept" in card and "/srv" not in card
    restarted(run, "filter")
    opened = pipeline.open_run(run)
    told = Manifest(stage="report", recipe="", inputs=opened.inputs("report"), outputs={}, counts={})
    told.detail["agreements"] = [AGREED]
    (run / "report").mkdir()
    opened.folder("report").finish(told, [])
    monkeypatch.setattr(pipeline.agreement, "measure", None)
    export_model.export_any(run, str(tmp_path / "b"), what="rl")
    assert "On 9 answers" in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_that_was_not_evaluated_has_no_figures(run, tmp_path):
    (run / "evaluate" / "manifest.json").unlink()
    export_model.export_any(run / "rl" / "checkpoint", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("This checkpoint was not evaluated") == 1 and "not_unsafe" not in card
    assert "| rl | steps 3" in card, "the run was found by its checkpoint"


@pytest.mark.parametrize("place", ["checkpoint", "checkpoint/adapter", "."])
def test_a_checkpoint_is_found_from_within_its_run(run, tmp_path, monkeypatch, place):
    within = run / "sft" / "checkpoint" if place == "." else run / "sft"
    monkeypatch.chdir(within)
    said = export_model.export_any(Path(place), str(tmp_path / "out"), form="gguf")
    assert said.endswith("tiny-sft-q8_0.gguf")
    assert "| sft | epochs" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_of_no_stage_is_a_model_folder(run, tmp_path):
    (run / "sft").rename(run / "sft.stale")
    said = export_model.export_any(run / "sft.stale" / "checkpoint", str(tmp_path / "out"), form="gguf")
    assert said.endswith("checkpoint-q8_0.gguf")
    assert "No run stood beside it" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def test_no_path_leaves_in_a_json_file_or_the_card(run, tmp_path, monkeypatch):
    """Relative, absolute and nested ones; what only looks like one stays."""
    folder = tmp_path / "secret" / "model"
    shutil.copytree(run / "sft" / "checkpoint", folder)
    (tmp_path / "secret" / "base").mkdir()
    change(folder / "adapter" / "adapter_config.json", base_model_name_or_path="secret/runs/mine/sft/checkpoint")
    change(folder / "adapter" / "adapter_config.json", eva_config={"data": "secret/rows.jsonl/x"}, revision="a/b")
    change(folder / "config.json", _name_or_path="secret/base", files=["~/secret/x", "silu"], hub="me/model")
    change(folder / "tokenizer_config.json", vocab_file="./secret/vocab.json", extra={"made": {"by": "/secret/x y"}})
    change(folder / "tokenizer_config.json", eos_token="/s", extra_special_tokens=["//", "</think>"])
    monkeypatch.chdir(tmp_path)
    for form in ("adapter", "safetensors"):
        export_model.export_any(folder, str(tmp_path / form), form=form)
        assert not [p.name for p in (tmp_path / form).glob("*.*") if b"secret" in p.read_bytes()]
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert told["base_model_name_or_path"] == "checkpoint" and told["revision"] == "a/b"
    assert "goes onto checkpoint, which is not a name on the hub" in (tmp_path / "adapter" / "README.md").read_text()
    told = json.loads((tmp_path / "safetensors" / "config.json").read_text(encoding="utf-8"))
    assert told["files"] == ["silu"] and told["hub"] == "me/model" and told["architectures"] == ["LlamaForCausalLM"]
    told = json.loads((tmp_path / "safetensors" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["eos_token"] == "/s" and told["extra_special_tokens"] == ["//", "</think>"]


def test_what_others_named_is_no_markup_in_the_card(run, tmp_path, monkeypatch):
    opened = pipeline.open_run(run)
    opened.spec = opened.spec.model_copy(update={"title": "![x](http://x.test) <script> | `y`"})
    monkeypatch.setattr(pipeline, "open_run", lambda path: opened)
    export_model.export_any(run, str(tmp_path / "out"), what="rl")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "x.test" in card and "<script>" not in card and "![x]" not in card and "> |" not in card


def test_a_checkpoint_that_changed_or_an_unfinished_stage_does_not_leave(run, tmp_path):
    (run / "rl" / "checkpoint" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is not what rl left there"):
        export_model.export_any(run, str(tmp_path / "out"), what="rl")
    (run / "sft" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"sft is not finished.*--to sft"):
        export_model.export_any(run, str(tmp_path / "out"), what="sft")
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".delib-export-")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--form", "gguf"], "are a model's; name one with --what sft or --what rl"),
        (["--what", "rl", "--quantisation", "q4_0"], "--quantisation q4_0: is of a GGUF file"),
        (["--what", "rl", "--public"], "--public is for the hub"),
        (["--what", "everything"], "everything"),
    ],
)
def test_options_that_do_not_fit_are_told(run, tmp_path, capsys, monkeypatch, given, told):
    monkeypatch.setattr(sys, "argv", ["delib", "export", str(run), "--to", str(tmp_path / "out"), *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_folder_takes_no_stage_and_is_not_written_over(tmp_path, tiny_model):
    with pytest.raises(UserError, match="is a model folder and not a run"):
        export_model.export_any(tiny_model, str(tmp_path / "out"), what="rl")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="name a new folder"):
        export_model.export_any(tiny_model, str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_the_hub_gets_a_model_private_unless_asked(run, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **given):
            calls.append((name, given["private"], given["repo_type"]))

        def upload_folder(self, folder_path, **given):
            calls.append([*sorted(p.suffix for p in folder_path.iterdir()), given["repo_type"]])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    said = export_model.export_any(run, "hub:me/policy", what="rl", form="gguf")
    assert calls == [("me/policy", True, "model"), [".gguf", ".md", "model"]] and said == "hub:me/policy: private"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "no adapter_model.safetensors"),
        (lambda f: change(f / "adapter_config.json", base_model_name_or_path=None), "names no model that it goes onto"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "names no model that it goes onto"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "names no model that it goes onto"),
    ],
)
@pytest.mark.parametrize("form", ["adapter", "safetensors", "gguf"])
def test_an_adapter_that_is_not_whole_is_told_before_anything_is_written(run, tmp_path, spoil, said, form):
    alone = tmp_path / "alone"
    shutil.copytree(run / "sft" / "checkpoint" / "adapter", alone)
    spoil(alone)
    with pytest.raises(UserError, match=said):
        export_model.export_any(alone, str(tmp_path / "out"), form=form)
    assert not (tmp_path / "out").exists()


def test_an_export_goes_to_no_object_storage(run):
    with pytest.raises(UserError, match="--to s3://bucket/x: an export goes to a new local folder or to hub:"):
        export_model.export_any(run, "s3://bucket/x", what="sft")
