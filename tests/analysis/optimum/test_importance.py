"""Importance weighting against enumeration: exact where every sequence is a sample, within its errors where not."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import random_tree, sequence_log_probs

from kl_reg.analysis.optimum import exact as exact_optimum
from kl_reg.analysis.optimum.exact import soft_optimum
from kl_reg.analysis.optimum.importance import expected_budget, importance_frontier, sample_tilted

LAMS = np.array([0.2, 1.0, 5.0, math.inf])


def all_sequences(tree, seed):
    """Every sequence once, and two policies whose equal mixture is uniform over them."""
    n = len(tree.reward)
    first = np.random.default_rng(seed).uniform(0.01, 1.99, n // 2)
    first = np.concatenate([first, 2 - first]) / n if n % 2 == 0 else np.full(n, 1 / n)
    return tree.reward, sequence_log_probs(tree.log_base, 2), np.log(np.stack([first, 2 / n - first]))


@given(st.integers(0, 2**31))
def test_every_sequence_once_under_a_uniform_mixture_is_exact(seed):
    tree = random_tree(2, "AAAA", seed)
    points = importance_frontier(*all_sequences(tree, seed), np.array([8, 8]), LAMS, least=0.0)
    for lam, point in zip(LAMS, points, strict=True):
        optimum = soft_optimum(tree, lam)
        np.testing.assert_allclose((point.reward, point.kl), (optimum.reward, optimum.kl), rtol=1e-9, atol=1e-12)
        chances = [np.exp(sequence_log_probs(policy, 2)) for policy in (optimum.policy, tree.log_base)]
        np.testing.assert_allclose(point.ess, min(1 / (chance**2).sum() for chance in chances), rtol=1e-9)


def test_a_budget_on_average_is_the_enumerated_optimum():
    tree = random_tree(2, "AAAA", 5)
    sampled, most = all_sequences(tree, 5), soft_optimum(tree, 0.0).kl
    at = lambda lam: importance_frontier(*sampled, np.array([8, 8]), np.array([lam]), least=0.0)[0]  # noqa: E731
    for nats in (0.01, 0.3, 0.9 * most):
        point, exact = expected_budget(at, nats, 1e-3), exact_optimum.expected_budget(tree, nats)
        assert nats * (1 - 1e-9) < point.kl <= nats
        np.testing.assert_allclose((point.reward, point.lam), (exact.reward, exact.lam), rtol=1e-6)
    assert expected_budget(at, most + 0.1, 1e-3) == at(1e-3)
    for wrong, named in (((at, 0.0, 1.0), "nats=0"), ((at, math.nan, 1.0), "nats=nan"), ((at, 1.0, 0.0), "lam=0")):
        with pytest.raises(ValueError, match=named):
            expected_budget(*wrong)


def test_each_prompt_has_its_own_optimum():
    pair = [random_tree(2, "AAAA", seed) for seed in (1, 2)]
    parts = [all_sequences(tree, 3) for tree in pair]
    order = np.random.default_rng(0).permutation(32)
    reward, log_base, proposals = (np.concatenate(part, -1)[..., order] for part in zip(*parts, strict=True))
    prompt = np.array(["a"] * 16 + ["b"] * 16)[order]
    points = importance_frontier(reward, log_base, proposals, np.array([16, 16]), LAMS, prompt, least=0.0)
    for lam, point in zip(LAMS, points, strict=True):
        optima = [soft_optimum(tree, lam) for tree in pair]
        alone = [importance_frontier(*part, np.array([8, 8]), np.array([lam]), least=0.0)[0] for part in parts]
        np.testing.assert_allclose((point.reward, point.kl), np.mean([(o.reward, o.kl) for o in optima], 0), rtol=1e-9,
                                   atol=1e-12)
        np.testing.assert_allclose(point.reward_se, math.hypot(*(one.reward_se for one in alone)) / 2)
        assert point.ess == pytest.approx(min(one.ess for one in alone), rel=1e-12)


def draw(tree, rng, counts, lam=0.5):
    """Samples of the base and of the optimum at lam: (reward, log_base, log_proposals)."""
    log_probs = np.stack([sequence_log_probs(policy, 2) for policy in (tree.log_base, soft_optimum(tree, lam).policy)])
    rows = np.concatenate([rng.choice(len(row), count, p=np.exp(row) / np.exp(row).sum())
                           for row, count in zip(log_probs, counts, strict=True)])
    return tree.reward[rows], log_probs[0, rows], log_probs[:, rows]


@pytest.mark.parametrize("lam", [0.3, 1.0, 10.0])
def test_samples_of_two_policies_are_within_their_stated_errors(lam):
    tree, counts, rng = random_tree(2, "AAAA", 7), np.array([200, 200]), np.random.default_rng(0)
    optimum = soft_optimum(tree, lam)
    points = [importance_frontier(*draw(tree, rng, counts), counts, np.array([lam]))[0] for _ in range(300)]
    for name, expected in (("reward", optimum.reward), ("kl", optimum.kl)):
        values = np.array([getattr(point, name) for point in points])
        stated = np.mean([getattr(point, f"{name}_se") for point in points])
        assert abs(values.mean() - expected) < 4 * stated / np.sqrt(300) + 0.1 * stated     # its bias is of order 1/n
        assert 0.6 * stated < values.std() < 1.15 * stated      # the draws are stratified: a little better than stated


def test_points_without_samples_enough_are_left_out():
    tree, counts = random_tree(2, "AAAAAA", 8, scale=3.0), np.array([300, 0])
    sampled = draw(tree, np.random.default_rng(1), counts)
    lams = np.array([0.02, 1.0, math.inf])
    ess = [point.ess for point in importance_frontier(*sampled, counts, lams, least=0.0)]
    kept = importance_frontier(*sampled, counts, lams, least=(ess[0] + ess[2]) / 2)
    assert ess[0] < ess[2] and ess[2] == pytest.approx(300) and [p.lam for p in kept][-1] == math.inf
    assert len(kept) < 3


def test_samples_of_the_optimum_alone_do_not_show_its_kl():
    tree, counts, lam = random_tree(2, "AAAAAA", 9, scale=3.0), np.array([0, 500]), 0.1
    sampled = draw(tree, np.random.default_rng(2), counts, lam)
    (point,) = importance_frontier(*sampled, counts, np.array([lam]), least=0.0)
    assert point.ess < 50        # their own weights are all equal, 500; those of the base are not


def test_wrong_arguments_are_named():
    reward, log_base, proposals = all_sequences(random_tree(2, "AAAA", 0), 0)
    counts, lams, infinite = np.array([8, 8]), np.array([1.0]), np.where(np.arange(16) == 5, np.inf, reward)
    for changed, message in (((reward, log_base, proposals, np.array([8, 7]), lams), "counts="),
                             ((infinite, log_base, proposals, counts, lams), "reward: sample 5"),
                             ((reward, log_base, proposals + np.where(np.arange(16) == 3, -np.inf, 0), counts, lams),
                              "log_proposals: sample 3"),
                             ((reward, log_base, proposals, counts, np.array([0.0])), "lam=")):
        with pytest.raises(ValueError, match=message):
            importance_frontier(*changed)
    with pytest.raises(ValueError, match="prompt has shape"):
        importance_frontier(reward, log_base, proposals, counts, lams, np.zeros(3))


def test_resampling_draws_the_optimum_of_the_samples():
    rewards = np.array([0.0, 1.0, 1.0, 3.0])
    drawn = sample_tilted(np.random.default_rng(0), rewards, 0.8, 40_000)
    chance = np.exp(rewards / 0.8) / np.exp(rewards / 0.8).sum()
    np.testing.assert_allclose(np.bincount(drawn.indices) / 40_000, chance, atol=0.01)
    np.testing.assert_allclose((drawn.point.reward, drawn.point.kl, drawn.point.ess),
                               (chance @ rewards, chance @ np.log(4 * chance), 1 / (chance @ chance)), rtol=1e-9)
    assert (sample_tilted(np.random.default_rng(0), rewards, 1e-12, 5).indices == 3).all()
    for wrong, lam in ((np.array([]), 1.0), (np.array([np.nan]), 1.0), (rewards, 0.0)):
        with pytest.raises(ValueError, match="rewards|lam"):
            sample_tilted(np.random.default_rng(0), wrong, lam, 1)
