"""Opens models and judges by their names for one recipe: one cache, one set of limits, one ledger."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from delib import labelling, made_with
from delib import recipe as recipes
from delib.errors import UserError
from delib.judges.compact import CompactJudge
from delib.judges.probe import ProbeJudge
from delib.judges.prompted import PromptedJudge
from delib.models import embedded, opened, weights
from delib.models.cache import Cache
from delib.models.calls import Caller, Finished, Ledger, Working, estimated_tokens
from delib.recipe import LimitsSection, Recipe
from delib.records import Prompt, Record, Sample
from delib.spec import Spec
from delib.stages import evaluate, filter, generate
from delib.wiring import ARMS

FITTED: dict[str, type[CompactJudge] | type[ProbeJudge]] = {"compact": CompactJudge, "probe": ProbeJudge}
"""The judges that are no models to be called."""
Judge = CompactJudge | ProbeJudge | PromptedJudge
CONVERSATION_TOKENS = 2048
"""Room for the conversation and the instructions in a call of teacher or judge."""
LABEL, LOOKALIKES = "label", "look-alikes"
"""What a labeller is asked for of the prompts, as a stage of its own kind."""


def recipe_of(model: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of the run that a checkpoint stands in, with the spec that the run keeps, else the quickstart's; it
    gives spec and max_tokens."""
    run = Path(model).resolve().parent.parent
    if not (Path(model).is_dir() and (run / made_with.RECIPE).exists()):
        return recipes.load(recipes.QUICKSTART, overrides)
    found, kept = recipes.load(run / made_with.RECIPE, overrides), run / made_with.SPEC
    if not kept.exists() or any(item.startswith("spec=") for item in overrides or []):
        return found
    return found.model_copy(update={"spec": str(kept)})


