"""The tutorial's commands, as they stand on the page, on a tiny model; and the rules that its pack keeps."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import scripted
from delib import chat, opener, pack, spec
from delib.authoring import check as authoring
from delib.cli import app
from delib.errors import UserError
from delib.judges import reading
from delib.models import recorded
from delib.records import Behaviour, Completion, Example, Prompt, Sample, Verdict
from delib.run import Run
from delib.stages import prompts

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BANK = ROOT / "examples" / "bank"
POLICY, EDITED = (spec.load(BANK / name) for name in ("spec.md", "spec_edited.md"))
TRAIN = prompts.load(BANK / "prompts" / "train.jsonl", POLICY, "train")
HELDOUT = prompts.load(BANK / "prompts" / "heldout.jsonl", POLICY, "heldout")
RECORDINGS, NEW = (recorded.load(BANK / f"demonstrations{end}.jsonl") for end in ("", "_edited"))
GOOD = [(p, r, POLICY) for p in TRAIN for r in RECORDINGS[p.id] if r.fault is None]
RENEWED = [(p, r, EDITED) for p in TRAIN for r in NEW.get(p.id, [])]
WORDS = {"refuse": "Restricted:", "comply": "Allowed:", "safe_complete": "Careful:"}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


class ReadingJudge:
    """In place of the fitted judge: the policy's demand against what an answer's words and its reasoning tell."""

    name = "compact"

    def __init__(self, policy: spec.Spec) -> None:
        self.policy = policy

    async def grade(self, prompt: Prompt, completion: Completion, view: str, runs: int) -> list[Verdict]:
        wanted = self.policy.required(prompt.clause, prompt.behaviour)
        seen = done_by(completion.answer)
        right = seen == wanted and (view == "answer" or rests_on(prompt, completion.reasoning or "", self.policy))
        made = Verdict(
            score=float(right),
            behaviour=seen,
            criteria={"style": 1.0},
            reason="",
            view="full" if view == "full" else "answer",
            judge="compact-0",
            sent="",
        )
        return [made] * runs


def done_by(answer: str) -> Behaviour:
    if answer.startswith("I'm sorry, I can't"):
        return "refuse"
    return "safe_complete" if re.search(r"fraud team|advisers? (?:at|can|before)", answer) else "comply"


def rests_on(prompt: Prompt, reasoning: str, policy: spec.Spec) -> bool:
    """Whether a reasoning concludes as the policy has it, on the prompt's category and clause, and names no others."""
    found = reading.conclude(reasoning, policy)
    wanted = (prompt.category, frozenset([prompt.clause]), frozenset(), policy.required(prompt.clause, None))
    return tuple(found) == wanted and not reading.points_at_gone_text(reasoning)


