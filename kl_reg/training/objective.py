"""The loss of a minibatch: one function of an agent stream's tokens, whatever way they are read."""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.algorithms.value import squared_error
from kl_reg.kl.exact import TokenTerms
from kl_reg.program import FUSED, Program
from kl_reg.sharding import constraints
from kl_reg.sharding.mesh import EPISODES
from kl_reg.training.chunks import loss_at_once
from kl_reg.training.scoring import Cost, Scores, caps_of, score
from kl_reg.training.targets import Targets
from kl_reg.types import Episodes, Frozen, Hyper, WeightedMetric


class Given(NamedTuple):
    """What the loss of an agent token reads beside its terms, which are a function of the parameters."""

    old_log_prob: Float[Array, " k"]
    advantage: Float[Array, " k"]
    kl_coef: Float[Array, " k"]         # of the KL in the loss, reward units per nat
    missing: Float[Array, " k"]         # mass that the reference lacks


class Parts(NamedTuple):
    """What each agent token adds to the loss, before any reduction, and what is logged of it."""

    policy: Float[Array, " k"]
    kl: Float[Array, " k"]
    entropy: Float[Array, " k"]         # nats
    ratio: Float[Array, " k"]           # pi / pi_old
    approx_kl: Float[Array, " k"]       # (log ratio)^2 / 2, nats from the sampling policy
    clipped: Float[Array, " k"]         # 1 where PPO's clip holds the token

    def total(self, hyper: Hyper) -> Float[Array, "*k"]:
        """The loss of each token, but for its value's error."""
        return self.policy + self.kl - hyper.entropy_coef * self.entropy


def parts_of(program: Program, terms: TokenTerms, given: Given, mask: Bool[Array, " k"], hyper: Hyper) -> Parts:
    """The loss of one agent stream, token by token. Outside of the mask terms and given are zero."""
    algorithm = program.algorithm
    old = jax.lax.stop_gradient(terms.log_prob) if program.execution.update_records else given.old_log_prob
    moved = jnp.where(mask, terms.log_prob - old, 0.0)
    ratio = jnp.exp(moved)
    policy = algorithm.loss(terms.log_prob, old, given.advantage, mask, hyper)
    chex.assert_shape(policy, mask.shape, exception_type=ValueError, custom_message=(
        "rl.loss must return one number for each token of the stream"))
    penalty = given.kl_coef * algorithm.kl.loss(terms, given.missing, ratio, mask)
    clipped = ratio * given.advantage > jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip_high) * given.advantage
    return Parts(policy, penalty, terms.entropy, ratio, 0.5 * moved**2, clipped.astype(ratio.dtype))


def token_loss(program: Program, terms: TokenTerms, given: tuple[Float[Array, ""], Given], shared: Hyper
               ) -> Float[Array, ""]:
    """The loss of one token, times its weight in the reduction: `parts_of` a stream of one. Where there is no token,
    the weight is 0 and what stands there may overflow."""
    weight, own = given
    terms = jax.tree.map(lambda x: jnp.where(weight == 0, 0.0, x)[None], terms)
    own = jax.tree.map(lambda x: x[None], own)
    return weight * parts_of(program, terms, own, jnp.ones(1, bool), shared).total(shared)[0]


