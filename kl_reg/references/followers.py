"""References that are a policy of the agent's kind: its average, its copy of some iterations ago, a run's member."""
from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kl_reg.policies.interface import Policy, Reading
from kl_reg.references.interface import Measure, Reference, unmoved
from kl_reg.types import Sampling


def follower(policy, sampling, init, update) -> Reference:
    """A policy of the same kind, whose parameters are the memory; it has no budget, and is constant within an update.
    """
    free = lambda situation: situation._replace(remaining=jnp.full_like(situation.remaining, jnp.inf))  # noqa: E731

    def prefill(memory, frozen, tokens, start, chosen, slots, group=1):
        return () if policy.shared else policy.prefill(memory, frozen.base, tokens[:, :-1], start, chosen, slots, group)

    def decode(memory, frozen, token, start, index, state):
        return ((), ()) if policy.shared else policy.decode(memory, frozen.base, token, start, index, state)

    def read(memory, frozen, features, seen, situation, reading: Reading):
        inputs = jax.lax.stop_gradient((features if policy.shared else seen, free(situation)))
        other = jax.lax.stop_gradient(policy.read(memory, frozen.base, *inputs))
        log_probs = jax.nn.log_softmax((other.base_logits + other.gap) / sampling.temperature)
        gap = (reading.gap - other.gap) / sampling.temperature
        return Measure(log_probs, gap, jnp.zeros(log_probs.shape[:-1]), None)

    def apart(memory, own):
        return memory if policy.shared else policy.apart(memory), own

    return Reference(True, False, init, update, prefill, decode, apart, unmoved, read)


def ema(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The exponential moving average of the policy's parameters: decay * average + (1 - decay) * policy, an iteration.
    """
    def update(memory, params, iteration):
        return jax.tree.map(lambda old, new: settings.decay * old + (1 - settings.decay) * new, memory, params)

    return follower(policy, sampling, copy, update)


def sync(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The policy as it was at the last iteration that is a multiple of `every`."""
    def update(memory, params, iteration):
        due = (iteration + 1) % settings.every == 0
        return jax.tree.map(lambda old, new: jnp.where(due, new, old), memory, params)

    return follower(policy, sampling, copy, update)


def copy(params):
    return jax.tree.map(jnp.copy, params)
