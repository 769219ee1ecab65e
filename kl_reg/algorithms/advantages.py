"""Advantages over one group: g agent streams with the same opening. Callers vmap over groups.

Every function takes rewards, values and mask [g, k] and returns (advantages [g, k], returns [g, k], scale), in reward
units. `returns` are the value head's targets. `scale` is the factor between the expected policy gradient and that of
the return; a KL term in the loss must be multiplied by it too, or it changes its price. Other writers' tokens are no
part of a stream, so a reward survives a student's turn. The episode ends with the stream: nothing is bootstrapped
behind it. A stream without a token is an episode of return 0, and counts as one where a group is compared; unless
`judged` [g] (None: all) is false there: the reward could not say what that episode is worth, and it is in no baseline.

Callers map over the axis `GROUPS`, along which statistics of the batch can be taken. What is divided by a deviation is
multiplied by at most `CEILING`.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.registry import Registry
from kl_reg.sharding.constraints import total

ADVANTAGES = Registry("rl.advantage")

GROUPS = "groups"
"""Name of the axis that an advantage is mapped over: all groups of the batch."""

CEILING = 100.0
"""The largest factor 1 / deviation, in 1 / reward units: a spread below 0.01 is not made a spread of 1. Without it,
returns that differ by 1e-5 would multiply the KL of their group by 6,000, which then is all that a step descends."""

Rows = Float[Array, "g k"]
Judged = Bool[Array, " g"] | None
Scalar = Float[Array, ""]
Estimate = tuple[Rows, Rows, Scalar]


def generalised(rewards: Float[Array, " k"], values: Float[Array, " k"], mask: Bool[Array, " k"], discount: Scalar,
                gae_lambda: Scalar) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    r"""Generalised advantage estimation over one stream: A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}, and A + V.

    \delta_t = r_t + \gamma V_{t+1} - V_t. Source: Schulman et al. (2016).
    """
    chex.assert_equal_shape([rewards, values, mask])
    values = jnp.where(mask, values, 0.0)
    delta = jnp.where(mask, rewards + discount * jnp.append(values[1:], 0.0) - values, 0.0)

    def back(later, delta_t):
        advantage = delta_t + discount * gae_lambda * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros((), delta.dtype), delta, reverse=True)
    return advantages, advantages + values


def gae(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
        judged: Judged = None) -> Estimate:
    """Each stream's generalised advantages; no stream is compared with another, so `judged` is not used."""
    del judged
    advantages, returns = jax.vmap(generalised, (0, 0, 0, None, None))(rewards, values, mask, discount, gae_lambda)
    return advantages, returns, jnp.ones((), advantages.dtype)


def monte_carlo(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
                judged: Judged = None) -> Estimate:
    r"""A_t = G_t - V_t with the return-to-go G_t = \sum_l \gamma^l r_{t+l}: REINFORCE's, the value head as baseline.

    Source: Williams (1992). `gae_lambda` and `judged` are not used.
    """
    del gae_lambda, judged
    returns = _returns(rewards, mask, discount)
    return jnp.where(mask, returns - values, 0.0), returns, jnp.ones((), returns.dtype)


def leave_one_out(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
                  judged: Judged = None) -> Estimate:
    r"""A_i = R_i - mean_{j \ne i} R_j for each token of stream i, R the whole stream's return; 0 in a group of one.

    The baseline does not depend on the stream that it is subtracted from, so the policy gradient is unbiased. It is
    (R_i - mean R) g / (g - 1). `values` and `gae_lambda` are not used.
    Sources: Kool, van Hoof and Welling (2019); Ahmadian et al. (2024).
    """
    advantages, returns, _ = group_mean(rewards, values, mask, discount, gae_lambda, judged)
    _, count = _counted(returns, judged)
    return count / jnp.maximum(count - 1, 1) * advantages, returns, jnp.ones((), returns.dtype)


def group_mean(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
               judged: Judged = None) -> Estimate:
    """A_i = R_i - mean R for each token of stream i, R the whole stream's return: GRPO's without the deviation.

    A stream is part of its own baseline, so the policy gradient is (g - 1) / g of that of the return: the scale.
    `values` and `gae_lambda` are not used. Source: Liu et al. (2025), "Understanding R1-Zero-like training".
    """
    del values, gae_lambda
    returns = _returns(rewards, mask, discount)
    (here, count), whole = _counted(returns, judged), returns[:, 0]
    mean = jnp.where(here, whole, 0.0).sum() / count
    return jnp.where(mask & here[:, None], (whole - mean)[:, None], 0.0), returns, 1 - 1 / count


