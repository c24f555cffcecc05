"""One prompt's way through a run, told in order: `delib show RUN PROMPT_ID`."""

from pathlib import Path

from delib.errors import UserError
from delib.recipe import ARMS
from delib.records import Completion, Example, Prompt, Sample, Verdict
from delib.run import Run, StageFolder


def tell(path: Path, prompt_id: str) -> str:
    """The prompt's life as text. Raises UserError when the run or the prompt is not there."""
    run = Run(path)
    prompts = {p.id: p for p in run.finished("prompts", Prompt)}
    if prompt_id not in prompts:
        near = [i for i in prompts if prompt_id.lower() in i.lower()][:5]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"{path}: no prompt {prompt_id!r} in this run{hint}")
    prompt = prompts[prompt_id]
    lines = [f"# {prompt.id}", f"{prompt.split}, {prompt.source}, category {prompt.category}, clause {prompt.clause}"]
    lines += [f"required: {prompt.behaviour}", ""]
    lines += [f"[{m.role}] {m.content}" for m in prompt.messages]
    filtered = {s.key: s for s in run.stage("filter").records(Sample) if s.prompt.id == prompt_id}
    for sample in run.stage("generate").records(Sample):
        if sample.prompt.id == prompt_id:
            lines += ["", f"## generate: completion {sample.index} (excerpt {sample.excerpt_id})"]
            lines += [f"marked fault: {sample.fault}"] if sample.fault else []
            lines += _written(sample.completion) if sample.completion else [f"failed: {sample.failure}"]
            graded = filtered.get(sample.key)
            if graded:
                lines += ["", "## filter: " + ("kept" if graded.kept else f"dropped ({graded.drop_reason})")]
                lines += [text for verdict in graded.verdicts for text in _judged(verdict)]
    for example in run.stage("distill").records(Example):
        if example.prompt_id == prompt_id:
            lines += ["", "## distill: an example, without the spec", example.reasoning, "---", example.answer]
    for sample in run.stage("rl").records(Sample):
        if sample.prompt.id == prompt_id and sample.completion:
            lines += ["", f"## rl: completion {sample.index}", *_written(sample.completion)]
            lines += [text for verdict in sample.verdicts for text in _judged(verdict)]
    for arm in ARMS:
        for sample in StageFolder(path / "evaluate" / arm).records(Sample):
            if sample.prompt.id == prompt_id and sample.completion:
                lines += ["", f"## evaluate: {arm}", *_written(sample.completion)]
                lines += [text for verdict in sample.verdicts for text in _judged(verdict)]
    return "".join(c if c.isprintable() or c in "\n\t" else named(c) for c in "\n".join(lines))


def named(character: str) -> str:
    """A control character as its escape, so that what a model wrote cannot steer a terminal."""
    return character.encode("unicode_escape").decode()


def _written(made: Completion) -> list[str]:
    sent = ["sent:", made.sent] if made.sent else ["sent: nothing (recorded)"]
    return [*sent, f"received ({made.finish}, {made.model}):", made.text]


def _judged(verdict: Verdict) -> list[str]:
    score = "ungraded" if verdict.score is None else f"{verdict.score:.2f}"
    criteria = ", ".join(f"{k} {v:.2f}" for k, v in verdict.criteria.items())
    reason = verdict.failure or verdict.reason
    return [f"{verdict.judge} ({verdict.view} view) {score}: {reason} [{criteria}]", f"judge was shown: {verdict.sent}"]
