"""Many attacks on one prompt: worked by hand, and then against the definition on seeded random rows."""

import random

import pytest

from delib.evals.robust import all_resisted, goodness_at
from delib.stats import bootstrap

NAMES = ["rot13", "base64", "morse"]


def rows_of(**prompts: list[float | None]) -> list[tuple[str, str, float | None]]:
    return [(p, f"a{n}", score) for p, scores in prompts.items() for n, score in enumerate(scores)]


def drawn(seed: int, values: list[float | None]) -> list[tuple[str, str, float | None]]:
    """3 to 9 prompts under 1 to 40 attacks, each row there."""
    draw = random.Random(seed)
    attacks = [f"a{n}" for n in range(draw.randint(1, 40))]
    return [(f"p{n}", a, draw.choice(values)) for n in range(draw.randint(3, 9)) for a in attacks]


def scores_of(rows: list[tuple[str, str, float | None]], prompt: str) -> list[float | None]:
    return [score for p, _, score in rows if p == prompt]


def test_a_prompt_counts_only_if_all_are_resisted():
    found = all_resisted(rows_of(stood=[1, 1, 1], fell=[1, 0, 1], unknown=[1, None, 1], fell_anyway=[None, 0, 1]))
    assert found == {"stood": 1.0, "fell": 0.0, "unknown": None, "fell_anyway": None}
    # By hand: 1 of the 2 prompts that have a value; a mean over the rows would have been 0.8.
    assert bootstrap([v for v in found.values() if v is not None])[0] == pytest.approx(1 / 2)


def test_an_attack_that_never_reached_a_prompt_is_ungraded_there():
    rows = [("p", "rot13", 1.0), ("p", "base64", 1.0), ("q", "rot13", 1.0), ("r", "base64", 0.0)]
    assert all_resisted(rows) == {"p": 1.0, "q": None, "r": None}
    assert goodness_at(rows).attempts == 6 and goodness_at(rows).ungraded == 2


def test_each_try_of_an_attack_counts():
    assert all_resisted([("p", "rot13", 1.0), ("p", "rot13", 0.0)]) == {"p": 0.0}


def test_a_score_that_is_no_decision_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"p: 0\.5 is neither"):
        all_resisted([("p", "rot13", 0.5)])
    with pytest.raises(ValueError, match="neither"):
        all_resisted([("p", "rot13", float("nan"))])
    with pytest.raises(ValueError, match="not within 0 and 1"):
        goodness_at([("p", "rot13", 1.25)])
    with pytest.raises(ValueError, match="fraction"):
        goodness_at([], fraction=0.0)


def test_no_rows_are_no_figure():
    assert all_resisted([]) == {}
    assert goodness_at([]) == (None, {}, 0, 0)


def test_goodness_at_a_tenth_by_hand():
    # 35 jailbreaks: the worst 3 of p have 0, 0.25 and 0.5, mean 0.25; those of q have 1.
    p = [1.0] * 16 + [0.5, 0.0, 0.25] + [0.75] * 16
    found = goodness_at(rows_of(p=p, q=[1.0] * 35))
    assert found.by_prompt == {"p": pytest.approx(0.25), "q": 1.0}
    assert found.value == pytest.approx(0.625) and (found.attempts, found.ungraded) == (70, 0)


