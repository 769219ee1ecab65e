"""What the KL penalty is made of and where it acts.

Each estimator carries its facts, keyed by placement: what the expected gradient descends, or why the placement is
refused. L = log pi(a) - log beta(a), D_t = D(pi || beta) at agent token t, nats per token.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kl_reg.registry import Registry

ESTIMATORS = Registry("kl.estimator")


class Placement(NamedTuple):
    """What an estimator does in one placement; both functions take and give [k] arrays, nats.

    `gradient_of` says what its expected gradient descends (on-policy, undiscounted, advantages not biased by a value
    function: PPO's clip, later epochs and lambda < 1 trade some of that for variance, as they do with the reward).
    `reward(log_ratio, kl)` is subtracted from the reward, `loss(kl)` is added to the loss, both times the coefficient.
    """

    gradient_of: str
    reward: Callable
    loss: Callable


class Estimator(NamedTuple):
    """`value_of` names the estimated quantity; `placements` are the sound ones, `refused` says why others are not."""

    value_of: str
    placements: dict[str, Placement]
    refused: dict[str, str]


def _nothing(*terms):
    return jnp.zeros_like(terms[-1])


ESTIMATORS.register("k1", Estimator(
    "D(pi || beta), unbiased, can be negative",
    {"reward": Placement("the KL of the whole episode, future tokens included; high variance",
                         lambda log_ratio, kl: log_ratio, _nothing)},
    {"loss": "has zero expected gradient, because E_pi[grad log pi] = 0",
     "full": "is sampled, and `full` needs the exact D_t"}))
ESTIMATORS.register("exact", Estimator(
    "D(pi || beta), exact",
    {"full": Placement("the KL of the whole episode, future tokens included: D_t in the loss, later D in the reward",
                       lambda log_ratio, kl: jnp.append(kl[1:], 0.0), lambda kl: kl),
     "loss": Placement("D_t of each token alone; its effect on the KL of later tokens is left out",
                       _nothing, lambda kl: kl)},
    {"reward": "prices nothing at the token itself, because D_t does not depend on the drawn action"}))


def check(estimator: str, placement: str) -> None:
    """Raises ValueError for a combination with no or wrong effect, and says why."""
    facts = ESTIMATORS[estimator]
    allowed = "; ".join(f"estimator={n!r} with placement={p!r}" for n in ESTIMATORS.names()
                        for p in ESTIMATORS[n].placements)
    if placement in facts.refused:
        raise ValueError(f"kl.estimator={estimator!r} with kl.placement={placement!r} {facts.refused[placement]}. "
                         f"Use {allowed}.")
    if placement not in facts.placements:
        raise ValueError(f"kl.placement={placement!r} is unknown. Use {allowed}.")
