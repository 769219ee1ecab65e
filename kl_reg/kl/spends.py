"""How much of the remaining budget the next token may cost: the budget fraction, in [0, 1]."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.registry import Registry


class Spend(NamedTuple):
    """A way to spend the budget, of one token.

    fraction(neuron, action, tokens) -> the budget fraction, from the output of the budget neuron, the fraction that was
    drawn with that probability (0 where none is) and the tokens that are left in the episode, this one included.

    `drawn` is True where the fraction is an action of the policy beside the token. It has a log-probability then, it
    decides what the token's D(pi || beta) is, and the ledger is charged the whole allowance.
    """

    fraction: Callable
    drawn: bool = False


SPENDS = Registry("kl.spend", of=Spend)


def neuron(neuron: Float[Array, ""], action: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
    """The budget neuron's output, as in the paper."""
    del action, tokens
    return neuron


def sampled(neuron: Float[Array, ""], action: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
    """The fraction that was drawn."""
    del neuron, tokens
    return action


def greedy(neuron: Float[Array, ""], action: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
    """All of the remaining budget."""
    del action, tokens
    return jnp.ones_like(neuron)


def uniform(neuron: Float[Array, ""], action: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
    """An even share of the remaining budget for each token to come."""
    del neuron, action
    return 1 / tokens.astype(jnp.float32)


SPENDS.register("neuron", Spend(neuron))
SPENDS.register("sampled", Spend(sampled, drawn=True))
SPENDS.register("greedy", Spend(greedy))
SPENDS.register("uniform", Spend(uniform))
