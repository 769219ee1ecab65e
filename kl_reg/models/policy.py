"""Kinds of policy behind one interface, so that rollout and update are written once.

Axis names: m members, b episodes, k agent tokens. A policy's parameters have a leading member axis outside `read` and
`refresh`, which callers vmap over members.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.models import decoder
from kl_reg.models.actor import Actor, Scalars, Situation
from kl_reg.registry import Registry

POLICIES = Registry("policy.kind")


class Reading(NamedTuple):
    """What one forward pass says of the next token. The proposal's logits are base_logits + gap."""

    base_logits: Float[Array, "... v"]
    gap: Float[Array, "... v"]
    value: Float[Array, ...]
    spend: Float[Array, ...]


class Policy(NamedTuple):
    """Pure functions of (params, base, ...); `base` holds the frozen base parameters.

    init(key, base) -> params of one member.
    prefill(params, base, tokens [m, b, t], start [m, b], slots) -> state: the caches.
    decode(params, base, token [m, b], start, index, state) -> (features, state).
    refresh(params, base, episodes) -> features [b, k, ...], those parts recomputed that depend on params.
    reread(params, base, transcript, slot) -> features [b, k, ...] of any transcript, before the tokens in slot [b, k].
    read(params, base, features [..., ...], situation) -> Reading.
    relative: whether the gap is a change of any reference's logits; else base_logits + gap are logits on their own.
    shared: whether the features are the frozen base's alone, so that two policies of this kind read the same.
    """

    init: Callable
    prefill: Callable
    decode: Callable
    refresh: Callable
    reread: Callable
    read: Callable
    relative: bool
    shared: bool


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _before(hidden, slot):
    """Hidden states [b, k, d] from which the tokens in these slots are predicted."""
    return jnp.take_along_axis(hidden, jnp.maximum(slot - 1, 0)[..., None], axis=1)


def head(config: decoder.DecoderConfig, settings) -> Policy:
    """The paper's agent: actor, value head and budget neuron on the frozen trunk's last layers.

    One trunk pass a token serves policy, base, value and student, for all members in one flat batch; its activations
    are recorded, so an update runs no trunk pass. Settings: `layers`, `hidden`, `spend_init`.
    """
    actor, scalars = Actor(config.width, settings.hidden), Scalars(settings.hidden, settings.spend_init)

    def init(key, base):
        del base
        x = jnp.zeros(settings.layers * config.width + 3)
        keys = jax.random.split(key)
        return {"actor": actor.init(keys[0], x)["params"], "scalars": scalars.init(keys[1], x)["params"]}

    def prefill(params, base, tokens, start, slots):
        del params
        return decoder.prefill(config, base, _flat(tokens), _flat(start), slots, settings.layers)[1]

    def decode(params, base, token, start, index, state):
        del params
        hidden, state = decoder.decode(config, base, _flat(token), _flat(start), index, state, settings.layers)
        return hidden.features.reshape(*token.shape, -1), state

    def refresh(params, base, episodes):
        del params, base
        return episodes.features

    def reread(params, base, transcript, slot):
        del params
        hidden = decoder.forward(config, base, transcript.tokens, transcript.start, settings.layers)
        return _before(hidden.features, slot)

    def read(params, base, features, situation: Situation):
        last = features[..., -config.width:]
        x = jnp.concatenate([features.astype(jnp.float32), situation.inputs()], axis=-1)
        change = actor.apply({"params": params["actor"]}, x)
        value, spend = scalars.apply({"params": params["scalars"]}, x)
        gap = decoder.unembed(base, change.astype(last.dtype))
        return Reading(decoder.logits(config, base, last), gap, value, spend)

    return Policy(init, prefill, decode, refresh, reread, read, relative=True, shared=True)


class TwinFeatures(NamedTuple):
    """Final hidden states [..., d] of the frozen base and of the finetuned model."""

    base: Array
    policy: Array


class Finetuned(NamedTuple):
    """A finetuned model beside the frozen base. `own` are the weights that it adds, one member's, or where marked m all
    members'; the policy's parameters hold them as `name`.

    init(key, base) -> own.
    prefill(own m, base, tokens [m, b, t], start [m, b], slots) -> cache.
    decode(own m, base, token [m, b], start, index, cache) -> (final hidden states [m, b, d], cache).
    forward(own, base, transcript) -> final hidden states [b, s, d].
    logits(own, base, hidden) -> logits.
    """

    name: str
    init: Callable
    prefill: Callable
    decode: Callable
    forward: Callable
    logits: Callable


def _beside_base(config, settings, model: Finetuned) -> Policy:
    """The policy of a finetuned model. The value head and the budget neuron read its final hidden state, and their
    gradient stops there: its weights move for the policy alone."""
    scalars = Scalars(settings.hidden, settings.spend_init)

    def init(key, base):
        x = jnp.zeros(config.width + 3)
        return {model.name: model.init(jax.random.fold_in(key, 1), base), "scalars": scalars.init(key, x)["params"]}

    def prefill(params, base, tokens, start, slots):
        own = model.prefill(params[model.name], base, tokens, start, slots)
        return own, decoder.prefill(config, base, _flat(tokens), _flat(start), slots)[1]

    def decode(params, base, token, start, index, state):
        own, own_cache = model.decode(params[model.name], base, token, start, index, state[0])
        frozen, cache = decoder.decode(config, base, _flat(token), _flat(start), index, state[1])
        return TwinFeatures(frozen.last.reshape(own.shape), own), (own_cache, cache)

    def refresh(params, base, episodes):
        hidden = model.forward(params[model.name], base, episodes.transcript)
        return episodes.features._replace(policy=_before(hidden, episodes.slot))

    def reread(params, base, transcript, slot):
        frozen = decoder.forward(config, base, transcript.tokens, transcript.start).last
        return TwinFeatures(*(_before(x, slot) for x in (frozen, model.forward(params[model.name], base, transcript))))

    def read(params, base, features, situation: Situation):
        x = features.policy.astype(jnp.float32)
        inputs = jnp.concatenate([jax.lax.stop_gradient(x), situation.inputs()], axis=-1)
        value, spend = scalars.apply({"params": params["scalars"]}, inputs)
        base_logits = decoder.logits(config, base, features.base)
        own = model.logits(params[model.name], base, features.policy)
        return Reading(base_logits, own - base_logits, value, spend)

    return Policy(init, prefill, decode, refresh, reread, read, relative=False, shared=False)


