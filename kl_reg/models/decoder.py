"""A Llama-style decoder: one Flax block, scanned over layers for whole sequences, unrolled for one token at a time.

Parameters are a pytree {"embed": [v, d], "layers": {... each [layers, ...]}, "norm": {"scale": [d]}}, and "unembed"
[v, d] where the embeddings are not tied. The KV cache is a tuple of (key, value) per layer, each [b, k, s, f]: per
layer, so that writing one token updates a buffer in place instead of re-stacking all layers.
"""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from kl_reg.models.layers import RMSNorm, attend, rope, rotate


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder; hashable, so a static argument of jit."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_position: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    dtype: str = "float32"


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    config: DecoderConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        residual = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        dense = partial(nn.Dense, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(0.02))
        self.attention_norm = RMSNorm(c.norm_eps, dtype)
        self.query, self.key = dense(c.heads * c.head_width), dense(c.kv_heads * c.head_width)
        self.value, self.out = dense(c.kv_heads * c.head_width), dense(c.width, kernel_init=residual)
        self.mlp_norm = RMSNorm(c.norm_eps, dtype)
        self.gate, self.up, self.down = dense(c.mlp_width), dense(c.mlp_width), dense(c.width, kernel_init=residual)

    def __call__(self, x, cos, sin, mask, cache, index):
        """One layer over x [b, t, d]; writes its keys and values into `cache` at slot `index` where one is given."""
        c = self.config
        split = lambda y, n: y.reshape(*y.shape[:2], n, c.head_width).transpose(0, 2, 1, 3)  # noqa: E731
        y = self.attention_norm(x)
        query, key = rotate(split(self.query(y), c.heads), cos, sin), rotate(split(self.key(y), c.kv_heads), cos, sin)
        value = split(self.value(y), c.kv_heads)
        if cache is not None:
            key, value = (jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
                          for old, new in zip(cache, (key, value), strict=True))
        x = x + self.out(attend(query, key, value, mask))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), (key, value)


class Hidden(NamedTuple):
    """Activations: `last` [b, t, d] after the final norm, `features` [b, t, n * d] of the last n layers."""

    last: jax.Array
    features: jax.Array


def init(config: DecoderConfig, key: Array) -> dict:
    """Random parameters, float32."""
    embed_key, layer_key, unembed_key = jax.random.split(key, 3)
    x, angles = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1, config.head_width // 2))
    block = lambda k: Block(config).init(k, x, angles, angles, jnp.ones((1, 1, 1), bool), None, 0)["params"]  # noqa: E731
    table = lambda k: 0.02 * jax.random.normal(k, (config.vocab, config.width))  # noqa: E731
    params = {"embed": table(embed_key), "layers": jax.vmap(block)(jax.random.split(layer_key, config.layers)),
              "norm": {"scale": jnp.ones(config.width)}}
    return params if config.tied else params | {"unembed": table(unembed_key)}


def unembedding(params: dict) -> Float[Array, "v d"]:
    """The matrix that turns final hidden states into logits: h @ unembedding.T."""
    return params["unembed"] if "unembed" in params else params["embed"]


def _embed(config, params, tokens):
    return params["embed"][tokens].astype(config.dtype)


def _finish(config, params, layers_out, features):
    """Final norm; each of the recorded layers is normalised too, so that a reader sees unit scale."""
    norm = partial(RMSNorm(config.norm_eps, jnp.dtype(config.dtype)).apply, {"params": params["norm"]})
    last = norm(layers_out[-1])
    plain = [norm(x) for x in layers_out[-features:-1]]
    return Hidden(last, jnp.concatenate([*plain, last], axis=-1) if features else last[..., :0])


def forward(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"],
            features: int = 0) -> Hidden:
    """Whole sequences, left-padded up to `start`; no cache. Layers are scanned.

    Args:
        tokens: [b, t]; what stands before `start` is padding and is never looked at.
        start: first real slot of each row.
        features: number of last layers whose (normalised) output is returned beside the final hidden state.
    """
    hidden, _ = _scan(config, params, tokens, start, features)
    return hidden


def prefill(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"], slots: int,
            features: int = 0) -> tuple[Hidden, tuple]:
    """`forward`, and the cache of `slots` slots with the first t of them filled."""
    hidden, (keys, values) = _scan(config, params, tokens, start, features)
    pad = [(0, 0), (0, 0), (0, slots - tokens.shape[1]), (0, 0)]
    return hidden, tuple((jnp.pad(keys[i], pad), jnp.pad(values[i], pad)) for i in range(config.layers))


def _scan(config, params, tokens, start, features):
    slot = jnp.arange(tokens.shape[1])
    cos, sin = rope(slot[None] - start[:, None], config.head_width, config.rope_theta)
    mask = (slot[:, None] >= slot[None])[None] & (slot[None] >= start[:, None])[:, None]
    keep = max(features, 1)

    def layer(carry, layer_params):
        x, tail = carry
        x, cache = Block(config).apply({"params": layer_params}, x, cos, sin, mask, None, 0)
        return (x, (*tail[1:], x)), cache

    x = _embed(config, params, tokens)
    (_, tail), cache = jax.lax.scan(layer, (x, (x,) * keep), params["layers"])
    return _finish(config, params, tail, features), cache


def decode(config: DecoderConfig, params: dict, token: Int[Array, " b"], start: Int[Array, " b"],
           index: Int[Array, ""], cache: tuple, features: int = 0) -> tuple[Hidden, tuple]:
    """One token at slot `index`, the same for all rows. Layers are unrolled and the cache is updated in place.

    Returns:
        Hidden states with t = 1 removed ([b, d] and [b, n * d]) and the cache.
    """
    slot = jnp.arange(cache[0][0].shape[2])
    cos, sin = rope((index - start)[:, None], config.head_width, config.rope_theta)
    mask: Bool[Array, "b 1 s"] = ((slot <= index)[None] & (slot[None] >= start[:, None]))[:, None]
    x, outs, new = _embed(config, params, token)[:, None], [], []
    for i, layer_cache in enumerate(cache):
        layer_params = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        x, layer_cache = Block(config).apply({"params": layer_params}, x, cos, sin, mask, layer_cache, index)
        outs.append(x)
        new.append(layer_cache)
    hidden = _finish(config, params, outs, features)
    return Hidden(hidden.last[:, 0], hidden.features[:, 0]), tuple(new)
