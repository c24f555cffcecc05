import pytest

from conftest import SPEC
from delib import spec
from delib.errors import UserError
from delib.recipe import STARTER


def problems_of(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        spec.parse(text, "policy.md")
    return caught.value.problems


def test_starter_spec_is_whole():
    loaded = spec.load(STARTER / "spec.md")
    assert len(loaded.categories) == 7
    assert 3000 <= len(loaded.text.split()) <= 5000
    assert all(c.behaviour in spec.BEHAVIOURS for c in loaded.clauses.values())
    assert {s.behaviour for s in loaded.styles} == {"refuse", "safe_complete"}


def test_excerpt_has_all_summaries_and_one_full_category():
    loaded = spec.parse(SPEC)
    text = loaded.excerpt("fraud")
    assert "No picks; general education is fine." in text
    assert "Signs of a scam are explained." in text
    assert "What a share is, is explained." not in text
    assert loaded.excerpt_id("fraud") != loaded.excerpt_id("investment")


def test_every_problem_is_told_at_once_with_its_line():
    text = SPEC.replace("### F2 (comply)", "### F1 (maybe)").replace("Summary: No picks", "Sum: No picks")
    text = text.replace("hand-over): Own", "no-such-style): Own")
    found = problems_of(text)
    lines = text.splitlines()
    place = next(n for n, line in enumerate(lines, 1) if line.startswith("### F1 (maybe)"))
    assert any(p.startswith(f"policy.md:{place}: clause ID F1 was used in line") for p in found)
    assert any("'maybe' is not one of" in p for p in found)
    assert any("no summary" in p for p in found)
    assert any("no style 'no-such-style'" in p for p in found)
    assert len(found) == 4


def test_spec_without_clauses():
    assert any("no clauses" in p for p in problems_of("# Title\n\nSome text.\n"))


def test_empty_category():
    assert any("is empty" in p for p in problems_of(SPEC + "\n## Category: hollow\nSummary: nothing\n"))


@pytest.mark.parametrize(("data", "words"), [(b"\xff\xfe\x00", "not UTF-8"), (b"  \n", "empty")])
def test_unreadable_files(tmp_path, data, words):
    file = tmp_path / "s.md"
    file.write_bytes(data)
    assert words in spec.check(file)[0]
    assert "no such file" in spec.check(tmp_path / "none.md")[0]
