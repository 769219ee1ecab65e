"""What recorded agent tokens are under any parameters: straight from hidden states where they depend on nothing but the
transcript, else as the sampler has them."""
from __future__ import annotations

import jax.numpy as jnp

from kl_reg.kl.budget import Caps
from kl_reg.program import AS_SAMPLED, Program
from kl_reg.sampling.rollout import shared_openings
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.constraints import spread
from kl_reg.training.chunks import PLAIN, Cost, Scores, read_at_once, states
from kl_reg.training.ledger import read_as_sampled
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


def score(program: Program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, cost: Cost = PLAIN
          ) -> Scores:
    """What the recorded agent tokens are under `params`, differentiable in them.

    Args:
        memory: of the reference.
    """
    features = program.agent.policy.refresh(params, frozen.base, episodes, cost.group)
    episodes = episodes._replace(features=features)
    if program.execution.scorer == AS_SAMPLED:
        return read_as_sampled(program, params, memory, frozen, episodes, caps, cost)
    return read_at_once(program, params, frozen, episodes, cost)


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
        program, params, frozen, episodes, cost)
    return with_scores(program, episodes, over_members(read)(params, episodes))


def with_scores(program: Program, episodes: Episodes, scores: Scores) -> Episodes:
    """The record of what was sampled, where these are the scores under the policy that drew it."""
    said = scores.terms._asdict() | {"value": scores.value, "estimate": program.algorithm.kl.value(scores.terms, 0.0),
                                     "spent_before": jnp.cumsum(scores.terms.kl, axis=-1) - scores.terms.kl}
    return episodes._replace(**{name: jnp.where(episodes.mask, x, 0.0) for name, x in said.items()})
