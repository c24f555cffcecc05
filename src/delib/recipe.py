"""One recipe: YAML in, a checked Recipe out, a section a stage. A field's docstring is its documentation.

Paths are relative to the recipe's own folder; `starter:name` is a file of the shipped starter pack. Any problem is a
UserError that lists all of them, each naming its key and the mend.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    """`train`, `rl` and `heldout` are JSON lines, CSV or parquet files, or hub:OWNER/NAME:SPLIT (docs/prompts.md)."""

    train: str = "starter:prompts.jsonl"
    """Training prompts."""
    rl: str | None = None
    """Prompts for RL alone, which needs no completions of a teacher; null takes the training prompts."""
    heldout: str = "starter:heldout.jsonl"
    """Evaluation prompts. Training and RL prompts that are near one of them are left out and counted."""
    text: str | None = None
    """The column of prompts in CSV, parquet and hub sets; null takes a conversation, or the first of prompt, question,
    instruction, goal, text."""
    near_duplicates: float | None = Field(default=0.8, ge=0.5, le=0.95)
    """Of training (or RL) prompts with the same labels that are at least so similar only the first stays; null keeps
    all but exact copies."""
    labeller: str | None = None
    """A model that finds category, clause and behaviour of the prompts that have none; null leaves them so."""
    lookalikes: str | None = None
    """A model that writes a benign look-alike of each prompt to refuse; `labeller` decides whether it is one."""

    @model_validator(mode="after")
    def _judged(self) -> "PromptsSection":
        if self.lookalikes is not None and self.labeller is None:
            raise ValueError("lookalikes needs a labeller, which decides whether a look-alike is benign; name one")
        return self


class GenerateSection(Section):
    teacher: str = "recorded"
    """`recorded` replays `recordings`; anything else is a model: an inspect_ai name (`anthropic/…`,
    `openai-api/SERVICE/MODEL`), a GGUF file, or smollm2, a folder or a hub id, run here."""
    recordings: str = "starter:demonstrations.jsonl"
    """Recorded completions of the teacher, JSON lines."""
    samples: int = Field(default=4, ge=1)
    """Completions a prompt from a live teacher, each with its own seed; a recorded one gives all it has."""
    max_tokens: int = Field(default=1024, ge=16)
    """The most tokens of one completion of a live teacher."""
    temperature: float = Field(default=0.8, ge=0)
    """Sampling temperature of a live teacher."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """The stage stops when more than this share of the samples fail."""


class FilterSection(Section):
    runs: int = Field(default=3, ge=1)
    """Judge runs a completion (k); the score is their minimum. The compact judge has three members, and gives three at
    most."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """The least score that is kept."""
    best_of: int = Field(default=1, ge=1)
    """How many completions of a prompt are kept at most, the best."""
    limit: int | None = Field(default=None, ge=1)
    """How many samples are kept at most: in turn from each source, category and behaviour, the best of each first;
    null keeps all."""
    side_information: bool = False
    """Whether a prompted judge is told what the prompt's label says, to agree or disagree with."""
    max_tokens: int = Field(default=512, ge=64)
    """The most tokens of a prompted judge's verdict, its own reasoning included."""


class DistillSection(Section):
    plain_share: float = Field(default=0.3, ge=0, lt=1)
    """The most that everyday prompts may make up of the examples; the rest of them are left out."""


class LoraSection(Section):
    """Train a small adapter beside the weights (LoRA) in place of the weights."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(default=32, ge=1)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped while training."""
    targets: list[str] | None = None
    """Names of the linear layers that get one, such as q_proj; null takes all of them, the head left out."""


class MixSection(Section):
    """Ordinary chat mixed in among the examples, so that the student keeps what it could do."""

    data: str
    """Conversations that end in the assistant's turn: JSON lines, CSV, parquet or hub:OWNER/NAME:SPLIT
    (docs/training.md). Those that hold a held-out prompt are left out and counted."""
    share: float = Field(default=0.2, gt=0, lt=1)
    """Their share of the examples; less where the set has not so many."""


