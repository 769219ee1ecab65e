"""What the KL penalty is made of and where it acts.

Each estimator carries its facts, keyed by placement: what the expected gradient descends, or why the placement is
refused. L = log pi(a) - log beta(a), D_t = D(pi || beta) at agent token t, nats per token.
"""
from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.registry import Registry

ESTIMATORS = Registry("kl.estimator")


class Estimator(NamedTuple):
    """`value_of` names the estimated quantity; `gradient_of` and `refused` are keyed by placement."""

    value_of: str
    gradient_of: dict
    refused: dict


ESTIMATORS.register("k1", Estimator(
    "D(pi || beta), unbiased, can be negative",
    {"reward": "the KL of the whole episode, future tokens included; high variance"},
    {"loss": "has zero expected gradient, because E_pi[grad log pi] = 0",
     "full": "is sampled, and `full` needs the exact D_t"}))
ESTIMATORS.register("exact", Estimator(
    "D(pi || beta), exact",
    {"full": "the KL of the whole episode, future tokens included; D_t in the loss and KL-to-go in the reward",
     "loss": "D_t of each token alone; its effect on the KL of later tokens is left out"},
    {"reward": "prices nothing at the token itself, because D_t does not depend on the drawn action"}))


def check(estimator: str, placement: str) -> None:
    """Raises ValueError for a combination with no or wrong effect, and says why."""
    facts = ESTIMATORS[estimator]
    allowed = "; ".join(f"estimator={n!r} with placement={p!r}" for n in ESTIMATORS.names()
                        for p in ESTIMATORS[n].gradient_of)
    if placement in facts.refused:
        raise ValueError(f"kl.estimator={estimator!r} with kl.placement={placement!r} {facts.refused[placement]}. "
                         f"Use {allowed}.")
    if placement not in facts.gradient_of:
        raise ValueError(f"kl.placement={placement!r} is unknown. Use {allowed}.")


def reward_term(estimator: str, placement: str, log_ratio: Float[Array, " k"],
                kl: Float[Array, " k"]) -> Float[Array, " k"]:
    """What is subtracted (times the coefficient) from the reward of each agent token, nats; zero behind the last token.

    Args:
        log_ratio, kl: recorded when the episode was sampled, masked to zero where there is no token.
    """
    if placement == "loss":
        return jnp.zeros_like(kl)
    if estimator == "k1":
        return log_ratio
    return jnp.append(kl[1:], 0.0)


def loss_term(placement: str, kl: Float[Array, " k"]) -> Float[Array, " k"]:
    """What is added (times the coefficient) to the loss of each agent token, nats; `kl` is differentiable."""
    return jnp.zeros_like(kl) if placement == "reward" else kl
