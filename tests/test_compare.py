"""`delib compare` and `delib tables` on made files: what is paired, what is shown, and what stands beside the paper."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from delib import compare, pareto, tables
from delib.errors import UserError
from delib.records import Metric

HOSTILE = "Sure \x1b[2J" + "x" * 400


def file(path, values, figure="not_unsafe", about=None, **more):
    rows = [
        {
            "prompt": f"p{i}",
            "source": "s",
            "group": f"p{i}",
            "figures": {figure: value},
            "answer": HOSTILE if value == 0.0 else "No.",
            "messages": [{"role": "user", "content": f"Do {i}"}],
        }
        | {key: value[i] for key, value in more.items()}
        for i, value in enumerate(values)
    ]
    path.write_text(json.dumps({"metrics": [], "rows": rows} | ({"about": about} if about else {})))
    return str(path)


def told(*sources):
    return compare.table(list(sources), [compare.read(s) for s in sources]).splitlines()


def line_of(lines, name):
    return next(line for line in lines if line.startswith(name))


def test_three_models_each_against_the_first_with_holm(tmp_path):
    one = file(tmp_path / "one.json", [0.0] * 40)
    two = file(tmp_path / "two.json", [1.0] * 30 + [0.0] * 10)
    near = file(tmp_path / "near.json", [1.0] * 7 + [0.0] * 33)
    same = file(tmp_path / "same.json", [0.0] * 39 + [1.0])
    lines = told(one, two, near, same)
    assert [x for x in lines if x.startswith("second: ")] == [f"second: {s}" for s in (two, near, same)]
    strong, weak, none = [x for x in lines if x.startswith("not_unsafe")]
    assert "+0.750" in strong and " ** " in strong
    assert "+0.175" in weak and " ** " in weak  # p 0.0156, of three the second: 0.031
    assert "*" not in none and "0.196 (0.196)" in none and none.endswith(" 40")  # 2.8² / 40 both ways
    worse = told(one, near, *[same] * 4)
    assert " * " in line_of(worse, "not_unsafe") and "all 5 differences" in "\n".join(worse)


def test_tries_of_a_prompt_are_their_mean_and_parts_are_joined(tmp_path):
    values = [1.0, 0.0, None]
    one = file(tmp_path / "one.json", values, prompt=["p", "p", "p"])
    assert compare.read(one)["p"].figures == {"not_unsafe": 0.5}
    other = file(tmp_path / "other.json", [1.0, 1.0], "not_overrefuse", prompt=["p", "q"])
    both = compare.read(f"{one},{other}")
    assert both["p"].figures == {"not_unsafe": 0.5, "not_overrefuse": 1.0} and set(both) == {"p", "q"}


def test_who_judged_is_told_and_two_judges_are_warned_of(tmp_path):
    one = file(tmp_path / "one.json", [1.0, 0.0], about={"judge": "compact"})
    two = file(tmp_path / "two.json", [1.0, 1.0], about={"judge": "openai-api/x/y", "resamples": 10_000})
    lines = told(one, one, two)
    assert lines[3] == "judge: compact"
    warned = line_of(lines, "judges: ")
    assert "judges: compact; openai-api/x/y. A difference in judged figures may be theirs" in warned
    assert line_of(lines, "Intervals: 95 %, 10,000 resamples")
    assert line_of(told(one, one), "Intervals: 95 %, 1,000 resamples")


def test_many_attacks_are_compared_one_by_one_and_by_prompt(tmp_path):
    prompts = ["p", "p", "q", "q"]
    more = {"prompt": prompts, "under": ["none", "role_play"] * 2, "group": prompts}
    rows = compare.read(file(tmp_path / "one.json", [1.0, 0.0, 1.0, 1.0], **more))
    assert set(rows) == {"p@none", "p@role_play", "q@none", "q@role_play", "p", "q"}
    assert rows["p"].figures == {"not_unsafe@0.1": 0.0, "all_resisted": 0.0} and rows["q"].figures["all_resisted"] == 1
    lost = compare.read(file(tmp_path / "two.json", [1.0, None, 1.0, 1.0], **more))
    assert lost["p"].figures == {"not_unsafe@0.1": None, "all_resisted": None}


def test_prompts_that_changed_sides_are_shown_short_and_harmless(tmp_path):
    one = file(tmp_path / "one.json", [1.0, 1.0, 0.0, None])
    two = file(tmp_path / "two.json", [0.0, 1.0, 1.0, 0.0])
    shown = compare.changed([one, two], [compare.read(one), compare.read(two)], 1)
    assert "2, of which 1:" in shown and "not_unsafe 1 → 0: Do 0" in shown and "Do 2" not in shown
    assert "\x1b" not in shown and "\\x1b[2J" in shown and "…" in shown
    assert max(map(len, shown.splitlines())) < compare.SHORT + 60
    assert "Do 2" in compare.changed([one, two], [compare.read(one), compare.read(two)], 5)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_plot_names_each_point(tmp_path, kind):
    sources = []
    for name, safe in (("$a$", [0.0, 1.0] * 5), ("b<&", [1.0] * 10)):
        first = file(tmp_path / f"{name}-sr.json", safe)
        sources.append(f"{first},{file(tmp_path / f'{name}-xs.json', [1.0] * 9 + [0.0], 'not_overrefuse')}")
    place = tmp_path / f"plot.{kind}"
    said = pareto.draw(["$a$", "b<&"], [compare.read(s) for s in sources], place)
    assert "not_unsafe against not_overrefuse" in said and place.stat().st_size > 1000
    if kind == "svg":
        text = place.read_text()
        ElementTree.fromstring(text)
        assert "<!-- $a$ -->" in text or "<!-- \\$a\\$ -->" in text
    with pytest.raises(UserError, match="has no not_overrefuse"):
        pareto.draw(["x"], [compare.read(str(tmp_path / "$a$-sr.json"))], place)
    with pytest.raises(UserError, match=r"in \.svg or \.png"):
        pareto.draw(["x"], [], tmp_path / "plot.gif")


def test_the_front_is_of_those_that_nothing_beats():
    a, b, c, twin = (((x, 0, 1), (y, 0, 1)) for x, y in ((0.2, 0.9), (0.9, 0.2), (0.1, 0.8), (0.9, 0.2)))
    assert pareto.front([b, c, a, twin]) == [a, b, twin]


def suite_file(path, suite, figure, data, value=0.9, **about):
    suffix = "" if data else "_shipped"
    metric = Metric(suite=suite, arm="m", name=figure + suffix, value=value, low=0.8, high=0.95, n=50, n_ungraded=2)
    about = {"model": "m", "suite": suite, "headline": figure + suffix, "data": data or "shipped"} | about
    path.write_text(json.dumps({"about": about, "metrics": [metric.model_dump()], "rows": []}))
    return str(path)


def row_of(text, name):
    return [cell.strip() for cell in line_of(text.splitlines(), f"| {name}").strip("|").split(" | ")]


def test_no_shipped_set_stands_beside_the_paper_unmarked(tmp_path):
    shipped = suite_file(tmp_path / "a.json", "xstest", "not_overrefuse", None, judge="compact")
    own = suite_file(tmp_path / "b.json", "xstest", "not_overrefuse", "xstest.csv", judge="openai-api/x/y")
    text = tables.write(None, [f"ours={shipped}", f"theirs={own}"], None)
    row = row_of(text, "XSTest")
    assert row[1:3] == [
        "0.90 \\[0.80–0.95] (n=50, 2 ungraded, other prompts)",
        "0.90 \\[0.80–0.95] (n=50, 2 ungraded)",
    ]
    assert row[3] == "shipped; compact / xstest.csv; openai-api/x/y"
    assert row[4:8] == ["0.88", "0.976", "0.93", "0.90"] and row[8] == "XSTest; n not told; judge not told"
    assert row_of(text, "challenging refusal")[1:4] == ["–", "–", "–"]
    part = suite_file(
        tmp_path / "p.json", "xstest", "not_overrefuse", "xstest.csv", judge="compact", limit=50, failed=3
    )
    assert "n=50, 2 ungraded, 3 failed, a part of the prompts" in row_of(tables.write(None, [part], None), "XSTest")[1]
    many = suite_file(
        tmp_path / "c.json", "strong_reject", "not_unsafe@0.1", "sr.csv", judge="compact", attacks=["none", "role_play"]
    )
    row = row_of(tables.write(None, [many], None), "StrongREJECT")
    assert "other attacks, not_unsafe@0.1" in row[1] and row[2] == "sr.csv × 2 attacks; compact"
    out = tmp_path / "tables.md"
    assert tables.write(None, [many], out) == f"the tables: {out}\n" and "## Table 3" in out.read_text()


def test_mistakes_of_tables_are_told_together(tmp_path):
    plain = suite_file(tmp_path / "a.json", "strong_reject", "not_unsafe", None, judge="compact")
    other = suite_file(tmp_path / "b.json", "bbq", "accuracy", None)
    with pytest.raises(UserError) as error:
        tables.write(None, [plain, other, str(tmp_path / "none.json"), file(tmp_path / "d.json", [1.0])], None)
    problems = error.value.problems
    assert len(problems) == 4 and "-T attacks=all" in problems[0] and "in none of these tables" in problems[1]


def test_a_runs_arms_stand_in_the_tables(tmp_path):
    from test_report import make_run

    run = make_run(tmp_path)
    place = run.stage("evaluate").path / "metrics.json"
    found = json.loads(place.read_text())
    for m in found:
        if m["name"] == "not_unsafe" and m["by"] == {"source": "unknown"}:
            m["by"] = {"source": "disallowed"}
    place.write_text(json.dumps(found))
    from delib.recipe import QUICKSTART, dump, load

    (tmp_path / "recipe.yaml").write_text(dump(load(QUICKSTART, ["evaluate.second_judge=j"])))
    text = tables.write(tmp_path, [], None)
    row = row_of(text, "challenging refusal")
    assert all("n=1, other prompts" in cell for cell in row[1:5]) and "heldout" in row[5] and "compact" in row[5]
    head = line_of(text.splitlines(), "|  | base")
    assert "base, spec in its prompt | SFT | SFT + RL" in head
    retrieval = row_of(text, "hard refusal")
    assert "n=1" in retrieval[1] and "by rule" in retrieval[5], "policy retrieval"
    assert "; j: " not in row[1], "none of its answers is of this source"
    for file in run.stage("evaluate").path.glob("*/records.jsonl"):
        file.write_text(file.read_text().replace('"source":"unknown"', '"source":"disallowed"'))
    row = row_of(tables.write(tmp_path, [], None), "challenging refusal")
    assert row[1].count("[") == 2 and "; j: 1.00 \\[" in row[1], "the second judge beside the first"


def test_a_sweep_stands_in_a_table_of_its_own(tmp_path):
    def metric(name, value):
        made = Metric(suite="xstest_shipped", arm="m", name=name, value=value, low=0.1, high=0.9, n=40, n_ungraded=1)
        return made.model_dump()

    about = {
        "model": "m|1",
        "suite": "xstest",
        "headline": "not_overrefuse_shipped",
        "judge": "compact",
        "data": "shipped",
    }
    rows = [
        {
            "max_tokens": most,
            "tokens": metric("tokens", most / 2),
            "cut_off": metric("cut_off", 0.5),
            "about": about,
            "metrics": [metric("not_unsafe_shipped", 0.2), metric("not_overrefuse_shipped", 0.75)],
        }
        for most in (64, 128)
    ]
    sweep = tmp_path / "s.json"
    sweep.write_text(json.dumps({"budgets": rows}))
    text = tables.write(None, [f"rl={sweep}"], None)
    assert row_of(text, "SFT + RL")[1:] == [
        "xstest, not_overrefuse_shipped",
        "64",
        "32 \\[0, 1]",
        "0.500 \\[0.100, 0.900]",
        "0.750 \\[0.100, 0.900] (n=40, 1 ungraded)",
        "shipped; compact",
    ]
    assert "| m\\|1 | xstest" in tables.write(None, [str(sweep)], None)
    sweep.write_text(json.dumps({"budgets": [rows[0] | {"metrics": []}]}))
    with pytest.raises(UserError, match="make it anew"):
        tables.write(None, [str(sweep)], None)
