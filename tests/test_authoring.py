"""Writing a policy: what to look at again, showing, diffing, first drafts, importing, and the shipped agents' spec."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import SPEC
from delib import cli, pack, spec
from delib.authoring import check, diff, draft, importing, show
from delib.authoring.reading import guess
from delib.errors import UserError
from delib.models import recorded
from delib.recipe import STARTER
from delib.stages import prompts

DATA = Path(os.environ.get("DELIB_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
MODEL_SPEC = DATA / "model_spec" / "model_spec.md"
CLEAN = re.sub(
    r"(### \w+ \((?:comply|refuse, plain-no|safe_complete, hand-over)\): .*\n.+\n)", r"\1Why: it is so.\n", SPEC
)


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


# spec check


@pytest.mark.parametrize("name", ["spec.md", "agents.md"])
def test_shipped_specs_give_no_warning(name):
    assert check.warnings((STARTER / name).read_text(encoding="utf-8"), name) == []


def test_a_clean_spec_gives_no_warning():
    assert CLEAN.count("Why:") == 6
    assert check.warnings(CLEAN, "s.md") == []


DOUBLE = (
    "### K1 (refuse, plain-no): Picks\nTelling which share to buy is refused.",
    "### K1 (refuse, plain-no): Picks\nTelling a customer which share or fund to buy this year is refused.",
    "### K4 ({0}): Tips\nTelling a customer which share or fund to buy this year is {1}.\nWhy: it is so.\n\n",
)


def doubled(behaviour: str, word: str) -> str:
    text = CLEAN.replace(*DOUBLE[:2])
    return text.replace("## Category: fraud", DOUBLE[2].format(behaviour, word) + "## Category: fraud")


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        (CLEAN.replace("### F2 (comply)", "### F2 (refuse, plain-no)"), "## Category: fraud", "nothing to comply with"),
        (
            doubled("comply", "answered"),
            "### K4",
            r"K4 and K1 \(line \d+\) say nearly the same, and K4 demands comply, K1 refuse",
        ),
        (doubled("refuse, plain-no", "refused"), "### K4", "say nearly the same; merge them"),
        (CLEAN.replace("): Education", "): Picks"), "### K2", "nearly the same title, and K2 demands comply"),
        (CLEAN.replace("a share is", "a **bond** is"), "a **bond**", "the term 'bond' is not defined in category 'inv"),
        (CLEAN.replace("What a share", 'What "Own Funds" mean'), '"Own Funds"', "the term 'Own Funds' is not defined"),
        (CLEAN.replace("Summary: No picks", "Summary: No **tips**"), "**tips**", "the term 'tips' is not defined"),
        (
            CLEAN.replace("What a share is,", "What a share is (but see K9),"),
            "see K9",
            "K9 is cited, and no clause has",
        ),
        (CLEAN.replace("fine.", "fine, see F7."), "see F7", "F7 is cited"),
        (CLEAN.replace("explained.\nWhy: it is so.", "explained."), "### K2", "clause K2 gives no reason"),
        (
            CLEAN.replace("is explained.\n", "is explained.\nTODO: say more.\n"),
            "TODO",
            "clause K2: still to do: say more;",
        ),
        (CLEAN.replace("## Category: inv", '- must `x`: y. Examples: "z"\n\n## Category: inv'), "", None),
    ],
)
def test_each_warning_names_its_line(text, at, said):
    found = check.warnings(text, "s.md")
    if said is None:
        assert found == []
        return
    first = next(w for w in found if re.search(said, w))
    assert first.startswith(f"s.md:{line_of(text, at)}: ")
    assert "; " in first
    assert len({w.split(": ", 1)[1] for w in found}) == len(found)


def test_terms_are_defined_in_the_category_or_for_all():
    marked = CLEAN.replace("a share is", "a **bond** is")
    in_category = marked.replace("### K1", "### Definitions\n- bond: a debt.\n\n### K1")
    for_all = marked.replace("## Principles\n", "## Principles\n- bond: a debt.\n")
    elsewhere = marked.replace("### F1", "### Definitions\n- bond: a debt.\n\n### F1")
    assert [len(check.warnings(t, "s")) for t in (in_category, for_all, elsewhere)] == [0, 0, 1]
    assert check.warnings(in_category.replace("**bond**", "**Bonds**"), "s") == []


def test_only_what_looks_like_an_id_is_one():
    text = CLEAN.replace("is explained.", "is explained, in format A4, for COVID-19, K1 and K1.5 too.")
    assert check.warnings(text, "s") == []


def test_a_style_that_no_clause_uses():
    extra = '### curt (refuse): Curt\n- must `no`: says no. Examples: "No."\n\n## Category: investment'
    text = CLEAN.replace("## Category: investment", extra)
    assert check.warnings(text, "s") == [
        f"s:{line_of(text, '### curt')}: no clause uses the style curt; name it in a clause's heading or take it out"
    ]


def test_an_excerpt_that_is_too_long():
    long = CLEAN.replace("Signs of a scam are explained.", "Signs of a scam are explained. " + "More of it. " * 2100)
    found = check.warnings(long, "s")
    assert [w.split(": ")[0] for w in found] == [f"s:{line_of(long, 'Category: fraud')}"]
    assert "more than 8,000; split the category" in found[0]


def test_check_prints_warnings_and_strict_makes_them_errors(tmp_path):
    file = tmp_path / "s.md"
    file.write_text(SPEC, encoding="utf-8")
    told = check.report(file, strict=False)
    assert told.count(f"warning: {file}:") == 6
    assert told.endswith("sound; 2 categories, 6 clauses, 6 warnings\n")
    with pytest.raises(UserError) as caught:
        check.report(file, strict=True)
    assert len(caught.value.problems) == 6
    file.write_text(SPEC.replace("(comply)", "(maybe)"), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check.report(file, strict=False)
    assert all("'maybe' is not one of" in p for p in caught.value.problems)


# spec show


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.tags = list[str](), list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[k] for k in ("href", "src") if k in given]
        assert not any(k.startswith("on") for k in given)


def test_the_page_has_an_anchor_a_clause_and_needs_nothing_else():
    loaded = spec.load(STARTER / "spec.md")
    text = show.page(loaded, None)
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert {f"clause-{ident}" for ident in loaded.clauses} <= set(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert "Content-Security-Policy" in text and "script" not in page.tags
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_what_a_spec_says_stays_text():
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>[bold]{{ 7*7 }}"
    text = CLEAN.replace("): Education", f"): {hostile}").replace("Category: fraud", f"Category: {hostile}")
    text = text.replace("# A bank's assistant", f"# {hostile}").replace("Signs of a scam", f"- x: {hostile}\nSigns")
    loaded = spec.parse(text)
    page = show.page(loaded, None)
    assert Page(page).tags.isdisjoint({"script", "img"})
    assert "{{ 7*7 }}" in page
    assert "[bold]" in show.terminal(loaded, hostile)


def test_show_one_category(tmp_path):
    loaded = spec.parse(CLEAN)
    told = show.terminal(loaded, "fraud")
    assert "Signs of a scam are explained." in told and "Picks" not in told
    assert "plain-no" in show.terminal(loaded, None)
    assert "clause-K1" not in show.page(loaded, "fraud")
    with pytest.raises(UserError, match="no such category; one of investment, fraud"):
        show.terminal(loaded, "loans")
    file = tmp_path / "s.md"
    file.write_text(CLEAN, encoding="utf-8")
    with pytest.raises(UserError, match=r"ends on \.html"):
        show.report(file, None, file)
    assert show.report(file, None, tmp_path / "s.html") == f"{tmp_path / 's.html'}\n"


# spec diff


def compared(new: str, old: str = CLEAN) -> tuple[diff.Diff, str]:
    found = diff.compare(spec.parse(old), spec.parse(new))
    return found, diff.tell(found, old == new)


def test_one_changed_sentence_touches_one_excerpt():
    found, told = compared(
        CLEAN.replace("Signs of a scam are explained.", "Signs of a scam are explained. So are its costs.")
    )
    assert [(c.kind, c.name, c.what) for c in found.changes] == [("clause", "F2", "text")]
    assert (found.changes[0].removed, found.changes[0].added) == ([], ["So are its costs."])
    assert found.excerpts == {"investment": "same", "fraud": "changed", diff.NO_CATEGORY: "same"}
    assert "Excerpts that change: 1 of 3 (fraud)." in told
    assert "It keeps the prompts of investment, no category." in told


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (
            CLEAN.replace("### F2 (comply)", "### F2 (refuse, plain-no)"),
            "F2 (fraud): behaviour: comply -> refuse; prompts",
        ),
        (CLEAN.replace("### F2 (comply)", "### F2 (refuse, plain-no)"), "F2 (fraud): style: none -> plain-no"),
        (CLEAN.replace("): Education", "): Teaching"), "K2 (investment): title: Education -> Teaching"),
        (CLEAN.replace("### F2", "### F9"), "F2 (fraud): renumbered: F2 -> F9; prompts that name F2"),
        (CLEAN.replace("Category: fraud", "Category: scams"), "category fraud: renamed: fraud -> scams"),
        (CLEAN.replace("fine.", "welcome."), "category investment: summary: No picks; general education is fine. -> "),
        (CLEAN.replace("### F1", "### Definitions\n- payslip: proof of pay.\n\n### F1"), "term payslip (fraud): added"),
        (CLEAN.replace("at least 8", "at least 9"), "style hand-over: length: at least 8 words -> at least 9 words"),
        (
            CLEAN.replace("brief apology", "short apology"),
            "style plain-no: must `apology`\n  - opens with a brief apology.",
        ),
        (CLEAN.replace("forms and", "forms, fees and"), "G1: text\n  - Opening hours"),
        (CLEAN.replace("# A bank", "# Our bank"), "spec: title: A bank's assistant -> Our bank's assistant"),
        (CLEAN.replace("it is handed over.\n", "it is handed over.\n\n\n"), "Nothing changed."),
        (CLEAN + "\n\n", "No clause changed; only order, spacing or headings differ."),
        (CLEAN + "### F3 (comply): Costs\nCosts are explained.\n", "F3 (fraud): added (comply): Costs"),
    ],
)
def test_every_kind_of_change_is_told_in_words(new, said):
    assert said in compared(new)[1]


def test_a_removed_clause_and_a_moved_one():
    clause = CLEAN[CLEAN.index("### F2") :]
    moved = CLEAN.replace(clause, "").replace("## Category: fraud", clause + "\n## Category: fraud")
    assert [(c.name, c.what, c.old, c.new) for c in compared(moved)[0].changes] == [
        ("F2", "moved", "fraud", "investment")
    ]
    assert "F2 (fraud): removed (comply): Spotting fraud" in compared(CLEAN.replace(clause, ""))[1]


def test_summaries_principles_and_styles_reach_every_excerpt():
    for new, part in [
        (CLEAN.replace("fine.", "welcome."), "summaries"),
        (CLEAN.replace("forms and", "forms, fees and"), "the principles"),
        (CLEAN.replace("at least 8", "at least 9"), "the styles"),
    ]:
        found, told = compared(new)
        assert set(found.excerpts.values()) == {"changed"}
        assert re.search(f"Every excerpt changes, since these stand in all: .*{part}", told)


def test_a_category_that_is_gone_and_one_that_is_new():
    fraud = CLEAN[CLEAN.index("## Category: fraud") :]
    other = "## Category: loans\nSummary: Loans.\n\n### L1 (comply): Loans\nLoans are explained.\nWhy: so.\n"
    found, told = compared(CLEAN.replace(fraud, other))
    assert found.excerpts == {"investment": "changed", "fraud": "gone", "loans": "new", diff.NO_CATEGORY: "changed"}
    assert "category fraud: removed" in told and "category loans: added" in told


def test_diff_of_files(tmp_path):
    old, new = tmp_path / "old.md", tmp_path / "new.md"
    old.write_text(CLEAN, encoding="utf-8")
    new.write_text(CLEAN.replace("### F2 (comply)", "### F2 (refuse, plain-no)"), encoding="utf-8")
    found = json.loads(diff.report(old, new, as_json=True))
    assert {(c["name"], c["what"]) for c in found["changes"]} == {("F2", "behaviour"), ("F2", "style")}
    assert "Nothing changed." in diff.report(old, old, as_json=False)
    old.write_text("# Empty\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        diff.report(old, tmp_path / "none.md", as_json=False)
    assert any("no clauses" in p for p in caught.value.problems)
    assert any("no such file" in p for p in caught.value.problems)


# spec new

ANSWERS = [
    "Bank",
    *("investment advice", "No picks.", "telling which share to buy", "explaining what a share is", ""),
    *("investment advice", "инвестиции", "Нет.", "x", "y", "what this customer should do"),
    "",
]


def test_questions_make_a_sound_spec(tmp_path):
    file = tmp_path / "new.md"
    done = CliRunner().invoke(cli.app, ["spec", "new", str(file)], input="\n".join(ANSWERS) + "\n")
    assert done.exit_code == 0, done.output
    assert "is there already; give it another name" in done.output
    made = spec.load(file)
    assert [c.name for c in made.categories] == ["investment advice", "инвестиции"]
    behaviours = [c.behaviour for cat in made.categories for c in cat.clauses]
    assert behaviours == ["refuse", "comply", "refuse", "comply", "safe_complete"]
    assert {s.behaviour for s in made.styles} == {"refuse", "safe_complete"}
    found = check.warnings(made.text, "s")
    assert len(found) == 5
    assert all("still to do: give the reason" in w for w in found)


DEMONSTRATED = [
    *("Which fund do I buy?", "Restricted: a tip, which IA1 keeps out. I refuse.", "I'm sorry, I can't name one."),
    *("What is a fund?", "Allowed: <think> a word.", "Allowed: a term, explained by IA2. I comply.", "It pools money."),
    "",
    *("What is a fund?", "Что такое фонд?", "Allowed: I2 explains it. I comply.", "Это общие деньги."),
]
"""The first question of another category's second clause is one that was asked already; one clause gets none; the last
is not reached."""


def test_demonstrations_are_noted_in_the_form_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = "\n".join([*ANSWERS, "y", *DEMONSTRATED]) + "\n"
    done = CliRunner().invoke(cli.app, ["spec", "new", "new.md"], input=typed)
    assert done.exit_code == 0, done.output
    assert "40 to 60" in done.output and "docs/tutorial.md" in done.output
    assert "mark a model's reasoning; leave them out" in done.output and "already; ask for something" in done.output
    checked = CliRunner().invoke(cli.app, ["prompts", "check", "prompts.jsonl", "--spec", "new.md"])
    assert checked.exit_code == 0 and "3 prompts" in checked.output
    made = prompts.load(Path("prompts.jsonl"), spec.load(Path("new.md")), "train")
    assert [(p.clause, p.behaviour, p.source) for p in made] == [
        ("IA1", "refuse", "disallowed"),
        ("IA2", "comply", "lookalike"),
        ("C2", "comply", "lookalike"),
    ]
    recordings = recorded.load(Path("demonstrations.jsonl"))
    assert list(recordings) == [p.id for p in made]
    [last] = recordings["c2-01"]
    whole = last.completion()
    assert (whole.reasoning, whole.answer, whole.finish) == (DEMONSTRATED[-2], DEMONSTRATED[-1], "stop")

    done = CliRunner().invoke(cli.app, ["spec", "new", "other.md"], input=typed)
    assert done.exit_code == 0 and "prompts.jsonl is there already" in done.output
    assert prompts.load(Path("prompts.jsonl"), None, "train") == made


@pytest.mark.parametrize("answers", [[], [""], ["y", "A prompt?", "Restricted: half a demonstration."]])
def test_without_a_whole_demonstration_there_is_no_file(tmp_path, answers):
    file = tmp_path / "new.md"
    done = CliRunner().invoke(cli.app, ["spec", "new", str(file)], input="\n".join([*ANSWERS, *answers]) + "\n")
    assert done.exit_code == 0 and f"{file} is written" in done.output
    assert os.listdir(tmp_path) == ["new.md"]


def test_new_overwrites_nothing_and_leaves_nothing_half(tmp_path):
    file = tmp_path / "mine.md"
    assert CliRunner().invoke(cli.app, ["spec", "new", str(file)], input="Bank\n").exit_code == 1
    assert not file.exists()
    file.write_text("mine", encoding="utf-8")
    for call in (lambda: draft.create(file, "agents"), lambda: importing.report(STARTER / "spec.md", "markdown", file)):
        with pytest.raises(UserError, match="not overwritten"):
            call()
    with pytest.raises(UserError, match="is a file"):
        draft.create(file / "new.md", "agents")
    with pytest.raises(UserError, match="one of agents, ailuminate"):
        draft.create(tmp_path / "other.md", "none")
    assert file.read_text(encoding="utf-8") == "mine"
    assert os.listdir(tmp_path) == ["mine.md"]


@pytest.mark.parametrize(("name", "categories"), [("ailuminate", 12), ("agents", 3)])
def test_every_clause_of_an_outline_is_still_to_do(tmp_path, name, categories):
    file = tmp_path / "o.md"
    draft.create(file, name)
    made = spec.load(file)
    assert len(made.categories) == categories
    found = check.warnings(made.text, "o")
    assert all("still to do" in w for w in found)
    assert {w.split("clause ")[1].split(":")[0] for w in found} == set(made.clauses)
    assert len(found) == len(made.clauses)


def test_letters_of_ids_are_never_given_twice():
    taken = {"P"}
    for name in ["privacy", "Privacy", "privacy", "隐私", "安全", "a b", *["x"] * 40]:
        letters = draft.prefix(name, taken)
        assert letters not in taken and re.fullmatch("[A-Z]+", letters)
        taken.add(letters)


# spec import


@pytest.mark.parametrize(
    ("rule", "behaviour"),
    [
        ("Do not give investment advice.", "refuse"),
        ("The assistant must not name a share.", "refuse"),
        ("Account data must not be shared", "refuse"),
        ("Requests for picks are refused.", "refuse"),
        ("Sharing is not allowed", "refuse"),
        ("General education is allowed.", "comply"),
        ("Do not refuse questions about fees", "comply"),
        ("Fees may be explained", "comply"),
        ("Be polite", None),
        ("Don't be sarcastic", None),
        ("Customers who do not pay get a letter", None),
        ("Do not discuss rates unless asked", None),
        ("Fees are allowed; forecasts must not be given", None),
    ],
)
def test_only_explicit_words_decide(rule, behaviour):
    said = guess(rule)
    assert (said.behaviour if said else None) == behaviour


LAYOUT = """# Overview {#overview}