class Weights(NamedTuple):
    """The denominators of a minibatch's means: of its loss, and of averages over its tokens. Those of its parts add up.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]


def weights_of(program: Program, episodes: Episodes) -> Weights:
    """The denominators of a minibatch's means. They depend on its masks only; an episode that was not judged adds
    nothing, so that a minibatch with it weighs as one without."""
    def row(mask):
        return program.algorithm.reduction(jnp.zeros((1, len(mask))), mask[None], program.task.env.length).weight

    loss = jnp.where(episodes.judged, jax.vmap(row)(episodes.learned), 0.0).sum()
    axis = program.execution.axis
    loss, tokens = constraints.total((loss, episodes.learned.sum().astype(jnp.float32)), axis)
    return Weights(jnp.maximum(loss, 1), jnp.maximum(tokens, 1))


def mean(x: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> WeightedMetric:
    """Mean over agent tokens."""
    return WeightedMetric(jnp.where(mask, x, 0.0).sum(), mask.sum().astype(x.dtype))


def objective(program: Program, params, memory, frozen: Frozen, episodes: Episodes, targets: Targets, hyper: Hyper,
              weights: Weights, cost: Cost) -> tuple[Float[Array, ""], tuple[dict, Scores]]:
    """What a part of a minibatch of one member adds to its loss, reduced as the algorithm does; what went into it, and
    what its tokens are.

    Args:
        weights: of the whole minibatch.
    """
    mask, length = episodes.learned, program.task.env.length
    average = lambda x: mean(x, mask).total / weights.tokens  # noqa: E731
    reduce = lambda x: program.algorithm.reduction(x, mask, length).total / weights.loss  # noqa: E731
    given = Given(jnp.where(mask, episodes.log_prob, 0.0), targets.advantages,
                  jnp.broadcast_to(targets.kl_coef[:, None], mask.shape), -jnp.expm1(-episodes.floor))
    fused = program.execution.scorer == FUSED
    if fused:
        weight = jax.grad(reduce)(jnp.zeros(mask.shape))
        total, scores = loss_at_once(program, params, frozen, episodes, partial(token_loss, program), (weight, given),
                                     hyper, cost)
    else:
        scores = score(program, params, memory, frozen, episodes, caps_of(hyper), cost)
    terms = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores.terms)
    parts = jax.vmap(partial(parts_of, program), (0, 0, 0, None))(terms, given, mask, hyper)
    if not fused:
        total = reduce(parts.total(hyper))
    value = reduce(jax.vmap(squared_error, (0, 0, 0, None))(scores.value, episodes.value, targets.returns,
                                                            hyper.value_clip))
    logged = {"loss/policy_avg": reduce(parts.policy), "loss/kl": reduce(parts.kl), "loss/value_avg": value,
              "policy/entropy_avg": average(parts.entropy), "policy/clipfrac_avg": average(parts.clipped),
              "policy/approxkl_avg": average(parts.approx_kl), "val/ratio": average(parts.ratio)}
    if scores.miss is not None:
        logged["loss/budget_miss"] = reduce(jnp.where(mask, scores.miss, 0.0))
        total += hyper.kl_miss_coef * logged["loss/budget_miss"]
    if scores.passes is not None:
        logged["kl/ledger_passes"] = average(scores.passes)
    return total + hyper.value_coef * value, (logged, scores)


def gradient(program: Program, params, memory, frozen: Frozen, episodes: Episodes, targets: Targets, hyper: Hyper,
             cost: Cost) -> tuple[object, dict, Scores]:
    """The gradient of one minibatch, added up over the schedule's parts; what went into its loss, and what its tokens
    are."""
    weights, parts = weights_of(program, episodes), program.schedule.accumulate
    own = jax.grad(lambda params, part, targets: objective(
        program, params, memory, frozen, part, targets, hyper, weights, cost), has_aux=True)
    if parts == 1:
        grads, (logged, scores) = own(params, episodes, targets)
        return *constraints.total((grads, logged), program.execution.axis), scores

    def add(sums, part):
        grads, (logged, scores) = own(params, *part)
        return jax.tree.map(jnp.add, sums, (grads, logged)), scores

    rows = len(episodes.mask) // parts
    split = jax.tree.map(lambda x: x.reshape(parts, rows, *x.shape[1:]), (episodes, targets))
    split = constraints.constrain(split, None, EPISODES)
    shapes = jax.eval_shape(own, params, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    sums, scores = jax.lax.scan(add, zeros, split)
    return (*constraints.total(sums, program.execution.axis),
            jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), scores))
