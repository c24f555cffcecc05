"""The viewer's page as data: the figures are those of the run, every text is there whole, and none can be markup."""

import base64
import hashlib
import json
import re

import pytest

import view_run
from delib import life as life_of
from delib import view
from delib.errors import UserError
from delib.judges.reading import broken
from delib.records import Checks, Manifest, Metric, Prompt, Sample
from delib.run import Run, StageFolder, key_of
from delib.view_lives import Rows, mark
from test_cli import delib

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028\u2029 \u202e\x00\x1b[2J <img src=x onerror=alert(2)>"
BLOCK = re.compile(r'<script type="application/json" id="([^"]+)">(.*?)</script>', re.S)


def blocks(page):
    return {name: json.loads(body) for name, body in BLOCK.findall(page.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return view_run.small(tmp_path_factory.mktemp("view") / "run")


@pytest.fixture(scope="module")
def page(made):
    return view.write(made)


def test_the_rows_add_up_to_the_figures_of_the_run(made, page):
    data = blocks(page)
    rows, authors = data["rows"]["rows"], data["overview"]["authors"]
    figures = [Metric.model_validate(m) for m in json.loads((made / "evaluate" / "metrics.json").read_text())]
    for arm in ("base", "sft", "rl"):
        for required, name in (
            ("refuse", "not_unsafe"),
            ("comply", "not_overrefuse"),
            ("safe_complete", "safe_completion_style"),
        ):
            marks = [r[7][authors.index(arm)] for r in rows if r[1] == "heldout" and r[4] == required]
            metric = next(m for m in figures if (m.arm, m.name, m.by) == (arm, name, None))
            graded = [m for m in marks if m[0] in "+-"]
            assert len(graded) == metric.n
            assert sum(m[0] == "+" for m in graded) / len(graded) == pytest.approx(metric.value), (arm, name)


def test_the_three_questions_are_answered(page):
    safer, prude, where = blocks(page)["overview"]["answers"]
    assert safer["answer"] == "Yes" and (safer["lines"][0]["before"], safer["lines"][0]["after"]) == (0.0, 1.0)
    assert prude["lines"][0]["before"] == 1.0 and prude["lines"][0]["after"] < 1.0
    assert prude["answer"] == "No difference seen"  # one of eighteen: the interval holds zero
    assert where["lines"][0]["after"] == 1.0 and where["answer"] == "No category stands out"


def test_a_category_stands_out_where_its_interval_lies_below_all():
    def row(value, low, high, by):
        return Metric(suite="h", arm="rl", name="not_unsafe", value=value, low=low, high=high, n=9, by=by)

    rows = [row(0.8, 0.7, 0.9, None), row(0.3, 0.1, 0.6, {"category": "fraud"}), row(0.9, 0.8, 1, {"category": "none"})]
    assert view._where(rows, "rl")["answer"] == "Weakest in fraud"
    wide = [rows[0], row(0.3, 0.1, 0.85, {"category": "fraud"})]
    assert view._where(wide, "rl")["answer"] == "No category stands out"
    few = [rows[0], rows[1].model_copy(update={"n": 4})]
    assert view._where(few, "rl") == {"question": "Where?", "answer": "Too few prompts in each category", "lines": []}


def test_a_model_that_refuses_everything_is_called_a_prude(tmp_path):
    asked = [view_run.prompt(n, "heldout") for n in range(24)]
    answers = {
        arm: [view_run.sample(p, seen, arm) for p in asked] for arm, seen in (("base", "comply"), ("sft", "refuse"))
    }
    run = view_run.make(tmp_path / "run", [view_run.prompt(n, "train") for n in range(7)], asked, answers)
    safer, prude, _ = blocks(view.write(run))["overview"]["answers"]
    assert safer["answer"] == "Yes" and prude["answer"] == "Yes, it helps less"
    assert prude["lines"][1]["change"] == 1.0  # declined, of the same


CHECKED = ["max_words: 30", 'avoids: "sorry", "can\'t"', "json: true"]


def test_every_text_of_a_prompt_is_on_the_page_as_it_was(tmp_path, monkeypatch):
    """Over many pages, with texts that hold the whole excerpt, which are put together again."""
    monkeypatch.setattr("delib.view_lives.PAGE_CHARACTERS", 3000)
    held = [view_run.prompt(n, "heldout", HOSTILE + str(n) if n % 5 == 0 else None) for n in range(20)]
    checks = Checks(max_words=30, avoids=["sorry", "can't"], json=True)
    held[0] = held[0].model_copy(update={"checks": checks})
    excerpt = view_run.POLICY.excerpt("fraud")
    rows = [view_run.sample(p, "comply", "base", text=HOSTILE) for p in held]
    rows = [
        s.model_copy(update={"completion": s.completion.model_copy(update={"sent": f"before {excerpt} after {n}"})})
        for n, s in enumerate(rows)
    ]
    run = view_run.make(tmp_path / "run", [view_run.prompt(n, "train") for n in range(9)], held, {"base": rows})
    data = blocks(view.write(run))
    starts, shared = data["rows"]["starts"], data["shared"]
    assert len(starts) > 5
    lives = {}
    for number, first in enumerate(starts):
        part = data[f"page-{number}"]
        for place, life in enumerate(part["lives"]):
            lives[data["rows"]["rows"][first + place][0]] = (life, part["texts"])
    for prompt in StageFolder(run / "prompts").stream(Prompt):
        life, texts = lives[prompt.id]
        assert life["checks"] == (CHECKED if prompt.id == held[0].id else [])
        assert [texts[n] for _, n in life["messages"]] == [m.content for m in prompt.messages]
    for folder, where in (("filter", "made"), ("evaluate/base", "arms")):
        for sample in StageFolder(run / folder).stream(Sample):
            life, texts = lives[sample.prompt.id]
            told = next(s for s in [s[1] if where == "arms" else s for s in life[where]] if s["index"] == sample.index)
            sent = "".join(shared[-1 - n] if n < 0 else texts[n] for n in told["made"].get("sent", []))
            assert sent == sample.completion.sent
            assert texts[told["made"]["answer"]] == sample.completion.answer
            assert [texts[v[5]] for v in told["verdicts"]] == [v.reason for v in sample.verdicts]
            assert told.get("drop") == sample.drop_reason


def test_a_models_text_can_not_steer_the_terminal(tmp_path):
    path = view_run.small(tmp_path / "run")
    rows = with_text(path, "\x1b]0;mine\x07 a line\nand \u202e another")
    told = life_of.tell(path, rows[0].prompt.id)
    assert "\\x1b]0;mine\\x07 a line\nand \\u202e another" in told
    assert not [c for c in told if not c.isprintable() and c not in "\n\t"]


def with_text(path, text):
    """The first held-out prompt's answer by rl is `text`."""
    folder = StageFolder(path / "evaluate" / "rl")
    rows = folder.records(Sample)
    made = rows[0].completion.model_copy(update={"text": text})
    folder.replace([rows[0].model_copy(update={"completion": made}), *rows[1:]])
    return rows


def test_nothing_in_the_page_can_end_a_block_and_only_its_own_script_may_run(tmp_path):
    held = [view_run.prompt(0, "heldout", HOSTILE)]
    run = view_run.make(
        tmp_path / "run", [], held, {"base": [view_run.sample(held[0], "comply", "base", text=HOSTILE)]}
    )
    text = view.write(run).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text and "\u2028" not in text
    own = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(own) == 1
    allowed = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"script-src 'sha256-{allowed}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert "innerHTML" not in own[0] and "document.write" not in own[0]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    run = view_run.start(tmp_path / "run")
    view_run.finish(run, "prompts", [view_run.prompt(0, "train")], {"train": 1})
    with (tmp_path / "run" / "prompts" / "records.jsonl").open("a") as handle:
        handle.write('{"id": "torn')
    data = blocks(view.write(tmp_path / "run"))
    assert data["overview"]["answers"] == [] and len(data["rows"]["rows"]) == 1


def test_a_report_of_an_earlier_evaluation_gives_no_figures(tmp_path):
    path = view_run.small(tmp_path / "run")
    run = Run(path)
    evaluated, report = run.stage("evaluate").manifest(), run.stage("report")
    report.path.mkdir()
    old = [{"suite": "heldout", "arm": "rl", "name": "not_unsafe", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}]
    (report.path / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    for made_of, current in ((key_of(evaluated.outputs, 0, {}), True), ("another", False)):
        report.finish(Manifest(stage="report", recipe="k", inputs={"evaluate": made_of}, outputs={}, counts={}), [])
        assert ([m.value for m in view._metrics(run)] == [0.5]) is current


def test_what_is_wrong_is_told_with_its_mend(made, tmp_path):
    with pytest.raises(UserError, match="no recipe"):
        view.write(tmp_path)
    empty = view_run.start(tmp_path / "run").path
    with pytest.raises(UserError, match="stage prompts is not finished"):
        view.write(empty)
    run = view_run.small(tmp_path / "bad", train=2, held=2)
    file = run / "filter" / "records.jsonl"
    file.write_text(file.read_text() + '{"prompt": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"filter/records.jsonl:3: no sample .*delete this line"):
        view.write(run)


def test_a_mark_tells_side_and_behaviour():
    asked = view_run.prompt(0, "heldout")
    good, bad = (view_run.sample(asked, seen, "m") for seen in ("refuse", "partial"))
    cut = good.model_copy(update={"completion": good.completion.model_copy(update={"finish": "length"})})
    ungraded = good.model_copy(update={"verdicts": []})
    lost = good.model_copy(update={"completion": None})
    assert broken(cut.completion) == "truncated"
    told = [mark(s, view_run.POLICY, "refuse") for s in (good, bad, cut, ungraded, lost)]
    assert told == ["+r", "-p", "-b", "??", "!?"]
    assert mark(good, view_run.POLICY, None) == ".r"


def test_long_curves_are_thinned_and_keep_their_mean(made, page):
    loss = next(c for c in blocks(page)["overview"]["curves"] if c["name"] == "loss")
    whole = [row["loss"] for row in Run(made).stage("sft").manifest().detail["curve"]]
    assert len(loss["values"]) == len(loss["steps"]) <= view.POINTS < len(whole)
    assert loss["values"][0] == pytest.approx(sum(whole[:3]) / 3, abs=1e-3)
    assert [c["name"] for c in blocks(page)["overview"]["curves"]][-2:] == ["reward", "refusals"]


def test_a_curve_leaves_out_what_is_no_number():
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": float("inf")}]
    made = Manifest(stage="sft", recipe="k", inputs={}, outputs={}, counts={}, detail={"curve": rows})
    assert view.curves(made) == [{"stage": "sft", "name": "loss", "steps": [2], "values": [1.0]}]


def test_rows_read_each_prompt_where_it_stands(made):
    rows = Rows(made, view_run.POLICY)
    for sample in StageFolder(made / "evaluate" / "rl").stream(Sample):
        assert rows.arms["rl"].of(sample.prompt.id) == [sample]
    assert rows.arms["rl"].of("nobody") == []


def test_the_command_writes_the_page_and_tells_where(made, tmp_path):
    done = delib("view", made, "--out", tmp_path / "there", "--no-open")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "there" / "index.html")
    assert (tmp_path / "there" / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert delib("view", tmp_path, "--no-open").returncode == 2