class SftSection(Section):
    epochs: int = Field(default=2, ge=1)
    """Passes over the examples."""
    limit: int | None = Field(default=None, ge=1)
    """How many examples are trained on, in turn from each behaviour and the everyday ones, those with the shortest
    completions first; null takes all. `plain_share` is about all examples, not about these."""
    mix: MixSection | None = None
    """Ordinary chat that is mixed in; null mixes in none."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate: linear warm-up over a twentieth of the steps, cosine decay to zero over the last two
    fifths."""
    batching: Literal["grouped", "packed"] = "grouped"
    """`grouped`: batches of like length, so that little is padding. `packed`: examples laid one after another into rows
    of up to `max_tokens`, none seeing another; then `batch_size` counts these rows."""
    batch_size: int = Field(default=8, ge=1)
    """Examples an optimiser step, over all processes."""
    device_batch: int | None = Field(default=None, ge=1)
    """Examples that one device takes at once; gradients are summed up until `batch_size` is reached. Null takes its
    whole part at once."""
    max_tokens: int = Field(default=384, ge=32)
    """Longer examples are left out and counted."""
    lora: LoraSection | None = None
    """A LoRA adapter; null trains the weights themselves."""
    frozen_layers: int = Field(default=0, ge=0)
    """The first layers (and with any, the embeddings) that do not train: faster, and less is forgotten. With `lora`
    they get no adapter."""
    decision_weight: float = Field(default=1.0, ge=1)
    """Loss weight of the tokens that decide: a reasoning's opening, clause and conclusion, and the answer's opening.
    The first word of a reasoning weighs the square of this."""
    reasoning: bool = True
    """False trains on the same answers without their reasoning: the control that tells what deliberation gives. Where
    it is true, RL gives a completion without reasoning the lowest reward."""
    held_out_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the examples' prompts that are kept out of training; the loss on them is measured every
    `checkpoint_steps`, and the checkpoint with the lowest is kept."""
    patience: int | None = Field(default=None, ge=1)
    """Training stops when so many measurements in a row did not lower the held-out loss; null trains to the end."""
    checkpoint_steps: int = Field(default=10, ge=1)
    """A checkpoint to resume from is written every so many steps."""

    @model_validator(mode="after")
    def _measured(self) -> "SftSection":
        if self.patience is not None and not self.held_out_share:
            raise ValueError("patience needs a held-out loss to watch; set held_out_share, such as 0.05")
        return self


class RlSection(Section):
    steps: int = Field(default=4, ge=1)
    """GRPO steps."""
    prompts: int = Field(default=4, ge=1)
    """Prompts a step."""
    group: int = Field(default=4, ge=2)
    """Completions a prompt, whose mean reward is the baseline."""
    device_batch: int | None = Field(default=None, ge=1)
    """Completions that one device learns from at once, as in sft; all of a step's are written at once."""
    max_tokens: int = Field(default=128, ge=16)
    """The most tokens of one completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the completions."""
    learning_rate: float = Field(default=2e-6, gt=0)
    """Peak learning rate: linear warm-up over a tenth of the steps, cosine decay to zero over the last two fifths."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whether advantages are divided by the spread of the group's or batch's rewards. With `none` a group whose rewards
    hardly differ hardly counts, so that the noise of a judge with continuous scores is not blown up."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty against the model that RL starts from."""
    lora: LoraSection | None = None
    """A LoRA adapter; null trains the weights themselves."""
    frozen_layers: int = Field(default=0, ge=0)
    """As in sft."""
    exact_answers: bool = False
    """Prompts with expected answers or checks are rewarded by these, 1 or 0, and cost no judge call."""
    cut_off: Literal["baseline", "out"] = "out"
    """What becomes of a completion that is cut off below evaluate's `max_tokens`. It is out of the loss; `out` leaves
    it out of its group's mean too, and `baseline` counts it there, with the lowest reward."""
    rollouts: Literal["transformers", "llamacpp", "vllm", "vllm_server"] = "transformers"
    """Who writes the completions: the weights in training, the embedded server with them quantised to 8 bits, on some
    CPUs the faster one, vLLM beside the training on its GPUs, or a vLLM server on port 8000 (docs/training.md). With
    all but the first importance weights correct for the difference."""
    report_to: Literal["none", "trackio", "wandb"] = "none"
    """Where the curves go beside the manifest; the package of that name must be installed."""
    checkpoint_steps: int = Field(default=1, ge=1)
    """A checkpoint to resume from is written every so many steps. Each step has a generation of its own, so that a
    checkpoint always stands between two."""


class EvaluateSection(Section):
    arms: list[Arm] = Field(default=list(ARMS), min_length=1)
    """Which models are measured; base_spec is base with the summarised spec in its system message. Without `rl` among
    them `delib run` leaves RL out; `delib rl` and `delib ablate` run it all the same."""
    max_tokens: int = Field(default=224, ge=16)
    """The most tokens of one completion, the same for all arms."""
    quantisation: Literal["f32", "q8_0", "q4_0"] = "q8_0"
    """Weights of the embedded server; the transformers engine uses `dtype`."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many held-out prompts, balanced over behaviours; null takes all."""
    second_judge: str | None = None
    """A judge that neither filters nor rewards, `probe` or a model; its figures stand beside the first one's."""


class ReportSection(Section):
    samples: int = Field(default=3, ge=0)
    """Prompts a category that the report shows with all arms side by side."""


class Price(Section):
    prompt: float = Field(ge=0)
    """For a million tokens that are sent."""
    completion: float = Field(ge=0)
    """For a million tokens that are written."""


class LimitsSection(Section):
    """What calls to models may take. The same for all models that a run calls; each has its own concurrency."""

    concurrency: int = Field(default=64, ge=1)
    """Calls to one model at once, at most; fewer while its server says that it is full."""
    timeout_seconds: float = Field(default=600, gt=0)
    """How long one try of a call to a server may take. A GGUF file or a model folder takes as
    long as it takes."""
    max_tokens: int | None = Field(default=None, ge=1)
    """A run stops cleanly before its calls have taken more tokens than this, sent and written; null for no limit."""
    max_cost: float | None = Field(default=None, gt=0)
    """As max_tokens, in the unit of the prices; models without a price cost nothing."""
    prices: dict[str, Price] = {}
    """Prices by model name: {"anthropic/…": {"prompt": 3, "completion": 15}}."""


