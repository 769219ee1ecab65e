"""Proximal policy optimisation, clipped."""
from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.types import Hyper


def ppo_clip(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
             hyper: Hyper) -> Float[Array, " k"]:
    r"""-min(\rho A, clip(\rho, 1 - c, 1 + c) A) per token, \rho = \pi(a) / \pi_{old}(a).

    The gradient is zero where the ratio has left [1 - c, 1 + c] in the direction that the advantage asks for.
    Source: Schulman et al. (2017).
    """
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage)
