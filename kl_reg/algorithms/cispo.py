"""Clipped importance-sampling-weight policy optimisation."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.grpo import GRPO
from kl_reg.types import Hyper


def cispo(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
          mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""-sg(clip(\rho, 1 - c, 1 + c_{high})) A log \pi(a) per token, \rho = \pi(a) / \pi_{old}(a).

    The weight is clipped, not the update: every token keeps a gradient. Source: MiniMax (2025), "MiniMax-M1".
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    weight = jnp.clip(jnp.exp(log_prob - old_log_prob), 1 - hyper.clip, 1 + hyper.clip_high)
    return -jax.lax.stop_gradient(weight) * advantage * log_prob


CISPO = GRPO._replace(loss="cispo", reduction="token_mean", clip=1.0, clip_high=4.0)
"""GRPO's advantages, the mean over all tokens, weights of at most 5 and, in effect, no lower bound, as in the paper.

The paper gives no upper bound; 5 is what TRL recommends, whose `epsilon_high` is our 1 + clip_high.
"""
