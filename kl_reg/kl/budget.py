r"""The hard KL budget: a policy that is *constructed* to stay inside a number of nats per episode.

At each agent token the reference is moved towards the proposal (`kl.operations`) by as much as the allowance admits, a
fraction of what remains of the budget (of the episode, and of caps on a turn and a token), and the exact D is charged
to a ledger. Against a semi-distribution of mass s there is a floor of -log s, which is charged too.

Source: Cohen et al. (2024).
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kl_reg.kl.exact import exact_sum


class Caps(NamedTuple):
    """Hard limits in nats: of the episode, of each turn of the agent, of each of its tokens; infinite: none."""

    episode: Float[Array, ...]
    turn: Float[Array, ...]
    token: Float[Array, ...]


def ramped(caps: Caps, ramp: Float[Array, ...], iteration: Int[Array, ...], iterations: int) -> Caps:
    """The limits of an iteration of a run of so many, which grow linearly from 0 to their whole in its first part of
    size `ramp`."""
    grown = (iteration + 1).astype(ramp.dtype) / jnp.maximum(ramp * iterations, 1)
    whole = jnp.where(ramp > 0, jnp.minimum(grown, 1.0), 1.0)
    return jax.tree.map(lambda cap: jnp.where(jnp.isfinite(cap), cap, 0.0) * whole + jnp.where(
        jnp.isfinite(cap), 0.0, cap), caps)


class Ledger(NamedTuple):
    """What was charged so far, nats, in the episode and in the agent's present turn, with what carrying over counts."""

    spent: Float[Array, ...]
    in_turn: Float[Array, ...]
    spent_rest: Float[Array, ...]      # what float32 left out of the two sums: thousands of small charges count
    in_turn_rest: Float[Array, ...]
    turn: Int[Array, ...]          # the transcript's number of the present turn
    turns: Float[Array, ...]       # of the agent, the present one included
    tokens: Float[Array, ...]      # of the agent, before the present one


def open_ledger(shape: tuple[int, ...]) -> Ledger:
    """Nothing spent."""
    zero = jnp.zeros(shape)
    return Ledger(zero, zero, zero, zero, jnp.full(shape, -1, jnp.int32), zero, zero)


def enter(ledger: Ledger, turn: Int[Array, ...]) -> Ledger:
    """The ledger at a token of the agent in that turn."""
    new = turn != ledger.turn
    return ledger._replace(in_turn=jnp.where(new, 0.0, ledger.in_turn),
                           in_turn_rest=jnp.where(new, 0.0, ledger.in_turn_rest), turn=turn,
                           turns=jnp.where(new, ledger.turns + 1, ledger.turns))


def left(caps: Caps, ledger: Ledger, carry: bool) -> Float[Array, ...]:
    """Nats that the present token may cost; never negative.

    Args:
        carry: what a turn or a token leaves of its cap is added to the later ones'.
    """
    def after(cap):
        return cap - ledger.spent - ledger.spent_rest

    turn, token = caps.turn - ledger.in_turn - ledger.in_turn_rest, caps.token
    if carry:
        turn, token = after(caps.turn * ledger.turns), after(caps.token * (ledger.tokens + 1))
    return jnp.maximum(jnp.minimum(jnp.minimum(after(caps.episode), turn), token), 0.0)


def part_left(caps: Caps, ledger: Ledger, nats: Float[Array, ...]) -> Float[Array, ...]:
    """The part of the episode's budget that remains, where it has one; else `nats`, of `left`, over the smallest other
    limit. In [0, 1]."""
    whole = jnp.where(jnp.isfinite(caps.episode), caps.episode, jnp.minimum(caps.turn, caps.token))
    rest = jnp.where(jnp.isfinite(caps.episode), caps.episode - ledger.spent, nats)
    some = jnp.isfinite(whole) & (whole > 0)
    return jnp.where(some, jnp.clip(rest / jnp.where(some, whole, 1.0), 0.0, 1.0), 0.0)


def charge(ledger: Ledger, nats: Float[Array, ...], own: Bool[Array, ...]) -> Ledger:
    """The ledger behind a token that cost `nats`, where it is the agent's `own`."""
    nats = jnp.where(own, nats, 0.0)
    spent, spent_rest = exact_sum(ledger.spent, nats + ledger.spent_rest)
    in_turn, in_turn_rest = exact_sum(ledger.in_turn, nats + ledger.in_turn_rest)
    return ledger._replace(spent=spent, in_turn=in_turn, spent_rest=spent_rest, in_turn_rest=in_turn_rest,
                           tokens=jnp.where(own, ledger.tokens + 1, ledger.tokens))
