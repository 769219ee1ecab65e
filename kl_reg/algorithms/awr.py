"""Advantage-weighted regression."""
from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.types import Hyper

LARGEST = 20.0
"""Bound of the weight, as in the paper's experiments."""


def awr(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
        mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""-min(exp(A / T), 20) log \pi(a) per token, T = hyper.temperature in reward units; the weight is held constant.

    Maximum likelihood of what was sampled, good tokens more than others: it tends to \pi \propto \pi_{old} e^{A/T} and
    needs no ratio in later epochs. Not zero without an advantage: then it imitates. Source: Peng et al. (2019).
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    del old_log_prob, mask
    return -jax.lax.stop_gradient(jnp.minimum(jnp.exp(advantage / hyper.temperature), LARGEST)) * log_prob


AWR = Algorithm("awr", "gae", "token_mean", value_coef=0.5)
r"""Advantages of a value head, not normalised: T is in reward units, and what the policy tends to depends on no batch.

Differs from the authors' code, which normalises advantages (T in deviations of a batch) and keeps a replay buffer; here
it learns from the episodes of one iteration. Near \pi_{old} the gradient is 1 / T of the policy gradient, so a KL in
the loss costs T times its price; in the reward it costs its price.
"""
