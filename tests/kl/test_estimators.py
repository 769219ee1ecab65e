"""Expected gradients by enumeration: an autoregressive model over 3 symbols and 3 steps, one row of logits a prefix."""
from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.kl.estimators import ESTIMATORS, check
from kl_reg.kl.exact import token_terms

SEQUENCES = np.array(list(itertools.product(range(3), repeat=3)))
ROWS = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)
PRODUCTS = [(name, placement) for name in ESTIMATORS.names() for placement in ("reward", "loss", "full")]
ALLOWED = [(name, placement) for name, placement in PRODUCTS if placement in ESTIMATORS[name].placements]


@pytest.fixture(scope="module")
def tables():
    """Logits of the policy and of the base [13, 3]."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(0, 1.5, (13, 3)), jnp.float32), jnp.asarray(rng.normal(0, 1.5, (13, 3)), jnp.float32)


def log_prob(table):
    """Of every token of every sequence, [27, 3]."""
    return jax.nn.log_softmax(table)[ROWS, SEQUENCES]


@jax.jit
def sequence_kl(policy, base):
    """The KL of whole sequences: the sum over all 27."""
    ours, theirs = log_prob(policy).sum(1), log_prob(base).sum(1)
    return (jnp.exp(ours) * (ours - theirs)).sum()


@jax.jit
def per_token_kl(policy, base):
    """Sum of the KL at each prefix, at the probabilities of prefixes of a policy that is held constant."""
    weight = jax.lax.stop_gradient(jnp.exp(log_prob(policy).sum(1)))
    per_prefix = (jax.nn.softmax(policy) * (jax.nn.log_softmax(policy) - jax.nn.log_softmax(base))).sum(1)
    return (weight[:, None] * per_prefix[ROWS]).sum()


@partial(jax.jit, static_argnums=(2, 3, 4))
def expected_gradient(policy, base, estimator, placement, steps=3):
    """What a policy-gradient step with coefficient 1 and no task reward descends: undiscounted, no baseline."""
    rows, actions = ROWS[:, :steps], SEQUENCES[:, :steps]
    weight = jnp.exp(log_prob(policy).sum(1))

    def terms(table):
        return jax.vmap(jax.vmap(token_terms))(table[rows], jax.nn.log_softmax(base)[rows], jnp.asarray(actions))

    recorded = terms(policy)
    chosen = ESTIMATORS[estimator].placements[placement]
    penalty = jax.vmap(chosen.reward)(recorded.log_ratio, recorded.kl)
    advantage = -jnp.cumsum(penalty[:, ::-1], axis=1)[:, ::-1]

    def loss(table):
        new = terms(table)
        return (weight[:, None] * (-advantage * new.log_prob + jax.vmap(chosen.loss)(new.kl))).sum()

    return jax.grad(loss)(policy)


@pytest.mark.parametrize("pair", [("k1", "reward"), ("exact", "full")])
def test_expected_gradient_is_that_of_the_sequence_kl(tables, pair):
    np.testing.assert_allclose(expected_gradient(*tables, *pair), jax.grad(sequence_kl)(*tables), rtol=1e-4, atol=1e-6)


def test_exact_in_the_loss_is_the_per_token_part(tables):
    got, per_token, whole = expected_gradient(*tables, "exact", "loss"), *(
        jax.grad(kl)(*tables) for kl in (per_token_kl, sequence_kl))
    np.testing.assert_allclose(got, per_token, rtol=1e-4, atol=1e-6)
    assert jnp.linalg.norm(per_token - whole) > 0.2 * jnp.linalg.norm(whole)


def test_enumerated_gradients_are_finite_differences(tables):
    """The oracle itself, in float64."""
    policy, base = (np.float64(x) for x in tables)

    def kl(table):
        normal = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))  # noqa: E731
        ours, theirs = (normal(x)[ROWS, SEQUENCES].sum(1) for x in (table, base))
        return (np.exp(ours) * (ours - theirs)).sum()

    steps = 1e-5 * np.eye(39).reshape(39, 13, 3)
    expected = np.array([(kl(policy + e) - kl(policy - e)) / 2e-5 for e in steps]).reshape(13, 3)
    np.testing.assert_allclose(jax.grad(sequence_kl)(*tables), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pair", ALLOWED)
def test_descends_what_its_facts_say(tables, pair):
    """The registered sentence decides which enumerated gradient it is."""
    fact = ESTIMATORS[pair[0]].placements[pair[1]].gradient_of
    oracle = sequence_kl if fact.startswith("the KL of the whole episode") else per_token_kl
    assert oracle is sequence_kl or "each token alone" in fact
    np.testing.assert_allclose(expected_gradient(*tables, *pair), jax.grad(oracle)(*tables), rtol=1e-4, atol=1e-6)


def test_exact_in_the_reward_alone_is_zero_at_horizon_one(tables):
    """Why it is refused: D does not depend on the action, and a baseline has no gradient."""
    policy, base = tables

    def surrogate(table):
        kl = jax.lax.stop_gradient(token_terms(table[0], jax.nn.log_softmax(base[0]), jnp.int32(0)).kl)
        return (jax.lax.stop_gradient(jax.nn.softmax(table[0])) * kl * jax.nn.log_softmax(table[0])).sum()

    np.testing.assert_allclose(jax.grad(surrogate)(policy), 0.0, atol=1e-6)
    assert jnp.abs(jax.grad(per_token_kl)(policy, base)[0]).max() > 0.1


def test_k1_in_the_loss_is_zero(tables):
    """Why it is refused: the expected score is zero."""
    policy, base = tables
    weight = jnp.exp(log_prob(policy).sum(1))
    gradient = jax.grad(lambda table: (weight[:, None] * (log_prob(table) - log_prob(base))).sum())(policy)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_terms_by_hand():
    ratio, kl = jnp.array([0.5, -0.2, 0.1, 0.0]), jnp.array([1.0, 2.0, 3.0, 0.0])
    k1, exact = ESTIMATORS["k1"].placements["reward"], ESTIMATORS["exact"].placements
    np.testing.assert_array_equal(k1.reward(ratio, kl), ratio)
    np.testing.assert_array_equal(k1.loss(kl), np.zeros(4))
    np.testing.assert_array_equal(exact["full"].reward(ratio, kl), [2.0, 3.0, 0.0, 0.0])
    np.testing.assert_array_equal(exact["full"].loss(kl), kl)
    np.testing.assert_array_equal(exact["loss"].reward(ratio, kl), np.zeros(4))
    np.testing.assert_array_equal(exact["loss"].loss(kl), kl)


@pytest.mark.parametrize("pair", ALLOWED)
def test_sound_combinations_pass(pair):
    check(*pair)


@pytest.mark.parametrize("pair, reason", [
    (("k1", "loss"), "zero expected gradient"), (("k1", "full"), "needs the exact D_t"),
    (("exact", "reward"), "does not depend on the drawn action")])
def test_unsound_combinations_are_refused_with_the_reason(pair, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check(*pair)
    assert f"kl.estimator={pair[0]!r}" in str(error.value)
    assert "estimator='exact' with placement='full'" in str(error.value)


def test_every_combination_is_allowed_or_refused():
    for name, placement in PRODUCTS:
        facts = ESTIMATORS[name]
        assert (placement in facts.placements) != (placement in facts.refused)


def test_unknown_names_raise_and_list_the_choices():
    with pytest.raises(ValueError, match="kl.placement='reard' is unknown"):
        check("k1", "reard")
    with pytest.raises(ValueError, match="'k7' is unknown; choose one of exact, k1"):
        check("k7", "loss")
