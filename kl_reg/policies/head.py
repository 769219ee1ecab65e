"""The paper's policy: a head on the frozen trunk."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from kl_reg.models import decoder
from kl_reg.policies.actor import Actor, LinearActor, Scalars, Situation, labels
from kl_reg.policies.interface import Alone, Factored, Policy, Reading, States, before, flat


def head(config: decoder.DecoderConfig, settings) -> Policy:
    """The paper's agent: actor, value head and budget neuron on the frozen trunk's last layers.

    One trunk pass a token serves policy, base, value and student, for all members in one flat batch; its activations
    are recorded, so an update runs no trunk pass. Settings: `layers`, `hidden`, `spend_init`, `actor`,
    `critic_layers`, `critic_activation`.
    """
    linear = settings.actor == "linear"
    actor = LinearActor(config.vocab) if linear else Actor(config.width, settings.hidden)
    scalars = Scalars(settings.hidden, settings.spend_init, settings.critic_layers, settings.critic_activation, linear)

    def init(key, base):
        del base
        x = jnp.zeros(settings.layers * config.width + 3)
        keys = jax.random.split(key)
        return {"actor": actor.init(keys[0], x)["params"], "scalars": scalars.init(keys[1], x)["params"]}

    def prefill(params, base, tokens, start, chosen, slots, group=1):
        del params
        return decoder.prefill(config, base, tokens, start, slots, group=group, chosen=flat(chosen))[1]

    def decode(params, base, token, start, index, state):
        del params
        hidden, state = decoder.decode(config, base, flat(token), flat(start), index, state, settings.layers)
        return hidden.features.reshape(*token.shape, -1), state

    def refresh(params, base, episodes, group=1):
        del params, base, group
        return episodes.features

    def reread(params, base, transcript, slot):
        del params
        hidden = decoder.forward(config, base, transcript.tokens, transcript.start, settings.layers)
        return before(hidden.features, slot)

    def states(params, base, features, situation: Situation):
        del base
        last = features[..., -config.width:]
        x = jnp.concatenate([features.astype(jnp.float32), situation.inputs()], axis=-1)
        value, spend = scalars.apply({"params": params["scalars"]}, x)
        own = actor.apply({"params": params["actor"]}, x)
        return States(last, own if linear else own.astype(last.dtype), value, spend)

    def table(params, base):
        return params["actor"]["table"] if linear else decoder.unembedding(base)

    def read(params, base, features, situation: Situation):
        own = states(params, base, features, situation)
        gap = decoder.unembed(table(params, base), own.policy)
        return Reading(decoder.logits(config, base, own.base), gap, own.value, own.spend)

    def logits_alone(params, base, features, situation, agent):
        own = states(params, base, features, situation)
        change = jnp.where(agent[..., None], own.policy, 0)
        # One product serves both where they have one table and no sum of shorter floats would be rounded.
        if config.logit_cap is None and own.base.dtype == jnp.float32 and not linear:
            return decoder.unembed(decoder.unembedding(base), own.base + change)
        return decoder.logits(config, base, own.base) + decoder.unembed(table(params, base), change)

    def complete(base, features, transcript, slot, group=1):
        del base, transcript, slot, group
        return features

    factored = Factored(states, table, linear, config.logit_cap)
    return Policy(init, prefill, decode, refresh, reread, read, relative=True, shared=True, factored=factored,
                  alone=Alone(prefill, decode, logits_alone, complete, speaks=True), labels=labels)
