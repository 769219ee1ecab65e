"""What KL is measured to: kinds of reference behind one interface, so that rollout and update are written once.

A reference is proper (a distribution) or a semi-distribution, whose missing mass is the probability of asking for help.
Axis names: m members, b episodes, k agent tokens, n models. `memory` is what a reference remembers of the policy, a
tree in the train state; `frozen` its own parameters, which nothing changes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kl_reg.models import decoder
from kl_reg.policies.interface import Policy, Reading
from kl_reg.pretrained import weights
from kl_reg.references import bayes
from kl_reg.registry import Registry
from kl_reg.types import Sampling

REFERENCES = Registry("reference.name", proper=True, follows=False, paths=(0, math.inf))
"""`proper`: it is a distribution, and no semi-distribution. `follows`: it moves with the policy. `paths`: the fewest
and the most models that it is made of."""


class Measure(NamedTuple):
    """The reference at one token. The proposal's logits are log_probs + gap, both at the sampling temperature.

    `floor` is -log mass, nats; `models` log-probabilities of each of the reference's models, where they vote.
    """

    log_probs: Float[Array, "... v"]
    gap: Float[Array, "... v"]
    floor: Float[Array, ...]
    models: Float[Array, "... n v"] | None


class Reference(NamedTuple):
    """Pure functions; all but `prefill`, `decode` and `observe` are of one member.

    init(params) -> memory; update(memory, params, iteration) -> memory.
    prefill(memory, frozen, tokens [n, p], start [n], chosen [m, g], slots, group) -> state of `group` episodes behind
        each of the chosen openings, whose last token is not yet decoded.
    decode(memory, frozen, token [m, b], start, index, state) -> (features [m, b, ...], state).
    apart(memory, frozen.reference) -> the same as `decode` reads them the fastest.
    observe(state, measure, token [m, b]) -> state, with what the token says of the models.
    read(memory, frozen, features [...], seen [...], situation, reading) -> Measure; `features` are the policy's, `seen`
    what decode gave.
    """

    proper: bool
    is_base: bool
    init: Callable
    update: Callable
    prefill: Callable
    decode: Callable
    apart: Callable
    observe: Callable
    read: Callable


def _forget(*args):
    return ()


def _keep(memory, params, iteration):
    return memory


def _as_they_are(memory, own):
    return memory, own


def _unmoved(state, measure, token):
    return state


def base(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The frozen base model."""

    def read(memory, frozen, features, seen, situation, reading: Reading):
        log_probs = jax.nn.log_softmax(reading.base_logits / sampling.temperature)
        return Measure(log_probs, reading.gap / sampling.temperature, jnp.zeros(log_probs.shape[:-1]), None)

    return Reference(True, True, _forget, _keep, _forget, lambda *args: ((), ()), _as_they_are,
                     _unmoved, read)


def _follower(policy, sampling, init, update) -> Reference:
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

    return Reference(True, False, init, update, prefill, decode, apart, _unmoved, read)


