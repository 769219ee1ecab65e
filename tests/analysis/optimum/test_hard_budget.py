"""The optimum under a budget of every path, against brute force over two-step policies and other feasible ones."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax
from trees import random_tree, trees

from kl_reg.analysis.optimum import hard_budget as solver
from kl_reg.analysis.optimum.enumeration import Tree, evaluate, reverse_kl
from kl_reg.analysis.optimum.exact import expected_budget, soft_optimum
from kl_reg.analysis.optimum.hard_budget import hard_budget


def bernoulli(base, worth, nats):
    """Largest mean of two values over distributions with D <= nats."""
    best = int(np.argmax(worth))
    kl = lambda p: p * np.log(p / base[best]) + (1 - p) * np.log((1 - p) / base[1 - best])  # noqa: E731
    top = 1 - 1e-13
    p = top if kl(top) <= nats else brentq(lambda p: kl(p) - nats, base[best], top, xtol=1e-15)
    return p * worth[best] + (1 - p) * worth[1 - best]


def brute_force(tree, nats):
    """All first steps on a fine grid; behind each, one more step of the agent with what is left."""
    base, last = np.exp(tree.log_base[0][0]), len(tree.writers) - 1
    best = -np.inf
    for p in np.linspace(1e-6, 1 - 1e-6, 1001):
        first = np.array([p, 1 - p])
        left = nats - first @ np.log(first / base)
        if left < 0:
            continue
        worth = [bernoulli(row, pair, left) for row, pair in
                 zip(np.exp(tree.log_base[last]), tree.reward.reshape(-1, 2), strict=True)]
        if last == 2:
            worth = (np.exp(tree.log_base[1]) * np.reshape(worth, (2, 2))).sum(1)
        best = max(best, first @ worth)
    return best


@pytest.mark.parametrize("writers, nats, seed", [("AA", 0.3, 0), ("AA", 1.0, 6), ("ASA", 0.3, 7), ("ASA", 1.0, 1)])
def test_two_steps_against_brute_force(writers, nats, seed):
    tree = random_tree(2, writers, seed)
    expected = brute_force(tree, nats)
    coarse, fine = (hard_budget(tree, nats, levels) for levels in (4, 256))
    np.testing.assert_allclose(fine.reward, expected, atol=1e-4)
    assert expected - coarse.reward > 5e-3          # where the levels matter


def test_a_student_in_front_leaves_the_whole_budget_to_each_branch():
    tree = random_tree(2, "SA", 2)
    worth = [bernoulli(row, pair, 0.4) for row, pair in
             zip(np.exp(tree.log_base[1]), tree.reward.reshape(2, 2), strict=True)]
    np.testing.assert_allclose(hard_budget(tree, 0.4, 1).reward, np.exp(tree.log_base[0][0]) @ worth, rtol=1e-8)


@settings(max_examples=25)
@given(trees, st.floats(0.02, 3.0))
def test_it_keeps_the_budget_rises_with_levels_and_stays_below_the_expected_budget(tree, nats):
    coarse, fine = hard_budget(tree, nats, 6), hard_budget(tree, nats, 12)
    assert coarse.reward <= fine.reward + 1e-7
    assert fine.reward <= expected_budget(tree, nats).reward + 1e-9
    assert fine.kl <= fine.most + 1e-12 and fine.most <= nats * (1 + 1e-12)
    np.testing.assert_allclose((fine.reward, fine.kl), evaluate(tree, fine.policy), rtol=1e-12)
    spent = np.zeros(1)
    for policy, base, writer in zip(fine.policy, tree.log_base, tree.writers, strict=True):
        spent = (spent + (reverse_kl(policy, base) if writer == "A" else 0)).repeat(3)
    possible = np.isfinite(sum(np.repeat(p.reshape(-1), 27 // p.size) for p in fine.policy))
    np.testing.assert_allclose(fine.most, spent[possible].max(), rtol=1e-12)


def spending(tree, amounts):
    """Reward of the best policy whose t-th token may spend amounts[t]: theta of each tilt by brentq."""
    worth = tree.reward
    for base, nats in zip(tree.log_base[::-1], amounts[::-1], strict=True):
        rows = []
        for log_beta, values in zip(base, worth.reshape(base.shape), strict=True):
            tilt = lambda theta, b=log_beta, v=values: softmax(b + theta * v)  # noqa: E731
            over = lambda theta, b=log_beta, f=tilt, n=nats: f(theta) @ np.log(f(theta) / np.exp(b)) - n  # noqa: E731
            rows.append(tilt(brentq(over, 0, 200) if over(200) > 0 else 200) @ values if nats else
                        np.exp(log_beta) @ values)
        worth = np.array(rows)
    return worth[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_above_spending_evenly_and_above_spending_all_at_once(seed):
    tree = random_tree(3, "AAA", seed)
    optimum = hard_budget(tree, 1.2, 12).reward
    for amounts in ((0.4, 0.4, 0.4), (1.2, 0, 0), (0, 0, 1.2)):
        assert optimum >= spending(tree, amounts) - 1e-8


def test_no_budget_is_the_base_and_enough_is_the_most_reward():
    tree = random_tree(3, "ASA", 3)
    base = hard_budget(tree, 0.0, 4)
    assert base.kl == base.most == 0 and base.reward == pytest.approx(soft_optimum(tree, math.inf).reward, rel=1e-12)
    for nats in (50.0, math.inf):
        assert hard_budget(tree, nats, 4).reward == pytest.approx(soft_optimum(tree, 0.0).reward, rel=1e-12)


def test_rare_and_impossible_and_tied_tokens():
    with np.errstate(divide="ignore"):
        base = np.log([[1 - 2e-9, 1e-9, 1e-9, 0.0]])
    tree = Tree((base,), np.array([0.0, 1.0, 1.0, 9.0]), "A")
    saturated = hard_budget(tree, 21.0, 1)
    np.testing.assert_allclose((saturated.reward, saturated.kl), (1.0, -np.log(2e-9)), rtol=1e-8)
    expected = bernoulli([1 - 2e-9, 2e-9], [0.0, 1.0], 1.0)
    np.testing.assert_allclose(hard_budget(tree, 1.0, 1).reward, expected, rtol=1e-7)


def test_chunks_change_nothing(monkeypatch):
    tree = random_tree(3, "AAA", 4)
    whole = hard_budget(tree, 0.7, 8)
    monkeypatch.setattr(solver, "_CHUNK", 300)
    assert hard_budget(tree, 0.7, 8).reward == pytest.approx(whole.reward, rel=1e-12)


@pytest.mark.parametrize("nats, levels", [(-1.0, 4), (math.nan, 4), (1.0, 0)])
def test_a_wrong_budget_is_refused(nats, levels):
    with pytest.raises(ValueError, match="nats="):
        hard_budget(random_tree(2, "A", 0), nats, levels)
