import numpy as np
import pytest

from delib import stats


def test_bootstrap_interval_holds_the_mean_and_is_seeded():
    data = [1.0] * 70 + [0.0] * 30
    mean, low, high = stats.bootstrap(data)
    assert mean == pytest.approx(0.7)
    assert 0.58 < low < 0.66 and 0.74 < high < 0.82
    assert stats.bootstrap(data) == (mean, low, high)


def test_all_right_has_wilsons_interval():
    assert stats.bootstrap([1.0] * 20) == (1.0, pytest.approx(20 / (20 + 1.96**2)), 1.0)


def test_nothing_is_no_figure():
    with pytest.raises(ValueError, match="no values"):
        stats.bootstrap([])


def test_kappa_by_hand():
    # 20 items: 15 agree; marginals 12/8 and 11/9: chance = .6*.55 + .4*.45 = .51
    first = ["a"] * 12 + ["b"] * 8
    second = ["a"] * 9 + ["b"] * 3 + ["a"] * 2 + ["b"] * 6
    assert stats.kappa(first, second) == pytest.approx((0.75 - 0.51) / 0.49)


def test_the_interval_of_kappa_draws_whole_groups():
    first = (["a"] * 30 + ["b"] * 30) * 2
    second = (["a"] * 24 + ["b"] * 6 + ["a"] * 3 + ["b"] * 27) * 2
    apart = stats.kappa_interval(first, second, [str(n) for n in range(120)])
    assert apart is not None and 0.55 < apart[0] < 0.65 and 0.75 < apart[1] < 0.85
    assert apart == stats.kappa_interval(first, second, [str(n) for n in range(120)]), "seeded"
    # By its definition: groups drawn by hand, and kappa of all that they hold.
    groups = [f"g{n % 20}" for n in range(120)]
    tied = stats.kappa_interval(first, second, groups)
    names, members = sorted(set(groups)), {g: [n for n in range(120) if groups[n] == g] for g in groups}
    draws = np.random.default_rng(0).integers(0, 20, size=(1000, 20))
    places = [[n for g in row for n in members[names[g]]] for row in draws]
    found = [stats.kappa([first[n] for n in p], [second[n] for n in p]) for p in places]
    assert tied == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])))
    # The same answers three times over tell no more than once.
    once = stats.kappa_interval(first, second, [str(n) for n in range(120)])
    assert stats.kappa_interval(first * 3, second * 3, [str(n) for n in range(120)] * 3) == pytest.approx(once)


def test_kappa_has_no_interval_where_there_is_nothing_to_draw():
    ids = [str(n) for n in range(40)]
    assert stats.kappa_interval(["a"] * 20 + ["b"] * 20, ["a"] * 40, ["g"] * 40) is None
    assert stats.kappa_interval(["a"] * 40, ["a"] * 20 + ["b"] * 20, ids) is None
    assert stats.kappa_interval(["a"] * 20 + ["b"] * 20, ["a"] * 40, ids) is None
    # One of 40 is of the other class: 0.36 of the resamples are without it.
    assert stats.kappa_interval(["a"] * 39 + ["b"], ["a"] * 38 + ["b"] * 2, ids) is None
    # All agree: agreement may be as low as Wilson's bound, chance is a half.
    low, high = stats.kappa_interval(["a"] * 20 + ["b"] * 20, ["a"] * 20 + ["b"] * 20, ids)
    assert high == 1.0 and low == pytest.approx(1 - 2 * 1.96**2 / (40 + 1.96**2))


def test_balanced_accuracy_needs_both_sides():
    assert stats.balanced_accuracy([True, True, False], [True, False, False]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="both sides"):
        stats.balanced_accuracy([True], [True])


def test_paired_difference_is_of_the_pairs():
    before = [0.0] * 40 + [1.0] * 40
    after = [1.0] * 20 + [0.0] * 20 + [1.0] * 40
    mean, low, high = stats.paired(before, after)
    assert mean == pytest.approx(0.25)
    assert 0.1 < low < 0.2 and 0.3 < high < 0.4
    # The same two means without pairs would be far less sure.
    assert high - low < 0.22
    mean, low, high = stats.paired([1.0] * 10, [1.0] * 10)
    assert (mean, low) == (0.0, -high) and high == pytest.approx(1.96**2 / (10 + 1.96**2))
    assert stats.paired([0.0], [1.0])[2] == 1.0
    with pytest.raises(ValueError, match="same prompts"):
        stats.paired([1.0], [1.0, 0.0])


