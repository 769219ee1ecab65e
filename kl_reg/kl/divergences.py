"""Divergences between two distributions over one vocabulary, computed exactly, for measuring and not for training.

All take normalised log-probabilities [v] of p and of q, -inf where a token is impossible, and keep their digits near
equality: each is a sum of non-negative terms in L = log p - log q. Log-ratios of +-100 nats are in range.
"""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.kl.exact import reverse_kl
from kl_reg.registry import Registry

DIVERGENCES = Registry("divergence")


def kl(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""D(p || q) = \sum p log(p / q), in [0, inf] nats; infinite where p > 0 = q. With p = pi, q = beta: reverse KL.

    Source: Kullback and Leibler (1951), "On information and sufficiency".
    """
    return reverse_kl(log_p, log_q)


def forward_kl(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""D(q || p) = \sum q log(q / p), in [0, inf] nats; infinite where q > 0 = p.

    Source: Kullback and Leibler (1951), "On information and sufficiency".
    """
    return reverse_kl(log_q, log_p)


def jensen_shannon(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""D(p || m) / 2 + D(q || m) / 2 with m = (p + q) / 2, in [0, ln 2] nats; symmetric.

    Computed as \sum m (h tanh h - log cosh h), h = |L| / 2.
    Source: Lin (1991), "Divergence measures based on the Shannon entropy".
    """
    size = jnp.abs(_log_ratio(log_p, log_q))
    small = jnp.minimum(size / 2, 0.1)**2
    series = small * (1 / 2 - small * (1 / 4 - small / 9))
    finite = jnp.minimum(size, 1e4)
    ratio = jnp.exp(-finite)
    direct = -jnp.log1p(jnp.expm1(-finite) / 2) - finite * ratio / (1 + ratio)
    return (0.5 * (jnp.exp(log_p) + jnp.exp(log_q)) * jnp.where(size < 0.2, series, direct)).sum()


def total_variation(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""\sum |p - q| / 2, in [0, 1], without unit: the largest difference in the probability of an event; symmetric.

    Source: Levin, Peres and Wilmer (2009), "Markov chains and mixing times", section 4.1.
    """
    larger, ratio = jnp.exp(jnp.maximum(log_p, log_q)), _log_ratio(log_p, log_q)
    return -0.5 * (larger * jnp.expm1(jnp.minimum(ratio, -ratio))).sum()       # the derivative of `abs` at 0 is 1


def renyi(log_p: Float[Array, " v"], log_q: Float[Array, " v"], order: float) -> Float[Array, ""]:
    r"""D_a(p || q) = log(\sum p^a q^{1-a}) / (a - 1), in [0, inf] nats, non-decreasing in the order a.

    The limits: D(p || q) at order 1, max log(p / q) over p > 0 at order inf.
    Source: van Erven and Harremoes (2014), "Renyi divergence and Kullback-Leibler divergence".

    Args:
        order: a > 0, static.

    Raises:
        ValueError: the order is not positive.
    """
    if not order > 0:
        raise ValueError(f"order={order} must be above 0 (1 is KL, inf the largest log-ratio): at 0 only supports are "
                         "compared, and below 0 it is not a divergence")
    if order == 1:
        return reverse_kl(log_p, log_q)
    ratio = _log_ratio(log_p, log_q)
    if order > 1e30:                            # finite orders as large differ from the limit by less than rounding
        return jnp.maximum(jnp.where(log_p > -jnp.inf, ratio, -jnp.inf).max(), 0.0)
    excess = (order - 1) * _power_excess(ratio, jnp.exp(log_p), jnp.exp(log_q), order)
    near = jnp.abs(excess) < 0.5
    possible = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    powers = jnp.where(possible, order * log_p + (1 - order) * log_q, -jnp.inf)
    return jnp.where(near, jnp.log1p(jnp.where(near, excess, 0.0)), jax.nn.logsumexp(powers)) / (order - 1)


def renyi_half(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""Order 1/2: -2 log \sum sqrt(p q), in [0, inf] nats, twice the Bhattacharyya distance; symmetric.

    Source: Bhattacharyya (1943), "On a measure of divergence between two statistical populations".
    """
    return renyi(log_p, log_q, 0.5)


def renyi_2(log_p: Float[Array, " v"], log_q: Float[Array, " v"]) -> Float[Array, ""]:
    r"""Order 2: log \sum p^2 / q = log(1 + chi^2(p || q)), in [0, inf] nats; infinite where p > 0 = q.

    It is the log of E_p[p / q], which says how heavy the tail of importance weights is.
    Source: van Erven and Harremoes (2014), "Renyi divergence and Kullback-Leibler divergence".
    """
    return renyi(log_p, log_q, 2.0)


def _log_ratio(log_p, log_q):
    """L = log p - log q; zero where both are impossible."""
    return jnp.where((log_p > -jnp.inf) | (log_q > -jnp.inf), log_p - log_q, 0.0)


def _power_excess(ratio, p, q, order):
    r"""(\sum p^a q^{1-a} - 1) / (a - 1) as \sum q + p (e^{(a-1) L} - 1) / (a - 1) - p, non-negative terms.

    For small L by its Taylor series, q \sum_{k>=2} (a + a^2 + ... + a^{k-1}) L^k / k!.
    """
    top = max(order, 1.0)
    near = jnp.abs(ratio) < 0.3 / top
    scaled = jnp.where(near, top * ratio, 0.0)
    series = sum(sum((order / top)**j * top**(j - k) for j in range(1, k)) / math.factorial(k) * scaled**k
                 for k in range(2, 8))
    direct = q + jnp.where(p > 0, p * jnp.expm1((order - 1) * jnp.where(p > 0, ratio, 0.0)), 0.0) / (order - 1) - p
    return jnp.where(near, q * series, direct).sum()


for _function in (kl, forward_kl, jensen_shannon, total_variation, renyi_half, renyi_2):
    DIVERGENCES.register(_function.__name__, _function)
