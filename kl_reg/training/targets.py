"""What an update aims at: advantages, returns, and the coefficient of the KL that stands in the loss."""
from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.algorithms.advantages import GROUPS, leaves_out, normalise
from kl_reg.kl.exact import TokenTerms
from kl_reg.program import Program
from kl_reg.sharding import constraints
from kl_reg.types import Episodes, Hyper


class Targets(NamedTuple):
    """What an update of a batch aims at, in reward units with the KL penalty subtracted.

    `kl_coef` is that of the KL in the loss: the coefficient times `factor`, by which the advantages were multiplied, so
    that a nat keeps its price.
    """

    advantages: Float[Array, "b k"]
    returns: Float[Array, "b k"]
    kl_coef: Float[Array, " b"]
    factor: Float[Array, " b"]


def recorded(episodes: Episodes) -> TokenTerms:
    """The terms of each agent token [b, k] as the sampler recorded them."""
    return TokenTerms(*(getattr(episodes, name) for name in TokenTerms._fields))


def targets(program: Program, episodes: Episodes, rewards: Float[Array, "b k"], coef: Float[Array, ""], hyper: Hyper
            ) -> Targets:
    """The targets of all epochs over one batch of one member.

    Args:
        rewards: of each agent token, reward units.
        coef: reward units per nat.
    """
    algorithm, axis = program.algorithm, program.execution.axis
    mask, missing = episodes.learned, -jnp.expm1(-episodes.floor)
    penalty = jax.vmap(algorithm.kl.reward)(recorded(episodes), missing, mask)
    rewards = jnp.where(mask, rewards - coef * penalty, 0.0)

    def estimate(rewards, values, mask, judged):
        known = {"judged": judged} if leaves_out(algorithm.advantage) else {}
        found = algorithm.advantage(rewards, values, mask, hyper.discount, hyper.gae_lambda, **known)
        chex.assert_shape(found, [mask.shape, mask.shape, ()], exception_type=ValueError, custom_message=(
            "rl.advantage must return (advantages [g, k], returns [g, k], scale [])"))
        return found

    groups = jax.tree.map(lambda x: x.reshape(-1, algorithm.group, *x.shape[1:]),
                          constraints.together((rewards, episodes.value, mask, episodes.judged), axis))
    advantages, returns, factor = jax.vmap(estimate, axis_name=GROUPS)(*groups)
    every = (advantages.reshape(-1, mask.shape[1]), returns.reshape(-1, mask.shape[1]),
             jnp.repeat(factor, algorithm.group))
    advantages, returns, factor = constraints.back(every, axis)
    if algorithm.normalise:
        advantages, own = normalise(advantages, mask, axis)
        factor = own * factor
    return Targets(advantages, returns, coef * factor, factor)
