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
