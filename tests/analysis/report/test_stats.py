from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from kl_reg.analysis.report import stats
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT


def test_mean_and_error_leave_nans_out():
    x = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan], [8.0, 6.0, np.nan], [2.0, 5.0, 7.0]])
    mean, error = stats.mean_and_error(x)
    np.testing.assert_allclose(mean, [3.5, 5.0, 7.0])
    np.testing.assert_allclose(error[:2], [scipy.stats.sem(x[:, 0]), scipy.stats.sem([4.0, 6.0, 5.0])])
    assert np.isnan(error[2])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_t_interval_is_scipys(level):
    x = np.array([1.0, 2.5, 2.0, 7.0])
    expected = scipy.stats.t.interval(level, 3, loc=x.mean(), scale=scipy.stats.sem(x))
    np.testing.assert_allclose(stats.t_interval(x, level), expected)
    assert np.isnan(stats.t_interval(x[:1])).all()


def test_a_difference_over_seeds_is_welchs():
    a, b = np.array([1.0, 1.4, 1.1, 1.3]), np.array([0.8, 1.0, 0.2])
    found = stats.difference(stats.mean_over_seeds(a), stats.mean_over_seeds(b))
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.error == pytest.approx(found.value / expected.statistic)
    assert (found.value - found.limit, found.value + found.limit) == pytest.approx((low, high))


def test_a_difference_over_episodes_is_welchs_too():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.5, 12), rng.normal(0.7, 2.0, 30)
    means = [stats.mean_over_episodes([x.mean()], [scipy.stats.sem(x)], [len(x)]) for x in (a, b)]
    found = stats.difference(*means, level=0.9)
    low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert (found.value - found.limit, found.value + found.limit) == pytest.approx((low, high))


def test_the_error_over_the_episodes_of_several_runs_is_that_of_the_mean_of_their_means():
    mean = stats.mean_over_episodes([1.0, 4.0], [0.3, 0.4], [10, 20])
    assert mean.value == 2.5
    assert mean.error == pytest.approx(0.5 * np.hypot(0.3, 0.4))
    assert [freedom for _, freedom in mean.parts] == [9, 19]


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0]])
def test_a_difference_without_a_spread_has_no_limit(values):
    found = stats.difference(stats.mean_over_seeds(values), stats.mean_over_seeds(np.array(values) - 0.5))
    assert found.value == 0.5
    assert np.isnan(found.limit)


def two_episodes():
    """By hand; the opening fills two slots at most, so position 0 is slot 2."""
    roles = np.array([[PAD, OPENING, AGENT, AGENT, STUDENT, AGENT], [OPENING, OPENING, FORCED, AGENT, AGENT, PAD]])
    turns = np.array([[-1, -1, 0, 0, 1, 2], [-1, -1, 0, 0, 0, -1]])
    kl = np.array([[0, 0, 4.0, 2.0, 0, 1.0], [0, 0, 0, 1.0, 0.5, 0]])
    return roles, turns, kl


def test_kl_by_position_by_hand():
    part = stats.kl_by_position(*two_episodes())
    np.testing.assert_allclose(part.per_token, [4.0, 1.5, 0.5, 1.0])
    np.testing.assert_allclose(part.per_position, [2.0, 1.5, 0.25, 0.5])
    np.testing.assert_allclose(part.cumulative, [2.0, 3.5, 3.75, 4.25])
    np.testing.assert_allclose(part.per_turn, [3.75, 0.5])
    assert stats.share_spent_early(part.cumulative, 0.5) == pytest.approx(3.5 / 4.25)


def test_padding_changes_no_position():
    roles, turns, kl = two_episodes()
    left = [np.pad(x, ((0, 0), (3, 0)), constant_values=fill) for x, fill in ((roles, PAD), (turns, -1), (kl, 0))]
    for a, b in zip(stats.kl_by_position(*left), stats.kl_by_position(roles, turns, kl), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mean_over_seeds_counts_a_turn_not_reached_as_nothing():
    roles, turns, kl = two_episodes()
    one, other = stats.kl_by_position(roles, turns, kl), stats.kl_by_position(roles[1:], turns[1:], kl[1:])
    mean = stats.mean_by_position([one, other])
    np.testing.assert_allclose(mean.per_token, [4.0, 1.25, 0.5, 1.0])
    np.testing.assert_allclose(mean.per_turn, [(3.75 + 1.5) / 2, 0.25])


@pytest.mark.parametrize(("value", "error", "text"), [
    (1.5234, 0.031, "1.523 <small>± 0.031</small>"), (50.27, 1.24, "50.3 <small>± 1.2</small>"),
    (1.5, float("nan"), "1.50"), (float("nan"), 0.1, "–")])
def test_numbers_show_two_digits_of_their_error(value, error, text):
    assert stats.show(value, error) == text
