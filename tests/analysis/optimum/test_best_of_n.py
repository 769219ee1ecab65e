"""Best-of-n against all subsets of the samples and all draws of a small base."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.analysis.optimum.best_of_n import best_of_n, best_of_n_kl

LEVELS = st.lists(st.sampled_from([0.0, 1.0, 2.5, 2.5 + 1e-6, 7.0]), min_size=6, max_size=6)


@given(LEVELS, LEVELS, st.integers(1, 5))
def test_reward_and_error_are_those_of_all_subsets_and_of_leaving_one_out(first, second, n):
    subsets = lambda row: np.mean([max(chosen) for chosen in itertools.combinations(row, n)])  # noqa: E731
    rows, found = (first, second), best_of_n(np.array([first, second]), n)
    np.testing.assert_allclose(found.reward, np.mean([subsets(row) for row in rows]), rtol=1e-9, atol=1e-12)
    without = np.array([[subsets(row[:i] + row[i + 1:]) for i in range(6)] for row in rows])
    np.testing.assert_allclose(found.reward_se, math.sqrt((5 * without.var(1)).sum()) / 2, rtol=1e-6, atol=1e-9)


def test_the_best_of_one_is_the_base_and_of_all_the_largest():
    rewards = np.random.default_rng(0).normal(size=(1, 50))
    one, everything = best_of_n(rewards, 1), best_of_n(rewards, 50)
    np.testing.assert_allclose((one.reward, one.reward_se, one.kl, one.kl_bound),
                               (rewards.mean(), rewards.std(ddof=1) / 50**0.5, 0, 0), atol=1e-12)
    assert everything.reward == pytest.approx(rewards.max()) and math.isnan(everything.reward_se)


@given(st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5), LEVELS, st.sampled_from([2, 3]))
def test_the_kl_is_that_of_all_draws_and_below_the_bound(masses, levels, n):
    masses, rewards = np.array(masses) / np.sum(masses), np.array(levels[:5])
    policy = np.zeros(5)
    for draws in itertools.product(range(5), repeat=n):
        tied = [i for i in draws if rewards[i] == max(rewards[list(draws)])]
        for i in tied:
            policy[i] += np.prod(masses[list(draws)]) / len(tied)
    kl = best_of_n_kl(rewards, masses, n)
    np.testing.assert_allclose(kl, policy @ np.log(policy / masses), rtol=1e-9, atol=1e-12)
    assert -1e-12 <= kl <= math.log(n) - (n - 1) / n + 1e-12


def test_continuous_rewards_reach_the_bound_and_coarse_ones_do_not():
    many = np.arange(20_000.0)[None]
    found = best_of_n(many, 16)
    assert found.kl == pytest.approx(found.kl_bound, rel=1e-3) and found.kl < found.kl_bound
    assert best_of_n(many % 2, 16).kl == pytest.approx(math.log(2), rel=1e-3)


def test_rare_and_impossible_outcomes_and_a_large_n():
    rewards = np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(best_of_n_kl(rewards, np.array([1 - 1e-18, 1e-18, 0.0]), 10), 9e-18 * (
        math.log(10) - 1 + 1 / 9 * math.log(10)), rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(best_of_n_kl(rewards, np.array([0.5, 0.4, 0.1]), 10**6), -math.log(0.1), rtol=1e-9)


@pytest.mark.parametrize("rewards, n, message", [
    (np.zeros((1, 3)), 4, "n=4"), (np.zeros((1, 3)), 0, "n=0"), (np.full((1, 3), np.nan), 1, "finite"),
    (np.zeros((0, 3)), 1, "shape")])
def test_wrong_arguments_are_named(rewards, n, message):
    with pytest.raises(ValueError, match=message):
        best_of_n(rewards, n)
