"""A model of one's own: what ends its turn, what it leaves of the randomness around it, what its template takes."""

import asyncio
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from delib import ablate, pipeline, recipe
from delib.errors import UserError
from delib.models import local
from delib.records import Message

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