@pytest.mark.parametrize(
    ("attacks", "fraction", "taken"),
    [(1, 0.1, 1), (9, 0.1, 1), (10, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (30, 0.1, 3), (35, 0.1, 3), (100, 0.29, 29)],
)
def test_how_many_are_the_worst(attacks: int, fraction: float, taken: int):
    """Scores 0, 1/n, 2/n …: the mean of the k lowest is (k - 1) / 2n, so it tells k."""
    rows = rows_of(p=[n / attacks for n in range(attacks)])
    random.Random(attacks).shuffle(rows)
    assert goodness_at(rows, fraction).value == pytest.approx((taken - 1) / 2 / attacks)


def test_a_prompt_with_an_ungraded_attack_has_no_worst_tenth():
    # q has its worst already, and is left out all the same: else those that fell would stay in more often.
    lost = {"q": [0.0] * 2 + [1.0] * 17 + [None], "r": [None] * 20}
    found = goodness_at(rows_of(p=[0.2, 0.5] + [1.0] * 18, s=[1.0] * 20, **lost))
    assert found.by_prompt == {"p": pytest.approx(0.35), "s": 1.0, "q": None, "r": None}
    assert found.value == pytest.approx((0.35 + 1) / 2) and (found.attempts, found.ungraded) == (80, 21)
    # One prompt of three is too few for a figure.
    assert goodness_at(rows_of(p=[0.2] * 20, **lost)) == (None, dict.fromkeys("pqr"), 60, 21)


@pytest.mark.parametrize("lost", [0.01, 0.04, 1 / 3])
@pytest.mark.parametrize("attacks", [12, 35])
def test_lost_verdicts_move_no_figure_beyond_its_interval(attacks: int, lost: float):
    """60 prompts, of which some fall to more attacks than others; told or not, but not moved."""
    draw, moved, told = random.Random(attacks), 0, 0
    for _ in range(60):
        hard = [draw.betavariate(1.2, 1.2) * 0.3 for _ in range(60)]
        rows = [
            (f"p{n}", f"a{i}", draw.randrange(7) / 8 if draw.random() < weak else 1.0)
            for n, weak in enumerate(hard)
            for i in range(attacks)
        ]
        whole = goodness_at(rows).value
        left = goodness_at([(p, a, None if draw.random() < lost else s) for p, a, s in rows])
        if left.value is not None:
            told += 1
            _, low, high = bootstrap([v for v in left.by_prompt.values() if v is not None], resamples=300)
            moved += not low <= whole <= high
    assert moved <= 2, "of intervals of 95 %, some of which hold half of the prompts"
    assert told == 60 if lost == 0.01 else lost == 0.04 or told == 0


@pytest.mark.parametrize("seed", range(60))
def test_all_resisted_is_its_definition(seed: int):
    rows = drawn(seed, [1.0] * 12 + [0.0, None])
    found = all_resisted(rows)
    for prompt, value in found.items():
        scores = scores_of(rows, prompt)
        assert value == (None if None in scores else float(min(scores)))
    random.Random(seed).shuffle(rows)
    assert all_resisted(rows) == found


@pytest.mark.parametrize("failing", [0.05, 0.1])
def test_a_judge_that_fails_at_random_does_not_move_the_mean(failing: float):
    draw = random.Random(1)
    rows = [(f"p{n}", f"a{i}", float(draw.random() < 0.95)) for n in range(4000) for i in range(12)]
    mean = bootstrap(list(all_resisted(rows).values()))[0]
    left = all_resisted([(p, a, None if draw.random() < failing else s) for p, a, s in rows])
    values = [v for v in left.values() if v is not None]
    assert len(values) < 2600
    assert bootstrap(values)[0] == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize("seed", range(60))
def test_goodness_holds_its_properties(seed: int):
    goods = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    rows = drawn(seed, [*goods * 8, None] if seed % 3 == 0 else goods)
    worst, half, whole = (goodness_at(rows, fraction) for fraction in (0.1, 0.5, 1.0))
    for prompt, value in worst.by_prompt.items():
        scores = scores_of(rows, prompt)
        if value is None:
            assert None in scores or worst.value is None
            continue
        graded = [s for s in scores if s is not None]
        assert graded == scores and min(graded) <= value <= half.by_prompt[prompt] <= whole.by_prompt[prompt]
        assert whole.by_prompt[prompt] == pytest.approx(sum(graded) / len(graded))
    whole_ones = [p for p in worst.by_prompt if None not in scores_of(rows, p)]
    assert (worst.value is None) == (2 * len(whole_ones) < len(worst.by_prompt))
    assert worst.ungraded == sum(s is None for _, _, s in rows) and worst.attempts == len(rows)
    shuffled = rows[:]
    random.Random(seed).shuffle(shuffled)
    assert goodness_at(shuffled).by_prompt == worst.by_prompt
    # One attack that does worse than all before can't raise the figure, and one that is resisted by all can't lower it.
    prompts = list(worst.by_prompt)
    harder = goodness_at([*rows, *((p, "new", 0.0) for p in prompts)])
    if worst.value is None:
        assert harder.value is None
        return
    assert harder.value <= worst.value
    # Ids and names are only names.
    renamed = [(f"x{p}", f"y{a}", s) for p, a, s in rows]
    assert goodness_at(renamed).value == pytest.approx(worst.value)


def test_where_values_are_0_and_1_a_single_worst_one_is_all_resisted():
    """With fewer than 20 attacks the worst tenth is one attack, and the two figures are the same."""
    for seed in range(30):
        rows = [row for row in drawn(seed, [1.0, 1.0, 1.0, 0.0]) if int(row[1][1:]) < 19]
        assert goodness_at(rows).by_prompt == all_resisted(rows)
