"""One training step as pure functions: score recorded episodes with new parameters, and update."""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kl_reg import rollout
from kl_reg.advantages import normalise
from kl_reg.kl.budget import remaining
from kl_reg.kl.exact import token_terms
from kl_reg.losses.value import squared_error
from kl_reg.models.actor import Situation
from kl_reg.types import Episodes, Hyper, TrainState, WeightedMetric


class Scores(NamedTuple):
    """Of the recorded agent tokens under given parameters, [b, k]; zero where there is no token."""

    log_prob: Float[Array, "b k"]
    kl: Float[Array, "b k"]
    entropy: Float[Array, "b k"]
    value: Float[Array, "b k"]


def score(program, params, base, episodes: Episodes, hyper: Hyper, longest: Int[Array, ""]) -> Scores:
    """Re-reads the recorded agent tokens, one position of the stream after the other, differentiable in `params`.

    The budget ledger is re-run with the new parameters and differentiated through: what a token may spend depends on
    what the earlier ones cost, and a gradient that leaves this out sees the benefit of spending and not its price.
    Vocabulary-sized arrays exist for one position at a time and are recomputed in the backward pass.

    Args:
        longest: agent tokens of the longest stream in the whole batch; positions behind it are skipped.
    """
    features = program.policy.refresh(params, base, episodes)
    width = episodes.transcript.tokens.shape[1] - program.env.length

    @jax.checkpoint
    def read(spent, features, slot, action, mask):
        budget = jnp.broadcast_to(hyper.kl_budget, spent.shape)
        situation = Situation(remaining(budget, spent), budget, (slot - width) / program.env.length)
        reading = program.policy.read(params, base, features, situation)

        def row(reading, budget, spent, action):
            logits, log_base = rollout.constrain(reading, budget, spent, program.constrained)
            return token_terms(logits, log_base, action)

        terms = jax.vmap(row)(reading, budget, spent, action)
        return jax.tree.map(lambda x: jnp.where(mask, x, 0.0),
                            Scores(terms.log_prob, terms.kl, terms.entropy, reading.value))

    def position(spent, xs):
        index, *xs = xs
        nothing = lambda spent, *xs: Scores(*[jnp.zeros_like(spent)] * 4)  # noqa: E731
        scores = jax.lax.cond(index < longest, read, nothing, spent, *xs)
        return spent + scores.kl, scores

    stream = (features, episodes.slot, episodes.action, episodes.mask)
    stream = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stream)
    count, rows = episodes.mask.shape[1], episodes.mask.shape[0]
    _, scores = jax.lax.scan(position, jnp.zeros(rows), (jnp.arange(count), *stream))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), scores)


def mean(x: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> WeightedMetric:
    """Mean over agent tokens."""
    return WeightedMetric(jnp.where(mask, x, 0.0).sum(), mask.sum().astype(x.dtype))


def learning_rate(program, hyper: Hyper, iteration: Int[Array, ""]) -> Float[Array, ""]:
    """Linear warm-up to the member's learning rate, then linear decay to `optim.final` of it."""
    schedule = optax.join_schedules(
        [optax.linear_schedule(1 / program.warmup, 1.0, program.warmup - 1) if program.warmup > 1
         else optax.constant_schedule(1.0),
         optax.linear_schedule(1.0, program.final, max(program.iterations - program.warmup, 1))], [program.warmup - 1])
    return hyper.learning_rate * schedule(iteration)


def objective(program, params, base, episodes: Episodes, targets, hyper: Hyper, longest) -> tuple[Array, dict]:
    """The loss of one minibatch of one member, a mean over agent tokens; and what went into it."""
    advantages, returns, factor = targets
    new, mask = score(program, params, base, episodes, hyper, longest), episodes.mask
    terms = {
        "loss/policy": jax.vmap(program.loss, (0, 0, 0, None))(new.log_prob, episodes.log_prob, advantages, hyper),
        "loss/kl": factor * hyper.kl_coef * jax.vmap(program.kl.loss)(new.kl),
        "loss/value": hyper.value_coef * jax.vmap(squared_error)(new.value, returns),
        "loss/entropy": -hyper.entropy_coef * new.entropy}
    parts = {name: mean(x, mask).mean() for name, x in terms.items()}
    moved = new.log_prob - episodes.log_prob
    parts["policy/clip_fraction"] = mean((jnp.abs(jnp.expm1(moved)) > hyper.clip).astype(jnp.float32), mask).mean()
    parts["policy/old_kl/nats_per_token"] = mean(jnp.expm1(moved) - moved, mask).mean()
    return sum(parts[name] for name in terms), parts


def targets(program, episodes: Episodes, rewards: Float[Array, "b k"], hyper: Hyper):
    """Advantages and returns [b, k] in reward units (KL penalty subtracted), and the factor on loss terms of the KL."""
    mask = episodes.mask
    penalty = jax.vmap(program.kl.reward)(episodes.log_ratio, episodes.kl)      # recorded, zero behind the stream
    rewards = jnp.where(mask, rewards - hyper.kl_coef * penalty, 0.0)
    estimate = lambda r, v, m: program.advantage(r, v, m, hyper.discount, hyper.gae_lambda)  # noqa: E731
    advantages, returns = jax.vmap(estimate)(rewards, episodes.value, mask)
    factor = jnp.float32(1.0)
    if program.normalise:
        advantages, factor = normalise(advantages, mask)
    return advantages, returns, factor


def update(program, state: TrainState, hyper: Hyper, base, episodes: Episodes, rewards: Float[Array, "b k"],
           longest: Int[Array, ""]) -> tuple[TrainState, dict]:
    """All epochs over one batch of one member. Callers vmap over members.

    Args:
        rewards: of each agent token, reward units; a reply's reward stands at the last agent token before its end.
    """
    advantages, returns, factor = targets(program, episodes, rewards, hyper)
    rate = learning_rate(program, hyper, state.iteration)
    rows = episodes.mask.shape[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.iteration), 2**31 - 2)

    def minibatch(carry, index):
        params, opt_state = carry
        part, adv, ret = jax.tree.map(lambda x: x[index], (episodes, advantages, returns))
        grad = jax.value_and_grad(lambda p: objective(program, p, base, part, (adv, ret, factor), hyper, longest),
                                  has_aux=True)
        (_, parts), grads = grad(params)
        parts["optim/grad_norm"] = optax.global_norm(grads)
        updates, opt_state = program.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        return (params, opt_state), parts

    def order(epoch):
        if program.minibatches == 1:
            return jnp.arange(rows)[None]
        return jax.random.permutation(jax.random.fold_in(key, epoch), rows).reshape(program.minibatches, -1)

    indices = jnp.concatenate([order(epoch) for epoch in range(program.epochs)])
    (params, opt_state), parts = jax.lax.scan(minibatch, (state.params, state.opt_state), indices)
    parts = jax.tree.map(lambda x: x.mean(0), parts)
    parts["optim/learning_rate"] = rate
    parts["value/explained_variance"] = _explained(episodes.value, returns, episodes.mask)
    return TrainState(params, opt_state, state.seed, state.iteration + 1), parts


def _explained(values, returns, mask):
    """1 - Var(G - V) / Var(G) over agent tokens."""
    def variance(x):
        centre = mean(x, mask).mean()
        return mean((x - centre) ** 2, mask).mean()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
