"""What the agent adds to a trunk: a change of the final hidden state, a value, and the budget neuron."""
from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from kl_reg.policies.interface import VALUE, unlabelled


class Situation(NamedTuple):
    """What the agent knows beside the transcript: nats that the next token may cost, the part of the budget that is
    left, and the part of the episode that is gone. Infinite nats: no budget."""

    remaining: Float[Array, ...]
    part: Float[Array, ...]
    time: Float[Array, ...]

    def inputs(self) -> Float[Array, "... 3"]:
        """In [0, 1]; without a budget the first two are zero."""
        limited = jnp.isfinite(self.remaining)
        left = jnp.where(limited, self.remaining, 0.0)
        return jnp.stack([left / (1 + left), jnp.where(limited, self.part, 0.0), self.time], axis=-1)


class Scalars(nn.Module):
    """Value (reward units) and budget neuron (part of the remaining budget to spend on the next token, in (0, 1)).

    The value starts at zero and the neuron at `spend_init`, both whatever the input. The value reads its input as a
    constant: the remaining budget is a function of actor and budget neuron where a ledger is re-run, and what the
    episode was worth must not move them.
    """

    hidden: int
    spend_init: float

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.constant(math.log(self.spend_init / (1 - self.spend_init)))
        small = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value")
        value = small(nn.silu(nn.Dense(self.hidden, name="value_hidden")(jax.lax.stop_gradient(x))))[..., 0]
        neuron = nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=bias, name="spend")
        spend = neuron(nn.silu(nn.Dense(self.hidden, name="spend_hidden")(x)))[..., 0]
        return value, jax.nn.sigmoid(spend)


def labels(params) -> dict:
    """The label of each parameter of a policy with `Scalars` under that name."""
    own = unlabelled(params)
    value = {name: jax.tree.map(lambda _: VALUE, own["scalars"][name]) for name in ("value", "value_hidden")}
    return own | {"scalars": own["scalars"] | value}


class Actor(nn.Module):
    """A zero-initialised change [..., d] of the final hidden state, from the trunk's last layers and the situation."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, name="change")(x)