def full(config: decoder.DecoderConfig, settings) -> Policy:
    """All weights are finetuned: a copy of the base beside the frozen base. Settings: `hidden`, `spend_init`."""

    def init(key, base):
        del key
        return jax.tree.map(jnp.copy, base)

    def prefill(own, base, tokens, start, slots):
        del base
        return jax.vmap(lambda p, t, s: decoder.prefill(config, p, t, s, slots)[1])(own, tokens, start)

    def decode(own, base, token, start, index, cache):
        del base
        step = jax.vmap(lambda p, t, s, cache: decoder.decode(config, p, t, s, index, cache))
        hidden, cache = step(own, token, start, cache)
        return hidden.last, cache

    def forward(own, base, transcript):
        del base
        return decoder.forward(config, own, transcript.tokens, transcript.start).last

    def logits(own, base, hidden):
        del base
        return decoder.logits(config, own, hidden)

    return _beside_base(config, settings, Finetuned("trunk", init, prefill, decode, forward, logits))


def adaptable(config: decoder.DecoderConfig, targets: str) -> dict[str, tuple[int, ...]]:
    """Linear layers whose whole name (query, key, value, out, gate, up, down) matches the regular expression, with the
    shapes [layers, in, out] of their matrices.

    Raises:
        ValueError: there is none, and lists those of the model; or it is no regular expression.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"policy.targets={targets!r} is no regular expression ({error}); '.*' is all layers") from None
    layers = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))["layers"]
    known = {name: leaf["kernel"].shape for name, leaf in layers.items() if "kernel" in leaf}
    chosen = {name: shape for name, shape in known.items() if pattern.fullmatch(name)}
    if not chosen:
        raise ValueError(f"policy.targets={targets!r} matches no linear layer; there are {', '.join(known)}")
    return chosen


def merged(base: dict, adapter: dict, scale: float) -> dict:
    """The base's parameters with one member's adapter added to its matrices: kernel + scale a b.

    Raises:
        ValueError: a matrix is int8, and the sum would not be.
    """
    layers = dict(base["layers"])
    for name, low in adapter.items():
        kernel = layers[name]["kernel"]
        if kernel.dtype == jnp.int8:
            raise ValueError(f"layers/{name}/kernel is int8; an adapter is added to floats (`export.as_floats`)")
        change = scale * jnp.einsum("ldr,lro->ldo", low["a"], low["b"])
        layers[name] = layers[name] | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
    return base | {"layers": layers}


def lora(config: decoder.DecoderConfig, settings) -> Policy:
    """Low-rank changes of the frozen base's matrices, kernel + alpha / rank a b, with b zero at first; all members'
    rows go through the base as one batch. Source: Hu et al. (2021), "LoRA".

    Settings: `rank`, `alpha`, `targets` (a regular expression of layers, as `adaptable` takes it), `hidden`,
    `spend_init`. The adapter is float32 whatever the base's dtype.
    """
    shapes, rank = adaptable(config, settings.targets), settings.rank

    def init(key, base):
        del base
        adapter = {}
        for i, (name, (layers, inner, outer)) in enumerate(shapes.items()):
            limit = inner**-0.5
            a = jax.random.uniform(jax.random.fold_in(key, i), (layers, inner, rank), minval=-limit, maxval=limit)
            adapter[name] = {"a": a, "b": jnp.zeros((layers, rank, outer))}
        return adapter

    def scaled(own, members):
        """As `decoder` takes it; the member axis, where there is one, is the second."""
        place = (lambda x: jnp.moveaxis(x, 0, 1)) if members else (lambda x: x[:, None])
        return {name: {"a": place(low["a"]), "b": settings.alpha / rank * place(low["b"])}
                for name, low in own.items()}

    def prefill(own, base, tokens, start, slots):
        adapter = scaled(own, True)
        return decoder.prefill(config, base, _flat(tokens), _flat(start), slots, adapter=adapter)[1]

    def decode(own, base, token, start, index, cache):
        adapter = scaled(own, True)
        hidden, cache = decoder.decode(config, base, _flat(token), _flat(start), index, cache, adapter=adapter)
        return hidden.last.reshape(*token.shape, -1), cache

    def forward(own, base, transcript):
        adapter = scaled(own, False)
        return decoder.forward(config, base, transcript.tokens, transcript.start, adapter=adapter).last

    def logits(own, base, hidden):
        del own
        return decoder.logits(config, base, hidden)

    return _beside_base(config, settings, Finetuned("adapter", init, prefill, decode, forward, logits))


POLICIES.register("head", head)
POLICIES.register("full", full)
POLICIES.register("lora", lora)


def build(kind: str, config: decoder.DecoderConfig, settings) -> Policy:
    """The policy of that kind for a base model of that shape."""
    return POLICIES[kind](config, settings)