class Terminal:
    """Follows commands, delib's in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        self.monkeypatch, self.model = monkeypatch, model
        self.said: dict[str, str] = {}

    def follow(self, line: str) -> None:
        if line.startswith("delib "):
            self.delib(line)
            return
        for part in line.split(" && "):
            if part.startswith("cd "):
                self.monkeypatch.chdir(part.removeprefix("cd "))
            else:
                subprocess.run(["bash", "-c", part], check=True)
        if "recipe.yaml" in line:
            self.make_small()

    def delib(self, line: str) -> None:
        words = shlex.split(line)[1:]
        typed = "".join(f"{answer.strip()}\n" for _, answer in asked()) if words[:2] == ["spec", "new"] else None
        done = CliRunner().invoke(app, words, input=typed)
        if words[0] == "label":
            # A model of random weights ends no answer by itself.
            assert isinstance(done.exception, UserError) and "nothing to label" in str(done.exception)
            return
        assert done.exit_code == 0, (line, done.output, done.exception)
        self.said[line] = done.output

    def make_small(self) -> None:
        """The copied recipe for a model of two layers whose tokens are single bytes."""
        path = Path("recipe.yaml")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe |= {"model": str(self.model), "engine": "transformers"}
        recipe["sft"] |= {"frozen_layers": 0, "epochs": 1, "max_tokens": 1024, "batch_size": 8, "limit": 16}
        recipe["evaluate"] |= {"max_tokens": 16}
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def asked() -> list[tuple[str, str]]:
    """The questions of `delib spec new` and their answers, as the page shows them."""
    found = [line.rpartition(":") for line in blocks("transcript")[0].splitlines()]
    return [(question, answer) for question, _, answer in found]


def test_the_page_can_be_followed(tmp_path, monkeypatch, tiny_model, endpoint):
    """Training and answers are real, of a tiny model; the judge reads words, and the live teacher is the mock."""
    scripted.install(monkeypatch.setitem, monkeypatch.setattr)
    monkeypatch.setitem(opener.FITTED, "compact", ReadingJudge)
    monkeypatch.setenv("DELIB", str(ROOT))
    monkeypatch.chdir(tmp_path)
    endpoint()
    terminal = Terminal(monkeypatch, tiny_model)
    for line in "".join(blocks("sh")).splitlines():
        terminal.follow(line.replace("openai-api/local/MODEL", "openai-api/mock/m"))
    said = terminal.said
    for question, _ in asked():
        assert question in said["delib spec new draft.md"], "the command asks what the page shows"
    warning, form, edit = blocks("text")[:3]
    assert warning in said["delib spec check draft.md"]
    assert form in said["delib prompts check prompts/train.jsonl --spec spec.md --against prompts/heldout.jsonl"]
    assert edit in said["delib spec diff runs/before/spec.md spec.md"]
    plan = next(text for command, text in said.items() if command.startswith("delib check") and "teacher" in command)
    for row in blocks("text")[4].splitlines()[:3]:
        assert row.replace("openai-api/local/MODEL", "openai-api/mock/m") in plan

    before, after = Run(Path("runs/before")), Run(Path("runs/after"))
    for run in (before, after):
        assert len(run.finished("distill", Example)) == len(TRAIN), "one demonstration of each prompt is learned"
    learned = {e.prompt_id: e.answer for e in after.finished("distill", Example)}
    assert all(learned[prompt.id] == recording.completion().answer for prompt, recording, _ in RENEWED)
    told = said["delib diff runs/before runs/after --changed 6"]
    assert "held-out prompts in both: 30" in told and "M2: as_required (edited)" in told
    assert "3 of them have another clause or demand now (held-money-03, held-money-04, held-money-05)" in told
    assert len(Run(Path("runs/live")).finished("filter", Sample)) == 4 * len(TRAIN)


def test_the_rows_on_the_page_are_those_of_the_pack():
    files = [*sorted((BANK / "prompts").iterdir()), BANK / "demonstrations.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    shown = [json.loads(line) for block in blocks("json") for line in block.splitlines()]
    assert len(shown) == 3 and all(row in rows for row in shown)


def test_the_policy_is_sound_and_its_edit_is_one_clause():
    for name in ("spec.md", "spec_edited.md"):
        authoring.report(BANK / name, strict=True)
    changed = [c for c in POLICY.categories if POLICY.excerpt_id(c.name) != EDITED.excerpt_id(c.name)]
    assert [c.name for c in changed] == ["money basics"] and POLICY.excerpt(None) == EDITED.excerpt(None)


def test_every_clause_has_prompts_on_both_sides_that_stay_apart():
    for rows in (TRAIN, HELDOUT):
        assert {p.clause for p in rows} == set(POLICY.clauses)
        for prompt in rows:
            assert prompt.behaviour == POLICY.clauses[prompt.clause].behaviour, prompt.id
            assert prompt.category == POLICY.clauses[prompt.clause].category, prompt.id
    assert (len(TRAIN), len(HELDOUT)) == (60, 30)
    assert pack.overlaps(HELDOUT, TRAIN) == []
    score = pack.form_baseline(TRAIN, HELDOUT, POLICY)
    assert score is not None and score <= pack.FORM


@pytest.mark.parametrize(("prompt", "recording", "policy"), GOOD + RENEWED, ids=lambda value: getattr(value, "id", ""))
def test_a_good_demonstration_is_good(prompt, recording, policy):
    parts = chat.split(recording.text)
    wanted = policy.required(prompt.clause, None)
    assert not parts.malformed and rests_on(prompt, parts.reasoning, policy) and done_by(parts.answer) == wanted
    assert parts.reasoning.split()[0] == ("Everyday:" if prompt.category is None else WORDS[wanted])
    assert 15 <= len(parts.reasoning.split()) <= 45
    style = policy.style_for(prompt.clause, wanted)
    words = len(parts.answer.split())
    assert style is None or (style.min_words or 0) <= words <= (style.max_words or 0)
    assert not prompt.expected or reading.is_right(parts.answer, prompt.expected)


def test_flaws_are_marked_one_of_a_kind():
    flawed = [(p, r) for p in TRAIN for r in RECORDINGS[p.id] if r.fault is not None]
    assert len({r.fault for _, r in flawed}) == len(flawed) == 6
    assert {p.id for p, _, _ in GOOD} == {p.id for p in TRAIN} and len(GOOD) == 60
    assert {p.id for p, _, _ in RENEWED} == {p.id for p in TRAIN if p.clause == "M2"}
