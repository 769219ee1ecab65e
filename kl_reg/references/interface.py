"""What KL is measured to: kinds of reference behind one interface, so that rollout and update are written once.

A reference is proper (a distribution) or a semi-distribution, whose missing mass is the probability of asking for help.
Axis names: m members, b episodes, k agent tokens, n models. `memory` is what a reference remembers of the policy, a
tree in the train state; `frozen` its own parameters, which nothing changes.
"""
from __future__ import annotations

from typing import NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from kl_reg.policies.interface import Reading


class Measure(NamedTuple):
    """The reference at one token. The proposal's logits are log_probs + gap, both at the sampling temperature.

    `floor` is -log mass, nats; `models` log-probabilities of each of the reference's models, where they vote.
    """

    log_probs: Float[Array, "... v"]
    gap: Float[Array, "... v"]
    floor: Float[Array, ...]
    models: Float[Array, "... n v"] | None


class Reference(NamedTuple):
    """Pure functions; all but `prefill`, `decode` and `observe` are of one member. `proper`: it is a distribution.
    `is_base`: it is the frozen base model, which the policy's own forward pass gives."""

    proper: bool
    is_base: bool
    init: Init
    update: Update
    prefill: Prefill
    decode: Decode
    apart: Apart
    observe: Observe
    read: Read


class Init(Protocol):
    """The memory at the policy's first parameters."""

    def __call__(self, params) -> object: ...


class Update(Protocol):
    """The memory behind an iteration, at the policy's new parameters."""

    def __call__(self, memory, params, iteration: Int[Array, ""]) -> object: ...


class Prefill(Protocol):
    """The state of `group` episodes behind each of the chosen openings, whose last token is not yet decoded."""

    def __call__(self, memory, frozen, tokens: Int[Array, "n p"], start: Int[Array, " n"], chosen: Int[Array, "m g"],
                 slots: int, group: int = 1) -> object: ...


class Decode(Protocol):
    """(features [m, b, ...], state) behind one more token of each episode."""

    def __call__(self, memory, frozen, token: Int[Array, "m b"], start: Int[Array, "m b"], index: Int[Array, ""], state
                 ) -> tuple[object, object]: ...


class Apart(Protocol):
    """Memory and own parameters (`frozen.reference`) as `decode` reads them the fastest."""

    def __call__(self, memory, own) -> tuple[object, object]: ...


class Observe(Protocol):
    """The state with what the next token says of the reference's models."""

    def __call__(self, state, measure: Measure, token: Int[Array, "m b"]) -> object: ...


class Read(Protocol):
    """The reference at tokens; `features` are the policy's, `seen` what `decode` gave."""

    def __call__(self, memory, frozen, features, seen, situation, reading: Reading) -> Measure: ...


def forget(*args):
    return ()


def keep(memory, params, iteration):
    return memory


def as_they_are(memory, own):
    return memory, own


def unmoved(state, measure, token):
    return state
