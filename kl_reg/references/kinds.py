"""The kinds of reference by name."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kl_reg.policies.interface import Policy, Reading
from kl_reg.references import bayes
from kl_reg.references.ensembles import mixture, models_of, pessimistic
from kl_reg.references.followers import copy, ema, follower, sync
from kl_reg.references.interface import Measure, Reference, as_they_are, forget, keep, unmoved
from kl_reg.registry import Registry
from kl_reg.types import Sampling

REFERENCES = Registry("reference.name", proper=True, follows=False, paths=(0, math.inf))
"""`proper`: it is a distribution, and no semi-distribution. `follows`: it moves with the policy. `paths`: the fewest
and the most models that it is made of."""


def base(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """The frozen base model."""

    def read(memory, frozen, features, seen, situation, reading: Reading):
        log_probs = jax.nn.log_softmax(reading.base_logits / sampling.temperature)
        return Measure(log_probs, reading.gap / sampling.temperature, jnp.zeros(log_probs.shape[:-1]), None)

    return Reference(True, True, forget, keep, forget, lambda *args: ((), ()), as_they_are,
                     unmoved, read)


def checkpoint(settings: ConfigDict, policy: Policy, sampling: Sampling, start) -> Reference:
    """Another model of the same vocabulary; or, where `start` is given, the policy of a run's member."""
    if start is not None:
        return follower(policy, sampling, lambda params: copy(start), keep)
    return models_of(settings, policy, sampling, True, lambda models, weights: bayes.Semi(
        models[0], jnp.zeros(())))


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
