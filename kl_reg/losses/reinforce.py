"""The plain policy gradient."""
from __future__ import annotations

from jaxtyping import Array, Float

from kl_reg.types import Hyper


def reinforce(log_prob: Float[Array, " k"], old_log_prob: Float[Array, " k"], advantage: Float[Array, " k"],
              hyper: Hyper) -> Float[Array, " k"]:
    r"""-A log \pi(a) per token: its gradient is the policy gradient on-policy (one epoch). Source: Williams (1992)."""
    del old_log_prob, hyper
    return -advantage * log_prob
