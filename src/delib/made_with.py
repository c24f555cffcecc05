"""What a run and each of its stages were made with: recipe and spec, kept beside them, since files change.

In: a recipe, and a run's or a stage's folder when work begins. Out: `recipe.yaml` and `spec.md` there. A stage's own
copies stand as long as what it made, so that a run that was begun anew and interrupted can still tell what differs.
"""

from pathlib import Path

from delib import recipe as recipes
from delib import spec as specs
from delib.errors import UserError
from delib.recipe import Recipe
from delib.run import Run, sha256, write_whole
from delib.spec import Spec

RECIPE, SPEC = "recipe.yaml", "spec.md"


def keep(recipe: Recipe, spec: Path, folder: Path) -> None:
    """Keep recipe and spec in a folder."""
    for name, text in ((RECIPE, recipes.dump(recipe)), (SPEC, specs.read_text(spec))):
        if not (folder / name).exists() or specs.read_text(folder / name) != text:
            write_whole(folder / name, text)


def in_the_way(recipe: Recipe, path: Path) -> list[str]:
    """What of a folder that is not a run's yet would be lost if a run began there: a spec of a person's own."""
    if not (path / SPEC).exists() or (path / RECIPE).exists():
        return []
    if (path / SPEC).read_bytes() == recipes.path_of(recipe.spec).read_bytes():
        return []
    return [f"{path / SPEC}: another spec than the recipe's, and a run here would overwrite it; name another --out"]


def file_of(path: Path) -> Path:
    """The file of a run's recipe. Raises UserError when the folder is no run's."""
    if not (path / RECIPE).exists():
        raise UserError(f"{path}: no {RECIPE} here; name a run folder that 'delib run' made")
    return path / RECIPE


def recipe_of(path: Path, stage: str | None = None) -> Recipe:
    """A run's recipe: that which a stage was made with, as far as it is kept, or else the one of its last start. Raises
    UserError when the folder is no run's."""
    return (recipe_for(path, stage) if stage else None) or recipes.load(file_of(path))


def recipe_for(path: Path, stage: str) -> Recipe | None:
    """The recipe that a stage's folder keeps; None where there is none that this version of delib can read."""
    try:
        return recipes.load(path / stage / RECIPE)
    except UserError:
        return None


def spec_for(path: Path, stage: str) -> Spec | None:
    """The spec that a finished stage of a run was made with: the text that is kept, or else the file of the recipe
    where it has not changed since. None where its text is gone, or the stage is not finished."""
    manifest, last = Run(path).stage(stage).manifest(), recipe_for(path, ".")
    files = [path / stage / SPEC, path / SPEC, *([recipes.path_of(last.spec)] if last else [])]
    same = (file for file in files if manifest and file.is_file() and sha256(file) == manifest.inputs.get("spec"))
    return next((specs.load(file) for file in same), None)


def spec_of(path: Path) -> Spec:
    """The spec of a run: of its evaluation, or of its prompts where that is not finished. Raises UserError where these
    are not finished either, or the text is gone."""
    run = Run(path)
    stage = "evaluate" if run.stage("evaluate").manifest() else "prompts"
    run.folder_of(stage)
    found = spec_for(path, stage)
    if found is None:
        named = recipes.path_of(recipe_of(path).spec)
        raise UserError(
            f"{named}: changed since stage {stage} of {path} was made, and no copy was kept; put the earlier text into "
            f"{path / SPEC}, or run it again"
        )
    return found
