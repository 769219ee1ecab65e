"""What KL is measured to: kinds of reference behind one interface, so that rollout and update are written once.

A reference is proper (a distribution) or a semi-distribution, whose missing mass is the probability of asking for help.
Axis names: m members, b episodes, k agent tokens, n models. `memory` is what a reference remembers of the policy, a
tree in the train state; `frozen` its own parameters, which nothing changes.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float


class Measure(NamedTuple):
    """The reference at one token. The proposal's logits are log_probs + gap, both at the sampling temperature.

    `floor` is -log mass, nats; `models` log-probabilities of each of the reference's models, where they vote.
    """

    log_probs: Float[Array, "... v"]
    gap: Float[Array, "... v"]
    floor: Float[Array, ...]
    models: Float[Array, "... n v"] | None


class Reference(NamedTuple):
    """Pure functions; all but `prefill`, `decode` and `observe` are of one member.

    init(params) -> memory; update(memory, params, iteration) -> memory.
    prefill(memory, frozen, tokens [n, p], start [n], chosen [m, g], slots, group) -> state of `group` episodes behind
        each of the chosen openings, whose last token is not yet decoded.
    decode(memory, frozen, token [m, b], start, index, state) -> (features [m, b, ...], state).
    apart(memory, frozen.reference) -> the same as `decode` reads them the fastest.
    observe(state, measure, token [m, b]) -> state, with what the token says of the models.
    read(memory, frozen, features [...], seen [...], situation, reading) -> Measure; `features` are the policy's, `seen`
    what decode gave.
    """

    proper: bool
    is_base: bool
    init: Callable
    update: Callable
    prefill: Callable
    decode: Callable
    apart: Callable
    observe: Callable
    read: Callable


def forget(*args):
    return ()


def keep(memory, params, iteration):
    return memory


def as_they_are(memory, own):
    return memory, own


def unmoved(state, measure, token):
    return state
