"""The oracle is float64: D(pi_alpha || beta) recomputed from the returned alpha, and a root finder of scipy's."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax

from kl_reg.kl import operations
from kl_reg.kl.operations import finite, tilt

VOCAB = 200
tilt_of = jax.jit(lambda gap, allowance, log_base: tilt(finite(gap), allowance, log_base))
tilts_of = jax.jit(jax.vmap(tilt, (0, None, None)))


def divergence(alpha, gap, log_base):
    """D(pi_alpha || beta), float64."""
    return kl_of_logits(np.float64(log_base) + np.float64(alpha) * np.float64(gap), log_base)


def kl_of_logits(logits, log_base):
    """D(softmax(logits) || softmax(log_base)), float64; every term is non-negative, so a small D keeps its digits."""
    log_policy, log_base = log_softmax(np.float64(logits)), log_softmax(np.float64(log_base))
    policy, base, ratio = np.exp(log_policy), np.exp(log_base), np.clip(log_policy - log_base, -1e300, 1e300)
    small = np.abs(ratio) < 1
    return np.where(small, policy * (ratio + np.expm1(-ratio * small)), policy * ratio - policy + base).sum()


def log_probs(logits):
    return np.float32(log_softmax(np.float64(logits)))


def alpha_of(gap, allowance, log_base):
    """`tilt`, padded with impossible tokens to one vocabulary so that it compiles once."""
    pad = (0, VOCAB - len(gap))
    return float(tilt_of(np.pad(gap, pad), np.float32(allowance), np.pad(log_base, pad, constant_values=-np.inf)))


def draw(rng, shape, vocab, scale):
    """Numbers of that shape: normal, heavy-tailed, or one spike."""
    if shape == "normal":
        return rng.normal(0, scale, vocab)
    if shape == "student":
        return rng.standard_t(2, vocab) * scale
    if shape == "cauchy":
        return np.clip(rng.standard_cauchy(vocab) * scale, -1e4, 1e4)
    return np.where(np.arange(vocab) == rng.integers(vocab), rng.choice([-10, 10]) * scale, 0.0)


shapes, scales = st.sampled_from(["normal", "student", "cauchy", "spike"]), st.floats(-2, 1.5).map(lambda x: 10.0**x)
allowances = st.one_of(st.floats(0, 30), st.floats(-6, 1.4).map(lambda x: 10.0**x))


@st.composite
def problems(draw_one):
    """(gap, allowance, log_base) for a vocabulary of 2 to 200."""
    rng, vocab = np.random.default_rng(draw_one(st.integers(0, 2**32))), draw_one(st.integers(2, VOCAB))
    base = draw(rng, draw_one(shapes), vocab, draw_one(scales))
    gap = draw(rng, draw_one(shapes), vocab, draw_one(scales))
    return np.float32(gap), np.float32(draw_one(allowances)), log_probs(base)


def check_tilt(gap, allowance, log_base, tight=True):
    """Feasible, and tight: nothing is left unspent unless the proposal itself is affordable."""
    alpha = alpha_of(gap, allowance, log_base)
    spent = divergence(alpha, np.clip(gap, -1e15, 1e15), log_base)
    assert 0 <= alpha <= 1
    assert spent <= allowance * (1 + 1e-5) + 1e-12
    assert not tight or alpha == 1 or spent >= 0.999 * allowance - 1e-7


@settings(max_examples=300)
@given(problems())
@example((np.float32([0, 90]), np.float32(1.0), log_probs([0, -90])))             # certain of what the base never says
@example((np.float32([0, -300, 3]), np.float32(0.5), log_probs([80, 0, 0])))
@example((np.float32([1e14, 0, 0]), np.float32(0.1), log_probs([0, 1, 2])))
def test_feasible_and_tight(problem):
    check_tilt(*problem)


@given(problems(), st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
def test_a_proposal_that_forbids_tokens_is_followed_as_far_as_affordable(problem, forbidden):
    """Tight where the base gives the other tokens 1e-6 or more."""
    gap, allowance, log_base = problem
    forbidden = [index % len(gap) for index in forbidden]
    gap[forbidden] = -np.inf
    check_tilt(gap, allowance, log_base, tight=np.delete(np.exp(log_base), forbidden).sum() > 1e-6)


@given(problems(), st.integers(0, VOCAB - 1))
def test_a_proposal_that_insists_on_a_token_is_feasible(problem, token):
    """Tight as well where the base gives it 1e-6 or more; else the steps may end before an alpha as small is found."""
    gap, allowance, log_base = problem
    gap[token % len(gap)] = np.inf
    check_tilt(gap, allowance, log_base, tight=log_base[token % len(gap)] > np.log(1e-6))


@given(problems())
def test_bfloat16_logits(problem):
    gap, allowance, log_base = problem
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))  # noqa: E731
    check_tilt(rounded(log_base + gap) - rounded(log_base), allowance, log_base)


TOKENS = 6


@st.composite
def extremes(draw_one):
    """(gaps, log_bases) of an episode: base logits of a scale up to 1,000 and gaps of one up to 1e10, bases that
    are near-one-hot, spikes, tokens that are forbidden or insisted on."""
    rng, gaps, bases = np.random.default_rng(draw_one(st.integers(0, 2**32))), [], []
    for _ in range(TOKENS):
        base = draw(rng, draw_one(shapes), VOCAB, 10.0 ** draw_one(st.floats(-1, 3)))
        base[0] += draw_one(st.sampled_from([0, 0, 12, 300]))
        gap = draw(rng, draw_one(shapes), VOCAB, 10.0 ** draw_one(st.floats(-2, 10)))
        infinite = draw_one(st.sampled_from([0, 0, -np.inf, np.inf]))
        gap = np.where(rng.random(VOCAB) < 0.02, infinite, gap) if infinite else gap
        gaps.append(np.float32(gap + draw_one(st.sampled_from([0, 0, 50]))))
        bases.append(log_probs(base))
    return np.stack(gaps), np.stack(bases)


@given(problems())
def test_nothing_allowed_is_the_base_and_everything_the_proposal(problem):
    gap, _, log_base = problem
    whole = divergence(1.0, gap, log_base)
    assert alpha_of(gap, np.inf, log_base) == 1.0
    assert alpha_of(gap, np.float32(whole * 1.001 + 1e-6), log_base) == 1.0
    if whole > 1e-6:
        assert alpha_of(gap, 0.0, log_base) == 0.0


@settings(max_examples=20)
@given(problems())
def test_strength_increases_with_the_allowance(problem):
    gap, allowance, log_base = problem
    grown = [alpha_of(gap, allowance * factor, log_base) for factor in (0.25, 0.5, 1.0, 2.0)]
    assert all(low <= high * (1 + 1e-4) for low, high in zip(grown, grown[1:], strict=False))


def language_model_like(seed, vocab, scale=2):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(0, scale, vocab)), log_probs(rng.normal(0, 3.5, vocab))


@pytest.mark.parametrize("vocab", [2, 63, 5000])
def test_a_batch_of_proposals(vocab):
    gap, log_base = language_model_like(0, vocab, 10)
    alphas = tilts_of(jnp.stack([gap, 2 * gap]), np.float32(0.05), log_base)
    for alpha, scale in zip(alphas, (1, 2), strict=True):
        assert 0.999 * 0.05 <= divergence(alpha, scale * gap, log_base) <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize("allowance", [1e-4, 0.05, 0.5, 2.0])
def test_evaluations_are_a_handful(allowance, monkeypatch):
    """One to start with, and five steps at most, for gaps like a language model's."""
    calls, evaluate = [], operations._tilt_cost
    monkeypatch.setattr(operations, "_tilt_cost", lambda *args: calls.append(0) or evaluate(*args))
    for seed in range(3):
        calls.clear()
        gap, log_base = language_model_like(seed, 300, 4)
        assert divergence(1.0, gap, log_base) > allowance
        with jax.disable_jit():
            tilt(jnp.asarray(gap), jnp.float32(allowance), jnp.asarray(log_base))
        assert 3 <= len(calls) <= 6


