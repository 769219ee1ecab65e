"""Building blocks of the decoder. Axes: b batch, t query, s key, d model, h heads, k kv-heads, f head width."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

ACTIVATIONS = {"silu": jax.nn.silu, "swish": jax.nn.silu, "relu": jax.nn.relu,
               "gelu": partial(jax.nn.gelu, approximate=False), "gelu_new": jax.nn.gelu, "gelu_fast": jax.nn.gelu,
               "gelu_pytorch_tanh": jax.nn.gelu}
"""By the names that config.json uses."""


class Linear(nn.Module):
    """x @ kernel + bias; with an adapter, + x @ a @ b of the member that a row belongs to.

    The collection "adapter" holds a [m, d, r] and b [m, r, o]; the rows of x are those of m members, one after the
    other, so that all members go through the kernel as one batch. Source: Hu et al. (2021), "LoRA".
    """

    features: int
    dtype: Any
    use_bias: bool = False
    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        if self.has_variable("params", "turned"):
            y = turned_product(self.get_variable("params", "turned").astype(self.dtype), x)
        else:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
            y = (_scaled(x, kernel, self.get_variable("params", "kernel_scale"))
                 if self.has_variable("params", "kernel_scale") else x @ kernel.astype(self.dtype))
        if self.has_variable("adapter", "a"):
            a, b = (self.get_variable("adapter", name).astype(self.dtype) for name in "ab")
            y += (x.reshape(len(a), -1, x.shape[-1]) @ a @ b).reshape(y.shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


def turned_product(table: jax.Array, x: jax.Array, dtype=None, precision=None) -> jax.Array:
    """x @ table^T of few rows x [n, i] and a table [o, i], [n, o], summed in `dtype`. On a CPU the table stands on the
    left, which then is up to twice as fast."""
    product = partial(jnp.einsum, preferred_element_type=dtype, precision=precision)

    def left(table, x):
        return jax.lax.optimization_barrier(product("oi,ni->on", table, x)).T

    return jax.lax.platform_dependent(table, x, cpu=left, default=lambda table, x: product("ni,oi->no", x, table))


# Checkpointed, so that a gradient keeps int8 kernels for its backward pass and not a float copy of every layer's.
@partial(jax.checkpoint, prevent_cse=False)
def _scaled(x, kernel, scale):
    """x @ (kernel * scale) of an int8 kernel (quantize.py); what is scaled is the product, so that it stays int8."""
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class Norm(nn.Module):
    """Normalisation in float32.

    "rms": x / rms(x) * scale, Zhang and Sennrich (2019); "rms_plus_one" with 1 + scale in place of scale (Gemma);
    "layer": (x - mean) / deviation * scale + bias, Ba et al. (2016).
    """

    kind: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        shape, x = (x.shape[-1],), x.astype(jnp.float32)
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        scale = self.param("scale", start, shape, jnp.float32).astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * jnp.broadcast_to(1 + scale if self.kind == "rms_plus_one" else scale, x.shape)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
            x = x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
        return x.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the first `width` numbers of a head are rotated, Su et al. (2021), "RoFormer".

    `kind` is how the frequencies theta^(-2i / width) are changed for longer contexts: "default" (not at all), "linear"
    (divided by `factor`), "llama3" (slow ones divided by it, fast ones kept), "yarn" (Peng et al., 2023).
    """

    theta: float
    width: int
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0             # of llama3: wavelengths longer than original / low are stretched
    high: float = 4.0            # those shorter than original / high are kept
    beta_fast: float = 32.0      # of yarn: turns within the original context beyond which a frequency is kept
    beta_slow: float = 1.0       # and below which it is divided
    truncate: bool = True        # yarn's bounds are whole numbers
    original: int = 0            # the context before stretching
    scale: float = 1.0           # of cosines and sines, yarn's attention factor

    def frequencies(self) -> np.ndarray:
        """[width / 2], radians a position, float64."""
        plain = self.theta ** (-np.arange(0, self.width, 2) / self.width)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            kept = (self.original * plain / (2 * math.pi) - self.low) / (self.high - self.low)
        elif self.kind == "yarn":
            at = [self.width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
                  for turns in (self.beta_fast, self.beta_slow)]
            first, last = (math.floor(at[0]), math.ceil(at[1])) if self.truncate else at
            first, last = max(first, 0), min(last, self.width - 1)
            kept = 1 - (np.arange(self.width // 2) - first) / max(last - first, 0.001)
        else:
            return plain
        kept = np.clip(kept, 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [..., t, width / 2]."""
        frequency = jnp.asarray(self.frequencies(), jnp.float32)
        angle = jnp.einsum("...,f->...f", positions.astype(jnp.float32), frequency)
        return self.scale * jnp.cos(angle), self.scale * jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the halves of the first numbers of x [b, h, t, f] by cos, sin [b, t, width / 2]; keeps the others."""
    half, kind = cos.shape[-1], x.dtype
    x, cos, sin = x.astype(jnp.float32), cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(kind)


class Stored(NamedTuple):
    """Keys or values [b, k, s, f] as a cache keeps them: x = values * scale, or the values themselves (None)."""

    values: jax.Array
    scale: jax.Array | None = None      # [b, k, s]


def store(x: jax.Array, dtype: str) -> Stored:
    """x [b, k, s, f] in that dtype; "": as it is. "int8": each head's vector has a scale of its own, max |x| / 127."""
    if dtype != "int8":
        return Stored(x.astype(dtype or x.dtype))
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-30).astype(jnp.float32) / 127
    return Stored(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


class Source(NamedTuple):
    """Keys and values that queries of b rows look at where `mask` [b, t, s] is True. They may be of fewer rows: then
    each is what b / rows queries' rows in a row have in common."""

    key: Stored
    value: Stored
    mask: jax.Array


def attend(query: jax.Array, sources: Sequence[Source], scale: float, cap: float | None) -> jax.Array:
    """Grouped-query attention to all sources together, softmax in float32.

    Args:
        query: [b, h, t, f]; h is a multiple of the sources' k.
        scale: of the scores.
        cap: scores become cap * tanh(score / cap), or stay as they are (None).

    Returns:
        [b, t, h * f].
    """
    b, h, t, f = query.shape
    kv_heads = sources[0].key.values.shape[1]
    query = query.reshape(b, kv_heads, h // kv_heads, t, f)
    scores = jnp.concatenate([_scores(query, source.key) for source in sources], axis=-1) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = jnp.concatenate([source.mask for source in sources], axis=-1)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    ends = np.cumsum([source.mask.shape[-1] for source in sources])[:-1]
    parts = zip(jnp.split(weights, ends, axis=-1), sources, strict=True)
    out = sum(_weighted(part, source.value, query.dtype) for part, source in parts)
    return out.reshape(b, h, t, f).transpose(0, 2, 1, 3).reshape(b, t, h * f)


def attend_fused(query: jax.Array, sources: Sequence[Source], scale: float, implementation: str) -> jax.Array:
    """`attend` without a cap, through `jax.nn.dot_product_attention`, for a t that is long.

    Args:
        sources: in floating point; what several rows share is repeated for each of them.
        implementation: "cudnn", whose kernels keep no scores [b, h, t, s] (an NVIDIA GPU, bfloat16), or "xla".
    """
    rows = len(query)

    def joined(name):
        each = (getattr(source, name).values for source in sources)
        return jnp.concatenate([jnp.repeat(x, rows // len(x), axis=0) for x in each], axis=2).swapaxes(1, 2)

    mask = jnp.concatenate([source.mask for source in sources], axis=-1)[:, None]
    out = jax.nn.dot_product_attention(query.swapaxes(1, 2), joined("key"), joined("value"), mask=mask, scale=scale,
                                       implementation=implementation)
    return out.reshape(*out.shape[:2], -1)


def _by_source(x, rows):
    """[b, k, r, t, ...] -> [rows, k, q, ...]: all queries that look at the same keys."""
    b, k, r, t = x.shape[:4]
    return x.reshape(rows, b // rows, k, r, t, -1).swapaxes(1, 2).reshape(rows, k, b // rows * r * t, -1)


def _by_query(x, b, r):
    """Back again."""
    rows, k, q, last = x.shape
    return x.reshape(rows, k, b // rows, r, -1, last).swapaxes(1, 2).reshape(b, k, r, -1, last)


def _scores(query, key):
    """[b, k, r, t, s] of queries [b, k, r, t, f]."""
    same = _by_source(query, len(key.values))
    scores = jnp.einsum("bkqf,bksf->bkqs", same, key.values.astype(query.dtype), preferred_element_type=jnp.float32)
    if key.scale is not None:
        scores *= key.scale[:, :, None]
    return _by_query(scores, len(query), query.shape[2])


def _weighted(weights, value, dtype):
    """The values' sums [b, k, r, t, f], with weights [b, k, r, t, s]."""
    same = _by_source(weights, len(value.values))
    if value.scale is not None:
        same *= value.scale[:, :, None]
    out = jnp.einsum("bkqs,bksf->bkqf", same.astype(dtype), value.values.astype(dtype))
    return _by_query(out, len(weights), weights.shape[2])
