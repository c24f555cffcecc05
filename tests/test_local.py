"""A model of one's own: what ends its turn, what it leaves of the randomness around it, what its template takes."""

import asyncio
import gc
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from delib import ablate, pipeline, recipe
from delib.errors import UserError
from delib.models import local, weights
from delib.recipe import RlSection, SftSection
from delib.records import Message
from delib.run import StageFolder
from delib.stages import sft
from delib.training.student import student

ASKED = [Message(role="user", content="Which share?")]


def answered(folder, temperature=0.0):
    async def work():
        async with local.load(folder, name="m", device="cpu", dtype="float32") as model:
            sent = model.sent(ASKED)
            made = await model.attempt(sent, ASKED, max_tokens=24, temperature=temperature, seed=1)
            return model.identity, made

    return asyncio.run(work())


@pytest.fixture
def ending(tiny_model, tmp_path):
    """The model, which declares a further token that ends its turn: the one that it writes third."""
    folder = tmp_path / "ending"
    shutil.copytree(tiny_model, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nWhich share?<|im_end|>\n<|im_start|>assistant\n"
    given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    third = model.generate(**given, max_new_tokens=3, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [1, third]
    model.generation_config.save_pretrained(folder)
    return folder


def test_whatever_a_model_declares_as_an_end_is_one(tiny_model, ending):
    before, cut = answered(tiny_model)
    identity, whole = answered(ending)
    assert cut.cut and cut.usage["completion"] == 24
    assert not whole.cut and whole.usage["completion"] <= 3, "it ended by itself"
    assert cut.text.startswith(whole.text) and identity != before, "a cached cut-off does not come back"


def test_a_call_leaves_the_random_state_as_it_was(tiny_model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = answered(tiny_model, 1.0)[1].text, answered(tiny_model, 1.0)[1].text
    assert torch.equal(torch.rand(3), expected), "RL draws its completions from it"
    assert one == two


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_student_without_a_fitting_template_is_told_before_anything_is_paid(recipe_file, tiny_model, tmp_path, place):
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    file, told = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    loaded = recipe.load(recipe_file, [f"model={folder}"])
    assert pipeline.check(loaded) == []
    file.unlink()
    [problem] = pipeline.check(loaded)
    assert problem.startswith(f"model: {folder}: no chat template")
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    if place == file.name:
        file.write_text(text)
    else:
        told.write_text(json.dumps(json.loads(told.read_text()) | {"chat_template": text}))
    [problem] = pipeline.check(loaded)
    assert problem.startswith("evaluate.arms: base_spec has the policy in a system message; ")
    without = recipe.load(recipe_file, [f"model={folder}", "evaluate.arms=[base,sft,rl]"])
    assert pipeline.check(without) == []
    with pytest.raises(UserError, match="'delib ablate' needs it"):
        ablate.run(without, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    if place == told.name:  # of a kind that no tokenizer reads
        told.write_text(json.dumps({k: v for k, v in json.loads(told.read_text()).items() if k != "chat_template"}))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
        [problem] = pipeline.check(without)
        assert problem.startswith(f"model: {folder}: no chat template")


def test_it_answers_by_no_penalty_of_the_models_own(tiny_model, tmp_path):
    folder = tmp_path / "penalised"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(repetition_penalty=50.0, top_k=1, do_sample=True)
    model.generation_config.save_pretrained(folder)
    sent = AutoTokenizer.from_pretrained(folder)(
        "<|im_start|>user\nWhich share?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    )
    own = model.generate(**sent, max_new_tokens=24, do_sample=False)[0].tolist()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert own != plain.generate(**sent, max_new_tokens=24, do_sample=False)[0].tolist(), "the penalty tells"
    (before, expected), (identity, made) = answered(tiny_model), answered(folder)
    assert made.text == expected.text and identity != before
    assert answered(folder, 5.0)[1].text == answered(tiny_model, 5.0)[1].text != expected.text, "nor by its top-k"


def test_a_merged_adapter_is_measured_and_kept_as_it_was_trained(tiny_model, tmp_path):
    """Base in bfloat16, the adapter in float32 beside, in SFT and again in RL from there. Merged in bfloat16 a change
    that is smaller than half of a weight's last digit would be lost."""
    tokenizer, start = AutoTokenizer.from_pretrained(tiny_model), tiny_model
    for stage in ("sft", "rl"):
        trained = stirred(start)
        weights.save(trained, tokenizer, start, tmp_path / stage, dtype="bfloat16")
        expected = dict(trained.named_parameters())

        async def opened(folder):
            async with local.load(folder, name="m", device="cpu", dtype="bfloat16") as model:
                made = await model.attempt("a", ASKED, max_tokens=3, temperature=0.0, seed=1)
                assert made.usage["completion"] > 0
                return dict(model.model.named_parameters())

        found = asyncio.run(opened(tmp_path / stage))
        assert expected.keys() == found.keys()
        for name, weight in found.items():
            assert weight.dtype == expected[name].dtype and torch.equal(weight, expected[name]), name
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / stage, dtype="auto")
        again = trained.float().merge_and_unload()
        assert whole.dtype == torch.float32
        for name, weight in again.named_parameters():
            assert torch.equal(dict(whole.named_parameters())[name], weight), name
        plain = dict(AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).named_parameters())
        name = "model.layers.0.mlp.up_proj.weight"
        assert (dict(whole.named_parameters())[name] != plain[name]).float().mean() > 0.9
        lost = dict(whole.named_parameters())[name].bfloat16() == plain[name]
        assert lost.float().mean() > 0.5, "in bfloat16 most of it would be gone"
        start = tmp_path / stage


def stirred(start):
    """What a stage trains by LoRA in bfloat16, after small steps."""
    given = recipe.Recipe(dtype="bfloat16", rl=recipe.RlSection(lora=recipe.LoraSection(rank=2)))
    made = student(given, given.rl, start)
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-5)
    return made


def test_a_checkpoint_of_handed_over_weights_tells_their_format(tiny_model, tmp_path):
    from safetensors import safe_open

    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    tokenizer, target = AutoTokenizer.from_pretrained(tiny_model), tmp_path / "checkpoint"
    weights.save(model, tokenizer, tiny_model, target, model.state_dict(), "bfloat16")
    with safe_open(target / "model.safetensors", "pt") as held:
        assert {held.get_tensor(k).dtype for k in held.keys()} == {torch.bfloat16}  # noqa: SIM118 - no mapping
        assert "lm_head.weight" not in held.keys()  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(target)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_tokenizer_without_an_end_is_told_before_anything_is_paid(recipe_file, tiny_model, tmp_path):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_model, folder)
    told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": None}), encoding="utf-8")
    loaded = recipe.load(recipe_file, [f"model={folder}"])
    [problem] = pipeline.check(loaded)
    assert problem.startswith(f"model: {folder}: its tokenizer has no eos_token; name in its tokenizer_config.json")
    with pytest.raises(UserError, match="has no eos_token"):
        sft.run(loaded, [], folder, StageFolder(tmp_path / "sft"))


def test_other_weights_in_a_folder_are_another_student(tiny_model, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    before = weights.content(str(folder))
    assert weights.content(str(tiny_model)) == before, "wherever it lies"
    (folder / "README.md").write_text("notes", encoding="utf-8")
    assert weights.content(str(folder)) == before
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(folder)
    assert weights.content(str(folder)) != before
    assert weights.content("smollm2") == "smollm2"


def test_a_finished_trainer_is_not_kept_beside_the_next_stage(recipe_file, tmp_path):
    loaded = recipe.load(recipe_file, [])
    made = pipeline.start_run(loaded, tmp_path / "run")
    for stage in ("prompts", "generate", "filter", "distill"):
        made.execute(stage)
    kinds = ("PlainHeadTrainer", "LlamaForCausalLM")
    gc.collect()
    before = [type(held).__name__ for held in gc.get_objects() if type(held).__name__ in kinds]
    gc.disable()  # none by chance
    try:
        made.execute("sft")
    finally:
        gc.enable()
    assert [type(held).__name__ for held in gc.get_objects() if type(held).__name__ in kinds] == before


def test_a_finished_run_stands_without_its_base(recipe_file, tiny_model, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    made = pipeline.start_run(recipe.load(recipe_file, [f"model={folder}"]), tmp_path / "run")
    pipeline.run_all(made, ("prompts", "generate", "filter", "distill", "sft"))
    assert made.folder("sft").manifest().inputs["model"] == weights.content(str(folder))
    folder.rename(tmp_path / "elsewhere")
    again = pipeline.open_run(tmp_path / "run")
    assert again.folder("sft").done(again.key("sft"))
    again.execute("sft")
    [problem] = pipeline.check(again.recipe)  # a path that was mistyped is no finished run
    assert problem == f"model: {folder}: no such folder; name one that is there, 'smollm2', or a hub id"
    shutil.copytree(tmp_path / "elsewhere", folder)
    assert again.folder("sft").done(again.key("sft")), "copied back, with other times"
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    assert not again.folder("sft").done(again.key("sft"))


@pytest.mark.parametrize("section", [SftSection(), RlSection()])
def test_sampling_settings_without_do_sample_keep_no_checkpoint_from_being_written(tiny_model, tmp_path, section):
    folder = tmp_path / "published"
    shutil.copytree(tiny_model, folder)
    told = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(told), encoding="utf-8")
    model = student(recipe.Recipe(), section, folder)
    model.generation_config.pad_token_id = 1  # as a trainer sets it
    model.save_pretrained(tmp_path / "checkpoint")
    kept = json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text(encoding="utf-8"))
    assert told.items() <= kept.items()


def test_a_model_folder_may_be_named_from_where_the_recipe_or_the_command_is(
    recipe_file, tiny_model, tmp_path, monkeypatch
):
    shutil.copytree(tiny_model, recipe_file.parent / "models" / "beside")
    shutil.copytree(tiny_model, tmp_path / "here" / "models" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    for name, place in (("models/beside", recipe_file.parent), ("models/mine", tmp_path / "here")):
        assert recipe.load(recipe_file, [f"model={name}"]).model == str((place / name).resolve())
    assert recipe.load(recipe_file, ["model=owner/name"]).model == "owner/name"


def test_a_model_that_is_out_of_sight_takes_no_trained_work_away(recipe_file, tiny_model, tmp_path):
    """Neither is set aside what another recipe would make anew, were the model there."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_model, folder)
    loaded = recipe.load(recipe_file, [f"model={folder}"])
    run = tmp_path / "run"
    opened = pipeline.start_run(loaded, run)
    made = StageFolder(run / "sft")
    made.begin("of before")
    (run / "sft" / "trainer" / "checkpoint-900").mkdir(parents=True)
    folder.rename(tmp_path / "elsewhere")
    pipeline.run_to(opened, "distill")
    with pytest.raises(UserError, match="no such model"):
        opened.execute("sft")
    assert (run / "sft" / "trainer" / "checkpoint-900").is_dir() and not (run / "sft.stale").exists()