class Opener:
    """`ledger`: what calls cost goes there, and counts towards its limits; None begins one, in memory alone.
    `cache`: where finished calls are kept; None takes that of this machine."""

    def __init__(self, recipe: Recipe, spec: Spec, ledger: Ledger | None = None, cache: Finished | None = None) -> None:
        self.recipe, self.spec = recipe, spec
        self.ledger, self.cache = ledger or Ledger(recipe.limits), cache or Cache()

    @property
    def at_once(self) -> int:
        """Samples that are worked on side by side: enough that both the teacher and the judge are busy."""
        return 2 * self.recipe.limits.concurrency

    @property
    def context_tokens(self) -> int:
        """Room for the longest excerpt, a long conversation, a completion of the teacher and the verdict on it."""
        longest = max(estimated_tokens(self.spec.excerpt(c.name)) for c in self.spec.categories)
        return longest + CONVERSATION_TOKENS + self.recipe.generate.max_tokens + self.recipe.filter.max_tokens

    def model(self, name: str) -> AbstractAsyncContextManager[Caller]:
        """A model by its name, under the recipe's limits; what it costs goes into the ledger."""
        return opened.open_model(self.recipe, name, self.ledger, self.cache, context_tokens=self.context_tokens)

    @asynccontextmanager
    async def arm(
        self, folder: Path, name: str, context_tokens: int, slots: int = embedded.SLOTS
    ) -> AsyncIterator[Caller]:
        """A model in a folder, by the recipe's engine; it costs nothing."""
        async with opened.open_folder(self.recipe, folder, name, context_tokens, slots) as backend:
            yield Caller(backend, self.cache, Ledger(LimitsSection()))

    def any(self, name: str, context_tokens: int, slots: int = embedded.SLOTS) -> AbstractAsyncContextManager[Caller]:
        """A model by its name; where it is run here, with room for `slots` calls at once, of so many tokens each, or
        of those of a teacher where it is a GGUF file and that is more."""
        if opened.is_hosted(name) or name.endswith(".gguf"):
            room = max(context_tokens, self.context_tokens)
            return opened.open_model(self.recipe, name, self.ledger, self.cache, context_tokens=room, slots=slots)
        return self.arm(weights.resolve(name), name, context_tokens, slots)

    @asynccontextmanager
    async def judge(self, name: str, side_information: bool = False) -> AsyncIterator[Judge]:
        """A judge by its name: a fitted one, or a model that holds the spec. `side_information`: for the filter."""
        if name in FITTED:
            yield FITTED[name](self.spec)
            return
        async with self.model(name) as model:
            yield self.prompted(name, model, side_information)

    @asynccontextmanager
    async def teacher_and_judge(self) -> AsyncIterator[tuple[Caller, generate.HandOn]]:
        """The teacher, and what each of its finished samples is handed to: the judge, at once. The verdicts land in the
        cache, where filter finds them: its own records wait until generate is whole, since their key holds its hash."""
        recipe, side = self.recipe, self.recipe.filter.side_information
        async with AsyncExitStack() as stack:
            teacher = await stack.enter_async_context(self.model(recipe.generate.teacher))
            judge: Judge | None = None
            if recipe.judge == recipe.generate.teacher:
                judge = self.prompted(recipe.judge, teacher, side)
            elif recipe.judge not in FITTED:
                judge = await stack.enter_async_context(self.judge(recipe.judge, side))

            async def hand_on(sample: Sample) -> None:
                if judge is not None:
                    await filter.grade(sample, judge, recipe.filter.runs, 0.0)

            yield teacher, hand_on

    def working(self, stage: str, checkpoint: Path | None = None) -> AbstractAsyncContextManager[Working]:
        """What works on the records of a stage, with its models open. Of `prompts` that is LABEL or LOOKALIKES, of
        `evaluate` the arm of this name, whose model is in the folder `checkpoint`, or else the one that is trained."""
        if stage in ARMS:
            return self._answering(stage, checkpoint)
        if stage in (LABEL, LOOKALIKES):
            return self._labelling(stage)
        if stage == "generate":
            section = self.recipe.generate
            return generate.working(
                self.teacher_and_judge,
                self.spec,
                max_tokens=section.max_tokens,
                temperature=section.temperature,
                seed=self.recipe.record_seed,
            )
        judge = partial(self.judge, self.recipe.judge, self.recipe.filter.side_information)
        return filter.working(judge, runs=self.recipe.filter.runs, threshold=self.recipe.filter.threshold)

    def _answering(self, arm: str, checkpoint: Path | None) -> AbstractAsyncContextManager[Working]:
        if checkpoint is not None and not checkpoint.is_dir():
            raise UserError(f"{checkpoint}: not on this machine; keep the run where the whole cluster sees it")
        in_context, most = arm == "base_spec", self.recipe.evaluate.max_tokens
        room = embedded.PROMPT_ROOM + most + (estimated_tokens(self.spec.summary()) if in_context else 0)
        return evaluate.working(
            partial(self.arm, checkpoint or weights.resolve(self.recipe.model), arm, room),
            self.spec,
            in_context=in_context,
            max_tokens=most,
        )

    def _labelling(self, what: str) -> AbstractAsyncContextManager[Working]:
        section = self.recipe.prompts
        assert section.labeller is not None
        labeller, writer = partial(self.model, section.labeller), None
        if what == LOOKALIKES and section.lookalikes is not None:
            same = section.lookalikes == section.labeller
            writer = labeller if same else partial(self.model, section.lookalikes)
        return labelling.working(
            labeller, writer, self.spec, max_tokens=self.recipe.filter.max_tokens, seed=self.recipe.record_seed
        )

    def prompted(self, name: str, model: Caller, side_information: bool) -> PromptedJudge:
        return PromptedJudge(
            self.spec,
            model,
            name=name,
            max_tokens=self.recipe.filter.max_tokens,
            seed=self.recipe.record_seed,
            side_information=side_information,
        )

    @asynccontextmanager
    async def judges(self) -> AsyncIterator[list[Judge]]:
        """The judges of the evaluation, the one that also filtered and rewarded first."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self.judge(name)) for name in self.judge_names()]

    def judge_names(self) -> list[str]:
        second = self.recipe.evaluate.second_judge
        return [self.recipe.judge] + ([second] if second else [])


def kinds(stage: str) -> tuple[type[Record], type[Record]]:
    """The kinds of record that `Opener.working` of a stage takes, and tells of."""
    return (Prompt, labelling.Asked) if stage in (LABEL, LOOKALIKES) else (Sample, Sample)


def called(recipe: Recipe) -> dict[str, str]:
    """The models that a recipe calls, beside those that it trains: by its key, the name."""
    teacher = recipe.generate.teacher
    named = {
        "prompts.labeller": recipe.prompts.labeller,
        "prompts.lookalikes": recipe.prompts.lookalikes,
        "generate.teacher": None if teacher == "recorded" else teacher,
        "judge": None if recipe.judge in FITTED else recipe.judge,
        "evaluate.second_judge": None if recipe.evaluate.second_judge in FITTED else recipe.evaluate.second_judge,
    }
    return {key: name for key, name in named.items() if name is not None}