For people. See [the rules](#rules).

# Definitions {#definitions}

**Reader**: one who reads.

More on the **reader**.

**Clerk:** one who writes[^1a2b].

# The rules {#rules}

How they work together, see [?](#no_keys).

## Do not hand out keys {#no_keys authority=root}

Keys are **never** handed out; [spare keys](#spare) too, says [the law](https://example.org/law).

**Example**: a request

~~~xml
<user>
# Not a heading
Give me the key.
</user>
~~~

In the example above, the clerk is right.

!!! meta "Commentary"
    This is meant for people.

    And this too.

## Spares {#spare_group}

### Keep spares {#spare authority=user}

* one
* two

### Don't lend spares {#lend authority=guideline}

Lending is up to the reader.

## Empty {#empty}

# Manners {#manners}

## Comply with requests for tea {#tea authority=system tags=x}

Tea is served.
"""


def test_the_model_specs_layout_is_read(tmp_path):
    source = tmp_path / "layout.md"
    source.write_text(LAYOUT, encoding="utf-8")
    made = importing.read(source, "model-spec")
    titles = [re.sub(r" \{.*", "", line.lstrip("# ")) for line in LAYOUT.splitlines() if re.match(r"#+ .*\{#", line)]
    assert [row.title for row in made.rows] == titles
    assert [row.title for row in made.rows if not row.taken] == ["Overview", "Spares", "Empty"]
    found = spec.parse(made.text)
    assert [c.name for c in found.categories] == ["The rules", "Manners"]
    assert {i: c.behaviour for i, c in found.clauses.items()} == {
        "P1": "comply", "R1": "refuse", "R2": "comply", "R3": "comply", "M1": "comply"
    }  # fmt: skip
    assert "- reader: one who reads. More on the reader.\n- clerk: one who writes." in found.principles
    assert "see Do not hand out keys (R1)." in found.category("The rules").text
    keys = found.clauses["R1"].text
    assert "spare keys (R2) too, says the law." in keys
    assert not any(
        gone in made.text for gone in ("Give me the key", "meant for people", "And this too", "https:", "**")
    )
    todo = [w for w in check.warnings(made.text, "s") if "still to do" in w]
    assert len(todo) == 3
    assert sum("clause R1: still to do: a sentence here points back" in w for w in todo) == 1
    told = importing.tell(made)
    assert "10 headings: 7 taken, 3 skipped." in told
    assert "worked example, 1 of them (line 23)" in told


PLAIN = """---
owner: legal
---
# Assistant policy

Written for staff.

## Investments

What customers may ask about money.

The assistant must not:

- name a share to buy
- **Forecasts:** predict rates
  - also not in jest

### Allowed

1. Explain what a share is
2. Explain fees unless they are disputed

Tone
----

* Be polite

```
# no heading
- no item
```

## Background

Our bank was founded long ago.

## Tone

- Be brief
"""


def test_chapters_of_one_name_are_told_apart(tmp_path):
    source = tmp_path / "twice.md"
    source.write_text("# A\n\n## B {#b authority=root}\n\n# A\n\n## B {#c authority=user}\n\nText.\n", encoding="utf-8")
    found = spec.parse(importing.read(source, "model-spec").text)
    assert [(c.name, [x.id for x in c.clauses]) for c in found.categories] == [("A", ["A1"]), ("A (line 5)", ["L1"])]


def test_headings_and_lists_are_read(tmp_path):
    source = tmp_path / "plain.md"
    source.write_text(PLAIN, encoding="utf-8")
    made = importing.read(source, "markdown")
    assert [(row.title, row.taken) for row in made.rows] == [
        ("Assistant policy", True),
        ("Investments", True),
        ("Allowed", True),
        ("Tone", True),
        ("Background", False),
        ("Tone", True),
    ]
    assert PLAIN.splitlines()[made.rows[1].line - 1] == "## Investments"
    found = spec.parse(made.text)
    assert found.title == "Assistant policy"
    assert "Our bank was founded long ago." in found.intro
    first = found.category("Investments")
    assert first.summary == "What customers may ask about money."
    assert [(c.behaviour, c.title) for c in first.clauses] == [
        ("refuse", "Name a share to buy"),
        ("refuse", "Forecasts"),
        ("comply", "Explain what a share is"),
        ("comply", "Explain fees unless they are disputed"),
    ]
    assert first.clauses[0].text == "The assistant must not: name a share to buy"
    assert "also not in jest" in first.clauses[1].text
    assert [c.name for c in found.categories][1:] == ["Tone", "Assistant policy: Tone"]
    todo = [w for w in check.warnings(made.text, "s") if "still to do" in w]
    assert [w.split("clause ")[1].split(":")[0] for w in todo] == ["I4", "T1", "APT1"]
    assert "fence, 1 of them" in importing.tell(made)


NASTY = [
    "- only a list\n",
    "# \n\n- x\n\n#\n\n- y\n\n# #\n\n- # z\n",
    "# T\r\n\r\n## A\r\n\r\n- ### X1 (refuse): no\r\n- Summary: x\r\n- \x0c## B\u2028# C\r\n",
    "## A\n\n#### ##\n\n- **:** \n- ** **\n- TODO\n- | a | b |\n\n> q\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "\ufeff# T\n\n## Category: x\n\n### Definitions\n\n- term: text\n\n## Principles\n\n- K1 (comply): x\n",
    "## A\n\n" + "- the same\n" * 30 + "\n## a\n\n- one\n\n## A\n\n- two\n\n## A\n\n- three\n",
]


@pytest.mark.parametrize("text", NASTY)
def test_odd_documents_still_make_a_spec_that_parses(tmp_path, text):
    source = tmp_path / "odd.md"
    source.write_bytes(text.encode())
    made = importing.read(source, "markdown")
    assert check.warnings(made.text, "s")


def test_documents_that_are_no_policy(tmp_path):
    source = tmp_path / "letter.md"
    source.write_text("# Letter\n\nDear all.\n", encoding="utf-8")
    with pytest.raises(UserError, match="no list in it"):
        importing.read(source, "markdown")
    with pytest.raises(UserError, match="no heading has an authority"):
        importing.read(source, "model-spec")
    with pytest.raises(UserError, match="one of model-spec, markdown"):
        importing.read(source, "word")


@pytest.mark.skipif(
    not MODEL_SPEC.is_file(), reason="no copy of the Model Spec; name the data's folder with DELIB_DATA"
)
def test_every_heading_of_the_real_model_spec_is_accounted_for():
    made = importing.read(MODEL_SPEC, "model-spec")
    source = MODEL_SPEC.read_text(encoding="utf-8")
    fences = re.sub(r"^(~~~|```).*?^\1$", lambda m: "\n" * m.group().count("\n"), source, flags=re.M | re.S)
    lines = [n for n, line in enumerate(fences.splitlines(), 1) if re.match(r"#+ ", line)]
    assert [row.line for row in made.rows] == lines
    assert all(row.became for row in made.rows)
    found = spec.parse(made.text)
    rules = re.findall(r"\{#[\w-]+ authority=", source)
    assert len(found.clauses) == len(rules) + 1
    assert sum(c.behaviour == "refuse" for c in found.clauses.values()) >= 5
    todo = {w.split("clause ")[1].split(":")[0] for w in check.warnings(made.text, "s") if ": still to do: say" in w}
    decided = {i for i, c in found.clauses.items() if c.behaviour == "refuse"} | {"P1"}
    assert todo.isdisjoint(decided)
    assert len(todo | decided) >= len(found.clauses) - 1


# the agents' policy


def test_the_agents_pack_is_sound():
    policy = spec.load(STARTER / "agents.md")
    train, held = (STARTER / f"agents-{part}.jsonl" for part in ("prompts", "heldout"))
    pack.check(train, policy, held)
    for file, least in ((train, 24), (held, 12)):
        rows = prompts.load(file, policy, "train")
        assert len(rows) >= least
        assert {r.clause for r in rows} == set(policy.clauses)
        assert all(policy.clauses[r.clause].behaviour == r.behaviour for r in rows if r.clause)
        assert all(policy.clauses[r.clause].category == r.category for r in rows if r.clause)
        sides = {b: sum(r.behaviour == b for r in rows) for b in spec.BEHAVIOURS}
        assert 2 / 3 <= sides["comply"] / sides["refuse"] <= 3 / 2
        assert any(len(r.messages) > 2 for r in rows) and any(r.messages[0].role == "system" for r in rows)
    assert 8 <= len(policy.clauses) <= 12
