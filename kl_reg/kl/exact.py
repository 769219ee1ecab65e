"""Exact full-vocabulary quantities of one token: KL, entropy and log-probability of the action."""
from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenTerms(NamedTuple):
    """The terms of one token, in nats: log pi(a), log pi(a) - log beta(a), D(pi || beta), H(pi), D(beta || pi).

    `forward_kl` is zero where it was not asked for.
    """

    log_prob: Float[Array, ""]
    log_ratio: Float[Array, ""]
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    forward_kl: Float[Array, ""]


def reverse_kl(log_policy: Float[Array, " v"], log_base: Float[Array, " v"]) -> Float[Array, ""]:
    r"""D(pi || beta) = \sum_i pi_i (e^{-L_i} - 1 + L_i), L = log pi - log beta; nats per token.

    The usual sum of pi L, plus \sum beta - \sum pi = 0: every term is non-negative and an error in a log-normaliser
    enters only times D, so small values keep their digits. Differentiable in `log_policy` as a free vector.

    Args:
        log_policy, log_base: normalised log-probabilities; -inf where a token is impossible.
    """
    chex.assert_equal_shape([log_policy, log_base])
    return divergence(jnp.exp(log_policy), log_policy - log_base, jnp.exp(log_base))


def divergence(policy: Float[Array, " v"], log_ratio: Float[Array, " v"], base: Float[Array, " v"]) -> Float[Array, ""]:
    """`reverse_kl` from probabilities and the logarithm of their ratio, which may be no number where `policy` is 0."""
    possible = policy > 0
    ratio = jnp.where(possible, log_ratio, 0.0)
    near = jnp.abs(ratio) < 1
    series = policy * _remainder(jnp.where(near, -ratio, 0.0))
    return jnp.where(near & possible, series, jnp.where(possible, policy * ratio, 0.0) - policy + base).sum()


def _remainder(x):
    """e^x - 1 - x for |x| <= 1, to float32's last digit: its series up to x^11."""
    total = 0.0
    for n in range(11, 1, -1):
        total = total * x + 1 / math.factorial(n)
    return total * x * x


class Normalised(NamedTuple):
    """pi, log pi and log pi - log beta of one softmax; the last may be no number where pi is 0."""

    policy: Float[Array, " v"]
    log_policy: Float[Array, " v"]
    log_ratio: Float[Array, " v"]


def normalise(logits: Float[Array, " v"], log_base: Float[Array, " v"]) -> Normalised:
    """The policy pi ∝ e^logits beside beta, with the log-ratio of the logits as they are, not of a rounded log pi.

    Log-ratios are 1e-3 where D is 1e-6, and log pi is rounded to 1e-6, for each token differently. So the logits are
    compared with log beta before they are normalised, and what float32 loses in the differences is kept. There remains
    the error of the log-normaliser, which all tokens share: it enters D as its square. Where log pi is rounded to log
    beta itself, the ratio is 0, so that a policy on its base has no KL at all.

    Args:
        logits: of the policy, any normalisation.
        log_base: normalised log-probabilities of the base.
    """
    top = logits.max()
    shifted = logits - top
    weights = jnp.exp(shifted)
    total = weights.sum()
    change, lost = exact_sum(logits, -log_base)
    normaliser, rest = exact_sum(top, jnp.log(total))
    ratio = (change - normaliser) + jnp.where(jnp.isfinite(change), lost - rest, 0.0)
    log_policy = shifted - jnp.log(total)
    return Normalised(weights / total, log_policy, jnp.where(log_policy == log_base, 0.0, ratio))


def exact_sum(x, y):
    """x + y as it is rounded, and what the rounding took from it. Source: Knuth (1969)."""
    total = x + y
    other = total - x
    return total, (x - (total - other)) + (y - other)


@jax.custom_jvp
def _terms(logits, log_base, action):
    """log pi(a), D(pi || beta) and H(pi) of one softmax, and their derivatives in one pass over the vocabulary."""
    policy, log_policy, log_ratio = normalise(logits, log_base)
    entropy = -jnp.where(policy > 0, policy * log_policy, 0.0).sum()
    return log_policy[action], divergence(policy, log_ratio, jnp.exp(log_base)), entropy


@_terms.defjvp
def _terms_jvp(primals, tangents):
    """d log pi(a) = dz_a - sum pi dz, dD = sum pi (L - D) dz and dH = -sum pi (log pi + H) dz; beta is a constant."""
    logits, log_base, action = primals
    log_prob, kl, entropy = _terms(logits, log_base, action)
    policy, log_policy, log_ratio = normalise(logits, log_base)
    possible = policy > 0
    by_log_prob = (jnp.arange(len(logits)) == action).astype(policy.dtype) - policy
    by_kl = jnp.where(possible, policy * (log_ratio - kl), 0.0)
    by_entropy = jnp.where(possible, -policy * (log_policy + entropy), 0.0)
    return (log_prob, kl, entropy), tuple((by * tangents[0]).sum() for by in (by_log_prob, by_kl, by_entropy))


@jax.custom_jvp
def _forward_kl(logits, log_base):
    return reverse_kl(log_base, jax.nn.log_softmax(logits))


@_forward_kl.defjvp
def _forward_kl_jvp(primals, tangents):
    """dD(beta || pi) = sum (pi - beta) dz; beta is a constant."""
    logits, log_base = primals
    return _forward_kl(logits, log_base), ((jax.nn.softmax(logits) - jnp.exp(log_base)) * tangents[0]).sum()


def token_terms(logits: Float[Array, " v"], log_base: Float[Array, " v"], action: Int[Array, ""],
                forward: bool = False) -> TokenTerms:
    """All that training needs of one token of the policy with these logits; beta is held constant.

    Args:
        logits: of the policy, any normalisation.
        log_base: normalised log-probabilities of the base.
        action: the token that was drawn.
        forward: whether D(beta || pi) is wanted (static); infinite where the policy excludes a token of the base.
    """
    chex.assert_equal_shape([logits, log_base])
    log_base = jax.lax.stop_gradient(log_base)
    log_prob, kl, entropy = _terms(logits, log_base, action)
    forward_kl = _forward_kl(logits, log_base) if forward else jnp.zeros_like(kl)
    return TokenTerms(log_prob, log_prob - log_base[action], kl, entropy, forward_kl)
