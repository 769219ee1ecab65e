"""A decoder-only transformer with the switches that model families differ in: one Flax block, scanned over layers for
whole sequences, unrolled for one token at a time.

Parameters are a pytree {"embed": [v, d], "layers": {... each [layers, ...]}, "norm": {"scale": [d], ...}}, with
"positions" [p, d] where positions are learned and "unembed" [v, d] where the embeddings are not tied. An adapter is a
tree {"query": {"a": [layers, m, d, r], "b": [layers, m, r, o]}, ...} of low-rank changes to some of the layers'
matrices; it is another tree, so that the base is the same parameters with the adapter left out. The KV cache is a tuple
of (key, value) per layer, each [b, k, s, f]: per layer, so that writing one token updates a buffer in place instead of
re-stacking all layers.
"""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from kl_reg.models.layers import ACTIVATIONS, Experts, Linear, Norm, Rope, attend, rotate


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder; hashable, so a static argument of jit. The defaults are those of a Llama."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_position: int
    rope: Rope | None = None                # None: learned positions
    local: tuple[bool, ...] = ()            # layers that see only `window` tokens, themselves included; (): none
    window: int = 0
    local_rope: Rope | None = None          # of local layers; None: as the others'
    norm: str = "rms"                       # a kind of `layers.Norm`
    norm_eps: float = 1e-5
    pre_norm: bool = True                   # of what enters attention and MLP
    post_norm: bool = False                 # of what leaves them, before it is added
    parallel: bool = False                  # attention and MLP read the same residual stream
    qk_norm: str = "none"                   # of queries and keys: "head", each alone; "all", all heads together
    activation: str = "silu"
    gated: bool = True                      # down(act(gate(x)) * up(x)); else down(act(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0                        # 0: a dense MLP
    chosen_experts: int = 2
    score_scale: float | None = None        # of attention; None: head_width^-1/2
    score_cap: float | None = None
    logit_cap: float | None = None          # logits become cap * tanh(logit / cap)
    embed_scale: float | None = None        # of embeddings, rounded to the dtype
    tied: bool = True
    dtype: str = "float32"


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    config: DecoderConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        residual = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        norm = partial(Norm, c.norm, c.norm_eps, dtype)
        self.query = Linear(c.heads * c.head_width, dtype, c.qkv_bias)
        self.key, self.value = (Linear(c.kv_heads * c.head_width, dtype, c.qkv_bias) for _ in range(2))
        self.out = Linear(c.width, dtype, c.out_bias, residual)
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        if c.qk_norm != "none":
            self.query_norm, self.key_norm = norm(), norm()
        if c.experts:
            self.experts = Experts(c.mlp_width, c.experts, c.chosen_experts, c.activation, dtype)
        else:
            if c.gated:
                self.gate = Linear(c.mlp_width, dtype, c.mlp_bias)
            self.up = Linear(c.mlp_width, dtype, c.mlp_bias)
            self.down = Linear(c.width, dtype, c.mlp_bias, residual)

    def __call__(self, x, angles, mask, cache, index):
        """One layer over x [b, t, d]; writes its keys and values into `cache` at slot `index` where one is given."""
        c = self.config
        attended, cache = self._attention(self.attention_norm(x) if c.pre_norm else x, angles, mask, cache, index)
        if c.post_norm:
            attended = self.attention_post_norm(attended)
        seen = x if c.parallel else x + attended
        y = self._mlp(self.mlp_norm(seen) if c.pre_norm else seen)
        return x + attended + (self.mlp_post_norm(y) if c.post_norm else y), cache

    def _attention(self, x, angles, mask, cache, index):
        c = self.config
        split = lambda y: y.reshape(*y.shape[:2], -1, c.head_width)  # noqa: E731
        query, key = self.query(x), self.key(x)
        if c.qk_norm == "all":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = split(query), split(key), split(self.value(x))
        if c.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (y.transpose(0, 2, 1, 3) for y in (query, key, value))
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = (jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
                          for old, new in zip(cache, (key, value), strict=True))
        scale = c.head_width**-0.5 if c.score_scale is None else c.score_scale
        return self.out(attend(query, key, value, mask, scale, c.score_cap)), (key, value)

    def _mlp(self, x):
        if self.config.experts:
            return self.experts(x)
        act = ACTIVATIONS[self.config.activation]
        return self.down(act(self.gate(x)) * self.up(x) if self.config.gated else act(self.up(x)))


class Hidden(NamedTuple):
    """Activations: `last` [b, t, d] after the final norm, `features` [b, t, n * d] of the last n layers."""

    last: jax.Array
    features: jax.Array


def init(config: DecoderConfig, key: Array) -> dict:
    """Random parameters, float32."""
    keys = jax.random.split(key, 3)
    x, position = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), jnp.int32)
    angles, one = _angles(config, position)[0], jnp.ones((1, 1, 1), bool)
    block = lambda k: Block(config).init(k, x, angles, one, None, 0)["params"]  # noqa: E731
    table = lambda k, rows: 0.02 * jax.random.normal(k, (rows, config.width))  # noqa: E731
    params = {"embed": table(keys[0], config.vocab),
              "layers": jax.vmap(block)(jax.random.split(keys[1], config.layers)),
              "norm": Norm(config.norm, config.norm_eps, jnp.float32).init(key, x)["params"]}
    if config.rope is None:
        params["positions"] = table(jax.random.fold_in(keys[0], 1), config.max_position)
    return params if config.tied else params | {"unembed": table(keys[2], config.vocab)}


