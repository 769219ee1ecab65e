"""One training step as pure functions: from recorded episodes and their rewards to new parameters.

Where `program.axis` names one, each device of that axis holds a part of the episodes: numerators and denominators are
added up over it before anything is divided.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kl_reg.algorithms.advantages import GROUPS, leaves_out, normalise
from kl_reg.algorithms.value import squared_error
from kl_reg.kl.exact import TokenTerms
from kl_reg.sharding import constraints
from kl_reg.sharding.mesh import EPISODES
from kl_reg.training.scoring import Cost, Scores, caps_of, loss_at_once, score, with_scores
from kl_reg.types import Episodes, Frozen, Hyper, TrainState, WeightedMetric


class Extreme(NamedTuple):
    """The token whose |log pi - log ref| is the largest of an update, nats: where an overflow begins."""

    log_ratio: Float[Array, ...]
    episode: Int[Array, ...]
    position: Int[Array, ...]          # in the agent stream


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


def descent(direction, rate, value_rate):
    """Updates against `direction`, those of the value head (`actor.Scalars`) at a rate of their own."""
    def scale(path, x):
        head, *part = (key.key for key in path[:2])
        return -(value_rate if head == "scalars" and part[0].startswith("value") else rate) * x

    return jax.tree_util.tree_map_with_path(scale, direction)


class Weights(NamedTuple):
    """What a minibatch's sums are divided by: in its loss, and in means over its tokens. Its parts add up."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]


def weights_of(program, episodes: Episodes) -> Weights:
    """The denominators of a minibatch's means. They depend on its masks only; an episode that was not judged adds
    nothing, so that a minibatch with it weighs as one without."""
    def row(mask):
        return program.reduction(jnp.zeros((1, len(mask))), mask[None], program.env.length).weight

    loss = jnp.where(episodes.judged, jax.vmap(row)(episodes.learned), 0.0).sum()
    loss, tokens = constraints.total((loss, episodes.learned.sum().astype(jnp.float32)), program.axis)
    return Weights(jnp.maximum(loss, 1), jnp.maximum(tokens, 1))


class Given(NamedTuple):
    """Of each agent token: what its loss is made of beside its terms, and what it weighs in the reduction."""

    weight: Float[Array, "b k"]
    old_log_prob: Float[Array, "b k"]
    advantage: Float[Array, "b k"]
    price: Float[Array, "b k"]          # of the KL in the loss


def token_loss(program, terms: TokenTerms, given: Given, shared: Hyper) -> Float[Array, ""]:
    """What one token adds to the loss of its minibatch, but for its value's error. Where there is no token, the weight
    is 0 and what stands there may overflow."""
    hyper, one = shared, jnp.ones(1, bool)
    terms = jax.tree.map(lambda x: jnp.where(given.weight == 0, 0.0, x), terms)
    old = jax.lax.stop_gradient(terms.log_prob) if program.once else given.old_log_prob
    stream = jax.tree.map(lambda x: x[None], terms)
    policy = program.loss(stream.log_prob, old[None], given.advantage[None], one, hyper)
    penalty = given.price * program.kl.loss(stream, jnp.zeros(1), jnp.exp(terms.log_prob - old)[None], one)
    return given.weight * (policy + penalty - hyper.entropy_coef * stream.entropy)[0]


def objective(program, params, memory, frozen: Frozen, episodes: Episodes, targets, hyper: Hyper, longest,
              weights: Weights, cost: Cost) -> tuple[Array, tuple[dict, Scores]]:
    """What a part of a minibatch of one member adds to its loss, reduced as the algorithm does; what went into it, and
    what its tokens are."""
    (advantages, returns, price), mask = targets, episodes.learned
    known = jnp.where(mask, episodes.log_prob, 0.0)
    average = lambda x: mean(x, mask).total / weights.tokens  # noqa: E731
    reduce = lambda x: program.reduction(x, mask, program.env.length).total / weights.loss  # noqa: E731
    fused = None
    if program.fused:
        weight = jax.grad(reduce)(jnp.zeros(mask.shape))
        given = Given(weight, known, advantages, jnp.broadcast_to(price[:, None], mask.shape))
        episodes = episodes._replace(features=program.policy.refresh(params, frozen.base, episodes, cost.group))
        fused, scores = loss_at_once(program, params, frozen, episodes, partial(token_loss, program), given, hyper,
                                     longest, cost)
    else:
        scores = score(program, params, memory, frozen, episodes, caps_of(hyper), longest, cost)
    new = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores.terms)
    old = jax.lax.stop_gradient(new.log_prob) if program.once else known
    moved = jnp.where(mask, new.log_prob - old, 0.0)
    ratio = jnp.exp(moved)
    over_rows = jax.vmap(program.loss, (0, 0, 0, 0, None))
    policy = reduce(over_rows(new.log_prob, old, advantages, mask, hyper))
    penalty = reduce(price[:, None] * jax.vmap(program.kl.loss)(new, -jnp.expm1(-episodes.floor), ratio, mask))
    value = reduce(jax.vmap(squared_error, (0, 0, 0, None))(scores.value, episodes.value, returns, hyper.value_clip))
    entropy = reduce(new.entropy)
    clipped = ratio * advantages > jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip_high) * advantages
    parts = {"loss/policy_avg": policy, "loss/kl": penalty, "loss/value_avg": value,
             "policy/entropy_avg": average(new.entropy), "policy/clipfrac_avg": average(clipped.astype(jnp.float32)),
             "policy/approxkl_avg": average(0.5 * moved**2), "val/ratio": average(ratio)}
    total = policy + penalty - hyper.entropy_coef * entropy if fused is None else fused
    return total + hyper.value_coef * value, (parts, scores)


