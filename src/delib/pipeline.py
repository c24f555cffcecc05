"""The stage table, wiring and resume; the only place that opens models.

A stage is skipped when its manifest stands for the same key: its recipe section, the seed and the hashes of its
inputs. Otherwise it runs, going on from the records that it finished under the same key.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from delib import made_with, on_ray, remote, sources
from delib import recipe as recipes
from delib import spec as specs
from delib.errors import StageError, UserError
from delib.evals import labels
from delib.judges import agreement
from delib.judges.prompted import PromptedJudge
from delib.labelling import Ask
from delib.models import memory, recorded, weights
from delib.models.calls import Ledger, Spread, here
from delib.opener import LABEL, LOOKALIKES, Opener
from delib.preflight import check, prompt_files
from delib.progress import say
from delib.recipe import Recipe
from delib.records import Example, Manifest, Metric, Prompt, Sample
from delib.run import Run, StageFolder, disk_error, free_megabytes, held, key_of, sha256, tensor_error, write_whole
from delib.spec import Spec
from delib.stages import distill, evaluate, filter, generate, prompts, report, rl, sft
from delib.training import cold_start, processes
from delib.wiring import ARMS, BEFORE, CHECKPOINT, IDLE, OUTPUTS, RECORD_STAGES, SECTIONS, TOGETHER, before, stages_of

ASKED = 120
"""Labelled answers that a prompted judge is measured with for the report; `delib judge-check` asks about all."""
NEEDED_MEGABYTES = 6000
"""Two checkpoints of a 135M float32 model, their optimiser state while training, and the GGUF copies."""


class Pipeline:
    """A recipe and its run folder. Inputs are read and checked when it is made, before any compute.

    `ledger`: that of another run whose limits hold for both together; None takes the run's own, `spent.json`.
    `spec`: the file of the policy; None takes the recipe's.
    """

    def __init__(self, recipe: Recipe, run: Run, ledger: Ledger | None = None, spec: Path | None = None) -> None:
        memory.keep()
        self.recipe, self.run = recipe, run
        self.spec_path = spec or recipes.path_of(recipe.spec)
        self.spec: Spec = specs.load(self.spec_path)
        self.opener = Opener(recipe, self.spec, ledger or Ledger(recipe.limits, run.path / "spent.json"))

    def folder(self, stage: str) -> StageFolder:
        return self.run.stage(stage)

    def _of(self, stage: str, split: str | None = None) -> list[Prompt]:
        rows = self.run.finished("prompts", Prompt)
        return [p for p in rows if split is None or p.split == split]

    def own_inputs(self, stage: str) -> dict[str, str]:
        """The hashes of what a stage reads that no earlier one made."""
        named = {} if stage == "sft" else {"spec": self.spec_path}  # SFT sees of the spec what the examples say of it
        recipe = self.recipe
        if stage == "generate" and recipe.generate.teacher == "recorded":
            named["recordings"] = recipes.path_of(recipe.generate.recordings)
        hashes = {name: sha256(path) for name, path in named.items()}
        if stage == "prompts":
            hashes |= {str(split): sources.identity(name) for split, name in prompt_files(recipe).items()}
        if SECTIONS.get(stage, stage) in ("sft", "rl", "evaluate"):
            hashes["model"] = self._student(stage)
        if stage == "sft" and recipe.sft.mix is not None:
            hashes["mix"] = sources.identity(recipe.sft.mix.data)
            hashes["heldout"] = sources.identity(prompt_files(recipe)["heldout"])
        return hashes

    def _student(self, stage: str) -> str:
        """What the model is. A folder that is out of sight is taken for what the finished stage was made from."""
        made, place = self.folder(stage).manifest(), Path(self.recipe.model)
        lost = place.is_absolute() and not place.is_dir()
        return made.inputs["model"] if lost and made is not None else weights.content(self.recipe.model)

    def inputs(self, stage: str) -> dict[str, str]:
        """The hashes of what a stage reads. Raises UserError where an earlier one is not finished."""
        hashes = self.own_inputs(stage)
        for earlier in before(self.recipe, stage):
            manifest = self.folder(earlier).manifest()
            if manifest is None:
                raise UserError(
                    f"{self.run.path}: stage {earlier} is not finished; run 'delib {earlier} --run …' first"
                )
            hashes[earlier] = key_of(manifest.outputs, 0, {})
        if stage == "report" and self.blind().samples:
            hashes["labels"] = sha256(self.labels_path / labels.SHEET)
        return hashes

    def basis(self, stage: str) -> tuple[Any, int]:
        """What of the recipe a stage's output depends on: its section, and what else of it counts, and the seed."""
        # The second judge changes no answer: with another one they are graded anew, and not made anew.
        rules = SECTIONS.get(stage, stage)
        made = getattr(self.recipe_of(stage), rules)
        chosen = rules == "sft" and made.held_out_share  # by a loss that is a mean over parts
        section: Any = made.model_dump(exclude=None if chosen else IDLE.get(rules))
        if stage == "ablate":
            section["arms"] = self.further_arms
        if rules in ("filter", "rl"):
            section = [section, self.recipe.judge, self.recipe.filter.max_tokens]
        if rules == "rl":  # what is cut off is learned from, or not, by evaluate's limit
            section = [section, self.recipe.rl.max_tokens < self.recipe.evaluate.max_tokens]
        if rules in ("sft", "rl", "evaluate", "generate"):
            engine = [] if rules == "sft" else [self.recipe.engine]  # which writes nothing there
            section = [section, self.recipe.device, self.recipe.dtype, *engine]
        seed = self.recipe.record_seed if stage in RECORD_STAGES else self.recipe.seed
        return section, seed

    def key(self, stage: str) -> str:
        return key_of(*self.basis(stage), self.inputs(stage))

    def recipe_of(self, stage: str) -> Recipe:
        """The recipe as a stage takes it."""
        return cold_start.recipe_of(self.recipe) if stage == "cold_start" else self.recipe

    @property
    def further_arms(self) -> list[str]:
        """The arms of the ablation that evaluate does not measure."""
        return [arm for arm in ARMS if arm not in self.recipe.evaluate.arms]

    def execute(self, stage: str) -> Manifest:
        """Run one stage unless it is done, and write its manifest.

        Where a launcher started several processes, each of them comes here, and the one that leads writes.
        """
        if processes.count() > 1 and stage not in TOGETHER:
            raise UserError(
                f"{stage}: {processes.count()} processes were started, and only {', '.join(TOGETHER)} are run by "
                "several; run the others without a launcher (with `accelerate` in the recipe, these start theirs)"
            )
        key, folder, lead = self.key(stage), self.folder(stage), processes.leads()
        done = folder.done(key) and self.graded(stage)
        processes.wait(self.recipe)
        if done:
            if lead:
                shutil.rmtree(folder.path / weights.TRAINER, ignore_errors=True)
                say(f"{stage}: done already")
                folder.publish()
            manifest = folder.manifest()
            assert manifest is not None
            return manifest
        if stage in TOGETHER and self.recipe.accelerate is not None and not processes.launched():
            processes.launch(self.recipe, stage, self.run.path)
            self.opener.ledger.read()
            manifest = folder.manifest()
            assert manifest is not None
            return manifest
        with held(self.run.path) if lead else nullcontext():
            return self._make(stage, folder, key, lead)

    def _make(self, stage: str, folder: StageFolder, key: str, lead: bool) -> Manifest:
        if lead and SECTIONS.get(stage, stage) == "sft":
            weights.resolve(self.recipe.model)  # one process fetches it; one that is not there sets nothing aside
        if lead and folder.begin(key):
            say(f"{stage}: its inputs changed, so it is made anew; the old one is in {folder.path.name}.stale")
        if lead:
            made_with.keep(self.recipe, self.spec_path, folder.path)
        processes.wait(self.recipe)
        started = time.monotonic()
        try:
            made: Manifest = _RUN[stage](self, folder)
        except (UserError, StageError, KeyboardInterrupt):
            if lead:
                _leave(folder)
            raise
        except OSError as error:
            raise disk_error(folder.path, error) from error
        except (RuntimeError, SafetensorError) as error:
            raise tensor_error(folder.path, error) from error
        seconds = time.monotonic() - started
        named = {"stage": stage, "recipe": key, "inputs": self.inputs(stage), "seconds": round(seconds, 1)}
        final = made.model_copy(update=named)
        if lead:
            final = folder.finish(final, OUTPUTS[stage](folder))
            shutil.rmtree(folder.path / weights.TRAINER, ignore_errors=True)
            say(f"{stage}: {', '.join(f'{k} {v}' for k, v in final.counts.items())} ({final.seconds:.0f} s)")
        processes.close(self.recipe)
        if stage in TOGETHER:
            memory.free()
        return final

    def graded(self, stage: str) -> bool:
        """Whether a finished stage was graded by the judges that the recipe names now."""
        manifest = self.folder(stage).manifest()
        return SECTIONS.get(stage, stage) != "evaluate" or (
            manifest is not None and manifest.detail.get("judges") == self.opener.judge_names()
        )

    def _prompts(self, folder: StageFolder) -> Manifest:
        section, ask = self.recipe.prompts, None
        if section.labeller is not None:
            written = self.spread(LOOKALIKES) if section.lookalikes is not None else None
            ask = Ask(self.spread(LABEL), written, self.recipe.generate.max_failure_rate)
        return prompts.run(
            prompt_files(self.recipe),
            self.spec,
            folder,
            text=section.text,
            near_duplicates=section.near_duplicates,
            ask=ask,
        )

    def _generate(self, folder: StageFolder) -> Manifest:
        section, train = self.recipe.generate, self._of("prompts", "train")
        if section.teacher == "recorded":
            return generate.replay(train, recorded.load(recipes.path_of(section.recordings)), self.spec, folder)

        return generate.live(
            train,
            self.spread("generate"),
            self.spec,
            folder,
            samples=section.samples,
            max_failure_rate=section.max_failure_rate,
        )

    def _filter(self, folder: StageFolder) -> Manifest:
        section = self.recipe.filter
        return filter.run(
            self.run.folder_of("generate"),
            self.spread("filter"),
            folder,
            threshold=section.threshold,
            best_of=section.best_of,
            limit=section.limit,
        )

    def spread(self, stage: str, checkpoint: Path | None = None) -> Spread:
        """Where `Opener.working` works on the records: over the cluster that the recipe names, or here."""
        alone = stage in ARMS and self.recipe.device == "cuda"  # a GPU is no CPU of the cluster's
        if self.recipe.ray is not None and not alone:
            return on_ray.over(self.recipe.ray, self.opener, stage, checkpoint)
        at_once = evaluate.AT_ONCE if stage in ARMS else self.opener.at_once
        return here(partial(self.opener.working, stage, checkpoint), at_once)

    def _distill(self, folder: StageFolder) -> Manifest:
        section = self.recipe.distill
        return distill.run(
            self.run.folder_of("filter").stream(Sample),
            self.spec,
            folder,
            plain_share=section.plain_share,
            seed=self.recipe.record_seed,
        )

    def _sft(self, folder: StageFolder, stage: str = "sft") -> Manifest:
        recipe, examples = self.recipe_of(stage), self.run.finished("distill", Example)
        if stage == "cold_start":
            examples = cold_start.examples_of(examples, self._of("prompts", "train"), self.spec)
        heldout = self._of("prompts", "heldout") if recipe.sft.mix else None
        return sft.run(recipe, examples, weights.resolve(recipe.model), folder, heldout)

    def _rl(self, folder: StageFolder, after: str = "sft") -> Manifest:
        start = self.folder(after).path / CHECKPOINT
        own = self._of("prompts", "rl") or self._of("prompts", "train")
        return rl.run(self.recipe, own, partial(self.opener.judge, self.recipe.judge), self.spec, start, folder)

    def _ablate(self, folder: StageFolder) -> Manifest:
        return self._measure(folder, self.further_arms)

    def _evaluate(self, folder: StageFolder) -> Manifest:
        return self._measure(folder, self.recipe.evaluate.arms)

    def _measure(self, folder: StageFolder, arms: Sequence[str]) -> Manifest:
        held = evaluate.balanced(self._of("prompts", "heldout"), self.recipe.evaluate.limit)
        found: list[Metric] = []
        tokens = 0
        for arm in arms:
            checkpoint = None if arm.startswith("base") else (self.folder(arm).path / CHECKPOINT).resolve()
            found += evaluate.run_arm(
                arm,
                held,
                self.spread(arm, checkpoint),
                self.opener.judges,
                self.opener.judge_names(),
                self.spec,
                folder,
                at_once=self.opener.at_once,
            )
            graded = StageFolder(folder.path / arm).records(Sample)
            tokens += sum(s.completion.usage.get("completion", 0) for s in graded if s.completion)
        write_whole(folder.path / "metrics.json", json.dumps([m.model_dump() for m in found], indent=1) + "\n")
        return evaluate.close(found, len(held) * len(arms), tokens, self.opener.judge_names())

    def agreements(self) -> list[dict[str, Any]]:
        """Each judge's agreement with the shipped blind labels; a prompted one's, whose calls cost, with some."""
        rows = agreement.shipped()

        async def work() -> list[dict[str, Any]]:
            found = []
            async with self.opener.judges() as judges:
                for judge in judges:
                    if isinstance(judge, PromptedJudge):
                        found.append(await agreement.ask(judge, agreement.drawn(rows, ASKED), self.opener.at_once))
                    else:
                        found.append(agreement.measure(judge, rows))
            return found

        return asyncio.run(work())

    def answers(self) -> dict[str, list[Sample]]:
        """The evaluated samples of each arm, with those of the ablation where they stand. Raises UserError when
        evaluate is not finished."""
        self.run.folder_of("evaluate")
        places: dict[str, Path] = {arm: self.folder("evaluate").path / arm for arm in self.recipe.evaluate.arms}
        known = all(self.folder(stage).manifest() for stage in (*BEFORE["ablate"], "ablate"))
        if known and self.folder("ablate").done(self.key("ablate")):
            places |= {arm: self.folder("ablate").path / arm for arm in self.further_arms}
        return {arm: StageFolder(place).records(Sample) for arm, place in places.items()}

    def blind(self) -> labels.Blind:
        """The blind labels, without those of the ablation's arms that no longer stand, or were made anew since."""
        places = [self.run.path / folder / arm for folder in ("ablate", "ablate.stale") for arm in self.further_arms]
        earlier: dict[str, list[Sample]] = {}
        for place in places:
            earlier.setdefault(place.name, []).extend(StageFolder(place).stream(Sample))
        return labels.read(self.answers(), earlier, self.labels_path, self.spec)

    @property
    def labels_path(self) -> Path:
        return self.run.path / "labels"

    def draw_labels(self, prompts: int) -> tuple[Path, int]:
        """A sheet for blind labels of all arms' answers to so many held-out prompts; its path and its rows."""
        answers = self.answers()
        chosen = evaluate.balanced([s.prompt for s in answers[self.recipe.evaluate.arms[0]]], prompts)
        return self.labels_path / labels.SHEET, labels.draw(answers, {p.id for p in chosen}, self.labels_path)

    def _report(self, folder: StageFolder) -> Manifest:
        blind = self.blind()
        judges = self.opener.judge_names()
        return report.run(
            self.recipe,
            self.run,
            self.spec,
            folder,
            list(stages_of(self.recipe)),
            judges,
            self.agreements(),
            blind,
            self.opener.ledger.spent,
        )