def group(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
          judged: Judged = None) -> Estimate:
    """A_i = (R_i - mean R) / (std R + 1e-4) for each token of stream i, R the whole stream's return; std over g - 1.

    The factor is at most `CEILING`. Where all returns are alike, to rounding, there is nothing to scale: advantages are
    0, and the KL's price is that of `group_mean`.
    `values` and `gae_lambda` are not used. Source: Shao et al. (2024), "DeepSeekMath"; 1e-4 and g - 1 as in TRL.
    """
    advantages, returns, shrinks = group_mean(rewards, values, mask, discount, gae_lambda, judged)
    here, count = _counted(returns, judged)
    whole = jnp.where(here, returns[:, 0], 0.0)
    squares = jnp.where(here, (whole - whole.sum() / count) ** 2, 0.0)
    scale = _factor(squares.sum() / jnp.maximum(count - 1, 1), jnp.abs(whole).max())
    return scale * advantages, returns, scale * shrinks


def group_batch(rewards: Rows, values: Rows, mask: Bool[Array, "g k"], discount: Scalar, gae_lambda: Scalar,
                judged: Judged = None) -> Estimate:
    """A_i = (R_i - mean R) / (std + 1e-4), mean R over the group and std over all returns of the batch (n - 1 of n).

    All groups have one factor, at most `CEILING`, so a group of little spread is not made as loud as the others, and a
    nat costs the same in each. `values` and `gae_lambda` are not used. Source: TRL, `scale_rewards="batch"`.
    """
    advantages, returns, shrinks = group_mean(rewards, values, mask, discount, gae_lambda, judged)
    here, _ = _counted(returns, judged)
    whole = jnp.where(here, returns[:, 0], 0.0)
    count = jax.lax.psum(here.sum(), GROUPS).astype(whole.dtype)
    mean = jax.lax.psum(whole.sum(), GROUPS) / jnp.maximum(count, 1)
    squares = jax.lax.psum(jnp.where(here, (whole - mean) ** 2, 0.0).sum(), GROUPS)
    scale = _factor(squares / jnp.maximum(count - 1, 1), jax.lax.pmax(jnp.abs(whole).max(), GROUPS))
    return scale * advantages, returns, scale * shrinks


def _factor(square, largest):
    """1 / (deviation + 1e-4) of returns of that variance and largest size; 1 where they differ by rounding alone."""
    deviation = jnp.sqrt(square)
    return jnp.where(deviation > 1e-6 * largest, jnp.minimum(1 / (deviation + 1e-4), CEILING), 1.0)


def _counted(returns, judged):
    """Which streams of a group are compared, and how many they are, at least 1."""
    here = jnp.ones(len(returns), bool) if judged is None else judged
    return here, jnp.maximum(here.sum(), 1).astype(returns.dtype)


def _returns(rewards, mask, discount):
    """Returns-to-go of each stream: generalised advantages with lambda 1 and no values."""
    nothing, one = jnp.zeros_like(rewards), jnp.ones((), rewards.dtype)
    return jax.vmap(generalised, (0, 0, 0, None, None))(rewards, nothing, mask, discount, one)[1]


ADVANTAGES.register("gae", gae)
ADVANTAGES.register("group", group)
ADVANTAGES.register("group_batch", group_batch)
ADVANTAGES.register("group_mean", group_mean)
ADVANTAGES.register("leave_one_out", leave_one_out)
ADVANTAGES.register("monte_carlo", monte_carlo)


def leaves_out(advantage: Callable) -> bool:
    """Whether an advantage is told which episodes of a group were judged, and can leave the others out."""
    return "judged" in inspect.signature(advantage).parameters


def normalise(advantages: Float[Array, "b k"], mask: Bool[Array, "b k"], axis: str | None = None
              ) -> tuple[Float[Array, "b k"], Float[Array, ""]]:
    """Zero mean and unit deviation over all agent tokens, and the factor 1 / deviation, at most `CEILING`.

    A KL term in the loss must be multiplied by the same factor, or it changes its price.

    Args:
        axis: of the devices that each hold a part of the episodes; None: all are here.
    """
    count = jnp.maximum(total(mask.sum(), axis), 1).astype(advantages.dtype)
    mean = total(jnp.where(mask, advantages, 0.0).sum(), axis) / count
    centred = jnp.where(mask, advantages - mean, 0.0)
    factor = jnp.minimum(1 / (jnp.sqrt(total((centred**2).sum(), axis) / count) + 1e-6), CEILING)
    return centred * factor, factor
