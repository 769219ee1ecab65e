"""References that are frozen models beside the base: one, a Bayes mixture of several, or their pessimistic minimum."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kl_reg.models import decoder
from kl_reg.policies.interface import Policy, Reading
from kl_reg.pretrained import weights
from kl_reg.references import bayes
from kl_reg.references.interface import Measure, Reference, forget, keep
from kl_reg.types import Sampling


def mixture(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The Bayes mixture of several imitators, even at first, its posterior updated with every token of the transcript.
    """
    return models_of(settings, policy, sampling, True, lambda models, weights: bayes.Semi(
        bayes.mixture(models, weights), jnp.zeros(())))


def pessimistic(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The minimum over the imitators at the top of the same posterior: a semi-distribution."""
    def combine(models, weights):
        members = bayes.top(weights, jnp.float32(settings.alpha), settings.cut)
        return bayes.pessimistic(models, members)

    return models_of(settings, policy, sampling, False, combine)


def models_of(settings, policy, sampling, proper, combine) -> Reference:
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

    return Reference(proper, False, forget, keep, prefill, decode, apart, observe, read)
