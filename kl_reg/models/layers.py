"""Building blocks of the decoder. Axes: b batch, t query, s key, d model, h heads, k kv-heads, f head width."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32. Source: Zhang and Sennrich (2019)."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)


def rope(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., t, f/2] of rotary positions. Source: Su et al. (2021)."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.einsum("...,f->...f", positions.astype(jnp.float32), frequency)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the halves of x [b, h, t, f] by cos, sin [b, t, f/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in float32.

    Args:
        query: [b, h, t, f].
        key, value: [b, k, s, f]; h is a multiple of k.
        mask: bool [b, t, s], True where a query may look.

    Returns:
        [b, t, h * f].
    """
    b, h, t, f = query.shape
    k = key.shape[1]
    query = query.reshape(b, k, h // k * t, f)
    scores = jnp.einsum("bkqf,bksf->bkqs", query, key, preferred_element_type=jnp.float32) * f**-0.5
    scores = scores.reshape(b, k, h // k, t, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkqs,bksf->bkqf", weights.reshape(b, k, h // k * t, -1), value)
    return out.reshape(b, h, t, f).transpose(0, 2, 1, 3).reshape(b, t, h * f)