def recorded(episodes: Episodes) -> TokenTerms:
    """What the sampler said of each agent token, [b, k]."""
    return TokenTerms(*(getattr(episodes, name) for name in TokenTerms._fields))


def targets(program, episodes: Episodes, rewards: Float[Array, "b k"], coef: Float[Array, ""], hyper: Hyper):
    """Advantages and returns [b, k] in reward units (KL penalty subtracted), and the coefficient [b] of the loss's KL;
    last the factor [b] in it, which is that of the advantages, so that a nat keeps its price."""
    mask, missing = episodes.learned, -jnp.expm1(-episodes.floor)
    penalty = jax.vmap(program.kl.reward)(recorded(episodes), missing, mask)
    rewards = jnp.where(mask, rewards - coef * penalty, 0.0)

    def estimate(rewards, values, mask, judged):
        known = {"judged": judged} if leaves_out(program.advantage) else {}
        return program.advantage(rewards, values, mask, hyper.discount, hyper.gae_lambda, **known)

    groups = jax.tree.map(lambda x: x.reshape(-1, program.group, *x.shape[1:]),
                          constraints.together((rewards, episodes.value, mask, episodes.judged), program.axis))
    advantages, returns, scale = jax.vmap(estimate, axis_name=GROUPS)(*groups)
    every = advantages.reshape(-1, mask.shape[1]), returns.reshape(-1, mask.shape[1]), jnp.repeat(scale, program.group)
    advantages, returns, scale = constraints.back(every, program.axis)
    if program.normalise:
        advantages, factor = normalise(advantages, mask, program.axis)
        scale = factor * scale
    return advantages, returns, coef * scale, scale


def safe_norm(tree) -> Float[Array, ""]:
    """The global norm, of numbers that are scaled first where their squares overflow (k3 at 80 nats has gradients of
    1e34) or vanish."""
    def again(state):
        largest = jnp.maximum(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]).max(), 1e-30)
        return largest * optax.global_norm(jax.tree.map(lambda x: x / largest, tree)), jnp.bool_(True)

    # A loop of at most one turn: a condition would be a selection under `vmap`, and read everything three times.
    return jax.lax.while_loop(lambda state: ~((state[0] > 1e-15) & jnp.isfinite(state[0])) & ~state[1], again,
                              (optax.global_norm(tree), jnp.bool_(False)))[0]


def gradient(program, params, memory, frozen: Frozen, episodes: Episodes, targets, hyper: Hyper, longest, cost: Cost):
    """Of one minibatch, added up over `program.accumulate` parts: gradients, what went into the loss, and what its
    tokens are."""
    weights, rows = weights_of(program, episodes), episodes.mask.shape[0] // program.accumulate
    own = jax.grad(lambda params, part, goals: objective(
        program, params, memory, frozen, part, goals, hyper, longest, weights, cost), has_aux=True)
    if program.accumulate == 1:
        grads, (parts, scores) = own(params, episodes, targets)
        return *constraints.total((grads, parts), program.axis), scores

    def add(sums, part):
        grads, (parts, scores) = own(params, *part)
        return jax.tree.map(jnp.add, sums, (grads, parts)), scores

    split = jax.tree.map(lambda x: x.reshape(program.accumulate, rows, *x.shape[1:]), (episodes, targets))
    split = constraints.constrain(split, None, EPISODES)
    shapes = jax.eval_shape(own, params, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    sums, scores = jax.lax.scan(add, zeros, split)
    return *constraints.total(sums, program.axis), jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), scores)


