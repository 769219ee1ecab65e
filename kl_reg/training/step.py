"""One training step as pure functions: score recorded episodes with new parameters, and update."""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kl_reg import choice
from kl_reg.advantages import normalise
from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.exact import TokenTerms
from kl_reg.losses.value import squared_error
from kl_reg.models.actor import Situation
from kl_reg.types import Episodes, Frozen, Hyper, TrainState, WeightedMetric


class Scores(NamedTuple):
    """Of the recorded agent tokens under given parameters, all [b, k]; zero where there is no token."""

    terms: TokenTerms
    value: Float[Array, "b k"]


class Extreme(NamedTuple):
    """The token whose |log pi - log ref| is the largest of an update, nats: where an overflow begins."""

    log_ratio: Float[Array, ...]
    episode: Int[Array, ...]
    position: Int[Array, ...]          # in the agent stream


def caps_of(hyper: Hyper) -> Caps:
    """The hard limits of a member."""
    return Caps(hyper.kl_budget, hyper.kl_turn_budget, hyper.kl_token_budget)


def score(program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, longest: Int[Array, ""]) -> Scores:
    """Re-reads the recorded agent tokens, one position of the stream after the other, differentiable in `params`.

    The budget ledger is re-run with the new parameters and differentiated through: what a token may spend depends on
    what the earlier ones cost, and a gradient that leaves this out sees the benefit of spending and not its price.
    (Where the amount is itself a recorded action, it depends on no parameter.) Vocabulary-sized arrays exist for one
    position at a time and are recomputed in the backward pass.

    Args:
        memory: of the reference.
        longest: agent tokens of the longest stream in the whole batch; positions behind it are skipped.
    """
    width, rows = episodes.transcript.tokens.shape[1] - program.env.length, episodes.mask.shape[0]
    caps = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), caps)

    def read(ledger, features, seen, kept, slot, turn, action, part, mask):
        ledger = budget.enter(ledger, jnp.where(mask, turn, ledger.turn))
        left = budget.left(caps, ledger, program.carry)
        situation = Situation(left, budget.part_left(caps, ledger, left), (slot - width) / program.env.length)
        reading = program.policy.read(params, frozen.base, features, situation)
        measure = program.reference.read(memory, frozen, features, seen, situation, reading)

        def row(measure, spend, value, kept, left, slot, action, drawn):
            part = choice.part_of(program, spend, drawn, slot - width)
            terms, cost = choice.terms_of(program, choice.constrain(program, measure, kept, left, part), action)
            log_prob = terms.log_prob + choice.part_log_prob(program, spend, drawn)
            return Scores(terms._replace(log_prob=log_prob), value), cost

        scores, cost = jax.vmap(row)(measure._replace(models=None), reading.spend, reading.value, kept, left, slot,
                                     action, part)
        return budget.charge(ledger, cost, mask), jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores)

    # Around the `cond`: inside it, all that `read` closes over, the unembedding too, would be kept for each position.
    @partial(jax.checkpoint, prevent_cse=False)
    def position(ledger, xs):
        index, *xs = xs
        zero = jnp.zeros(rows)
        nothing = lambda ledger, *xs: (ledger, Scores(TokenTerms(*[zero] * len(TokenTerms._fields)), zero))  # noqa: E731
        return jax.lax.cond(index < longest, read, nothing, ledger, *xs)

    features = program.policy.refresh(params, frozen.base, episodes)
    turn = jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1)
    stream = (features, episodes.reference, episodes.kept, episodes.slot, turn, episodes.action, episodes.part,
              episodes.mask)
    stream = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stream)
    _, scores = jax.lax.scan(position, budget.open_ledger((rows,)), (jnp.arange(episodes.mask.shape[1]), *stream))
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


def objective(program, params, memory, frozen: Frozen, episodes: Episodes, targets, hyper: Hyper, longest
              ) -> tuple[Array, tuple[dict, Float[Array, "b k"]]]:
    """The loss of one minibatch of one member, its parts reduced as the algorithm does; what went into it, and each
    token's log pi - log ref."""
    advantages, returns, price = targets
    scores, mask = score(program, params, memory, frozen, episodes, caps_of(hyper), longest), episodes.mask
    new = scores.terms
    moved = jnp.where(mask, new.log_prob - episodes.log_prob, 0.0)
    ratio = jnp.exp(moved)
    average = lambda x: mean(x, mask).mean()  # noqa: E731
    reduce = lambda x: program.reduction(x, mask, program.env.length).mean()  # noqa: E731
    over_rows = jax.vmap(program.loss, (0, 0, 0, 0, None))
    policy = reduce(over_rows(new.log_prob, episodes.log_prob, advantages, mask, hyper))
    penalty = reduce(price[:, None] * jax.vmap(program.kl.loss)(new, -jnp.expm1(-episodes.floor), ratio, mask))
    value = reduce(jax.vmap(squared_error, (0, 0, 0, None))(scores.value, episodes.value, returns, hyper.value_clip))
    entropy = reduce(new.entropy)
    clipped = ratio * advantages > jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip_high) * advantages
    parts = {"loss/policy_avg": policy, "loss/kl": penalty, "loss/value_avg": value,
             "policy/entropy_avg": average(new.entropy), "policy/clipfrac_avg": average(clipped.astype(jnp.float32)),
             "policy/approxkl_avg": average(0.5 * moved**2), "val/ratio": average(ratio)}
    total = policy + penalty + hyper.value_coef * value - hyper.entropy_coef * entropy
    return total, (parts, jnp.where(mask, new.log_ratio, 0.0))


