"""A decoder-only transformer with the switches that model families differ in: one Flax block (block.py), scanned over
layers for whole sequences, unrolled for one token at a time.

Parameters are a pytree {"embed": [v, d], "layers": {... each [layers, ...]}, "norm": {"scale": [d], ...}}, with
"positions" [p, d] where positions are learned and "unembed" [v, d] where the embeddings are not tied. An adapter is a
tree {"query": {"a": [layers, m, d, r], "b": [layers, m, r, o]}, ...} of low-rank changes to some of the layers'
matrices; it is another tree, so that the base is the same parameters with the adapter left out. The KV cache is a tuple
of a `LayerCache`: per layer, so that writing one token updates a buffer in place instead of re-stacking all layers.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kl_reg.models.block import REMATS, Block, DecoderConfig
from kl_reg.models.layers import Norm, Source, Stored, attend, attend_fused, rotate, store, turned_product
from kl_reg.sharding.batching import write
from kl_reg.sharding.constraints import constrain, spread
from kl_reg.sharding.mesh import ROWS

_FEW = 64       # rows of a product that are few (`layers.turned_product`)


class Hidden(NamedTuple):
    """Activations: `last` [b, t, d] after the final norm, `features` [b, t, n * d] of the last n layers."""

    last: jax.Array
    features: jax.Array


def init(config: DecoderConfig, key: Array) -> dict:
    """Random parameters, float32."""
    keys = jax.random.split(key, 3)
    x = jnp.zeros((1, config.width))
    block = lambda k: Block(config).init(k, x, lambda query, *_: (query.reshape(1, -1), ()))["params"]  # noqa: E731
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


def unembed(table: Float[Array, "v d"], hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """The linear part of the logits, float32."""
    if hidden.ndim == 2 and len(hidden) <= _FEW:
        return turned_product(table, hidden, jnp.float32, "highest")
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32,
                      precision="highest")      # float32 stays float32 where the hardware has a coarser default


def capped(config: DecoderConfig, raw: Float[Array, "... v"]) -> Float[Array, "... v"]:
    """Logits of their linear part."""
    return raw if config.logit_cap is None else config.logit_cap * jnp.tanh(raw / config.logit_cap)


def logits(config: DecoderConfig, params: dict, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """Logits of final hidden states, float32."""
    return capped(config, unembed(unembedding(params), hidden))


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


def _mask(config, query, key, start, local):
    """Which slots `key` [s] the slots `query` [t] of each row look at, [b, t, s]; `local`: whether in local layers."""
    behind = query[:, None] - key[None]
    mask = (behind >= 0)[None] & (key[None] >= start[:, None])[:, None]
    return mask & (behind < config.window)[None] if local else mask


def _finish(config, params, layers_out, features):
    """Final norm; each of the recorded layers is normalised too, so that a reader sees unit scale."""
    norm = partial(Norm(config.norm, config.norm_eps, jnp.dtype(config.dtype)).apply, {"params": params["norm"]})
    last = norm(layers_out[-1])
    plain = [norm(x) for x in layers_out[-features:-1]]
    return Hidden(last, jnp.concatenate([*plain, last], axis=-1) if features else last[..., :0])


def _heads(x, rows):
    """[n, h, f] -> [rows, h, t, f]."""
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)


def _attend(config, query, sources, implementation=""):
    scale = config.head_width**-0.5 if config.score_scale is None else config.score_scale
    if implementation:
        return attend_fused(query, sources, scale, implementation)
    return attend(query, sources, scale, config.score_cap)


class _Section(NamedTuple):
    """Some rows' tokens [b, t] in the slots from `first` on. They see their own row and, of the sections before, what
    each row of those has in common with as many rows in a row."""

    tokens: Array
    start: Array
    first: int

    def slots(self):
        return self.first + jnp.arange(self.tokens.shape[1])

    def positions(self):
        return self.slots()[None] - self.start[:, None]


def forward(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"],
            features: int = 0, adapter: dict | None = None, group: int = 1, shared: int = 0) -> Hidden:
    """Whole sequences, left-padded up to `start`; no cache. Layers are scanned.

    Args:
        tokens: [b, t]; what stands before `start` is padding and is never looked at.
        start: first real slot of each row.
        features: number of last layers whose (normalised) output is returned beside the final hidden state.
        adapter: of m members, whose rows stand one after the other in b.
        group, shared: the first `shared` slots are the same in `group` rows in a row, and are read once for them. With
            an adapter of several members nothing can be shared.
    """
    if group == 1 or not shared:
        hidden, _ = _scan(config, params, (_Section(tokens, start, 0),), features, adapter)
        return hidden[0]
    prefix = _Section(tokens[::group, :shared], start[::group], 0)
    (common, own), _ = _scan(config, params, (prefix, _Section(tokens[:, shared:], start, shared)), features, adapter)
    return jax.tree.map(lambda x, y: jnp.concatenate([jnp.repeat(x, group, axis=0), y], axis=1), common, own)


class LayerCache(NamedTuple):
    """Keys and values of one layer: of the prompts [b / group, k, p, f], and of the slots behind them [b, k, s, f]."""

    prompt_key: Stored
    prompt_value: Stored
    key: Stored
    value: Stored


def prefill(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"], start: Int[Array, " b"], slots: int,
            features: int = 0, adapter: dict | None = None, group: int = 1, axes: tuple = ROWS,
            chosen: Int[Array, " r"] | None = None) -> tuple[Hidden, tuple[LayerCache, ...]]:
    """`forward`, and a cache of `slots` slots for `group` rows behind each of the prompts, its first t slots filled;
    rows lie on these axes of the mesh, heads on "tensor".

    Args:
        chosen: the prompts are these rows of `tokens` and `start`, of an adapter's members one after the other; where
            there are more of them than rows, each row is read once. None: all rows.
    """
    again = None
    if chosen is not None:
        members = jax.tree.leaves(adapter)[0].shape[1] if adapter else 1
        if len(tokens) * spread(axes) < len(chosen) // members:
            first = jnp.repeat(jnp.arange(members) * len(tokens), len(chosen) // members)
            tokens, start, again = jnp.tile(tokens, (members, 1)), jnp.tile(start, members), first + chosen
        else:
            tokens, start = tokens[chosen], start[chosen]
    (hidden,), kept = _scan(config, params, (_Section(tokens, start, 0),), features, adapter, keep=True)
    prompts = lambda x: x if again is None else x[again]  # noqa: E731
    hidden = jax.tree.map(prompts, hidden)
    rows, empty = len(hidden.last) * group, (config.kv_heads, slots - tokens.shape[1], config.head_width)

    def layer(i):
        prompt = [store(prompts(x[i]), config.cache) for x in kept]
        own = (store(jnp.zeros((rows, *empty), config.dtype), config.cache) for _ in prompt)
        return constrain(LayerCache(*prompt, *own), axes, "tensor")

    return hidden, tuple(layer(i) for i in range(config.layers))


def _scan(config, params, sections, features, adapter, keep=False):
    """Hidden states of each section; with `keep`, keys and values [layers, ...] of the first one."""
    angles = [_angles(config, section.positions()) for section in sections]
    masks = [[[_mask(config, late.slots(), early.slots(), late.start, local) for early in sections[:i + 1]]
              for i, late in enumerate(sections)] for local in (False, True)]
    tail = max(features, 1)

    def look(local, query, key, value):
        choose = lambda both: jax.tree.map(  # noqa: E731
            lambda a, b: a if local is None else jnp.where(local, b, a), *both)
        seen, chosen, outs = [], choose(masks), []
        cuts = np.cumsum([section.tokens.size for section in sections])[:-1]
        parts = zip(*(jnp.split(x, cuts) for x in (query, key, value)), strict=True)
        for section, own, mask, part in zip(sections, angles, chosen, parts, strict=True):
            rows, turned = len(section.tokens), choose(own)
            q, k, v = (_heads(x, rows) for x in part)
            if turned is not None:
                q, k = rotate(q, *turned), rotate(k, *turned)
            seen.append((Stored(k), Stored(v)))
            out = _attend(config, q, [Source(*both, m) for both, m in zip(seen, mask, strict=True)], config.attention)
            outs.append(out.reshape(-1, out.shape[-1]))
        return jnp.concatenate(outs), (seen[0][0].values, seen[0][1].values) if keep else ()

    def layer(carry, xs):
        (x, outs), (variables, local) = carry, xs
        x, beside = Block(config).apply(variables, x, partial(look, local))
        return (x, (*outs[1:], x)), beside

    if config.remat:
        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMATS[config.remat])
    embedded = [_embed(config, params, section.tokens, section.positions()) for section in sections]
    x = jnp.concatenate([part.reshape(-1, config.width) for part in embedded])
    xs = ({"params": params["layers"], "adapter": adapter or {}}, jnp.array(config.local) if config.local else None)
    (_, outs), beside = jax.lax.scan(layer, (x, (x,) * tail), xs)
    hidden, shapes = _finish(config, params, outs, features), [section.tokens.shape for section in sections]
    cuts = np.cumsum([rows * count for rows, count in shapes])[:-1]
    parts = jax.tree.transpose(jax.tree.structure(hidden), None, jax.tree.map(lambda y: jnp.split(y, cuts), hidden))
    return [jax.tree.map(lambda y, shape=shape: y.reshape(*shape, -1), part)
            for part, shape in zip(parts, shapes, strict=True)], beside


def apart(params: dict) -> dict:
    """The parameters with a copy of each layer's by itself, as a tuple, its kernels turned (`layers.turned_product`).
    Many calls of `decode` take a copy that is made before them: a slice of a stack is copied each time."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)]
    return params | {"layers": tuple({name: _turned(own) for name, own in layer.items()} for layer in layers)}


