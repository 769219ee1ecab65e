"""Policies that are a finetuned model beside the frozen base; here the one whose weights are all finetuned."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kl_reg.models import decoder
from kl_reg.policies.actor import Scalars, Situation, labels
from kl_reg.policies.interface import Alone, Factored, Policy, Reading, States, before, flat
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.mesh import EPISODES


class TwinFeatures(NamedTuple):
    """Final hidden states [..., d] of the frozen base and of the finetuned model."""

    base: Array
    policy: Array


class Finetuned(NamedTuple):
    """A finetuned model beside the frozen base. `own` are the weights that it adds, one member's, or where marked m all
    members'; the policy's parameters hold them as `name`.

    init(key, base) -> own.
    prefill(own m, base, tokens [n, t], start [n], chosen [m, g], slots, group) -> cache.
    decode(own m, base, token [m, b], start, index, cache) -> (final hidden states [m, b, d], cache).
    forward(own, base, tokens [b, t], start [b], group, shared) -> final hidden states [b, t, d].
    apart(own m) -> own for many calls of `decode` (`decoder.apart`).
    table(own, base) -> the unembedding; `trained`: whether it is one of the weights that it adds.
    """

    name: str
    init: Callable
    prefill: Callable
    decode: Callable
    forward: Callable
    apart: Callable
    table: Callable
    trained: bool


def beside_base(config, settings, model: Finetuned) -> Policy:
    """The policy of a finetuned model. The value head and the budget neuron read its final hidden state, and their
    gradient stops there: its weights move for the policy alone."""
    scalars = Scalars(settings.hidden, settings.spend_init, settings.critic_layers, settings.critic_activation)
    def init(key, base):
        x = jnp.zeros(config.width + 3)
        return {model.name: model.init(jax.random.fold_in(key, 1), base), "scalars": scalars.init(key, x)["params"]}

    def prefill_alone(params, base, tokens, start, chosen, slots, group=1):
        return model.prefill(params[model.name], base, tokens, start, chosen, slots, group)

    def decode_alone(params, base, token, start, index, state):
        return model.decode(params[model.name], base, token, start, index, state)

    def logits_alone(params, base, features, situation, agent):
        del situation, agent
        return logits(params[model.name], base, features)

    def complete(base, features, transcript, slot, group=1):
        tokens, start = flat(transcript.tokens), flat(transcript.start)
        shared = tokens.shape[1] - slot.shape[-1]                   # the opening
        hidden = decoder.forward(config, base, tokens[:, :-1], start, group=group, shared=shared).last
        return TwinFeatures(before(hidden, flat(slot)).reshape(features.shape), features)

    def prefill(params, base, tokens, start, chosen, slots, group=1):
        own = prefill_alone(params, base, tokens, start, chosen, slots, group)
        return own, decoder.prefill(config, base, tokens, start, slots, group=group, chosen=flat(chosen))[1]

    def decode(params, base, token, start, index, state):
        own, own_cache = decode_alone(params, base, token, start, index, state[0])
        frozen, cache = decoder.decode(config, base, flat(token), flat(start), index, state[1])
        return TwinFeatures(frozen.last.reshape(own.shape), own), (own_cache, cache)

    def refresh(params, base, episodes, group=1):
        tokens, start = episodes.transcript.tokens, episodes.transcript.start
        shared = tokens.shape[1] - episodes.mask.shape[1]           # the opening
        hidden = model.forward(params[model.name], base, tokens[:, :-1], start, group, shared)
        return episodes.features._replace(policy=before(hidden, episodes.slot))

    def reread(params, base, transcript, slot):
        frozen = decoder.forward(config, base, transcript.tokens, transcript.start).last
        own = model.forward(params[model.name], base, transcript.tokens, transcript.start, 1, 0)
        return TwinFeatures(before(frozen, slot), before(own, slot))

    def logits(own, base, hidden):
        return decoder.capped(config, decoder.unembed(model.table(own, base), hidden))

    def states(params, base, features, situation: Situation):
        del base
        x = jax.lax.stop_gradient(features.policy.astype(jnp.float32))
        inputs = jnp.concatenate([x, situation.inputs()], axis=-1)
        return States(features.base, features.policy, *scalars.apply({"params": params["scalars"]}, inputs))

    def read(params, base, features, situation: Situation):
        own = states(params, base, features, situation)
        base_logits = decoder.logits(config, base, own.base)
        return Reading(base_logits, logits(params[model.name], base, own.policy) - base_logits, own.value, own.spend)

    table = lambda params, base: model.table(params[model.name], base)  # noqa: E731
    return Policy(init, prefill, decode, refresh, reread, read, relative=False, shared=False,
                  factored=Factored(states, table, model.trained, config.logit_cap),
                  alone=Alone(prefill_alone, decode_alone, logits_alone, complete, speaks=False),
                  apart=lambda params: params | {model.name: model.apart(params[model.name])}, labels=labels)


def full(config: decoder.DecoderConfig, settings) -> Policy:
    """All weights are finetuned: a copy of the base beside the frozen base. Settings: `hidden`, `spend_init`.

    The copy is float32 whatever the base's dtype, as updates are smaller than a bfloat16's resolution; it computes in
    the base's, so that before the first update it says what the base says.
    """

    def init(key, base):
        del key
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), base)

    def narrow(path, x):
        """In the dtype that it is computed in: norms compute in float32."""
        return x if any("norm" in str(key) for key in path) else x.astype(config.dtype)

    def apart(own):
        return over_members(decoder.apart)(jax.tree_util.tree_map_with_path(narrow, own))

    def prefill(own, base, tokens, start, chosen, slots, group):
        del base
        one = lambda p, c: decoder.prefill(config, p, tokens, start, slots, group=group, axes=EPISODES,  # noqa: E731
                                           chosen=c)[1]
        return over_members(one)(own, chosen)

    def decode(own, base, token, start, index, cache):
        del base
        step = over_members(lambda p, t, s, cache: decoder.decode(config, p, t, s, index, cache))
        hidden, cache = step(own, token, start, cache)
        return hidden.last, cache

    def forward(own, base, tokens, start, group, shared):
        del base
        return decoder.forward(config, own, tokens, start, group=group, shared=shared).last

    def table(own, base):
        del base
        return decoder.unembedding(own).astype(config.dtype)

    return beside_base(config, settings, Finetuned("trunk", init, prefill, decode, forward, apart, table, trained=True))
