"""Kinds of policy behind one interface, so that rollout and update are written once.

Axis names: m members, b episodes, k agent tokens. A policy's parameters have a leading member axis outside `read` and
`refresh`, which callers vmap over members.
"""
from __future__ import annotations

from collections.abc import Callable
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


def logits_of(hidden: Float[Array, "... d"], params: dict) -> Float[Array, "... v"]:
    """Logits of final hidden states under a trunk's parameters, float32."""
    return jnp.einsum("...d,vd->...v", hidden, decoder.unembedding(params), preferred_element_type=jnp.float32,
                      precision="highest")      # float32 stays float32 where the hardware has a coarser default


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
        return Reading(logits_of(last, base), logits_of(change.astype(last.dtype), base), value, spend)

    return Policy(init, prefill, decode, refresh, reread, read, relative=True, shared=True)


class FullFeatures(NamedTuple):
    """Final hidden states [..., d] of the frozen base and of the finetuned copy."""

    base: Array
    policy: Array


def full(config: decoder.DecoderConfig, settings) -> Policy:
    """All weights are finetuned: a copy of the base beside the frozen base. Settings: `hidden`, `spend_init`.

    The value head and the budget neuron read the copy's final hidden state, and their gradient stops there: the copy's
    weights move for the policy alone.
    """
    scalars = Scalars(settings.hidden, settings.spend_init)

    def init(key, base):
        x = jnp.zeros(config.width + 3)
        return {"trunk": jax.tree.map(jnp.copy, base), "scalars": scalars.init(key, x)["params"]}

    def prefill(params, base, tokens, start, slots):
        own = jax.vmap(lambda p, t, s: decoder.prefill(config, p, t, s, slots)[1])(params["trunk"], tokens, start)
        return own, decoder.prefill(config, base, _flat(tokens), _flat(start), slots)[1]

    def decode(params, base, token, start, index, state):
        own_step = jax.vmap(lambda p, t, s, cache: decoder.decode(config, p, t, s, index, cache))
        own, own_cache = own_step(params["trunk"], token, start, state[0])
        frozen, cache = decoder.decode(config, base, _flat(token), _flat(start), index, state[1])
        return FullFeatures(frozen.last.reshape(own.last.shape), own.last), (own_cache, cache)

    def hidden_before(params, transcript, slot):
        return _before(decoder.forward(config, params, transcript.tokens, transcript.start).last, slot)

    def refresh(params, base, episodes):
        del base
        return episodes.features._replace(policy=hidden_before(params["trunk"], episodes.transcript, episodes.slot))

    def reread(params, base, transcript, slot):
        return FullFeatures(*(hidden_before(p, transcript, slot) for p in (base, params["trunk"])))

    def read(params, base, features, situation: Situation):
        x = features.policy.astype(jnp.float32)
        inputs = jnp.concatenate([jax.lax.stop_gradient(x), situation.inputs()], axis=-1)
        value, spend = scalars.apply({"params": params["scalars"]}, inputs)
        base_logits = logits_of(features.base, base)
        return Reading(base_logits, logits_of(features.policy, params["trunk"]) - base_logits, value, spend)

    return Policy(init, prefill, decode, refresh, reread, read, relative=False, shared=False)


POLICIES.register("head", head)
POLICIES.register("full", full)


def build(kind: str, config: decoder.DecoderConfig, settings) -> Policy:
    """The policy of that kind for a base model of that shape."""
    return POLICIES[kind](config, settings)
