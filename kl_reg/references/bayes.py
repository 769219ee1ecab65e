r"""Reference distributions made of several imitators: the Bayes mixture and the pessimistic imitator.

Everything is about one position of one transcript, where n imitators nu give log-probabilities of the v next tokens.
h is the transcript so far, w(nu|h) the posterior weight, M^alpha the imitators of highest weight.

Sources: Cohen et al. (2024), "RL, but don't do anything I wouldn't do"; Cohen, Hutter, Nanda (2022), "Fully General
Online Imitation Learning", for M^alpha, the minimum over it and asking for help.
"""
from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CUTS = ("best", "cumulative")
"""The ways to cut M^alpha off."""


class Semi(NamedTuple):
    r"""A semi-distribution nu(x) = exp(log_probs + log_mass), whose sum exp(log_mass) is at most 1.

    D(pi || nu) = \sum pi log(pi / nu) = D(pi || exp(log_probs)) - log_mass, nats per token, so -log_mass is a floor
    that no policy gets below. With L = log pi - log nu, e^{-L} - 1 + L has mean D(pi || nu) - `missing()` under pi.
    """

    log_probs: Float[Array, " v"]          # normalised
    log_mass: Float[Array, ""]             # at most 0

    def missing(self) -> Float[Array, ...]:
        """1 - mass, the probability of asking for help."""
        return -jnp.expm1(self.log_mass)


def posterior(log_weights: Float[Array, " n"], log_likelihood: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""log w(nu|hx) = log w(nu|h) + log nu(x|h) - log \sum_nu' w(nu'|h) nu'(x|h), the weights after one more token.

    A weight of zero stays zero. A token that no imitator of positive weight thinks possible says nothing about which
    of them to trust: the weights are kept.

    Args:
        log_weights: before the token; only their differences matter, and one is finite.
        log_likelihood: of the token under each imitator, -inf where it is impossible.

    Returns:
        Normalised log-weights.
    """
    chex.assert_equal_shape([log_weights, log_likelihood])
    joint = log_weights + log_likelihood
    return jax.nn.log_softmax(jnp.where(jnp.isneginf(joint).all(), log_weights, joint))


def mixture(log_probs: Float[Array, "n v"], log_weights: Float[Array, " n"]) -> Float[Array, " v"]:
    r"""log xi(x|h) = log \sum_nu w(nu|h) nu(x|h); normalised where every nu and the weights are.

    Its log loss on a sequence, in nats, is at most log 1/w(nu) above that of any nu, w being the weight before the
    first token.

    Args:
        log_probs: of each imitator, -inf where a token is impossible.
        log_weights: normalised.
    """
    chex.assert_equal_shape_prefix([log_probs, log_weights], 1)
    return jax.nn.logsumexp(log_probs + log_weights[:, None], axis=0)


def top(log_weights: Float[Array, " n"], alpha: Float[Array, ""], cut: str) -> Bool[Array, " n"]:
    r"""Which imitators are in M^alpha, the ones of highest posterior weight.

    With weights sorted in descending order, w_(1) >= w_(2) >= ..:
        "best": w_(n) >= alpha w_(1);
        "cumulative": w_(n) >= alpha \sum_{m <= n} w_(m) (Cohen, Hutter, Nanda 2022); never more than "best" lets in.
    Equal weights are in or out together: where "cumulative" lets one in, it lets in all that equal it, which can be
    more than 1 / alpha of them. The best are always in, a weight of zero is never.

    Args:
        log_weights: only their differences matter, and one is finite.
        alpha: in [0, 1]; 0: all of positive weight, 1: the best alone.
        cut: one of `CUTS`.

    Raises:
        ValueError: the cut is unknown.
    """
    if cut not in CUTS:
        raise ValueError(f"cut={cut!r} is unknown; choose one of {', '.join(CUTS)}")
    if cut == "best":
        compared = log_weights.max()
    else:
        better = log_weights[None, :] > log_weights[:, None]
        above = jax.nn.logsumexp(jnp.where(better, log_weights[None, :], -jnp.inf), axis=1)
        compared = jnp.logaddexp(above, log_weights)
    return (log_weights >= jnp.log(alpha) + compared) & (log_weights > -jnp.inf)


def pessimistic(log_probs: Float[Array, "n v"], members: Bool[Array, " n"]) -> Semi:
    r"""nu_alpha(x|h) = min_{nu in M^alpha} nu(x|h), as a semi-distribution.

    If the demonstrator mu is a member then nu_alpha <= mu, so D(pi || nu_alpha) >= D(pi || mu) for every pi.

    Where no token is possible under all members the mass is zero: help is asked for with certainty and nu_alpha
    conditioned on not asking is undefined. `log_probs` is then uniform, which keeps D(pi || exp(log_probs)) finite for
    every pi and gives no token a preference; the floor is infinite. Without members it is the same.

    Args:
        log_probs: of each imitator, normalised, -inf where a token is impossible.
        members: who is in M^alpha; the others are ignored.
    """
    chex.assert_equal_shape_prefix([log_probs, members], 1)
    lowest = jnp.where(members[:, None], log_probs, jnp.inf).min(axis=0)
    agree = members.any() & (lowest > -jnp.inf).any()
    log_mass = jnp.where(agree, jnp.minimum(jax.nn.logsumexp(lowest), 0.0), -jnp.inf)      # rounding may exceed 0
    return Semi(jax.nn.log_softmax(jnp.where(agree, lowest, 0.0)), log_mass)
