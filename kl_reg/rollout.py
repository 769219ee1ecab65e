"""Sampling of episodes with a KV cache: the only place where tokens are drawn.

All members' episodes go through the trunk as one flat batch with one shared position; actors, ledgers and environments
are vmapped. A key is folded with member seed, iteration, episode and position, so what an episode says depends on
neither batch size nor neighbours, up to the rounding of matrix products of another shape.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl.budget import finite, remaining, tilt
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.models.actor import Situation
from kl_reg.models.policy import Policy, Reading
from kl_reg.types import AGENT, FORCED, OPENING, PAD, Episodes, Openings, Transcript

_BLOCK = 64


def inverse_cdf(log_probs: Float[Array, " v"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """Draws from one row with one uniform in [0, 1): the first token whose cumulative probability exceeds it.

    Two levels, blocks and then tokens within one, because a cumulative sum over the vocabulary costs more than the
    softmax. A token of probability zero is never drawn.
    """
    vocab = log_probs.shape[0]
    probs = jnp.exp(jnp.pad(log_probs, (0, -vocab % _BLOCK), constant_values=-jnp.inf)).reshape(-1, _BLOCK)
    blocks = jnp.cumsum(probs.sum(1))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    inner = jnp.cumsum(probs[block])
    return block * _BLOCK + _first_above(inner, target - jnp.where(block > 0, blocks[block - 1], 0.0))


def _first_above(cumulative, target):
    """First index whose cumulative value exceeds the target; where rounding leaves none, the last that adds to it."""
    return jnp.minimum((cumulative <= target).sum(), (cumulative < cumulative[-1]).sum())


def constrain(reading: Reading, budget: Float[Array, ""], spent: Float[Array, ""], constrained: bool
              ) -> tuple[Float[Array, " v"], Float[Array, " v"]]:
    """The policy's logits [v] and the base's log-probabilities [v] of one row; the sampler and the scorer share this.

    With a budget, the neuron's part of what is left is the token's allowance and the proposal is tilted to it.
    """
    log_base = jax.nn.log_softmax(reading.base_logits)
    if not constrained:
        return log_base + reading.gap, log_base
    allowance = reading.spend * remaining(budget, spent)
    gap = finite(reading.gap)
    return log_base + tilt(gap, allowance, log_base) * gap, log_base


class Step(NamedTuple):
    """What one position of the loop records, [m, b] each."""

    role: Array
    turn: Array
    token: Array
    terms: TokenTerms
    value: Array
    spent_before: Array
    features: object


def member_keys(seed: Int[Array, " m"], iteration: Int[Array, " m"]) -> Array:
    """One key a member, from its own seed and iteration alone."""
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed, iteration)


def rollout(policy: Policy, env, params, base, budget: Float[Array, " m"], keys: Array, first: Int[Array, " m"],
            episodes: int, constrained: bool) -> Episodes:
    """Samples `episodes` episodes for each member.

    Args:
        policy, env: static; `env` gives reset, turn, observe, openings and length.
        params: of the policy, a leading member axis.
        base: frozen base parameters.
        budget: nats per episode of each member; infinite: none. Only looked at when `constrained`.
        keys: one a member (`member_keys`).
        first: index of each member's first episode: parts of a larger batch are sampled as the whole would be.
        constrained: whether a hard budget is applied.

    Returns:
        Episodes [m, b, ...]; the agent stream has room for every token of the episode.
    """
    keys = jax.vmap(lambda key, i: jax.vmap(jax.random.fold_in, (None, 0))(key, i + jnp.arange(episodes)))(keys, first)
    openings = _choose_openings(env.openings, keys)
    width = openings.tokens.shape[-1]
    state = policy.prefill(params, base, openings.tokens[..., :-1], openings.start, width + env.length - 1)
    env_state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*keys.shape, *x.shape)), env.reset())

    def step(carry, position):
        token, spent, env_state, state = carry
        features, state = policy.decode(params, base, token, openings.start, width - 1 + position, state)
        whole = jnp.broadcast_to(budget[:, None], spent.shape)
        situation = Situation(remaining(whole, spent), whole, jnp.full(spent.shape, position / env.length))
        role, forced = _twice(env.turn)(env_state)
        reading = jax.vmap(policy.read, in_axes=(0, None, 0, 0))(params, base, features, situation)
        draw = _twice(lambda *row: _draw(*row, position, constrained))
        token, terms = draw(reading, situation.budget, spent, role, keys)
        token = jnp.where(role == FORCED, forced, token)
        out = Step(role, env_state.turn, token, terms, reading.value, spent, features)
        spent = spent + jnp.where(role == AGENT, terms.kl, 0.0)
        return (token, spent, _twice(env.observe)(env_state, token), state), out

    first = (openings.tokens[..., -1], jnp.zeros(keys.shape), env_state, state)
    _, steps = jax.lax.scan(step, first, jnp.arange(env.length))
    return _collect(openings, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), steps))


def _twice(function: Callable) -> Callable:
    """Over members and episodes."""
    return jax.vmap(jax.vmap(function))


def _choose_openings(openings: Openings, keys) -> Openings:
    count = len(openings.start)
    if count == 1:
        index = jnp.zeros(keys.shape, jnp.int32)
    else:
        index = _twice(lambda key: jax.random.randint(jax.random.fold_in(key, 2**31 - 1), (), 0, count))(keys)
    return Openings(jnp.asarray(openings.tokens)[index], jnp.asarray(openings.start)[index])


def _draw(reading, budget, spent, role, key, position, constrained):
    """The next token of one row, by the agent or by the base, and what it costs as an agent's token."""
    agent = role == AGENT
    spent = jnp.where(agent, spent, -jnp.inf)      # nobody else's tokens are constrained: their tilt takes no steps
    logits, log_base = constrain(reading, budget, spent, constrained)
    log_probs = jnp.where(agent, jax.nn.log_softmax(logits), log_base)
    token = inverse_cdf(log_probs, jax.random.uniform(jax.random.fold_in(key, position)))
    return token, token_terms(logits, log_base, token)


def _collect(openings, steps):
    """Transcript and agent stream from the steps [m, b, t]."""
    written = jax.vmap(jax.vmap(lambda start: jnp.arange(openings.tokens.shape[-1]) >= start))(openings.start)
    roles = jnp.concatenate([jnp.where(written, OPENING, PAD), steps.role], axis=-1)
    turns = jnp.concatenate([jnp.full_like(openings.tokens, -1), steps.turn], axis=-1)
    tokens = jnp.concatenate([openings.tokens, steps.token], axis=-1)
    agent = steps.role == AGENT
    order = jnp.argsort(~agent, axis=-1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)  # noqa: E731
    mask = take(agent)
    zero = lambda x: jnp.where(mask, take(x), 0.0)  # noqa: E731
    terms = steps.terms
    return Episodes(
        Transcript(tokens, roles, turns, openings.start), jax.tree.map(take, steps.features),
        jnp.where(mask, order + openings.tokens.shape[-1], 0), jnp.where(mask, take(steps.token), 0), mask,
        zero(terms.log_prob), zero(terms.log_ratio), zero(terms.kl), zero(terms.entropy), zero(steps.value),
        zero(steps.spent_before))
