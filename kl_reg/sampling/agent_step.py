"""One token of the agent: budget ledger -> policy and reference -> the distribution of the token -> its terms and cost.

`look`, `choose` and `settle` are these three arrows, and `kl.budget.charge` closes the circle. The sampler draws from
what `choose` gives, the scorer settles recorded tokens along it, the comparison takes it for each of two policies; so
what is trained is what was sampled.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from kl_reg.kl import budget
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.policies.actor import Situation
from kl_reg.policies.interface import Reading
from kl_reg.program import Program
from kl_reg.references.interface import Measure
from kl_reg.sampling.action import truncate, unpack
from kl_reg.sharding.constraints import EPISODES, constrain
from kl_reg.types import Frozen


class AgentState(NamedTuple):
    """What one member's agent is: parameters of its policy, what its reference remembers, and its hard limits [b]."""

    params: object
    memory: object
    caps: budget.Caps


class At(NamedTuple):
    """Where the next token of each episode stands, [b]: how many tokens the episode has before it, in which turn it is,
    and whether the agent writes it."""

    position: Int[Array, " b"]
    turn: Int[Array, " b"]
    agent: Bool[Array, " b"]


class View(NamedTuple):
    """What the agent has before it at a token [b]: the ledger in this turn, the remaining budget (nats that the token
    may cost), and what policy and reference read."""

    ledger: budget.Ledger
    remaining: Float[Array, " b"]
    reading: Reading
    measure: Measure


class Choice(NamedTuple):
    """The distribution of one token, and how the budget made it.

    `logits` are the policy's, any normalisation; `log_ref` the reference's log-probabilities on the allowed tokens;
    `floor` its -log mass, nats. `allowance` is what the budget lets the token cost above the floor, nats, `fraction` of
    `remaining`; `fraction_log_prob` is the fraction's log-probability where it was drawn, else 0. `strength`: how far
    the proposal is followed, in [0, 1] (`kl.operations`), a constant.
    """

    logits: Float[Array, " v"]
    log_ref: Float[Array, " v"]
    floor: Float[Array, ""]
    allowance: Float[Array, ""]
    fraction: Float[Array, ""]
    fraction_log_prob: Float[Array, ""]
    remaining: Float[Array, ""]
    strength: Float[Array, ""]


def look(program: Program, frozen: Frozen, agent: AgentState, at: At, ledger: budget.Ledger, features, seen) -> View:
    """What the agent has before it at the next token of each episode of one member.

    Args:
        ledger: behind the agent's token before this one.
        features, seen: what policy and reference read, [b, ...].
    """
    ledger = budget.enter(ledger, jnp.where(at.agent, at.turn, ledger.turn))
    remaining = budget.left(agent.caps, ledger, program.agent.carry)
    situation = Situation(remaining, budget.part_left(agent.caps, ledger, remaining),
                          at.position / program.task.env.length)
    return View(ledger, remaining, *observe(program, frozen, agent.params, agent.memory, situation, features, seen))


def observe(program: Program, frozen: Frozen, params, memory, situation: Situation, features, seen,
            read: Callable | None = None) -> tuple[Reading, Measure]:
    """What policy and reference say of the next token of each row, before any budget.

    Args:
        features, seen: what policy and reference read, [b, ...].
        read: (features, situation) -> Reading, instead of the policy's own.
    """
    reading = (program.agent.policy.read(params, frozen.base, features, situation) if read is None
               else read(features, situation))
    measure = program.agent.reference.read(memory, frozen, features, seen, situation, reading)
    # Gathered over the vocabulary once, and not summed over devices at every step of a tilt.
    whole = lambda x: constrain(x, EPISODES, None)  # noqa: E731
    return reading, measure._replace(log_probs=whole(measure.log_probs), gap=whole(measure.gap))


def choose(program: Program, measure: Measure, allowed: UInt8[Array, " w"] | None, remaining: Float[Array, ""],
           neuron: Float[Array, ""], drawn: Float[Array, ""], position: Int[Array, ""],
           start: Float[Array, ""] | float = 0.0) -> Choice:
    """The distribution of one row's next token. With a budget, the proposal is moved towards the reference until the
    token costs no more than a fraction of what remains above the floor.

    Args:
        allowed: the tokens that can be drawn, a bit each (`action.pack`); None: all.
        remaining: nats; infinite: this token has no limit.
        neuron: output of the budget neuron.
        drawn: of the agent's `Spend.draw`.
        position: tokens of the episode before this one, whoever wrote them.
        start: a guess of the strength with which the budget follows the proposal; 0: none.
    """
    fraction, allowance = allow(program, measure.floor, remaining, neuron, drawn, position)
    chance = program.agent.spend.log_prob(neuron, drawn)
    logits, log_ref, strength = between(program, measure, allowed, allowance, start)
    return Choice(logits, log_ref, measure.floor, allowance, fraction, chance, remaining, strength)


def allow(program: Program, floor: Float[Array, ...], remaining: Float[Array, ...], neuron: Float[Array, ...],
          drawn: Float[Array, ...], position: Int[Array, ...]) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """The budget fraction, and the nats above the floor that a token may cost with it; 0 without a budget."""
    fraction = program.agent.spend.fraction(neuron, drawn, jnp.maximum(program.task.env.length - position, 1))
    if not program.agent.constrained:
        return fraction, jnp.zeros_like(floor)
    return fraction, fraction * jnp.maximum(remaining - floor, 0.0) + program.agent.target_floor


def between(program: Program, measure: Measure, allowed: UInt8[Array, " w"] | None, allowance: Float[Array, ""],
            start: Float[Array, ""] | float = 0.0) -> tuple[Float[Array, " v"], Float[Array, " v"], Float[Array, ""]]:
    """(logits of the token, the reference's log-probabilities on the allowed tokens, the strength) with so much above
    the floor to spend; without a budget the proposal itself."""
    log_ref, gap = measure.log_probs, measure.gap
    if allowed is not None:
        keep = unpack(allowed, len(log_ref))
        log_ref, gap = truncate(log_ref, keep), jnp.where(keep, gap, 0.0)
    if not program.agent.constrained:
        return log_ref + gap, log_ref, jnp.ones(())
    logits, strength = program.agent.operation(log_ref, gap, allowance, start)
    return logits, log_ref, strength


def settle(program: Program, choice: Choice, action: Int[Array, ""]) -> tuple[TokenTerms, Float[Array, ""]]:
    """What a token is to training, with the reference's floor and the log-probability of a drawn fraction; and what the
    ledger is charged for it, nats."""
    terms = token_terms(choice.logits, choice.log_ref, action, program.algorithm.kl.config.direction == "forward")
    terms = terms._replace(log_ratio=terms.log_ratio + choice.floor, kl=terms.kl + choice.floor)
    cost = program.agent.spend.charge(terms, choice.allowance + choice.floor, choice.remaining)
    return terms._replace(log_prob=terms.log_prob + choice.fraction_log_prob), cost