def unembedding(params: dict) -> Float[Array, "v d"]:
    """The matrix that turns final hidden states into logits: h @ unembedding.T."""
    return params["unembed"] if "unembed" in params else params["embed"]


def unembed(params: dict, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """The linear part of the logits, float32."""
    return jnp.einsum("...d,vd->...v", hidden, unembedding(params), preferred_element_type=jnp.float32,
                      precision="highest")      # float32 stays float32 where the hardware has a coarser default


def logits(config: DecoderConfig, params: dict, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """Logits of final hidden states, float32."""
    raw = unembed(params, hidden)
    return raw if config.logit_cap is None else config.logit_cap * jnp.tanh(raw / config.logit_cap)


def _embed(config, params, tokens, positions):
    x = params["embed"][tokens].astype(config.dtype)
    if config.embed_scale is not None:
        x = x * jnp.asarray(config.embed_scale, config.dtype)
    if config.rope is None:
        x = x + params["positions"][jnp.maximum(positions, 0)].astype(config.dtype)
    return x


def _angles(config, positions):
    """Cosines and sines of layers that see everything, and of local ones."""
    plain = None if config.rope is None else config.rope.angles(positions)
    return plain, plain if config.local_rope is None else config.local_rope.angles(positions)


def _masks(config, query, key, start):
    """Which slots a query looks at, [b, t, s]: in layers that see everything, and in local ones."""
    behind = query[:, None] - key[None]
    mask = (behind >= 0)[None] & (key[None] >= start[:, None])[:, None]
    return mask, mask & (behind < config.window)[None]


def _finish(config, params, layers_out, features):
    """Final norm; each of the recorded layers is normalised too, so that a reader sees unit scale."""
    norm = partial(Norm(config.norm, config.norm_eps, jnp.dtype(config.dtype)).apply, {"params": params["norm"]})
    last = norm(layers_out[-1])
    plain = [norm(x) for x in layers_out[-features:-1]]
    return Hidden(last, jnp.concatenate([*plain, last], axis=-1) if features else last[..., :0])


def forward(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"],
            features: int = 0, adapter: dict | None = None) -> Hidden:
    """Whole sequences, left-padded up to `start`; no cache. Layers are scanned.

    Args:
        tokens: [b, t]; what stands before `start` is padding and is never looked at.
        start: first real slot of each row.
        features: number of last layers whose (normalised) output is returned beside the final hidden state.
        adapter: of m members, whose rows stand one after the other in b.
    """
    hidden, _ = _scan(config, params, tokens, start, features, adapter)
    return hidden


def prefill(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"], slots: int,
            features: int = 0, adapter: dict | None = None) -> tuple[Hidden, tuple]:
    """`forward`, and the cache of `slots` slots with the first t of them filled."""
    hidden, (keys, values) = _scan(config, params, tokens, start, features, adapter)
    pad = [(0, 0), (0, 0), (0, slots - tokens.shape[1]), (0, 0)]
    return hidden, tuple((jnp.pad(keys[i], pad), jnp.pad(values[i], pad)) for i in range(config.layers))


def _scan(config, params, tokens, start, features, adapter):
    slot = jnp.arange(tokens.shape[1])
    positions = slot[None] - start[:, None]
    angles, masks = _angles(config, positions), _masks(config, slot, slot, start)
    keep = max(features, 1)

    def layer(carry, xs):
        (x, tail), (variables, local) = carry, xs
        seen = tuple(jax.tree.map(lambda a, b: a if local is None else jnp.where(local, b, a), *both)
                     for both in (angles, masks))
        x, cache = Block(config).apply(variables, x, *seen, None, 0)
        return (x, (*tail[1:], x)), cache

    x = _embed(config, params, tokens, positions)
    xs = ({"params": params["layers"], "adapter": adapter or {}}, jnp.array(config.local) if config.local else None)
    (_, tail), cache = jax.lax.scan(layer, (x, (x,) * keep), xs)
    return _finish(config, params, tail, features), cache


def decode(config: DecoderConfig, params: dict, token: Int[Array, " b"], start: Int[Array, " b"],
           index: Int[Array, ""], cache: tuple, features: int = 0, adapter: dict | None = None) -> tuple[Hidden, tuple]:
    """One token at slot `index`, the same for all rows. Layers are unrolled and the cache is updated in place.

    Returns:
        Hidden states with t = 1 removed ([b, d] and [b, n * d]) and the cache.
    """
    slot, positions = jnp.arange(cache[0][0].shape[2]), (index - start)[:, None]
    angles, masks = _angles(config, positions), _masks(config, index[None], slot, start)
    x, outs, new = _embed(config, params, token[:, None], positions), [], []
    for i, layer_cache in enumerate(cache):
        local = bool(config.local) and config.local[i]
        variables = jax.tree.map(lambda p, i=i: p[i], {"params": params["layers"], "adapter": adapter or {}})
        x, layer_cache = Block(config).apply(variables, x, angles[local], masks[local], layer_cache, index)
        outs.append(x)
        new.append(layer_cache)
    hidden = _finish(config, params, outs, features)
    return Hidden(hidden.last[:, 0], hidden.features[:, 0]), tuple(new)
