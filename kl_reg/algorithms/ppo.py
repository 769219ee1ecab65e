"""Proximal policy optimisation, and its clipped loss, which the group methods share."""
from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.types import Hyper


def ppo_clip(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
             mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""-min(\rho A, clip(\rho, 1 - c, 1 + c_{high}) A) per token, \rho = \pi(a) / \pi_{old}(a).

    The gradient is zero where the ratio has left [1 - c, 1 + c_{high}] in the direction that the advantage asks for.
    Source: Schulman et al. (2017); bounds of their own for the two sides: Yu et al. (2025).
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


PPO = Algorithm("ppo_clip", "gae", "token_mean", normalise=True, value_coef=0.5)
"""The clipped ratio with generalised advantage estimation and a value head; the mean over all agent tokens.

Unlike most implementations it normalises advantages over the batch of an iteration, not over each minibatch, and the KL
loss by the same factor, so that normalising does not change the KL's price.
"""
