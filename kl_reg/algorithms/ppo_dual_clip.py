"""PPO with a bound on what a bad token can cost."""
from __future__ import annotations

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.algorithms.ppo import PPO, ppo_clip
from kl_reg.types import Hyper


def dual_clip(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
              mask: Bool[Array, " k"], hyper: Hyper) -> Float[Array, " k"]:
    r"""Where A < 0: -max(min(\rho A, clip(\rho, 1 - c, 1 + c_{high}) A), d A), d = hyper.dual_clip; else PPO's.

    PPO's loss has no bound where A < 0 and \rho is large; here the gradient is zero beyond \rho = d > 1.
    Source: Ye et al. (2020), "Mastering complex control in MOBA games with deep reinforcement learning".
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, mask])
    loss = ppo_clip(log_prob, old_log_prob, advantage, mask, hyper)
    return jnp.where(advantage < 0, jnp.minimum(loss, -hyper.dual_clip * advantage), loss)


PPO_DUAL_CLIP: Algorithm = PPO._replace(loss="dual_clip")
"""PPO in everything else."""
