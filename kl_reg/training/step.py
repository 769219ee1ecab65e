"""One training step as pure functions: from recorded episodes and their rewards to new parameters.

Where `program.execution.axis` names one, each device of that axis holds a part of the episodes: numerators and
denominators are added up over it before anything is divided.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kl_reg.program import Program
from kl_reg.sharding import constraints
from kl_reg.sharding.mesh import EPISODES
from kl_reg.training.objective import gradient, mean
from kl_reg.training.optimizer import safe_norm
from kl_reg.training.scoring import cost_of_update, with_scores
from kl_reg.training.targets import recorded, targets
from kl_reg.types import Episodes, Frozen, Hyper, TrainState


class Extreme(NamedTuple):
    """The token whose |log pi - log ref| is the largest of an update, nats: where an overflow begins."""

    log_ratio: Float[Array, ...]
    episode: Int[Array, ...]
    position: Int[Array, ...]          # in the agent stream


def update(program: Program, state: TrainState, hyper: Hyper, frozen: Frozen, episodes: Episodes,
           rewards: Float[Array, "b k"], members: int = 1
           ) -> tuple[TrainState, dict, Extreme, Episodes]:
    """All epochs over one batch of one member. Callers vmap over members.

    Args:
        rewards: of each agent token, reward units; a reply's reward stands at the last agent token before its end.
        members: how many are updated at a time.

    Returns:
        The new state, metrics, the most extreme token, and the episodes, whose record is complete.
    """
    algorithm, execution, cost = program.algorithm, program.execution, cost_of_update(program, members)
    coef = algorithm.controller.read(state.controller, hyper)
    aims = targets(program, episodes, rewards, coef, hyper)
    pool, several = (episodes, aims), program.schedule.minibatches > 1
    pool = constraints.together(pool, execution.axis) if several else pool

    def minibatch(carry, index):
        params, opt_state, stopped = carry
        part, own = constraints.constrain(jax.tree.map(lambda x: x[index], pool), EPISODES) if several else pool
        grads, metrics, scores = gradient(program, params, state.reference, frozen, part, own, hyper, cost)
        metrics["optim/grad_norm"] = safe_norm(grads)
        stopped |= metrics["policy/approxkl_avg"] > hyper.stop_kl
        metrics["policy/stopped_avg"] = stopped.astype(jnp.float32)
        updates, new_state = algorithm.optimizer.update(
            grads, opt_state, params, hyper=hyper, iteration=state.iteration, grad_norm=metrics["optim/grad_norm"])
        idle = stopped | (constraints.total(part.judged.sum(), execution.axis) == 0)
        new = optax.apply_updates(params, updates), new_state           # what an optimizer remembers moves, too
        params, opt_state = jax.tree.map(partial(jnp.where, idle), (params, opt_state), new)
        return (params, opt_state, stopped), (metrics, _extreme(part, scores, index),
                                              scores if execution.update_records else ())

    start = state.params, state.opt_state, jnp.bool_(False)
    indices = _minibatches(program, state, len(episodes.mask))
    (params, opt_state, _), (metrics, extremes, scores) = jax.lax.scan(minibatch, start, indices)
    if execution.update_records:
        episodes = with_scores(program, episodes, jax.tree.map(lambda x: x[0], scores))
    count = constraints.total(episodes.judged.sum(), execution.axis)
    controller = algorithm.controller.update(state.controller, _nats_per_episode(program, episodes, count), hyper)
    controller = jax.tree.map(partial(jnp.where, count > 0), controller, state.controller)
    memory = program.agent.reference.update(state.reference, params, state.iteration)
    metrics = jax.tree.map(lambda x: x.mean(0), metrics) | {
        "val/ratio_var": metrics["val/ratio"].var(), "kl/coef": coef,
        "optim/learning_rate": hyper.learning_rate * algorithm.learning_rate(state.iteration),
        "advantage/factor_max": constraints.together(aims.factor, execution.axis).max(),
        "value/explained_variance": _explained(episodes.value, aims.returns, episodes.learned, execution.axis)}
    extremes = constraints.together(extremes, execution.axis)
    extreme = jax.tree.map(lambda x: x[jnp.abs(extremes.log_ratio).argmax()], extremes)
    new = TrainState(params, opt_state, state.seed, state.iteration + 1, controller, memory)
    return new, metrics, extreme, episodes


def _minibatches(program: Program, state, rows):
    """The episodes' indices [epochs x minibatches, n], in an order of each epoch's own; this device's of them."""
    axis, schedule, group = program.execution.axis, program.schedule, program.algorithm.group
    rows *= 1 if axis is None else jax.lax.axis_size(axis)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.iteration), 2**31 - 2)

    def order(epoch):
        if schedule.minibatches == 1:
            return jnp.arange(rows)[None]
        # Groups stay together where minibatches hold whole ones, so that their prompts are read once.
        together = group if rows // group % schedule.minibatches == 0 else 1
        groups = jax.random.permutation(jax.random.fold_in(key, epoch), rows // together)
        return (groups[:, None] * together + jnp.arange(together)[None]).reshape(schedule.minibatches, -1)

    return constraints.part(jnp.concatenate([order(epoch) for epoch in range(schedule.epochs)]), axis)


def _extreme(episodes, scores, index):
    """The most extreme token of a minibatch of the episodes with these indices."""
    ratios = jnp.where(episodes.learned, scores.terms.log_ratio, 0.0)
    worst = jnp.abs(ratios).argmax()
    return Extreme(ratios.ravel()[worst], index[worst // ratios.shape[1]], worst % ratios.shape[1])


def _nats_per_episode(program: Program, episodes, count):
    """The exact KL that a controller reads, of `count` judged episodes."""
    nats = jnp.where(episodes.learned, program.algorithm.kl.exact(recorded(episodes)), 0.0).sum()
    return constraints.total(nats, program.execution.axis) / jnp.maximum(count, 1).astype(nats.dtype)


def _explained(values, returns, mask, axis):
    """1 - Var(G - V) / Var(G) over agent tokens."""
    def variance(x):
        centre = constraints.total(mean(x, mask), axis).mean()
        return constraints.total(mean((x - centre) ** 2, mask), axis).mean()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
