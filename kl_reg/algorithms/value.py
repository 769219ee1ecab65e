"""The value head's loss."""
from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_error(value: Float[Array, " k"], old_value: Float[Array, " k"], returns: Float[Array, " k"],
                  value_clip: Float[Array, ""]) -> Float[Array, " k"]:
    """max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2 per token, reward units squared.

    The gradient is zero where V has moved towards G by more than c since the batch was recorded. With an infinite c it
    is the plain squared error. Source: the reference implementation of Schulman et al. (2017).
    """
    chex.assert_equal_shape([value, old_value, returns])
    near = jnp.clip(value, old_value - value_clip, old_value + value_clip)
    return 0.5 * jnp.maximum((value - returns) ** 2, (near - returns) ** 2)
