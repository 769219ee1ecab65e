"""What a policy is: one interface for all kinds, so that rollout and update are written once.

Axis names: m members, b episodes, k agent tokens. A policy's parameters have a leading member axis outside `read` and
`refresh`, which callers vmap over members.
"""
from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

POLICY, VALUE = "policy", "value"
"""Labels of parameters: the value head may have a learning rate of its own."""


def unlabelled(params):
    """All parameters are the policy's: it has no value head."""
    return jax.tree.map(lambda _: POLICY, params)


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

    `trained`: the table is trained. `cap`: logits are cap * tanh(logit / cap), but not the change of a relative policy;
    None: as they are.
    """

    states: StatesOf
    table: Table
    trained: bool
    cap: float | None


class Alone(NamedTuple):
    """A policy that draws tokens with no more than that takes, and is compared with the base afterwards, on whole
    transcripts. Not for budgets. The features that `decode` gives may lack the base's part; the policy `speaks` for
    the base where it can give the base's logits too."""

    prefill: Prefill
    decode: Decode
    logits: LogitsAlone
    complete: Complete
    speaks: bool


class Policy(NamedTuple):
    """Pure functions of (params, base, ...); `base` holds the frozen base parameters.

    `relative`: the gap is a change of any reference's logits; else base_logits + gap are logits on their own. `shared`:
    the features are the frozen base's alone, so that two policies of this kind read the same. `factored` and `alone`
    are None for policies that cannot.
    """

    init: Init
    prefill: Prefill
    decode: Decode
    refresh: Refresh
    reread: Reread
    read: Read
    relative: bool
    shared: bool
    factored: Factored | None = None
    alone: Alone | None = None
    apart: Apart = lambda params: params
    labels: Labels = unlabelled


class Init(Protocol):
    """Parameters of one member."""

    def __call__(self, key: Array, base) -> object: ...


class Prefill(Protocol):
    """The caches of `group` episodes behind each of the chosen openings [m, g], of n that there are."""

    def __call__(self, params, base, tokens: Int[Array, "n t"], start: Int[Array, " n"], chosen: Int[Array, "m g"],
                 slots: int, group: int = 1) -> object: ...


class Decode(Protocol):
    """(features [m, b, ...], state) behind one more token of each episode."""

    def __call__(self, params, base, token: Int[Array, "m b"], start: Int[Array, "m b"], index: Int[Array, ""], state
                 ) -> tuple[object, object]: ...


class Refresh(Protocol):
    """Features [b, k, ...], those parts recomputed that depend on params; `group` episodes in a row have the same
    opening."""

    def __call__(self, params, base, episodes, group: int = 1) -> object: ...


class Reread(Protocol):
    """Features [b, k, ...] of any transcript, before the tokens in these slots."""

    def __call__(self, params, base, transcript, slot: Int[Array, "b k"]) -> object: ...


class Read(Protocol):
    """What the policy says of the next token, from features [..., ...]."""

    def __call__(self, params, base, features, situation) -> Reading: ...


class StatesOf(Protocol):
    """Hidden states in place of logits, from features [..., ...]."""

    def __call__(self, params, base, features, situation) -> States: ...


class Table(Protocol):
    """The unembedding [v, d] that turns `States.policy` into logits; the base's own is `decoder.unembedding`."""

    def __call__(self, params, base) -> Float[Array, "v d"]: ...


class LogitsAlone(Protocol):
    """Logits [b, v] of one member's episodes; where it is not the agent's turn the base's, if the policy speaks for it.
    """

    def __call__(self, params, base, features, situation, agent: Bool[Array, " b"]) -> Float[Array, "b v"]: ...


class Complete(Protocol):
    """The features of a Policy, from those that the policy alone has recorded [m, b, k, ...]."""

    def __call__(self, base, features, transcript, slot: Int[Array, "m b k"], group: int = 1) -> object: ...


class Apart(Protocol):
    """Parameters [m, ...] as `decode` reads them the fastest (`decoder.apart`)."""

    def __call__(self, params) -> object: ...


class Labels(Protocol):
    """The label of each parameter, POLICY or VALUE."""

    def __call__(self, params) -> object: ...


def flat(x: Array) -> Array:
    """[m, b, ...] -> [m * b, ...]."""
    return x.reshape(-1, *x.shape[2:])


def before(hidden: Float[Array, "b s d"], slot: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """Hidden states [b, k, d] from which the tokens in these slots are predicted."""
    return jnp.take_along_axis(hidden, jnp.maximum(slot - 1, 0)[..., None], axis=1)
