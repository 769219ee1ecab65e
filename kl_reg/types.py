"""The vocabulary that every room shares.

Axis names: m members, b episodes, s slots of a transcript (opening, then what the episode writes), k agent tokens of an
episode in order (its *agent stream*), v vocabulary, d model width.
"""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

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
    opening: Int[Array, " b"] | None = None     # which of the environment's; None: of none


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, by whomever: sampler, scorer and reference all read the same object.

    Logits are divided by `temperature`, those of the student's tokens by his own. Truncation keeps a set of tokens that
    the *reference* alone decides, and both distributions are renormalised on it: on the policy's own set a policy that
    is sure of one token would pay no KL. Where several truncations are given, a token must pass each.
    """

    temperature: float = 1.0
    top_k: int = 0              # the k most probable tokens, ties included; 0: all
    top_p: float = 1.0          # the most probable tokens whose predecessors hold less than this; 1: all
    min_p: float = 0.0          # tokens of at least this part of the largest probability; 0: all
    student_temperature: float | None = None        # of the student alone; None: `temperature`

    @property
    def of_student(self) -> float:
        """The student's temperature."""
        return self.temperature if self.student_temperature is None else self.student_temperature

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def keep(self, log_probs: Float[Array, " v"]) -> Bool[Array, " v"]:
        """Which tokens of the reference's distribution can be drawn; always the most probable one."""
        kept = log_probs >= log_probs.max() + (jnp.log(self.min_p) if self.min_p > 0 else -jnp.inf)
        if self.top_k > 0:
            kept &= log_probs >= jax.lax.top_k(log_probs, min(self.top_k, len(log_probs)))[0][-1]
        if self.top_p < 1:
            ordered = jnp.sort(log_probs)[::-1]
            before = jnp.cumsum(jnp.exp(ordered)) - jnp.exp(ordered)
            kept &= log_probs >= jnp.where(before < self.top_p, ordered, jnp.inf).min()
        return kept


class Episodes(NamedTuple):
    """A batch of episodes with its agent stream, as recorded when it was sampled.

    `mask` marks the agent tokens that exist; `slot` is where each stands in the transcript. KL is to the reference, at
    the sampling temperature. `spent_before` is the budget ledger: nats charged for the agent tokens before this one.
    """

    transcript: Transcript
    features: object                       # what the policy reads at each agent token: a pytree of [b, k, ...]
    reference: object                      # what the reference reads there
    allowed: UInt8[Array, "b k w"] | None  # the tokens that could be drawn, a bit each; None: all
    slot: Int[Array, "b k"]
    action: Int[Array, "b k"]
    fraction: Float[Array, "b k"]          # of the remaining budget that this token may cost
    mask: Bool[Array, "b k"]
    log_prob: Float[Array, "b k"]          # of the action, under the policy that drew it
    log_ratio: Float[Array, "b k"]         # log pi - log ref of the action, nats
    kl: Float[Array, "b k"]                # exact D(pi || ref), nats per token, its floor included
    estimate: Float[Array, "b k"]          # what the configured KL estimator says, nats per token
    forward_kl: Float[Array, "b k"]        # exact D(ref || pi), nats per token; 0 unless the direction is forward
    entropy: Float[Array, "b k"]           # nats per token
    floor: Float[Array, "b k"]             # -log of the reference's mass, nats: 0 for a proper distribution
    value: Float[Array, "b k"]
    spent_before: Float[Array, "b k"]
    strength: Float[Array, "b k"]          # how far the budget lets the proposal be followed, in [0, 1]
    asked: Bool[Array, " b"]               # whether it ended by asking for help: the floor was above what was left
    judged: Bool[Array, " b"]              # False where the reward cannot say what it is worth; True until it is asked

    @property
    def learned(self) -> Bool[Array, "b k"]:
        """The agent tokens that an update learns from: those of judged episodes."""
        return self.mask & self.judged[..., None]


class Hyper(NamedTuple):
    """What a sweep may vary without a recompilation: traced scalars, one of each a member."""

    kl_coef: Float[Array, ""]              # reward units per nat; where a controller starts
    kl_target: Float[Array, ""]            # nats per episode, of a controller
    kl_horizon: Float[Array, ""]           # episodes, of Ziegler's controller
    kl_rate: Float[Array, ""]              # step of log coefficient per iteration and unit of relative error
    kl_gain: Float[Array, ""]              # proportional gain of the PI controller, on the same error
    kl_final: Float[Array, ""]             # coefficient at the end of a schedule
    kl_budget: Float[Array, ""]            # nats per episode; infinite: none
    kl_turn_budget: Float[Array, ""]       # nats per turn of the agent; infinite: none
    kl_token_budget: Float[Array, ""]      # nats per token of the agent; infinite: none
    kl_miss_coef: Float[Array, ""]         # of the squared miss of the allowance in the loss, reward units per nat^2
    kl_budget_ramp: Float[Array, ""]       # part of the run in which all hard limits grow from 0
    learning_rate: Float[Array, ""]
    value_learning_rate: Float[Array, ""]    # of the value head; infinite: as learning_rate
    clip: Float[Array, ""]                 # ratios are clipped below 1 - clip
    clip_high: Float[Array, ""]            # and above 1 + clip_high
    dual_clip: Float[Array, ""]            # what a negative advantage is multiplied with at most, of "dual_clip"
    truncation: Float[Array, ""]           # largest importance weight, where a loss weighs with pi / pi_old
    temperature: Float[Array, ""]          # of "awr", reward units
    value_clip: Float[Array, ""]           # reward units; infinite: none
    stop_kl: Float[Array, ""]              # nats per token from the sampling policy; infinite: no early stop
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
    controller: object = ()                # of the KL coefficient
    reference: object = ()                 # what an adaptive reference remembers of the policy


class Frozen(NamedTuple):
    """Parameters that training never changes: the base model's, and those of reference and student where they have
    their own."""

    base: object
    reference: object = ()
    student: object = ()


class WeightedMetric(NamedTuple):
    """A mean as numerator and denominator, so that parts of a batch can be added up before dividing; 0 of nothing."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def mean(self) -> Float[Array, ""]:
        return self.total / jnp.maximum(self.weight, 1)
