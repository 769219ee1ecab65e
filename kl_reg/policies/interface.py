"""What a policy is: one interface for all kinds, so that rollout and update are written once.

Axis names: m members, b episodes, k agent tokens. A policy's parameters have a leading member axis outside `read` and
`refresh`, which callers vmap over members.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Reading(NamedTuple):
    """What one forward pass says of the next token. The proposal's logits are base_logits + gap. The value has no
    gradient outside the value head: it reads features and situation as constants."""

    base_logits: Float[Array, "... v"]
    gap: Float[Array, "... v"]
    value: Float[Array, ...]
    spend: Float[Array, ...]


class States(NamedTuple):
    """What a Reading is made of, before the unembedding: final hidden states [..., d] of the base and of the policy, or
    of a relative policy their change; value and budget neuron."""

    base: Float[Array, "... d"]
    policy: Float[Array, "... d"]
    value: Float[Array, ...]
    spend: Float[Array, ...]


class Factored(NamedTuple):
    """A policy whose logits are products of hidden states and a table, so that they need not be formed all at once.

    states(params, base, features, situation) -> States.
    table(params, base) -> [v, d], that turns `States.policy` into logits; the base's own is `decoder.unembedding`.
    trained: whether that table is trained.
    cap: logits are cap * tanh(logit / cap), but not the change of a relative policy; None: as they are.
    """

    states: Callable
    table: Callable
    trained: bool
    cap: float | None


class Alone(NamedTuple):
    """A policy that draws tokens with no more than that takes, and is compared with the base afterwards, on whole
    transcripts. Not for budgets.

    prefill, decode: as a Policy's; the features may lack the base's part.
    logits(params, base, features [b, ...], situation, agent [b]) -> [b, v], of one member; where it is not the agent's
        turn the base's, if the policy `speaks` for it.
    complete(base, features [m, b, k, ...], transcript [m, b, ...], slot [m, b, k], group) -> the features of a Policy.
    """

    prefill: Callable
    decode: Callable
    logits: Callable
    complete: Callable
    speaks: bool


class Policy(NamedTuple):
    """Pure functions of (params, base, ...); `base` holds the frozen base parameters.

    init(key, base) -> params of one member.
    prefill(params, base, tokens [n, t], start [n], chosen [m, g], slots, group) -> state: the caches of `group`
        episodes behind each of the chosen openings, of n that there are.
    decode(params, base, token [m, b], start, index, state) -> (features, state).
    refresh(params, base, episodes, group) -> features [b, k, ...], those parts recomputed that depend on params;
        `group` episodes in a row have the same opening.
    reread(params, base, transcript, slot) -> features [b, k, ...] of any transcript, before the tokens in slot [b, k].
    read(params, base, features [..., ...], situation) -> Reading.
    relative: whether the gap is a change of any reference's logits; else base_logits + gap are logits on their own.
    shared: whether the features are the frozen base's alone, so that two policies of this kind read the same.
    factored, alone: None for policies that cannot.
    apart(params m) -> params as `decode` reads them the fastest (`decoder.apart`).
    """

    init: Callable
    prefill: Callable
    decode: Callable
    refresh: Callable
    reread: Callable
    read: Callable
    relative: bool
    shared: bool
    factored: Factored | None = None
    alone: Alone | None = None
    apart: Callable = lambda params: params


def flat(x: Array) -> Array:
    """[m, b, ...] -> [m * b, ...]."""
    return x.reshape(-1, *x.shape[2:])


def before(hidden: Float[Array, "b s d"], slot: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """Hidden states [b, k, d] from which the tokens in these slots are predicted."""
    return jnp.take_along_axis(hidden, jnp.maximum(slot - 1, 0)[..., None], axis=1)
