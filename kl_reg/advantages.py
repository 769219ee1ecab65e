"""Advantages over one agent stream. Other writers' tokens are no part of it, so a reward survives a student's turn.

Every function takes rewards, values and mask [k] and returns (advantages, returns) [k], in reward units. The episode
ends with the stream: nothing is bootstrapped behind it.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.registry import Registry

ADVANTAGES = Registry("rl.advantage")


def gae(rewards: Float[Array, " k"], values: Float[Array, " k"], mask: Bool[Array, " k"], discount: Float[Array, ""],
        gae_lambda: Float[Array, ""]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    r"""Generalised advantage estimation: A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}.

    \delta_t = r_t + \gamma V_{t+1} - V_t. Returns are A + V. Source: Schulman et al. (2016).
    """
    values = jnp.where(mask, values, 0.0)
    delta = jnp.where(mask, rewards + discount * jnp.append(values[1:], 0.0) - values, 0.0)

    def back(later, delta_t):
        advantage = delta_t + discount * gae_lambda * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros((), delta.dtype), delta, reverse=True)
    return advantages, advantages + values


def monte_carlo(rewards: Float[Array, " k"], values: Float[Array, " k"], mask: Bool[Array, " k"],
                discount: Float[Array, ""], gae_lambda: Float[Array, ""]
                ) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    r"""A_t = G_t - V_t with the return-to-go G_t = \sum_l \gamma^l r_{t+l}: REINFORCE's, the value head as baseline.

    Source: Williams (1992). `gae_lambda` is not used.
    """
    del gae_lambda
    _, returns = gae(rewards, jnp.zeros_like(values), mask, discount, jnp.float32(1.0))
    return jnp.where(mask, returns - values, 0.0), returns


ADVANTAGES.register("gae", gae)
ADVANTAGES.register("monte_carlo", monte_carlo)


def normalise(advantages: Float[Array, "b k"], mask: Bool[Array, "b k"]
              ) -> tuple[Float[Array, "b k"], Float[Array, ""]]:
    """Zero mean and unit deviation over all agent tokens, and the factor 1 / deviation.

    A KL term in the loss must be multiplied by the same factor, or it changes its price.
    """
    count = jnp.maximum(mask.sum(), 1).astype(advantages.dtype)
    mean = jnp.where(mask, advantages, 0.0).sum() / count
    centred = jnp.where(mask, advantages - mean, 0.0)
    factor = 1 / (jnp.sqrt((centred**2).sum() / count) + 1e-6)
    return centred * factor, factor
