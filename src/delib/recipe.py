"""One recipe: YAML in, a checked Recipe out, a section a stage. A field's docstring is its documentation.

Paths are relative to the recipe's own folder; `starter:name` is a file of the shipped starter pack. Any problem is a
UserError that lists all of them, each naming its key and the mend.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delib.errors import UserError
from delib.spec import read_text

STARTER = Path(__file__).parent / "starter"
RECIPES = Path(__file__).parent / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
Arm = Literal["base", "base_spec", "sft", "rl"]
ARMS: tuple[Arm, ...] = ("base", "base_spec", "sft", "rl")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PromptsSection(Section):
    train: str = "starter:prompts.jsonl"
    """JSON lines of training prompts."""
    rl: str | None = None
    """JSON lines of prompts for RL alone, which needs no completions of a teacher; null takes the training prompts."""
    heldout: str = "starter:heldout.jsonl"
    """JSON lines of evaluation prompts; none may be a training prompt."""


class GenerateSection(Section):
    teacher: str = "recorded"
    """`recorded` replays `recordings`; anything else is a model (smollm2, a folder, a hub id) run locally."""
    recordings: str = "starter:demonstrations.jsonl"
    """Recorded completions of the teacher, JSON lines."""
    samples: int = Field(default=1, ge=1)
    """Completions a prompt from a live teacher; a recorded one gives all it has."""
    max_tokens: int = Field(default=384, ge=16)
    """The most tokens of one completion of a live teacher."""
    temperature: float = Field(default=0.8, ge=0)
    """Sampling temperature of a live teacher."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """The stage stops when more than this share of the samples fail."""


class FilterSection(Section):
    runs: int = Field(default=3, ge=1, le=3)
    """Judge runs a completion (k); the score is their minimum. The compact judge has three members."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """The least score that is kept."""


class DistillSection(Section):
    plain_share: float = Field(default=0.3, ge=0, lt=1)
    """The most that everyday prompts may make up of the examples; the rest of them are left out."""


class SftSection(Section):
    epochs: int = Field(default=2, ge=1)
    """Passes over whole examples."""
    whole_examples: int | None = Field(default=None, ge=1)
    """How many examples these passes take, in turn from each behaviour and the everyday ones, those with the shortest
    completions first; null takes all. `plain_share` is about all examples, not about these."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate: linear warm-up over a twentieth of the steps, cosine decay to zero over the last two
    fifths."""
    batch_size: int = Field(default=8, ge=1)
    """Examples an optimiser step."""
    max_tokens: int = Field(default=384, ge=32)
    """Longer examples are left out and counted."""
    frozen_layers: int = Field(default=0, ge=0)
    """The first layers (and with any, the embeddings) that do not train: faster, and less is forgotten."""
    opening_epochs: int = Field(default=0, ge=0)
    """Passes over all examples cut off after their reasoning's opening, mixed among the others."""
    decision_weight: float = Field(default=1.0, ge=1)
    """Loss weight of the tokens that decide: a reasoning's opening, clause and conclusion, and the answer's opening.
    The first word of a reasoning weighs the square of this."""
    reasoning: bool = True
    """False trains on the same answers without their reasoning: the control that tells what deliberation gives."""
    checkpoint_steps: int = Field(default=10, ge=1)
    """A checkpoint to resume from is written every so many steps."""


class RlSection(Section):
    steps: int = Field(default=4, ge=1)
    """GRPO steps."""
    prompts: int = Field(default=4, ge=1)
    """Prompts a step."""
    group: int = Field(default=4, ge=2)
    """Completions a prompt, whose mean reward is the baseline."""
    max_tokens: int = Field(default=128, ge=16)
    """The most tokens of one completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the completions."""
    learning_rate: float = Field(default=2e-6, gt=0)
    """Constant learning rate."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whether advantages are divided by the spread of the group's or batch's rewards. With `none` a group whose rewards
    hardly differ hardly counts, so that the noise of a judge with continuous scores is not blown up."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty against the SFT model."""
    frozen_layers: int = Field(default=0, ge=0)
    """As in sft."""
    checkpoint_steps: int = Field(default=1, ge=1)
    """A checkpoint to resume from is written every so many steps."""