def recorded(episodes: Episodes) -> TokenTerms:
    """What the sampler said of each agent token, [b, k]."""
    return TokenTerms(*(getattr(episodes, name) for name in TokenTerms._fields))


def targets(program, episodes: Episodes, rewards: Float[Array, "b k"], coef: Float[Array, ""], hyper: Hyper):
    """Advantages and returns [b, k] in reward units (KL penalty subtracted), and the coefficient [b] of the loss's KL.
    """
    mask, missing = episodes.mask, -jnp.expm1(-episodes.floor)
    penalty = jax.vmap(program.kl.reward)(recorded(episodes), missing, mask)
    rewards = jnp.where(mask, rewards - coef * penalty, 0.0)
    estimate = lambda r, v, m: program.advantage(r, v, m, hyper.discount, hyper.gae_lambda)  # noqa: E731
    groups = jax.tree.map(lambda x: x.reshape(-1, program.group, x.shape[1]), (rewards, episodes.value, mask))
    advantages, returns, scale = jax.vmap(estimate)(*groups)
    advantages, returns = advantages.reshape(mask.shape), returns.reshape(mask.shape)
    price = coef * jnp.repeat(scale, program.group)
    if program.normalise:
        advantages, factor = normalise(advantages, mask)
        price = factor * price
    return advantages, returns, price


def safe_norm(tree) -> Float[Array, ""]:
    """The global norm; where squares would overflow (k3 at 80 nats has gradients of 1e34) it is scaled first."""
    largest = jnp.maximum(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]).max(), 1e-30)
    return largest * optax.global_norm(jax.tree.map(lambda x: x / largest, tree))


def update(program, state: TrainState, hyper: Hyper, frozen: Frozen, episodes: Episodes, rewards: Float[Array, "b k"],
           longest: Int[Array, ""]) -> tuple[TrainState, dict, Extreme]:
    """All epochs over one batch of one member. Callers vmap over members.

    Args:
        rewards: of each agent token, reward units; a reply's reward stands at the last agent token before its end.
    """
    price = program.controller.read(state.controller, hyper)
    goals = targets(program, episodes, rewards, price, hyper)
    rate = learning_rate(program, hyper, state.iteration)
    rows = episodes.mask.shape[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.iteration), 2**31 - 2)

    def minibatch(carry, index):
        params, opt_state, stopped = carry
        part, own = jax.tree.map(lambda x: x[index], (episodes, goals))
        grad = jax.value_and_grad(objective, argnums=1, has_aux=True)
        (_, (parts, ratios)), grads = grad(program, params, state.reference, frozen, part, own, hyper, longest)
        norm = safe_norm(grads)
        parts["optim/grad_norm"] = norm
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, program.max_grad_norm / jnp.maximum(norm, 1e-30)), grads)
        worst = jnp.abs(ratios).argmax()
        extreme = Extreme(ratios.ravel()[worst], index[worst // ratios.shape[1]], worst % ratios.shape[1])
        stopped |= parts["policy/approxkl_avg"] > hyper.stop_kl
        parts["policy/stopped_avg"] = stopped.astype(jnp.float32)
        updates, new_state = program.optimizer.update(grads, opt_state, params)
        updated = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        params, opt_state = jax.tree.map(partial(jnp.where, stopped), (params, opt_state), (updated, new_state))
        return (params, opt_state, stopped), (parts, extreme)

    def order(epoch):
        if program.minibatches == 1:
            return jnp.arange(rows)[None]
        return jax.random.permutation(jax.random.fold_in(key, epoch), rows).reshape(program.minibatches, -1)

    indices = jnp.concatenate([order(epoch) for epoch in range(program.epochs)])
    start = state.params, state.opt_state, jnp.bool_(False)
    (params, opt_state, _), (parts, extremes) = jax.lax.scan(minibatch, start, indices)
    variance = parts["val/ratio"].var()
    parts = jax.tree.map(lambda x: x.mean(0), parts)
    spent = jnp.where(episodes.mask, program.kl.exact(recorded(episodes)), 0.0).sum(1).mean()
    parts |= {"val/ratio_var": variance, "optim/learning_rate": rate, "kl/coef": price,
              "value/explained_variance": _explained(episodes.value, goals[1], episodes.mask)}
    controller = program.controller.update(state.controller, spent, hyper)
    memory = program.reference.update(state.reference, params, state.iteration)
    extreme = jax.tree.map(lambda x: x[jnp.abs(extremes.log_ratio).argmax()], extremes)
    return TrainState(params, opt_state, state.seed, state.iteration + 1, controller, memory), parts, extreme


def _explained(values, returns, mask):
    """1 - Var(G - V) / Var(G) over agent tokens."""
    def variance(x):
        centre = mean(x, mask).mean()
        return mean((x - centre) ** 2, mask).mean()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
