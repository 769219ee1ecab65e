"""The vocabulary that every room shares.

Axis names: m members, b episodes, s slots of a transcript (opening, then what the episode writes), k agent tokens of an
episode in order (its *agent stream*), v vocabulary, d model width.
"""
from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PAD, OPENING, FORCED, AGENT, STUDENT = range(5)
"""Who wrote a slot: nobody, the configuration, the environment (a speaker prefix), the policy, the base model."""


class Openings(NamedTuple):
    """Opening transcripts, left-padded to one length."""

    tokens: Int[Array, "b p"]
    start: Int[Array, " b"]


class Transcript(NamedTuple):
    """What was said: one row an episode, every slot attributed to its writer."""

    tokens: Int[Array, "b s"]
    roles: Int[Array, "b s"]
    turns: Int[Array, "b s"]        # -1 in the opening and in padding
    start: Int[Array, " b"]         # first slot that is no padding


class Episodes(NamedTuple):
    """A batch of episodes with its agent stream, as recorded when it was sampled.

    `mask` marks the agent tokens that exist; `slot` is where each stands in the transcript. `spent_before` is the
    budget ledger: nats spent on the agent tokens before this one.
    """

    transcript: Transcript
    features: object                       # what the policy reads at each agent token: a pytree of [b, k, ...]
    slot: Int[Array, "b k"]
    action: Int[Array, "b k"]
    mask: Bool[Array, "b k"]
    log_prob: Float[Array, "b k"]          # of the action, under the policy that drew it
    log_ratio: Float[Array, "b k"]         # log pi - log beta of the action, nats
    kl: Float[Array, "b k"]                # exact D(pi || beta), nats per token
    entropy: Float[Array, "b k"]           # nats per token
    value: Float[Array, "b k"]
    spent_before: Float[Array, "b k"]


class Hyper(NamedTuple):
    """What a sweep may vary without a recompilation: traced scalars, one of each a member."""

    kl_coef: Float[Array, ""]              # reward units per nat
    kl_budget: Float[Array, ""]            # nats per episode; infinite: none
    learning_rate: Float[Array, ""]
    clip: Float[Array, ""]
    entropy_coef: Float[Array, ""]
    value_coef: Float[Array, ""]
    discount: Float[Array, ""]
    gae_lambda: Float[Array, ""]


class TrainState(NamedTuple):
    """Everything that training carries; its key is `seed` folded with `iteration`, so a resumed run draws the same."""

    params: object
    opt_state: object
    seed: Int[Array, ""]
    iteration: Int[Array, ""]


class WeightedMetric(NamedTuple):
    """A mean as numerator and denominator, so that parts of a batch can be added up before dividing; 0 of nothing."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        return self.total / jnp.maximum(self.weight, 1)
