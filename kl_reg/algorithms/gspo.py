"""Group sequence policy optimisation."""
from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.grpo import GRPO
from kl_reg.types import Hyper


def gspo(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
         mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""-min(s A, clip(s, 1 - c, 1 + c_{high}) A) with the ratio of the episode, s = exp(mean_t log \rho_t).

    All tokens share s, and its gradient flows to all of them: an episode is clipped as a whole.
    Source: Zheng et al. (2025), "Group sequence policy optimization".
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    tokens = jnp.maximum(mask.sum(), 1).astype(log_prob.dtype)
    ratio = jnp.exp(jnp.where(mask, log_prob - old_log_prob, 0.0).sum() / tokens)
    clipped = jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


GSPO = GRPO._replace(loss="gspo", clip=3e-4, clip_high=4e-4)
"""GRPO with the episode's ratio; its clip is the paper's, far narrower because a mean of log-ratios moves little.

On-policy the same gradient as GRPO's. The paper's loss has no KL; with kl.coef > 0 it is as in `grpo`.
"""
