"""Optima against the closed form of whole sequences, brute-force optimisation, and what any optimum must satisfy."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import log_softmax, logsumexp, softmax
from transformers import LlamaForCausalLM
from trees import random_tree, sequence_log_probs, trees

from kl_reg.analysis.optimum import enumeration as tree_module
from kl_reg.analysis.optimum.enumeration import Tree, enumerate_model, evaluate, reverse_kl, tokens_of
from kl_reg.analysis.optimum.exact import efficiency, expected_budget, frontier, soft_optimum
from kl_reg.pretrained import families, weights


@pytest.fixture(scope="module")
def five(tiny_shapes):
    """The tiny model with five tokens."""
    return dataclasses.replace(tiny_shapes, vocab=5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_read_as_torch_reads_it_history_by_history(five, tiny_params, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_module, "_ROWS", 7)       # 25 histories in four batches, the last one padded
    params, reward = tiny_params | {"embed": 8 * tiny_params["embed"][:5]}, np.arange(125.0).reshape(5, 5, 5)
    tree = enumerate_model(five, params, [3, 1], 3, reward, "ASA", temperature=0.7)
    weights.save(tmp_path, families.llama_settings(five), params, "float32")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for t, table in enumerate(tree.log_base):
        for number, row in enumerate(table):
            digits = [number // 5**i % 5 for i in reversed(range(t))]
            with torch.no_grad():
                expected = (loaded(torch.tensor([[3, 1, *digits]])).logits[0, -1].double() / 0.7).log_softmax(-1)
            np.testing.assert_allclose(row, expected.numpy(), atol=2e-5)
    assert np.ptp(tree.log_base[2], axis=0).max() > 0.1          # histories matter
    np.testing.assert_array_equal(tree.reward, np.arange(125.0))
    assert tree.writers == "ASA"


@pytest.mark.parametrize("change, message", [
    ({"horizon": 11}, "5\\*\\*11 sequences at most 16777216"), ({"horizon": 0}, "horizon=0"),
    ({"reward": np.zeros((5, 4))}, r"reward has shape \(5, 4\)"), ({"reward": np.full(25, np.nan)}, "25 values"),
    ({"writers": "AX"}, "writers='AX'"), ({"writers": "A"}, "writers='A'"), ({"opening": []}, "opening="),
    ({"opening": [5]}, "opening="), ({"opening": [0] * 64}, "context"), ({"temperature": 0.0}, "temperature=0.0")])
def test_a_wrong_argument_is_named(five, change, message):
    good = {"opening": [0], "horizon": 2, "reward": np.zeros(25), "writers": "", "temperature": 1.0}
    with pytest.raises(ValueError, match=message):
        enumerate_model(five, {}, **(good | change))


def test_histories_count_with_their_first_token_in_front():
    np.testing.assert_array_equal(tokens_of(np.array([0, 5, 7]), 3, 2), [[0, 0], [1, 2], [2, 1]])
    assert tokens_of(np.array([0]), 3, 0).shape == (1, 0)


def test_kl_of_close_and_of_impossible_distributions():
    base = np.log([0.5, 0.25, 0.25])
    np.testing.assert_allclose(reverse_kl(np.log([0.5 + 1e-7, 0.25 - 1e-7, 0.25]), base),
                               1e-14 / 2 * (1 / 0.5 + 1 / 0.25), rtol=1e-5)
    with np.errstate(divide="ignore"):
        certain = np.log([[0.0, 1, 0], [0.0, 0.5, 0.5]])
    np.testing.assert_allclose(reverse_kl(certain, np.stack([base, base])), np.log([4, 2]))
    assert reverse_kl(base, certain[1]) == math.inf


@given(trees, st.integers(0, 2**31))
def test_evaluation_is_the_sum_over_sequences(tree, seed):
    policy = random_tree(3, "AAA", seed).log_base
    own = [writer == "A" for writer in tree.writers]
    spoken = [p if mine else b for p, b, mine in zip(policy, tree.log_base, own, strict=True)]
    chance = np.exp(sequence_log_probs(spoken, 3))
    ratio = sequence_log_probs(policy, 3, own) - sequence_log_probs(tree.log_base, 3, own)
    np.testing.assert_allclose(evaluate(tree, policy), (chance @ tree.reward, chance @ ratio), rtol=1e-9, atol=1e-12)


def test_a_table_that_is_no_policy_is_named():
    tree = random_tree(3, "AS", 0)
    for tables, message in (((tree.log_base[0],), "1 tables"), ((tree.log_base[1],) * 2, r"log_policy\[0\] has shape"),
                            ((tree.log_base[0] + 1, tree.log_base[1]), r"log_policy\[0\] is not normalised")):
        with pytest.raises(ValueError, match=message):
            evaluate(tree, tables)
    assert evaluate(tree, (tree.log_base[0], np.zeros(())))[1] == 0      # the student's table is not read


@pytest.mark.parametrize("lam", [1e-3, 0.1, 1.0, 30.0])
def test_the_soft_optimum_is_the_tilt_of_whole_sequences(lam):
    tree = random_tree(4, "AAAA", 1)
    base = sequence_log_probs(tree.log_base, 4)
    log_z = logsumexp(base + tree.reward / lam)
    expected = base + tree.reward / lam - log_z
    optimum = soft_optimum(tree, lam)
    np.testing.assert_allclose(np.exp(sequence_log_probs(optimum.policy, 4)), np.exp(expected), atol=1e-11)
    chance = np.exp(expected)
    np.testing.assert_allclose((optimum.reward, optimum.kl), (chance @ tree.reward, chance @ (expected - base)),
                               rtol=1e-9)
    np.testing.assert_allclose(optimum.value, lam * log_z, rtol=1e-10)


@pytest.mark.parametrize("writers", ["AS", "SA", "ASA"])
def test_the_soft_optimum_with_a_student_is_what_brute_force_finds(writers):
    tree = random_tree(2, writers, 2)
    own = [t for t, writer in enumerate(writers) if writer == "A"]

    def loss(x):
        tables, at = list(tree.log_base), 0
        for t in own:
            tables[t] = log_softmax(np.stack([x[at:at + 2**t], np.zeros(2**t)], 1), axis=1)
            at += 2**t
        chance = np.exp(sequence_log_probs(tables, 2))
        mine = [t in own for t in range(len(writers))]
        ratio = sequence_log_probs(tables, 2, mine) - sequence_log_probs(tree.log_base, 2, mine)
        return -(chance @ (tree.reward - 0.3 * ratio))

    best = minimize(loss, np.zeros(sum(2**t for t in own)), tol=1e-10)
    np.testing.assert_allclose(soft_optimum(tree, 0.3).value, -best.fun, atol=1e-8)


def test_a_large_coefficient_leaves_the_base():
    tree = random_tree(3, "AAA", 3)
    chance = np.exp(sequence_log_probs(tree.log_base, 3))
    mean = chance @ tree.reward
    variance = chance @ (tree.reward - mean) ** 2
    near, base = soft_optimum(tree, 1e6), soft_optimum(tree, math.inf)
    np.testing.assert_allclose(near.kl, variance / (2 * 1e12), rtol=1e-4)           # the second cumulant
    np.testing.assert_allclose(near.reward - mean, variance / 1e6, rtol=1e-4)
    np.testing.assert_allclose(base.reward, mean, rtol=1e-12)
    assert base.kl == 0 and base.value == base.reward
    np.testing.assert_array_equal(base.policy[2], tree.log_base[2])


@pytest.mark.parametrize("lam", [0.0, 1e-300, 1e-9])
def test_without_a_penalty_ties_are_shared_as_the_base_has_them(lam):
    log_base = random_tree(3, "AA", 4).log_base
    reward = np.array([0.1, 3.0, 0, 3.0, 0, 2.9, -5, 0, 3.0])
    optimum = soft_optimum(Tree(log_base, reward, "AA"), lam)
    chance = np.where(reward == 3.0, np.exp(sequence_log_probs(log_base, 3)), 0)
    np.testing.assert_allclose(np.exp(sequence_log_probs(optimum.policy, 3)), chance / chance.sum(), atol=1e-12)
    np.testing.assert_allclose((optimum.reward, optimum.kl), (3.0, -np.log(chance.sum())), rtol=1e-9)


def test_without_a_penalty_the_student_is_not_chosen_for():
    tree = Tree((np.log([[0.9, 0.1]]), np.log([[0.5, 0.5], [0.75, 0.25]])), np.array([0.0, 2.0, 0.0, 3.0]), "AS")
    optimum = soft_optimum(tree, 0.0)
    np.testing.assert_allclose((optimum.reward, optimum.kl), (1.0, -np.log(0.9)))


def test_what_the_base_cannot_say_stays_unsaid():
    with np.errstate(divide="ignore"):
        tree = Tree((np.log([[0.5, 0.5, 0.0]]),), np.array([0.0, 1.0, 50.0]), "A")
    for lam in (0.0, 0.5, math.inf):
        optimum = soft_optimum(tree, lam)
        np.testing.assert_allclose(optimum.reward, softmax([0.0, 1 / lam if lam else math.inf])[1] if lam else 1.0)
        assert optimum.policy[0][0, 2] == -math.inf


@given(trees)
def test_the_frontier_rises_is_concave_and_each_point_best_at_its_own_coefficient(tree):
    lams = np.geomspace(1e-2, 30, 12)
    points = frontier(tree, lams)
    assert (np.diff(points.kl) <= 1e-12).all() and (np.diff(points.reward) <= 1e-12).all()
    values = points.reward[None] - lams[:, None] * points.kl[None]       # [coefficient, point]
    assert (values.diagonal()[:, None] >= values - 1e-10).all()
    moved = np.diff(points.kl) < -1e-6
    slope = (np.diff(points.reward) / np.where(moved, np.diff(points.kl), 1.0))[moved]
    assert (slope >= lams[:-1][moved] - 1e-6).all() and (slope <= lams[1:][moved] + 1e-6).all()


@pytest.mark.parametrize("lam", [-1.0, math.nan])
def test_a_coefficient_below_zero_is_refused(lam):
    with pytest.raises(ValueError, match="lam="):
        soft_optimum(random_tree(2, "A", 0), lam)
    with pytest.raises(ValueError, match="nats="):
        expected_budget(random_tree(2, "A", 0), lam)


@pytest.mark.parametrize("nats", [1e-8, 0.01, 0.5, 1.5])
def test_one_token_under_a_budget_moves_as_far_as_it_allows(nats):
    tree = Tree((np.log([[0.8, 0.2]]),), np.array([1.0, 4.0]), "A")
    kl = lambda p: p * np.log(p / 0.2) + (1 - p) * np.log((1 - p) / 0.8)  # noqa: E731
    expected = 1 + 3 * brentq(lambda p: kl(p) - nats, 0.2, 1 - 1e-12, xtol=1e-14)
    np.testing.assert_allclose(expected_budget(tree, nats).reward, expected, rtol=1e-7)


@given(trees, st.floats(0.01, 2.0))
def test_an_expected_budget_is_spent_and_at_its_coefficient_optimal(tree, nats):
    optimum, most = expected_budget(tree, nats), soft_optimum(tree, 0.0)
    np.testing.assert_allclose(optimum.kl, min(nats, most.kl), rtol=1e-9)
    assert optimum.kl <= nats
    # weak duality: no policy of at most that KL has more than max_pi(reward - lam kl) + lam nats
    if optimum.lam > 0:
        np.testing.assert_allclose(optimum.reward, soft_optimum(tree, optimum.lam).value + optimum.lam * nats,
                                   rtol=1e-9)
    else:
        assert optimum.reward == most.reward


def test_no_budget_and_more_than_enough():
    tree = random_tree(3, "ASA", 5)
    assert expected_budget(tree, 0.0).lam == math.inf and expected_budget(tree, 0.0).kl == 0
    assert expected_budget(tree, math.inf).lam == 0


def test_efficiency_is_one_on_the_frontier_and_a_half_at_twice_the_kl():
    tree = random_tree(3, "AAA", 6)
    points = frontier(tree, np.append(np.geomspace(1e-3, 30, 25), math.inf))
    for lam in (0.07, 0.4, 3.0):
        optimum = soft_optimum(tree, lam)
        for times in (1, 2):
            found = efficiency(points.kl, points.reward, times * optimum.kl, optimum.reward)
            np.testing.assert_allclose(found, 1 / times, rtol=0.01)
            assert efficiency(points.kl[::-1], points.reward[::-1], times * optimum.kl, optimum.reward) == found
    for kl, reward in ((1.0, points.reward.max() + 0.01), (1.0, points.reward.min() - 0.01), (0.0, points.reward[5])):
        assert math.isnan(efficiency(points.kl, points.reward, kl, reward))
    assert math.isnan(efficiency(np.array([]), np.array([]), 1.0, 1.0))
