import pytest

from delib import recipe
from delib.errors import UserError


def problems_of(path, overrides=None) -> list[str]:
    with pytest.raises(UserError) as caught:
        recipe.load(path, overrides)
    return caught.value.problems


def test_every_wrong_key_is_told_at_once(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nsft: {epochs: 0, speed: 9}\ncolour: red\n", encoding="utf-8")
    found = problems_of(file)
    assert len(found) == 3
    assert any("sft.epochs" in p for p in found)
    assert any("sft.speed: no such key; keys here are epochs" in p for p in found)
    assert any("colour: no such key" in p for p in found)


def test_broken_yaml_names_its_line(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nsft: {epochs: 1\nrl: 2\n", encoding="utf-8")
    assert ":3: broken YAML" in problems_of(file)[0]


def test_a_list_is_no_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- a\n", encoding="utf-8")
    assert "mapping" in problems_of(file)[0]


def test_set_overrides_and_paths_are_relative_to_the_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nspec: my.md\n", encoding="utf-8")
    loaded = recipe.load(file, ["sft.epochs=3", "evaluate.arms=[base]"])
    assert loaded.sft.epochs == 3
    assert loaded.evaluate.arms == ["base"]
    assert loaded.spec == str(tmp_path / "my.md")
    assert "write key=value" in problems_of(file, ["sft.epochs"])[0]


def test_quickstart_is_sound_and_survives_a_round_trip(tmp_path):
    loaded = recipe.load(recipe.QUICKSTART)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.dump(loaded), encoding="utf-8")
    assert recipe.load(copy) == loaded


def test_what_is_cut_off_is_out_of_the_baseline_by_default():
    for name in ("quickstart", "small", "gpu-24gb", "gpu-80gb", "gpu-8x80gb"):
        file = recipe.RECIPES / f"{name}.yaml"
        assert recipe.dump(recipe.load(file)) == recipe.dump(recipe.load(file, ["rl.cut_off=out"])), name


def test_a_fitted_judge_has_three_members_and_a_model_as_many_runs_as_it_is_asked(monkeypatch):
    from delib import pipeline

    monkeypatch.setenv("MOCK_BASE_URL", "http://127.0.0.1:9/v1")
    compact = recipe.load(recipe.QUICKSTART, ["filter.runs=4"])
    assert pipeline.check(compact) == ["filter.runs: 4 runs of judge compact, which has three members"]
    assert pipeline.check(recipe.load(recipe.QUICKSTART, ["filter.runs=4", "judge=openai-api/mock/m"])) == []
    twice = recipe.load(recipe.QUICKSTART, ["evaluate.second_judge=compact"])
    assert pipeline.check(twice) == ["evaluate.second_judge: compact is the recipe's judge; name another one, or null"]
