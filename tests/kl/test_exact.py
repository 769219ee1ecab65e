"""The oracle is scipy in float64, on the float32 inputs that the code gets."""
from __future__ import annotations

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import entr, kl_div, log_softmax, rel_entr, softmax

from kl_reg.kl.exact import reverse_kl, token_terms

kl_of = jax.jit(reverse_kl)
terms_of = jax.jit(lambda logits, log_base, action: token_terms(logits, log_base, action, forward=True))
logits = st.sampled_from((2, 7, 65)).flatmap(
    lambda v: arrays.arrays(np.float32, (2, v), elements=st.floats(-40, 40, width=32)))


def normal(seed, vocab, scale):
    return np.float32(np.random.default_rng(seed).normal(0, scale, vocab))


def log_probs(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x)))


def exact_kl(policy_logits, base_logits):
    """D(pi || beta) of float32 logits, in float64."""
    return rel_entr(softmax(np.float64(policy_logits)), softmax(np.float64(base_logits))).sum()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("vocab", [2, 50, 1000])
def test_reverse_kl_is_scipys(vocab, scale):
    policy, base = normal(0, vocab, scale), normal(1, vocab, 2.0)
    np.testing.assert_allclose(kl_of(log_probs(policy), log_probs(base)), exact_kl(policy, base), rtol=2e-6)


def test_it_is_the_reverse_direction():
    policy, base = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    kl = kl_of(jnp.float32(np.log(policy)), jnp.float32(np.log(base)))
    np.testing.assert_allclose(kl, 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2])
def test_small_values_keep_their_digits(size):
    """KL from 1e-10 to 1e-4; the plain sum of pi L, in float32, is wrong in the first digit at 1e-10."""
    base = log_probs(normal(0, 200, 2.0))
    policy = np.float32(base + normal(1, 200, size))
    expected = kl_div(np.exp(np.float64(policy)), np.exp(np.float64(base))).sum()
    assert 0.2 * size**2 < expected < size**2
    np.testing.assert_allclose(kl_of(policy, base), expected, rtol=1e-3)


def test_small_values_from_log_probabilities_are_right_to_a_percent():
    """They are rounded to float32 before they are compared."""
    base = normal(0, 500, 2.0)
    policy = base + normal(1, 500, 1e-4)
    np.testing.assert_allclose(kl_of(log_probs(policy), log_probs(base)), exact_kl(policy, base), rtol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 3.0, 60.0])
@pytest.mark.parametrize("size", [3e-4, 1e-3, 0.1])
@pytest.mark.parametrize("scale", [2.0, 40.0])
def test_small_values_from_logits_keep_all_digits(size, scale, offset):
    """KL down to 1e-13, of logits as they are; `offset` is common to all of them."""
    base = log_probs(normal(0, 500, scale))
    policy = np.float32(base + np.float32(normal(1, 500, size) + offset))
    log_policy, log_base = log_softmax(np.float64(policy)), log_softmax(np.float64(base))
    ratio = log_policy - log_base
    expected = (np.exp(log_policy) * (np.expm1(-ratio) + ratio)).sum()
    assert 0 < expected < size**2
    np.testing.assert_allclose(terms_of(policy, base, 0).kl, expected, rtol=1e-5)


def test_branches_of_the_series_meet():
    """Both sides of |L| = 1, where the formula changes, and well inside."""
    for ratio in (-1.0001, -0.9999, -0.5, 0.5, 0.8):
        base = np.array([0.4, 0.6])
        policy = np.array([0.4 * np.exp(ratio), 1 - 0.4 * np.exp(ratio)])
        kl = kl_of(jnp.float32(np.log(policy)), jnp.float32(np.log(base)))
        np.testing.assert_allclose(kl, rel_entr(policy, base).sum(), rtol=1e-5)


def test_impossible_tokens():
    base = np.log([0.25, 0.25, 0.5])
    with np.errstate(divide="ignore"):
        narrow, wide = np.log([0.5, 0.5, 0.0]), np.log([0.0, 0.0, 1.0])
    kl = lambda policy, base: float(kl_of(jnp.float32(policy), jnp.float32(base)))  # noqa: E731
    assert kl(narrow, base) == pytest.approx(np.log(2), rel=1e-6)
    assert kl(wide, wide) == 0.0
    assert kl(base, narrow) == np.inf
    terms = terms_of(jnp.float32(narrow), jnp.float32(base), 0)
    assert [float(x) for x in terms] == pytest.approx([np.log(0.5), np.log(2), np.log(2), np.log(2), np.inf], rel=1e-6)
    terms = terms_of(jnp.float32(base), jnp.float32(narrow), 0)
    assert float(terms.kl) == np.inf and float(terms.forward_kl) == pytest.approx(np.log(2), rel=1e-6)
    assert float(terms_of(jnp.float32(wide), jnp.float32(wide), 2).forward_kl) == 0.0
    np.testing.assert_allclose(jax.grad(lambda z: terms_of(z, jnp.float32(base), 0).forward_kl)(jnp.float32(narrow)),
                               [0.25, 0.25, -0.5], rtol=1e-6)


