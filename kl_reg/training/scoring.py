"""What recorded agent tokens are under any parameters: all at once where they depend on nothing but the transcript, one
position after the other where a budget's ledger runs through them."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.exact import TokenTerms
from kl_reg.program import IN_ORDER, Program
from kl_reg.sampling.agent_step import AgentState, At, choose, look, settle
from kl_reg.sampling.rollout import shared_openings
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.constraints import EPISODES, constrain, spread
from kl_reg.training.chunks import PLAIN, Cost, Scores, read_at_once, states
from kl_reg.types import Episodes, Frozen, Hyper


def caps_of(hyper: Hyper) -> Caps:
    """The hard limits of a member."""
    return Caps(hyper.kl_budget, hyper.kl_turn_budget, hyper.kl_token_budget)


def cost_of_update(program: Program, members: int) -> Cost:
    """The cost of a part of a minibatch."""
    rows = program.schedule.rows
    return _cost(rows, rows if len(program.task.env.openings.start) == 1 else program.algorithm.group, members)


def cost_of_batch(program: Program, group: int, members: int) -> Cost:
    """The cost of a pass over a batch in which `group` episodes in a row have the same opening."""
    return _cost(program.schedule.episodes, shared_openings(program, group), members)


def _cost(rows, group, members):
    # Over several devices the tokens of openings and of episodes would have to change places in every layer.
    return Cost(group if rows % group == 0 and spread() == 1 else 1, members)


def score(program: Program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, longest: Int[Array, ""],
          cost: Cost = PLAIN) -> Scores:
    """What the recorded agent tokens are under `params`, differentiable in them.

    Args:
        memory: of the reference.
        longest: agent tokens of the longest stream in the whole batch; positions behind it are skipped.
    """
    features = program.agent.policy.refresh(params, frozen.base, episodes, cost.group)
    episodes = episodes._replace(features=features)
    if program.execution.scorer == IN_ORDER:
        return read_in_order(program, params, memory, frozen, episodes, caps, longest)
    return read_at_once(program, params, frozen, episodes, longest, cost)


def complete(program: Program, params, frozen: Frozen, episodes: Episodes, cost: Cost, terms: bool) -> Episodes:
    """Adds the base's features and the values to episodes [m, b, ...] that the policy drew alone; with `terms` also
    what the drawn tokens are."""
    mask = episodes.mask
    episodes = episodes._replace(features=program.agent.policy.alone.complete(
        frozen.base, episodes.features, episodes.transcript, episodes.slot, cost.group))
    if not terms:
        own = over_members(lambda params, episodes: states(program, params, frozen, episodes))(params, episodes)
        return episodes._replace(value=jnp.where(mask, own.value, 0.0))
    read = lambda params, episodes: read_at_once(  # noqa: E731
        program, params, frozen, episodes, mask.sum(-1).max(), cost)
    return with_scores(program, episodes, over_members(read)(params, episodes))


def with_scores(program: Program, episodes: Episodes, scores: Scores) -> Episodes:
    """The record of what was sampled, where these are the scores under the policy that drew it."""
    said = scores.terms._asdict() | {"value": scores.value, "estimate": program.algorithm.kl.value(scores.terms, 0.0),
                                     "spent_before": jnp.cumsum(scores.terms.kl, axis=-1) - scores.terms.kl}
    return episodes._replace(**{name: jnp.where(episodes.mask, x, 0.0) for name, x in said.items()})


def read_in_order(program: Program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps,
                  longest: Int[Array, ""]) -> Scores:
    """Scores the tokens of any program, one position of the stream after the other.

    The budget ledger is re-run with the new parameters and differentiated through: what a token may spend depends on
    what the earlier ones cost, and a gradient that leaves this out sees the benefit of spending and not its price.
    (Where the amount is itself a recorded action, it depends on no parameter.) Vocabulary-sized arrays exist for one
    position at a time and are recomputed in the backward pass.
    """
    width, rows = episodes.transcript.tokens.shape[1] - program.task.env.length, episodes.mask.shape[0]
    agent = AgentState(params, memory, jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), caps))
    reading_of = _apart(program, params, frozen, rows)

    def read(ledger, features, seen, allowed, at, action, drawn):
        view = look(program, frozen, agent, at, ledger, features, seen, reading_of)

        def row(measure, neuron, value, allowed, remaining, position, action, drawn):
            choice = choose(program, measure, allowed, remaining, neuron, drawn, position)
            terms, cost = settle(program, choice, action)
            miss = (terms.kl - choice.floor - choice.allowance) ** 2 if program.agent.constrained else None
            return Scores(terms, value, miss), cost

        scores, cost = jax.vmap(row)(view.measure._replace(models=None), view.reading.spend, view.reading.value,
                                     allowed, view.remaining, at.position, action, drawn)
        return (budget.charge(view.ledger, cost, at.agent),
                jax.tree.map(lambda x: jnp.where(at.agent, x, 0.0), scores))

    # Around the `cond`: inside it, all that `read` closes over, the unembedding too, would be kept for each position.
    @partial(jax.checkpoint, prevent_cse=False)
    def position(ledger, xs):
        index, *xs = xs
        zero = jnp.zeros(rows)
        none = Scores(TokenTerms(*[zero] * len(TokenTerms._fields)), zero, zero if program.agent.constrained else None)
        nothing = lambda ledger, *xs: (ledger, none)  # noqa: E731
        return jax.lax.cond(index < longest, read, nothing, ledger, *xs)

    at = At(episodes.slot - width, jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1), episodes.mask,
            None if program.agent.hard else episodes.spent_before)
    stream = episodes.features, episodes.reference, episodes.allowed, at, episodes.action, episodes.fraction
    stream = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stream)
    _, scores = jax.lax.scan(position, budget.open_ledger((rows,)), (jnp.arange(episodes.mask.shape[1]), *stream))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), scores)


def _apart(program: Program, params, frozen, rows):
    """`policy.read` of that many rows. Where they lie on several devices, each has a copy of the parameters, whose
    gradients are added up over all positions first and over the devices then: once, and not for every position."""
    parts = spread()
    if parts == 1 or rows % parts:
        return lambda features, situation: program.agent.policy.read(params, frozen.base, features, situation)
    copies = constrain(jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), params), EPISODES)

    def read(*inputs):
        inputs = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), inputs)
        reading = jax.vmap(program.agent.policy.read, (0, None, 0, 0))(copies, frozen.base, *inputs)
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), reading)

    return read