def ema(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The exponential moving average of the policy's parameters: decay * average + (1 - decay) * policy, an iteration.
    """
    def update(memory, params, iteration):
        return jax.tree.map(lambda old, new: settings.decay * old + (1 - settings.decay) * new, memory, params)

    return _follower(policy, sampling, _copy, update)


def sync(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The policy as it was at the last iteration that is a multiple of `every`."""
    def update(memory, params, iteration):
        due = (iteration + 1) % settings.every == 0
        return jax.tree.map(lambda old, new: jnp.where(due, new, old), memory, params)

    return _follower(policy, sampling, _copy, update)


def _copy(params):
    return jax.tree.map(jnp.copy, params)


def checkpoint(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """Another model of the same vocabulary; or, where `start` is given, the policy of a run's member."""
    if start is not None:
        return _follower(policy, sampling, lambda params: _copy(start), _keep)
    return _models(settings, policy, sampling, True, lambda models, weights: bayes.Semi(
        models[0], jnp.zeros(())))


def mixture(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The Bayes mixture of several imitators, even at first, its posterior updated with every token of the transcript.
    """
    return _models(settings, policy, sampling, True, lambda models, weights: bayes.Semi(
        bayes.mixture(models, weights), jnp.zeros(())))


def pessimistic(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The minimum over the imitators at the top of the same posterior: a semi-distribution."""
    def combine(models, weights):
        members = bayes.top(weights, jnp.float32(settings.alpha), settings.cut)
        return bayes.pessimistic(models, members)

    return _models(settings, policy, sampling, False, combine)


def _models(settings, policy, sampling, proper, combine) -> Reference:
    """n frozen models of one shape, stacked in `frozen.reference`, and the log posterior over them as it goes on."""
    config = weights.load_config(settings.paths[0])
    count = len(settings.paths)
    over_models = lambda function, *axes: jax.vmap(function, (0, *axes))  # noqa: E731
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

    def log_probs_of(frozen, hidden):
        """[n, ..., v] of hidden states [n, ..., d]."""
        logits = over_models(lambda params, h: decoder.logits(config, params, h), 0)(frozen.reference, hidden)
        return jax.nn.log_softmax(logits / sampling.temperature)

    def learn(log_weights, likelihood):
        """Both [..., n]."""
        update = bayes.posterior
        for _ in range(log_weights.ndim - 1):
            update = jax.vmap(update)
        return update(log_weights, likelihood)

    def prefill(memory, frozen, tokens, start, chosen, slots, group=1):
        run = over_models(lambda params: decoder.prefill(config, params, tokens[:, :-1], start, slots, group=group,
                                                         chosen=flat(chosen)))
        hidden, caches = run(frozen.reference)
        opening, start = tokens[chosen], start[chosen]

        def position(log_weights, xs):
            """What the opening's next token says of the models."""
            index, hidden, token = xs
            rows = log_probs_of(frozen, hidden)
            said = jnp.take_along_axis(rows, flat(token)[None, :, None], axis=-1)[..., 0]
            new = learn(log_weights, said.T.reshape(*start.shape, count))
            return jnp.where((index >= start)[..., None], new, log_weights), None

        xs = (jnp.arange(opening.shape[-1] - 1), jnp.moveaxis(hidden.last, 2, 0), jnp.moveaxis(opening, 2, 0)[1:])
        even = jnp.full((*start.shape, count), -math.log(count), jnp.float32)
        return caches, jnp.repeat(jax.lax.scan(position, even, xs)[0], group, axis=1)

    def decode(memory, frozen, token, start, index, state):
        caches, log_weights = state
        run = over_models(
            lambda params, cache: decoder.decode(config, params, flat(token), flat(start), index, cache), 0)
        hidden, caches = run(frozen.reference, caches)
        seen = jnp.moveaxis(hidden.last, 0, 1).reshape(*start.shape, count, -1)
        return (seen, log_weights), (caches, log_weights)

    def observe(state, measure: Measure, token):
        caches, log_weights = state
        said = jnp.take_along_axis(measure.models, token[..., None, None], axis=-1)[..., 0]
        return caches, learn(log_weights, said)

    def read(memory, frozen, features, seen, situation, reading: Reading):
        hidden, log_weights = seen
        models = jnp.moveaxis(log_probs_of(frozen, jnp.moveaxis(hidden, -2, 0)), 0, -2)
        rows = combine
        for _ in range(log_weights.ndim - 1):
            rows = jax.vmap(rows)
        semi = jax.lax.stop_gradient(rows(models, log_weights))
        gap = reading.gap / sampling.temperature
        if not policy.relative:
            gap = reading.base_logits / sampling.temperature + gap - semi.log_probs
        return Measure(semi.log_probs, gap, -semi.log_mass, models)

    def apart(memory, own):
        return memory, jax.vmap(decoder.apart)(own)

    return Reference(proper, False, _forget, _keep, prefill, decode, apart, observe, read)


REFERENCES.register("base", base, paths=(0, 0))
REFERENCES.register("ema", ema, follows=True, paths=(0, 0))
REFERENCES.register("sync", sync, follows=True, paths=(0, 0))
REFERENCES.register("checkpoint", checkpoint, paths=(1, 1))
REFERENCES.register("mixture", mixture, paths=(2, math.inf))
REFERENCES.register("pessimistic", pessimistic, proper=False, paths=(2, math.inf))


def build(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The reference of that name.

    Args:
        start: parameters of a run's member, where that is the reference; None otherwise.
    """
    return REFERENCES[settings.name](settings, policy, sampling, start)