def _turned(own):
    """The parameters of one part of a layer; of a `Linear` in floats with its kernel turned."""
    if "kernel" not in own or "kernel_scale" in own:
        return own
    return {name: x for name, x in own.items() if name != "kernel"} | {"turned": own["kernel"].T}


def decode(config: DecoderConfig, params: dict, token: Int[Array, " b"], start: Int[Array, " b"],
           index: Int[Array, ""], cache: tuple[LayerCache, ...], features: int = 0, adapter: dict | None = None
           ) -> tuple[Hidden, tuple[LayerCache, ...]]:
    """One token at slot `index`, the same for all rows and behind the prompts. Layers are unrolled and the cache is
    updated in place.

    Returns:
        Hidden states with t = 1 removed ([b, d] and [b, n * d]) and the cache.
    """
    prompt, slots = cache[0].prompt_key.values.shape[2], cache[0].key.values.shape[2]
    places, positions = (jnp.arange(prompt), prompt + jnp.arange(slots)), (index - start)[:, None]
    angles = _angles(config, positions)
    masks = [[_mask(config, index[None], place, start, local) for place in places] for local in (False, True)]

    def look(old, local, query, key, value):
        query, key, value = (_heads(x, len(token)) for x in (query, key, value))
        if angles[local] is not None:
            query, key = rotate(query, *angles[local]), rotate(key, *angles[local])
        key, value = (jax.tree.map(lambda x, y: write(x, y, index - prompt, axis=2), kept, store(new, config.cache))
                      for kept, new in ((old.key, key), (old.value, value)))
        sources = [Source(old.prompt_key, old.prompt_value, masks[local][0]), Source(key, value, masks[local][1])]
        return _attend(config, query, sources)[:, 0], old._replace(key=key, value=value)

    x, outs, new = _embed(config, params, token[:, None], positions)[:, 0], [], []
    layers = params["layers"] if isinstance(params["layers"], tuple) else apart(params)["layers"]
    for i, old in enumerate(cache):
        local = bool(config.local) and config.local[i]
        variables = {"params": layers[i], "adapter": jax.tree.map(lambda p, i=i: p[i], adapter or {})}
        x, old = Block(config).apply(variables, x, partial(look, old, local))
        outs.append(x)
        new.append(old)
    return _finish(config, params, outs, features), tuple(new)
