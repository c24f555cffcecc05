"""What can be known of a recipe before any compute: every problem of it, and of the files and models that it names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from delib import on_ray
from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.models import opened, recorded
from delib.opener import FITTED, called
from delib.recipe import Recipe
from delib.records import Prompt
from delib.stages import prompts, rl
from delib.training import fitting, mix, processes


def prompt_files(recipe: Recipe) -> dict[prompts.Split, Path]:
    """The sets of prompts that a recipe names, by split; one of the hub keeps its name."""
    section = recipe.prompts
    named: dict[prompts.Split, str | None] = {"train": section.train, "rl": section.rl, "heldout": section.heldout}
    return {split: recipes.path_of(name) for split, name in named.items() if name is not None}


def check(recipe: Recipe) -> list[str]:
    """Every problem that can be known before any compute: spec, prompts, recordings, space."""
    problems: list[str] = []
    rows: list[Prompt] = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except UserError as error:
            problems.extend(error.problems)
            return None

    spec = attempt(lambda: specs.load(recipes.path_of(recipe.spec)))
    for split, path in prompt_files(recipe).items():
        rows += attempt(partial(prompts.load, path, spec, split, recipe.prompts.text)) or []
    if recipe.generate.teacher == "recorded":
        attempt(lambda: recorded.load(recipes.path_of(recipe.generate.recordings)))
    for key, name in called(recipe).items():
        try:
            opened.check(name)
        except UserError as error:
            problems.extend(f"{key}: {problem}" for problem in error.problems)
    if recipe.judge in FITTED and recipe.filter.runs > 3:
        problems.append(f"filter.runs: {recipe.filter.runs} runs of judge {recipe.judge}, which has three members")
    if recipe.evaluate.second_judge == recipe.judge:
        problems.append(f"evaluate.second_judge: {recipe.judge} is the recipe's judge; name another one, or null")
    if recipe.sft.mix is not None:
        attempt(partial(mix.load, recipe.sft.mix.data))
    if Path(recipe.model).is_absolute() and not Path(recipe.model).is_dir():
        problems.append(f"model: {recipe.model}: no such folder; name one that is there, 'smollm2', or a hub id")
    problems += fitting.template(recipe, rows)
    return problems + rl.problems(recipe) + processes.problems(recipe) + on_ray.problems(recipe.ray)
