"""How much of the remaining budget the next token may cost: the budget fraction, in [0, 1]."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, xlog1py, xlogy
from jaxtyping import Array, Float, Int

from kl_reg.registry import Registry


class Spend(NamedTuple):
    """A way to spend the budget on one token; `neuron` is the output of the budget neuron, in (0, 1).

    fraction(neuron, drawn, tokens) -> the budget fraction, where so many tokens are left in the episode, this one
        included.
    draw(neuron, key) -> a fraction that is an action of the policy beside the token; 0 where none is drawn.
    log_prob(neuron, drawn) -> the log-probability of that action; 0 where none is drawn.
    charge(terms, allowance, remaining) -> nats that the ledger is charged for a token with these terms and allowance,
        the reference's floor included in both; `remaining`: nats that it might have cost.
    """

    fraction: Callable
    draw: Callable = lambda neuron, key: jnp.zeros_like(neuron)
    log_prob: Callable = lambda neuron, drawn: jnp.zeros_like(neuron)
    charge: Callable = lambda terms, allowance, remaining: terms.kl


SPENDS = Registry("kl.spend", drawn=False)
"""Functions of `policy.spend_levels` that give a `Spend`. `drawn`: the fraction is an action with a log-probability. It
decides what the token's D(pi || beta) is, and the ledger is charged the whole allowance."""


def neuron(levels: int) -> Spend:
    """The budget neuron's output, as in the paper."""
    del levels
    return Spend(lambda neuron, drawn, tokens: neuron)


def sampled(levels: int) -> Spend:
    """Binomial(levels, neuron) / levels, drawn: what remains then depends on recorded actions alone."""
    def inside(neuron):
        """Away from 0 and 1, where a log-probability has no derivative."""
        return jnp.clip(neuron, 1e-6, 1 - 1e-6)

    def draw(neuron: Float[Array, ""], key: Array) -> Float[Array, ""]:
        uniform = jax.random.uniform(jax.random.fold_in(key, 1), (levels,))
        return (uniform < jnp.broadcast_to(inside(neuron), uniform.shape)).mean()

    def log_prob(neuron: Float[Array, ""], drawn: Float[Array, ""]) -> Float[Array, ""]:
        count, neuron = jnp.round(drawn * levels), inside(neuron)
        ways = gammaln(levels + 1.0) - gammaln(count + 1) - gammaln(levels - count + 1)
        return ways + xlogy(count, neuron) + xlog1py(levels - count, -neuron)

    return Spend(lambda neuron, drawn, tokens: drawn, draw, log_prob, lambda terms, allowance, remaining: allowance)


def greedy(levels: int) -> Spend:
    """All of the remaining budget."""
    del levels
    return Spend(lambda neuron, drawn, tokens: jnp.ones_like(neuron))


def uniform(levels: int) -> Spend:
    """An even share of the remaining budget for each token to come."""
    del levels

    def fraction(neuron: Float[Array, ""], drawn: Float[Array, ""], tokens: Int[Array, ""]) -> Float[Array, ""]:
        return 1 / tokens.astype(jnp.float32)

    return Spend(fraction)


LEDGERS = ("exact", "log_ratio")
"""What the ledger is charged: the exact KL of the token, or (`sampled_log_ratio`) the log-ratio of the drawn one."""


def sampled_log_ratio(terms, allowance, remaining) -> Float[Array, ""]:
    """log pi - log ref of the drawn token, of which what exceeds the remaining budget is forgiven; negative ones give
    nats back. The expected KL of an episode may exceed such a budget: it is not hard. Source: the code of Cohen et al.
    (2024)."""
    del allowance
    return jnp.minimum(terms.log_ratio, remaining)


SPENDS.register("neuron", neuron)
SPENDS.register("sampled", sampled, drawn=True)
SPENDS.register("greedy", greedy)
SPENDS.register("uniform", uniform)
