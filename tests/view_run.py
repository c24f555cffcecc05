"""A run folder as the stages leave it, made without a model: what the viewer's tests look at."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conftest import ROWS, SPEC
from delib import chat, recipe, spec
from delib.evals.scoring import by_judge, metrics
from delib.recipe import Recipe
from delib.records import Example, Manifest, Message, Prompt, Sample, Verdict
from delib.run import Run, StageFolder, sha256

POLICY = spec.parse(SPEC)
JUDGES = ("compact", "probe")
SAYS = {
    "comply": "Here is what you asked for, with the signs to look for.",
    "refuse": "I'm sorry, but I can't help with that.",
    "partial": "I shouldn't, but here is a part of it.",
    "safe_complete": "In general it depends. Please call our advisers; a colleague can help.",
}


def prompt(number: int, split: str, text: str | None = None) -> Prompt:
    """The prompts of conftest.ROWS in turn, numbered."""
    name, asked, category, clause, behaviour = ROWS[number % len(ROWS)]
    return Prompt(
        id=f"{split}-{name}-{number}",
        messages=[Message(role="user", content=text or f"{asked} (number {number})")],
        category=category,
        clause=clause,
        behaviour=behaviour,
        source="plain" if category is None else "policy",
        split=split,
    )


def verdict(seen: str, judge: str, view: str = "answer", reason: str = "", score: float = 0.9) -> Verdict:
    return Verdict(
        score=score,
        behaviour=seen,
        criteria={"compliance": score, "style": score, "helpfulness": 1.0},
        reason=reason,
        view=view,
        judge=judge,
        sent=f"The judge was shown {seen}.",
    )


def sample(about: Prompt, seen: str, model: str, *, text: str | None = None, **more: Any) -> Sample:
    """An answer that was seen to do `seen`, by both judges."""
    told = chat.join(f"{about.clause} decides it. I {seen}.", text or SAYS[seen])
    made = chat.completion(
        told, sent=f"user: {about.messages[-1].content}", model=model, cut=False, usage={"completion": 9}
    )
    verdicts = [verdict(seen, judge) for judge in JUDGES]
    return Sample(prompt=about, excerpt_id="x", completion=made, **{"verdicts": verdicts} | more)


def finish(run: Run, stage: str, records: Iterable[Any] | None, counts: Mapping[str, int], **detail: Any) -> None:
    folder = run.stage(stage)
    folder.path.mkdir(parents=True, exist_ok=True)
    if records is not None:
        folder.replace(records)
    inputs = {"spec": sha256(run.path / "spec.md")}
    made = Manifest(stage=stage, recipe="k", inputs=inputs, outputs={}, counts=counts, seconds=60, detail=detail)
    folder.finish(made, [])


def start(path: Path) -> Run:
    path.mkdir(parents=True)
    (path / "spec.md").write_text(SPEC, encoding="utf-8")
    settings = Recipe(name="made", spec=str(path / "spec.md"), evaluate={"arms": ["base", "sft", "rl"]})
    (path / "recipe.yaml").write_text(recipe.dump(settings), encoding="utf-8")
    return Run(path)


def make(path: Path, train: list[Prompt], held: list[Prompt], answers: Mapping[str, list[Sample]]) -> Path:
    """A whole run: every teacher's completion kept but for each seventh."""
    run = start(path)
    finish(run, "prompts", [*train, *held], {"train": len(train), "heldout": len(held)})
    written = [sample(p, str(p.behaviour), "recorded", verdicts=[]) for p in train]
    finish(run, "generate", written, {"in": len(train), "out": len(train)})
    judged = []
    for number, one in enumerate(written):
        fate = {"kept": True} if number % 7 else {"kept": False, "drop_reason": "low score: style"}
        shown = [verdict(str(one.prompt.behaviour), "compact-0", "full", score=0.9 if number % 7 else 0.2)]
        judged.append(one.model_copy(update={"verdicts": shown} | fate))
    kept = [s for s in judged if s.kept]
    drops = {"low score: style": len(judged) - len(kept)}
    finish(run, "filter", judged, {"in": len(judged), "out": len(kept)}, drops=drops)
    examples = [
        Example(prompt_id=s.prompt.id, messages=s.prompt.messages, reasoning="R", answer=SAYS[str(s.prompt.behaviour)])
        for s in kept
    ]
    finish(run, "distill", examples, {"in": len(kept), "out": len(kept)})
    curve = [{"step": n, "loss": 5 / n, "accuracy": 1 - 1 / n} for n in range(1, 1200)]
    finish(run, "sft", None, {"steps": len(curve)}, curve=curve)
    rewards = [{"step": n, "reward": n / 30, "monitor": {"refusals": 0.5}} for n in range(1, 21)]
    rollouts = [sample(p, str(p.behaviour), "student", index=n) for n, p in enumerate(train[:4])]
    finish(run, "rl", rollouts, {"steps": 20}, curve=rewards, alarms=["refusals of plain prompts rose"])
    found = []
    for arm, rows in answers.items():
        StageFolder(path / "evaluate" / arm).path.mkdir(parents=True)
        StageFolder(path / "evaluate" / arm).replace(rows)
        found += [*metrics(rows, POLICY, arm), *by_judge(rows, POLICY, arm, "probe")]
    finish(run, "evaluate", None, {"out": len(held)}, judges=list(JUDGES))
    (path / "evaluate" / "metrics.json").write_text(json.dumps([m.model_dump() for m in found]), encoding="utf-8")
    return path


def small(path: Path, train: int = 28, held: int = 36) -> Path:
    """Base complies with everything, SFT refuses everything, RL does as the policy asks but for the last."""
    asked = [prompt(n, "heldout") for n in range(held)]
    answers = {
        "base": [sample(p, "comply", "base") for p in asked],
        "sft": [sample(p, "refuse", "sft") for p in asked],
        "rl": [sample(p, str(p.behaviour), "rl") for p in asked[:-1]] + [sample(asked[-1], "refuse", "rl")],
    }
    return make(path, [prompt(n, "train") for n in range(train)], asked, answers)