def solve(gap, allowance, log_base):
    """The same strength in float64."""
    if divergence(1.0, gap, log_base) <= allowance:
        return 1.0
    return brentq(lambda alpha: divergence(alpha, gap, log_base) - allowance, 0, 1, xtol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("allowance", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_derivative_is_that_of_the_root(allowance, seed):
    gap, log_base = language_model_like(seed, 8, 10)
    wide = np.float64(gap)
    assert solve(wide, allowance, log_base) < 0.95
    by_gap, by_allowance = jax.grad(tilt_of, (0, 1))(gap, np.float32(allowance), log_base)
    eye, tiny = 1e-5 * np.eye(8), 1e-6 * allowance
    expected = [(solve(wide + e, allowance, log_base) - solve(wide - e, allowance, log_base)) / 2e-5 for e in eye]
    np.testing.assert_allclose(by_gap, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    up, down = solve(wide, allowance + tiny, log_base), solve(wide, allowance - tiny, log_base)
    np.testing.assert_allclose(by_allowance, (up - down) / (2 * tiny), rtol=1e-3)


@pytest.mark.parametrize("allowance", [0.0, 100.0, np.inf])
def test_derivative_is_zero_where_nothing_binds_or_nothing_is_left(allowance):
    gap, log_base = language_model_like(0, 8)
    for derivative in jax.grad(tilt_of, (0, 1))(gap, np.float32(allowance), log_base):
        np.testing.assert_array_equal(derivative, 0.0)


def test_derivative_with_infinite_gaps_is_finite():
    gap, log_base = language_model_like(0, 8)
    gap[2], gap[5] = -np.inf, np.inf
    for allowance in (0.0, 0.1, 3.0):
        for derivative in jax.grad(tilt_of, (0, 1))(gap, np.float32(allowance), log_base):
            assert jnp.isfinite(derivative).all()


def test_the_base_is_a_constant():
    gap, log_base = language_model_like(0, 8)
    np.testing.assert_array_equal(jax.grad(tilt_of, 2)(gap, np.float32(0.1), log_base), 0.0)


@pytest.mark.parametrize("allowance", [0.0, 1e-3, 0.5])
def test_a_vocabulary_of_150_000(allowance):
    """Feasible and tight, with float32 sums over that many tokens; proposals as a language model makes them."""
    gap, log_base = language_model_like(3, 150_000, 3)
    alpha = float(jax.jit(tilt)(gap, np.float32(allowance), log_base))
    spent = divergence(alpha, gap, log_base)
    assert 0.999 * allowance <= spent <= allowance * (1 + 1e-5)