@pytest.mark.parametrize("nats", [60.0, 100.0])
def test_extremes_are_finite_and_right(nats):
    """Log-ratios of +-100 nats: probabilities underflow, values and gradients do not."""
    policy, log_base = np.float32([nats, 0, 0]), log_probs([0.0, nats, -nats])
    np.testing.assert_allclose(terms_of(policy, log_base, 0), [0.0, nats, nats, 0.0, nats], rtol=1e-6, atol=1e-20)
    np.testing.assert_allclose(terms_of(policy, log_base, 1)[:2], [-nats, -nats], rtol=1e-6)
    for derivative in jax.jacobian(terms_of)(policy, log_base, 1):
        assert jnp.isfinite(derivative).all()


@given(logits)
def test_kl_is_never_negative_and_right(pair):
    policy, base = pair
    kl = float(terms_of(policy, log_probs(base), 0).kl)
    assert kl >= 0
    np.testing.assert_allclose(kl, exact_kl(policy, base), rtol=1e-5, atol=1e-10)


@given(logits, st.floats(-20, 20, width=32))
def test_kl_is_zero_at_equality(pair, shift):
    """Whatever constant is added to the logits; a shift changes their last bits, not more."""
    base = log_probs(pair[0])
    assert float(terms_of(pair[0], base, 0).kl) <= 1e-12
    assert float(terms_of(base, base, 0).kl) <= 1e-12
    assert 0 <= float(terms_of(pair[0] + np.float32(shift), base, 0).kl) <= 1e-10


@given(logits)
def test_other_terms_are_scipys(pair):
    policy, base = pair
    action = len(policy) - 1
    terms = terms_of(policy, log_probs(base), action)
    log_policy, log_base = log_softmax(np.float64(policy)), log_softmax(np.float64(base))
    np.testing.assert_allclose(terms.log_prob, log_policy[action], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(terms.log_ratio, log_policy[action] - log_base[action], rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(terms.entropy, entr(np.exp(log_policy)).sum(), rtol=1e-4, atol=1e-6)
    assert terms.forward_kl >= 0
    np.testing.assert_allclose(terms.forward_kl, exact_kl(base, policy), rtol=1e-5, atol=1e-10)


def test_forward_kl_near_equality_keeps_its_digits():
    """A KL of 1e-8, where the plain sum of beta (log beta - log pi) has an error of 1e-7."""
    base = normal(0, 200, 2.0)
    policy = np.float32(base + normal(1, 200, 1e-4))
    np.testing.assert_allclose(terms_of(policy, log_probs(base), 0).forward_kl, exact_kl(base, policy), rtol=1e-2)


def test_forward_kl_is_zero_and_costs_nothing_unless_asked_for():
    inputs = jnp.asarray(normal(0, 9, 1.0)), jnp.asarray(log_probs(normal(1, 9, 1.0))), jnp.int32(2)
    assert float(token_terms(*inputs).forward_kl) == 0.0
    calls = [str(jax.make_jaxpr(token_terms, static_argnums=3)(*inputs, asked)).count("custom_jvp_call[")
             for asked in (False, True)]
    assert calls[1] == calls[0] + 1


def numeric(function, x, step=1e-5):
    """Central differences of a scalar function, float64."""
    eye = np.eye(len(x)) * step
    return np.array([(function(x + e) - function(x - e)) / (2 * step) for e in eye])


@pytest.mark.parametrize("distance", [1e-3, 1.0, 10.0])
def test_derivatives_are_finite_differences(distance):
    base = np.float64(normal(1, 12, 1.0))
    policy = np.float64(np.float32(base + normal(0, 12, distance)))
    log_prob = numeric(lambda z: log_softmax(z)[3], policy)
    expected = {"log_prob": log_prob, "log_ratio": log_prob,
                "entropy": numeric(lambda z: entr(softmax(z)).sum(), policy),
                "kl": numeric(lambda z: rel_entr(softmax(z), softmax(base)).sum(), policy),
                "forward_kl": numeric(lambda z: rel_entr(softmax(base), softmax(z)).sum(), policy)}
    got = jax.jacobian(terms_of)(np.float32(policy), np.float32(log_softmax(base)), 3)
    for name, derivative in expected.items():
        np.testing.assert_allclose(getattr(got, name), derivative, rtol=1e-3, atol=1e-3 * np.abs(derivative).max())


def test_derivatives_are_those_of_the_plain_formula():
    policy, base = jnp.asarray(normal(0, 40, 2.0)), jax.nn.log_softmax(jnp.asarray(normal(1, 40, 2.0)))

    def plain(z):
        log_policy = jax.nn.log_softmax(z)
        return jnp.stack([(jnp.exp(log_policy) * (log_policy - base)).sum(), -(jnp.exp(log_policy) * log_policy).sum(),
                          (jnp.exp(base) * (base - log_policy)).sum()])

    got = jnp.stack(jax.jacobian(terms_of)(policy, base, 0)[2:])
    np.testing.assert_allclose(got, jax.jacobian(plain)(policy), rtol=1e-3, atol=1e-6)
    forward = jnp.stack(jax.jacfwd(terms_of)(policy, base, 0)[2:])
    np.testing.assert_allclose(got, forward, rtol=1e-5, atol=1e-7)


def test_the_base_is_a_constant():
    policy, base = normal(0, 9, 1.0), jnp.asarray(normal(1, 9, 1.0))
    grads = jax.jacobian(lambda b: jnp.stack(terms_of(policy, jax.nn.log_softmax(b), 2)))(base)
    np.testing.assert_array_equal(grads, 0.0)
