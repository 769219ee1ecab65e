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


ACTIVATIONS = {"silu": nn.silu, "tanh": nn.tanh}
"""Choices of `policy.critic_activation`."""


class Scalars(nn.Module):
    """Value (reward units) and budget neuron (part of the remaining budget to spend on the next token, in (0, 1)).

    The value starts at zero and the neuron at `spend_init`, both whatever the input. The value reads its input as a
    constant: the remaining budget is a function of actor and budget neuron where a ledger is re-run, and what the
    episode was worth must not move them.
    """

    hidden: int
    spend_init: float
    layers: int = 1                 # hidden layers of the value head
    activation: str = "silu"        # its, one of ACTIVATIONS
    linear: bool = False            # the budget neuron has no hidden layer

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.constant(math.log(self.spend_init / (1 - self.spend_init)))
        read = jax.lax.stop_gradient(x)
        for i in range(self.layers):
            dense = nn.Dense(self.hidden, name="value_hidden" + f"_{i}" * (i > 0))
            read = ACTIVATIONS[self.activation](dense(read))
        value = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value")(read)[..., 0]
        neuron = nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=bias, name="spend")
        spend = neuron(x if self.linear else nn.silu(nn.Dense(self.hidden, name="spend_hidden")(x)))[..., 0]
        return value, jax.nn.sigmoid(spend)


def labels(params) -> dict:
    """The label of each parameter of a policy with `Scalars` under that name."""
    own = unlabelled(params)
    value = {name: jax.tree.map(lambda _: VALUE, part) for name, part in own["scalars"].items()
             if name.startswith("value")}
    return own | {"scalars": own["scalars"] | value}


class LinearActor(nn.Module):
    """A zero-initialised change of the logits themselves, a table [v, n + 1]: an unembedding of the trunk's last
    layers, the situation and 1, which are what is returned. Source: the code of Cohen et al. (2024)."""

    vocabulary: int

    @nn.compact
    def __call__(self, x):
        inputs = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
        self.param("table", nn.initializers.zeros, (self.vocabulary, inputs.shape[-1]))
        return inputs


class Actor(nn.Module):
    """A zero-initialised change [..., d] of the final hidden state, from the trunk's last layers and the situation."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, name="change")(x)
