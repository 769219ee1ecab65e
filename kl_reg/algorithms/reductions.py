"""From the loss of each token to one number, as (total, weight), so that parts of a batch add up before dividing.

Every function takes x [b, k], mask [b, k] and the length that streams may have at most; what x says outside the mask is
ignored.
"""
from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.registry import Registry
from kl_reg.types import WeightedMetric

REDUCTIONS = Registry("rl.reduction")


def token_mean(x: Float[Array, "b k"], mask: Bool[Array, "b k"], length: int) -> WeightedMetric:
    """Mean over the tokens of all episodes: a long episode weighs more than a short one. `length` is not used."""
    chex.assert_equal_shape([x, mask])
    del length
    return WeightedMetric(jnp.where(mask, x, 0.0).sum(), mask.sum().astype(x.dtype))


def sequence_mean(x: Float[Array, "b k"], mask: Bool[Array, "b k"], length: int) -> WeightedMetric:
    """Mean over episodes of the mean over their own tokens: a token of a long episode weighs less. GRPO's.

    Episodes without a token do not count. `length` is not used.
    """
    chex.assert_equal_shape([x, mask])
    del length
    tokens = mask.sum(1).astype(x.dtype)
    means = jnp.where(mask, x, 0.0).sum(1) / jnp.maximum(tokens, 1)
    return WeightedMetric(means.sum(), (tokens > 0).sum().astype(x.dtype))


def fixed_length(x: Float[Array, "b k"], mask: Bool[Array, "b k"], length: int) -> WeightedMetric:
    """Sum over all tokens, divided by episodes times `length`: no weight depends on a length that the policy chose.

    Source: Liu et al. (2025), "Understanding R1-Zero-like training".
    """
    chex.assert_equal_shape([x, mask])
    return WeightedMetric(jnp.where(mask, x, 0.0).sum(), jnp.asarray(len(x) * length, x.dtype))


REDUCTIONS.register("token_mean", token_mean)
REDUCTIONS.register("sequence_mean", sequence_mean)
REDUCTIONS.register("fixed_length", fixed_length)
