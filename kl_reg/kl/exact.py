"""Exact full-vocabulary quantities of one token: KL, entropy and log-probability of the action."""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenTerms(NamedTuple):
    """Of one token, in nats: log pi(a), log pi(a) - log beta(a), D(pi || beta), H(pi), D(beta || pi).

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
    policy, base = jnp.exp(log_policy), jnp.exp(log_base)
    possible = policy > 0
    ratio = jnp.where(possible, log_policy - log_base, 0.0)
    near = jnp.abs(ratio) < 0.1
    small = jnp.where(near, ratio, 0.0)
    series = policy * small**2 * (1 / 2 - small * (1 / 6 - small * (1 / 24 - small / 120)))
    terms = jnp.where(near & possible, series, jnp.where(possible, policy * ratio, 0.0) - policy + base)
    return terms.sum()


@jax.custom_jvp
def _terms(logits, log_base, action):
    """log pi(a), D(pi || beta) and H(pi) of one softmax, and their derivatives in one pass over the vocabulary."""
    log_policy = jax.nn.log_softmax(logits)
    policy = jnp.exp(log_policy)
    entropy = -jnp.where(policy > 0, policy * log_policy, 0.0).sum()
    return log_policy[action], reverse_kl(log_policy, log_base), entropy


@_terms.defjvp
def _terms_jvp(primals, tangents):
    """d log pi(a) = dz_a - sum pi dz, dD = sum pi (L - D) dz and dH = -sum pi (log pi + H) dz; beta is a constant."""
    logits, log_base, action = primals
    log_prob, kl, entropy = _terms(logits, log_base, action)
    log_policy = jax.nn.log_softmax(logits)
    policy = jnp.exp(log_policy)
    possible = policy > 0
    by_log_prob = (jnp.arange(len(logits)) == action).astype(policy.dtype) - policy
    by_kl = jnp.where(possible, policy * (log_policy - log_base - kl), 0.0)
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
    log_base = jax.lax.stop_gradient(log_base)
    log_prob, kl, entropy = _terms(logits, log_base, action)
    forward_kl = _forward_kl(logits, log_base) if forward else jnp.zeros_like(kl)
    return TokenTerms(log_prob, log_prob - log_base[action], kl, entropy, forward_kl)