def test_the_sign_test_by_hand():
    # 4 pairs differ, all one way: 2 * 0.5**4
    assert stats.differ([0.0] * 4 + [1.0] * 50, [1.0] * 54) == pytest.approx(0.125)
    assert stats.differ([1.0, 0.0], [1.0, 0.0]) == 1.0


def test_p_values_and_holm_by_hand():
    # 10 pairs, 8 up and 2 down: the exact sign test's p is 2 * (1 + 10 + 45) / 1024
    up = stats.p_value([0.0] * 8 + [1.0] * 2, [1.0] * 8 + [0.0] * 2)
    assert up == pytest.approx(112 / 1024)
    # differences -1, 0, 1, 2, 3: of the 16 ways to give their signs six have a sum of 5 or more, up or down
    assert stats.p_value([0.0] * 5, [-1.0, 0.0, 1.0, 2.0, 3.0]) == pytest.approx(6 / 16)
    # One prompt that outweighs the others: the exchange test sees that all are up, the normal one how far they scatter.
    assert stats.p_value([0.0] * 14, [0.1] * 13 + [10.0]) == pytest.approx(0.2537, abs=1e-4)
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


def test_with_few_prompts_a_mean_over_seeds_is_not_sure():
    """Five prompts of three seeds each, all better in two or three: the normal approximation has p < 1e-9."""
    after = [1.0, 2 / 3, 1.0, 2 / 3, 1.0]
    assert stats.p_value([0.0] * 5, after) == pytest.approx(2 / 2**5)
    assert stats.p_value([0.0] * 10, after * 2, ["a", "b", "c", "d", "e"] * 2) == pytest.approx(2 / 2**5)
    assert stats.p_value([0.5] * 3, [0.5] * 3) == 1.0


def test_drawn_exchanges_are_those_of_all_ways():
    draw = np.random.default_rng(1)
    # Differences of one size: the sign test's distribution, which is known. 30 prompts, 22 up.
    change = [1 / 3] * 22 + [-1 / 3] * 8
    exact = stats.differ([0.0] * 22 + [1.0] * 8, [1.0] * 22 + [0.0] * 8)
    assert stats.exchanged(change) == pytest.approx(exact, abs=0.003)
    # Where nothing differs in truth, 5 % come out below 0.05, whether all ways are taken or some are drawn.
    for prompts in (8, 20):
        found = [stats.exchanged(list(draw.normal(size=prompts).round(1)), seed=n) for n in range(300)]
        assert 0.02 < np.mean([p < 0.05 for p in found]) < 0.09
    assert stats.exchanged([1.0] * 40) == pytest.approx(1 / 10_001)


def test_clusters_widen_the_standard_error():
    values = [0.0, 0.0, 1.0, 1.0] * 5
    apart = stats.standard_error(values)
    assert apart == pytest.approx((0.25 * 20 / 19 / 20) ** 0.5)
    assert stats.standard_error(values, [f"g{i // 2}" for i in range(20)]) == pytest.approx((0.25 / 9) ** 0.5)
    assert stats.standard_error([1.0, 0.0], ["g", "g"]) is None


@pytest.mark.parametrize("pairs", [True, False])
def test_the_detectable_difference_is_found_four_times_in_five(pairs):
    """Worlds with a true difference of that size: the test at 5 % calls it one in about 80 % of them."""
    draw = np.random.default_rng(0)
    n = 400
    hard = draw.random(n) * 0.8
    one = (draw.random(n) < hard).astype(float)
    found = stats.detectable(list(one), list((draw.random(n) < hard).astype(float)), pairs=pairs)
    hits = 0
    for _ in range(400):
        own, other = (hard, hard) if pairs else (draw.random(n) * 0.8, draw.random(n) * 0.8)
        a = (draw.random(n) < own).astype(float)
        b = (draw.random(n) < other + found).astype(float)
        error = stats.standard_error(b - a) if pairs else np.hypot(stats.standard_error(a), stats.standard_error(b))
        hits += abs((b - a).mean()) > 1.96 * error
    assert 0.74 < hits / 400 < 0.88


def test_where_no_pair_differs_little_could_have_been_found():
    assert stats.detectable([1.0] * 50, [1.0] * 50) == pytest.approx(2.801585**2 / 50)
    assert stats.detectable([1.0] * 50, [1.0] * 50, ["g"] * 25 + ["h"] * 25) == pytest.approx(2.801585**2 / 2)
    assert stats.detectable([1.0], [0.0]) is None
    pairs, apart = (stats.detectable([0.0, 1.0] * 40, [0.0, 1.0] * 39 + [1.0, 1.0], pairs=p) for p in (True, False))
    assert pairs < apart