class EvaluateSection(Section):
    arms: list[Arm] = Field(default=list(ARMS), min_length=1)
    """Which models are measured; base_spec is base with the summarised spec in its system message."""
    max_tokens: int = Field(default=224, ge=16)
    """The most tokens of one completion, the same for all arms."""
    quantisation: Literal["f32", "q8_0", "q4_0"] = "q8_0"
    """Weights of the embedded server; the transformers engine uses `dtype`."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many held-out prompts, balanced over behaviours; null takes all."""
    second_judge: Literal["probe"] | None = None
    """A judge that neither filters nor rewards; its figures stand beside the first one's."""


class ReportSection(Section):
    samples: int = Field(default=3, ge=0)
    """Prompts a category that the report shows with all arms side by side."""


class Recipe(Section):
    name: str = Field(default="quickstart", pattern=r"^[A-Za-z0-9._-]+$")
    """The run folder's name below `runs/`."""
    seed: int = 0
    """Seeds sampling, shuffling, folds and bootstrap."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where training and the transformers engine run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of training and of the transformers engine."""
    engine: Literal["llamacpp", "transformers"] = "llamacpp"
    """Who generates for evaluate and for a live teacher; models that llama.cpp can't take use transformers."""
    model: str = "smollm2"
    """The student: `smollm2`, a model folder, or a hub id."""
    spec: str = "starter:spec.md"
    """The written policy, in markdown."""
    prompts: PromptsSection = PromptsSection()
    generate: GenerateSection = GenerateSection()
    filter: FilterSection = FilterSection()
    distill: DistillSection = DistillSection()
    sft: SftSection = SftSection()
    rl: RlSection = RlSection()
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()


def shipped(name: Path) -> Path:
    """The recipe that a person named: a file, or a shipped one by its name (`quickstart`, `small`)."""
    inside = RECIPES / f"{name}.yaml"
    return inside if not name.is_file() and len(name.parts) == 1 and inside.exists() else name


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override (`key=value`, dotted keys, values as YAML), check. Paths in the result are absolute."""
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: broken YAML ({getattr(error, 'problem', error)}); mend it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, such as 'name: quickstart'")
    for item in overrides or []:
        _override(data, item)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError([_explain(path, item) for item in error.errors()]) from None
    return _absolute(recipe, path.parent)


def _override(data: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise UserError(f"--set {item}: write key=value, such as sft.epochs=1")
    place = data
    *parents, last = key.split(".")
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {item}: {parent} is no section")
        place = inner
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {item}: {value!r} is no YAML value") from None


def _explain(path: Path, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        parents = [str(part) for part in item["loc"][:-1]]
        known: Any = Recipe
        for parent in parents:
            known = known.model_fields[parent].annotation
        return f"{path}: {key}: no such key; keys here are {', '.join(known.model_fields)}"
    return f"{path}: {key}: {item['msg']} (got {item['input']!r})"


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    def find(name: str) -> str:
        if name.startswith("starter:"):
            return name
        return str((base / name).resolve())

    def find_model(name: str) -> str:
        return find(name) if name.startswith((".", "/")) else name

    given = recipe.prompts
    prompts = given.model_copy(
        update={"train": find(given.train), "rl": given.rl and find(given.rl), "heldout": find(given.heldout)}
    )
    teacher = recipe.generate.teacher
    generate = recipe.generate.model_copy(
        update={
            "recordings": find(recipe.generate.recordings),
            "teacher": teacher if teacher == "recorded" else find_model(teacher),
        }
    )
    changes = {"spec": find(recipe.spec), "prompts": prompts, "generate": generate, "model": find_model(recipe.model)}
    return recipe.model_copy(update=changes)


def path_of(name: str) -> Path:
    """The file behind a recipe's path: `starter:name` lies in the package."""
    return STARTER / name.removeprefix("starter:") if name.startswith("starter:") else Path(name)


def dump(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
