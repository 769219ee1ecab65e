"""REINFORCE, and its loss, which RLOO shares."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.types import Hyper


def reinforce(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
              mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""-sg(min(\rho, c)) A log \pi(a) per token, \rho = \pi(a) / \pi_{old}(a), c = hyper.truncation.

    On-policy \rho = 1: the plain policy gradient. In later epochs the weight makes it the gradient of the new policy's
    return, up to the weights of other tokens; c bounds its variance, at the price of a bias where \rho > c.
    Sources: Williams (1992); Ionides (2008) and Espeholt et al. (2018), "IMPALA", for the truncated weight.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    weight = jnp.minimum(jnp.exp(log_prob - old_log_prob), hyper.truncation)
    return -jax.lax.stop_gradient(weight) * advantage * log_prob


REINFORCE = Algorithm("reinforce", "monte_carlo", "token_mean", normalise=True, value_coef=0.5)
r"""A_t = G_t - V_t, the value head as baseline; the mean over all agent tokens.

Unlike the textbook's it normalises advantages over the batch, as other trainers do, and weighs later epochs by the
truncated ratio, where the plain loss -A log \pi would go on pushing without seeing how far it went.
"""
