"""Drawing one token of one row: which tokens may be drawn, the student's distribution, and the draw itself."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from kl_reg.sharding.constraints import constrain
from kl_reg.types import Sampling

_BLOCK = 64


def pack(sampling: Sampling, log_probs: Float[Array, " v"]) -> UInt8[Array, " w"] | None:
    """The tokens that the reference lets through, a bit each; None where nothing is truncated."""
    return jnp.packbits(sampling.keep(log_probs)) if sampling.truncates else None


def unpack(allowed: UInt8[Array, " w"], vocabulary: int) -> Bool[Array, " v"]:
    """The tokens that `pack` let through."""
    return jnp.unpackbits(allowed, count=vocabulary).astype(bool)


def truncate(log_probs: Float[Array, " v"], allowed: Bool[Array, " v"]) -> Float[Array, " v"]:
    """Log-probabilities renormalised on the allowed tokens."""
    return jax.nn.log_softmax(jnp.where(allowed, log_probs, -jnp.inf))


def student_log_probs(sampling: Sampling, logits: Float[Array, " v"]) -> Float[Array, " v"]:
    """The student's distribution as it is sampled."""
    log_probs = jax.nn.log_softmax(logits / sampling.of_student)
    return truncate(log_probs, sampling.keep(log_probs)) if sampling.truncates else log_probs


def inverse_cdf(log_probs: Float[Array, " v"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """Draws from one row with one uniform in [0, 1): the first token whose cumulative probability exceeds it.

    Two levels, blocks and then tokens within one, because a cumulative sum over the vocabulary costs more than the
    softmax. A token of probability zero is never drawn.

    Args:
        log_probs: up to a constant, but near enough to 0 that no exponential overflows.
    """
    vocab, log_probs = log_probs.shape[0], constrain(log_probs, None)      # XLA cannot cut a divided one into blocks
    rows = jnp.pad(log_probs, (0, -vocab % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
    blocks = jnp.cumsum(jnp.exp(rows).sum(1))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    inner = jnp.cumsum(jnp.exp(rows[block]))
    return block * _BLOCK + _first_above(inner, target - jnp.where(block > 0, blocks[block - 1], 0.0))


def _first_above(cumulative, target):
    """First index whose cumulative value exceeds the target; where rounding leaves none, the last that adds to it."""
    return jnp.minimum((cumulative <= target).sum(), (cumulative < cumulative[-1]).sum())