def update(program, state: TrainState, hyper: Hyper, frozen: Frozen, episodes: Episodes, rewards: Float[Array, "b k"],
           longest: Int[Array, ""], members: int = 1) -> tuple[TrainState, dict, Extreme, Episodes]:
    """All epochs over one batch of one member. Callers vmap over members.

    Args:
        rewards: of each agent token, reward units; a reply's reward stands at the last agent token before its end.
        members: how many are updated at a time.

    Returns:
        The new state, metrics, the most extreme token, and the episodes, whose record is complete.
    """
    price = program.controller.read(state.controller, hyper)
    *goals, factor = targets(program, episodes, rewards, price, hyper)
    rate = learning_rate(program, hyper, state.iteration)
    own_rate = jnp.where(jnp.isfinite(hyper.value_learning_rate), hyper.value_learning_rate, hyper.learning_rate)
    value_rate = learning_rate(program, hyper._replace(learning_rate=own_rate), state.iteration)
    rows, cost, axis = episodes.mask.shape[0], program.cost(members), program.axis
    rows *= 1 if axis is None else jax.lax.axis_size(axis)
    pool = (episodes, goals) if program.minibatches == 1 else constraints.together((episodes, goals), axis)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.iteration), 2**31 - 2)

    def minibatch(carry, index):
        params, opt_state, stopped = carry
        part, own = pool
        if program.minibatches > 1:
            part, own = constraints.constrain(jax.tree.map(lambda x: x[index], pool), EPISODES)
        grads, parts, scores = gradient(program, params, state.reference, frozen, part, own, hyper, longest, cost)
        ratios = jnp.where(part.learned, scores.terms.log_ratio, 0.0)
        norm = safe_norm(grads)
        parts["optim/grad_norm"] = norm
        if program.max_grad_norm is not None:
            shrink = jnp.minimum(1.0, program.max_grad_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        worst = jnp.abs(ratios).argmax()
        extreme = Extreme(ratios.ravel()[worst], index[worst // ratios.shape[1]], worst % ratios.shape[1])
        stopped |= parts["policy/approxkl_avg"] > hyper.stop_kl
        parts["policy/stopped_avg"] = stopped.astype(jnp.float32)
        updates, new_state = program.optimizer.update(grads, opt_state, params)
        updated = optax.apply_updates(params, descent(updates, rate, value_rate))
        idle = stopped | (constraints.total(part.judged.sum(), axis) == 0)      # what an optimizer remembers moves, too
        params, opt_state = jax.tree.map(partial(jnp.where, idle), (params, opt_state), (updated, new_state))
        return (params, opt_state, stopped), (parts, extreme, scores if program.once else ())

    def order(epoch):
        if program.minibatches == 1:
            return jnp.arange(rows)[None]
        # Groups stay together where minibatches hold whole ones, so that their openings are read once.
        together = program.group if rows // program.group % program.minibatches == 0 else 1
        groups = jax.random.permutation(jax.random.fold_in(key, epoch), rows // together)
        return (groups[:, None] * together + jnp.arange(together)[None]).reshape(program.minibatches, -1)

    indices = constraints.part(jnp.concatenate([order(epoch) for epoch in range(program.epochs)]), axis)
    start = state.params, state.opt_state, jnp.bool_(False)
    (params, opt_state, _), (parts, extremes, scores) = jax.lax.scan(minibatch, start, indices)
    if program.once:
        episodes = with_scores(program, episodes, jax.tree.map(lambda x: x[0], scores))
    variance = parts["val/ratio"].var()
    parts = jax.tree.map(lambda x: x.mean(0), parts)
    count = constraints.total(episodes.judged.sum(), axis)
    nats = jnp.where(episodes.learned, program.kl.exact(recorded(episodes)), 0.0).sum()
    spent = constraints.total(nats, axis) / jnp.maximum(count, 1).astype(nats.dtype)
    parts |= {"val/ratio_var": variance, "optim/learning_rate": rate, "kl/coef": price,
              "advantage/factor_max": constraints.together(factor, axis).max(),
              "value/explained_variance": _explained(episodes.value, goals[1], episodes.learned, axis)}
    controller = jax.tree.map(partial(jnp.where, count > 0), program.controller.update(state.controller, spent, hyper),
                              state.controller)
    memory = program.reference.update(state.reference, params, state.iteration)
    extremes = constraints.together(extremes, axis)
    extreme = jax.tree.map(lambda x: x[jnp.abs(extremes.log_ratio).argmax()], extremes)
    new = TrainState(params, opt_state, state.seed, state.iteration + 1, controller, memory)
    return new, parts, extreme, episodes


def _explained(values, returns, mask, axis=None):
    """1 - Var(G - V) / Var(G) over agent tokens."""
    def variance(x):
        centre = constraints.total(mean(x, mask), axis).mean()
        return constraints.total(mean((x - centre) ** 2, mask), axis).mean()

    return 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