_RUN: dict[str, Callable[[Pipeline, StageFolder], Manifest]] = {
    "prompts": Pipeline._prompts,
    "generate": Pipeline._generate,
    "filter": Pipeline._filter,
    "distill": Pipeline._distill,
    "sft": Pipeline._sft,
    "rl": Pipeline._rl,
    "evaluate": Pipeline._evaluate,
    "report": Pipeline._report,
    "cold_start": partial(Pipeline._sft, stage="cold_start"),
    "rl_only": partial(Pipeline._rl, after="cold_start"),
    "ablate": Pipeline._ablate,
}


def _leave(folder: StageFolder) -> None:
    """Leave a stage that stops; a failure of that does not hide why it stops."""
    try:
        folder.leave()
    except StageError as error:
        say(f"note: {error}")


def open_run(path: Path) -> Pipeline:
    """A run that exists, by the recipe and the spec that it was started with: the files that these came from may have
    been edited since. Raises UserError when it is none."""
    run = remote.opened(path, fetch=not processes.launched())
    spec = path / made_with.SPEC
    return Pipeline(made_with.recipe_of(path), run, spec=spec if spec.exists() else None)


def start_run(recipe: Recipe, path: Path, ledger: Ledger | None = None, spec: Path | None = None) -> Pipeline:
    """A new run folder for a recipe, or one that exists, in which nothing is changed before a stage is run. `ledger`
    and `spec` as for a Pipeline."""
    if problems := check(recipe):
        raise UserError(problems)
    run = remote.opened(path)
    if problems := made_with.in_the_way(recipe, path):
        raise UserError(problems)
    return Pipeline(recipe, run, ledger, spec)


def run_to(pipeline: Pipeline, last: str) -> None:
    """The recipe's stages up to and with `last`."""
    run_all(pipeline, stages_of(pipeline.recipe, last))


def run_all(pipeline: Pipeline, stages: Sequence[str]) -> None:
    """These stages, in order; one that is done is not run. The run's folder keeps what it was started with, and later
    stages go by that, also where the policy's file is edited meanwhile."""
    made_with.keep(pipeline.recipe, pipeline.spec_path, pipeline.run.path)
    pipeline.spec_path = pipeline.run.path / made_with.SPEC
    free = free_megabytes(pipeline.run.path)
    if free < NEEDED_MEGABYTES and not set(stages) <= set(RECORD_STAGES):
        say(f"note: {free} MiB are free at {pipeline.run.path}; training needs about {NEEDED_MEGABYTES}")
    for stage in stages:
        pipeline.execute(stage)