class RaySection(Section):
    """A Ray cluster over which labels, generate, filter and the answers of evaluate are made (docs/ray.md)."""

    address: str | None = None
    """`HOST:PORT` of the cluster's head, or `auto` on a machine of the cluster; null starts one on this machine while a
    stage runs."""
    workers: int = Field(default=2, ge=1)
    """Worker processes, at most. Each takes one CPU of the cluster, as Ray counts them, and makes
    `limits.concurrency` calls to one model at once."""
    block: int = Field(default=64, ge=1)
    """Samples that a worker is given at once; their records are written when all of them are finished."""


class Recipe(Section):
    name: str = Field(default="quickstart", pattern=r"^[A-Za-z0-9._-]+$")
    """The run folder's name below `runs/`."""
    seed: int = 0
    """Seeds sampling, shuffling, folds and bootstrap."""
    data_seed: int | None = None
    """Seeds the stages up to distill, and models that judge; null takes `seed`. `delib ablate` sets it, so that its
    seeds share data and judge."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where training and the transformers engine run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of training and of the transformers engine. Training in bfloat16 computes in it, and keeps the
    weights that it trains in float32, a LoRA adapter's also after it is merged: steps smaller than bfloat16 can tell
    would be lost."""
    gradient_checkpointing: bool = False
    """Whether training keeps only the layers' inputs for the backward pass and computes the rest again: less memory,
    about a third more work."""
    accelerate: str | None = None
    """A config file of `accelerate launch`: how many processes train, by FSDP, DeepSpeed or neither. SFT and RL
    then start under it; null trains in this process."""
    engine: Literal["llamacpp", "transformers"] = "llamacpp"
    """Who generates for evaluate and for a live teacher; models that llama.cpp can't take use transformers."""
    model: str = "smollm2"
    """The student: `smollm2`, a model folder, or a hub id."""
    spec: str = "starter:spec.md"
    """The written policy, in markdown."""
    judge: str = "compact"
    """Who grades in filter, rl and evaluate: `compact`, or a model as for `generate.teacher`."""
    limits: LimitsSection = LimitsSection()
    prompts: PromptsSection = PromptsSection()
    generate: GenerateSection = GenerateSection()
    filter: FilterSection = FilterSection()
    distill: DistillSection = DistillSection()
    sft: SftSection = SftSection()
    rl: RlSection = RlSection()
    evaluate: EvaluateSection = EvaluateSection()
    report: ReportSection = ReportSection()
    ray: RaySection | None = None
    """Where labels, generate, filter and evaluate's answers are made beyond this process; null makes them in it."""

    @property
    def record_seed(self) -> int:
        """The seed of the stages up to distill."""
        return self.seed if self.data_seed is None else self.data_seed


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
            if parent in known.model_fields:  # else it is a key of a mapping of sections
                kind = known.model_fields[parent].annotation
                known = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, Section)), kind)
        return f"{path}: {key}: no such key; keys here are {', '.join(known.model_fields)}"
    return f"{path}: {key}: {item['msg']} (got {item['input']!r})"


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    def find(name: str) -> str:
        if name.startswith(("starter:", "hub:")):
            return name
        return str((base / name).resolve())

    def find_model(name: str) -> str:
        if name.startswith((".", "/")) or name.endswith(".gguf") or (base / name / "config.json").is_file():
            return find(name)
        return str(Path(name).resolve()) if Path(name, "config.json").is_file() else name

    given = recipe.prompts
    prompts = given.model_copy(
        update={
            "train": find(given.train),
            "rl": given.rl and find(given.rl),
            "heldout": find(given.heldout),
            "labeller": given.labeller and find_model(given.labeller),
            "lookalikes": given.lookalikes and find_model(given.lookalikes),
        }
    )
    teacher = recipe.generate.teacher
    generate = recipe.generate.model_copy(
        update={
            "recordings": find(recipe.generate.recordings),
            "teacher": teacher if teacher == "recorded" else find_model(teacher),
        }
    )
    second = recipe.evaluate.second_judge
    mix = recipe.sft.mix
    changes = {
        "spec": find(recipe.spec),
        "judge": find_model(recipe.judge),
        "prompts": prompts,
        "generate": generate,
        "evaluate": recipe.evaluate.model_copy(update={"second_judge": second and find_model(second)}),
        "model": find_model(recipe.model),
        "accelerate": recipe.accelerate and find(recipe.accelerate),
        "sft": recipe.sft.model_copy(update={"mix": mix and mix.model_copy(update={"data": find(mix.data)})}),
    }
    return recipe.model_copy(update=changes)


def path_of(name: str) -> Path:
    """The file behind a recipe's path: `starter:name` lies in the package."""
    return STARTER / name.removeprefix("starter:") if name.startswith("starter:") else Path(name)


def dump(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
