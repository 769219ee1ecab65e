r"""How a budget moves the reference beta towards a proposal: by a strength alpha in [0, 1], the largest whose KL to
beta the allowance admits.

`tilt`: pi \propto beta exp(alpha g), g = proposal logits - base logits. Of all policies with the same mean of g it has
the least KL; D'(alpha) = alpha Var_pi(g). It is ours: the paper does not say how the distribution is moved.

`mixture`: x = alpha a + (1 - alpha) beta, a the proposal; D'(alpha) = \sum (a - beta) log(x / beta). It is what the
code of the paper's authors does. Source: Cohen et al. (2024), "RL, but don't do anything I wouldn't do".

D is increasing in alpha in both. The derivative of alpha is implicit, not unrolled; it is zero where the proposal
itself is affordable, where no alpha > 0 is feasible, and without an allowance.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.kl.exact import divergence, normalise
from kl_reg.registry import Registry

OPERATIONS = Registry("kl.operation")
"""Functions (log_base [v], gap [v], allowance [], start []) -> `Moved`, whose softmax has D <= allowance (1 + 1e-5).
`start` is a guess of the strength, as what it was when the token was sampled; 0: none. The result does not depend on it
but for less than what D may be below the allowance."""

_EVALUATIONS = 40      # for adversarial proposals; those of a language model take 1 to 7
_CLOSE = 1e-4          # stop when D is within this part below the allowance
_RESOLVED = 2.0**-22   # or when the bracket holds no more than a few numbers of float32
_LEAST = 1e-12         # nats; no smaller D can be told from the rounding of logits
_ROUNDING = 2.0**-23   # of a logit, relative to its summands
_NOTHING = 1e-30       # of what a mixture leaves of a token's probability where the proposal forbids it


class Moved(NamedTuple):
    """The logits between the reference's and the proposal's, and their strength alpha, a constant."""

    logits: Float[Array, " v"]
    strength: Float[Array, ""]


def tilt(gap: Float[Array, " v"], allowance: Float[Array, ""], log_base: Float[Array, " v"],
         start: Float[Array, ""] | float = 0.0) -> Float[Array, ""]:
    """The strength alpha in [0, 1] of the tilt; differentiable in `gap` and `allowance` (implicit function theorem).

    The softmax of `log_base + alpha * gap`, however float32 rounds these logits, has D <= allowance (1 + 1e-5); where
    their rounding is worth a part of the allowance, alpha stays that far below the root.

    Zero where no alpha > 0 is feasible, one where the proposal itself is affordable; there, and without an allowance,
    the derivative is zero.

    Args:
        gap: proposal logits minus base logits, finite (`finite`).
        allowance: nats that this token may cost; infinite: no limit.
        log_base: normalised log-probabilities of the base, a constant.
        start: a guess of the strength, tried first; 0: none.
    """
    chex.assert_equal_shape([gap, log_base])
    return _tilt(gap, allowance, *jax.lax.stop_gradient((log_base, jnp.float32(start))))


def finite(gap: Float[Array, " v"]) -> Float[Array, " v"]:
    """Infinite entries moved to +-1e15: tokens that the proposal forbids or insists on."""
    return jnp.nan_to_num(gap, nan=jnp.nan, posinf=1e15, neginf=-1e15)


def tilted(log_base: Float[Array, " v"], gap: Float[Array, " v"], allowance: Float[Array, ""],
           start: Float[Array, ""] | float = 0.0) -> Moved:
    """The logits log_base + alpha gap of the tilt that the allowance admits; `gap` may be infinite (`finite`)."""
    gap = finite(gap)
    alpha = tilt(gap, allowance, log_base, start)
    return Moved(log_base + alpha * gap, jax.lax.stop_gradient(alpha))


def mixed(log_base: Float[Array, " v"], gap: Float[Array, " v"], allowance: Float[Array, ""],
          start: Float[Array, ""] | float = 0.0) -> Moved:
    """The logits log(alpha a + (1 - alpha) beta) of the mixture that the allowance admits; `gap` may be infinite
    (`finite`). Where the proposal forbids a token, at least 1e-30 of beta's probability stays."""
    chex.assert_equal_shape([gap, log_base])
    ratio = _log_proposal_ratio(finite(gap), log_base)
    alpha = _mix(ratio, allowance, *jax.lax.stop_gradient((log_base, jnp.float32(start))))
    return Moved(log_base + _mixed_ratio(ratio, alpha), jax.lax.stop_gradient(alpha))


OPERATIONS.register("tilt", tilted)
OPERATIONS.register("mixture", mixed)


@jax.custom_jvp
def _tilt(gap, allowance, log_base, start):
    return _tilt_strength(gap, allowance, log_base, start)[0]


@_tilt.defjvp
def _tilt_jvp(primals, tangents):
    gap, _, log_base, _ = primals
    alpha, binds = _tilt_strength(*primals)
    policy = jax.nn.softmax(log_base + alpha * gap)
    centred = gap - (policy * gap).sum()
    slope = alpha * (policy * centred**2).sum()                       # dD / dalpha
    by_gap = (alpha**2 * policy * centred * tangents[0]).sum()        # dD along the change of the gap
    return alpha, _rate(binds, slope, tangents[1] - by_gap)


def _tilt_strength(gap, allowance, log_base, start):
    """(alpha, whether the allowance binds)."""
    base = jnp.exp(log_base)
    return _solve(lambda alpha: _tilt_cost(gap, alpha, log_base, base), allowance, start)


def _tilt_cost(gap, alpha, log_base, base):
    """(D as `_charged` has it, its derivative by log alpha) of the tilt."""
    charged, unsure, policy = _charged(alpha * gap, log_base, base)
    mean = (policy * gap).sum()
    return charged, (policy * (alpha * (gap - mean))**2).sum() + unsure


def _log_proposal_ratio(gap, log_base):
    """log(a / beta) of the proposal a, proportional to beta e^gap; what all tokens share is taken from the gap first,
    so that gaps of 1e15 keep their digits."""
    possible = log_base > -jnp.inf
    shifted = gap - jax.lax.stop_gradient(jnp.where(possible, gap, -jnp.inf).max())
    return jnp.where(possible, shifted - jax.nn.logsumexp(jnp.where(possible, log_base + shifted, -jnp.inf)), 0.0)


def _mixed_ratio(ratio, alpha):
    """log(x / beta) = log(1 + alpha (e^ratio - 1)): by log1p where that is near 0, else without an overflow."""
    change = alpha * jnp.expm1(jnp.minimum(ratio, 80.0))
    near = jnp.abs(change) < 0.5
    far = jnp.where(near, 1.0, ratio)
    top = jnp.maximum(far, 0.0)
    total = (1 - alpha) * jnp.exp(-top) + alpha * jnp.exp(far - top)
    return jnp.where(near, jnp.log1p(jnp.where(near, change, 0.0)), top + jnp.log(jnp.maximum(total, _NOTHING)))


@jax.custom_jvp
def _mix(ratio, allowance, log_base, start):
    return _mix_strength(ratio, allowance, log_base, start)[0]


@_mix.defjvp
def _mix_jvp(primals, tangents):
    """dD along a change of the proposal is alpha sum a log(x / beta) (d ratio): a's derivative is a d ratio."""
    ratio, _, log_base, _ = primals
    alpha, binds = _mix_strength(*primals)
    base, log_ratio = jnp.exp(log_base), _mixed_ratio(ratio, alpha)
    proposal = jnp.exp(jnp.minimum(log_base + ratio, 0.0))
    slope = ((proposal - base) * log_ratio).sum()                     # dD / dalpha
    by_ratio = (alpha * proposal * log_ratio * tangents[0]).sum()
    return alpha, _rate(binds, slope, tangents[1] - by_ratio)


def _mix_strength(ratio, allowance, log_base, start):
    """(alpha, whether the allowance binds)."""
    base, proposal = jnp.exp(log_base), jnp.exp(jnp.minimum(log_base + ratio, 0.0))
    return _solve(lambda alpha: _mix_cost(ratio, alpha, log_base, base, proposal), allowance, start)


def _mix_cost(ratio, alpha, log_base, base, proposal):
    """(D as `_charged` has it, its derivative by log alpha) of the mixture."""
    change = _mixed_ratio(ratio, alpha)
    charged, unsure, _ = _charged(change, log_base, base)
    return charged, alpha * ((proposal - base) * change).sum() + unsure


def _charged(change, log_base, base):
    """(D(pi || beta) with the worst rounding of the logits added, that rounding, pi) of the logits log_base + change.

    D is the expression that is charged (`kl.exact`), but of logits that are computed elsewhere: whether a product is
    rounded before the sum is the compiler's choice. To first order, rounding changes D by at most the sum of
    pi |L - D| times the rounding of each logit.
    """
    logits = log_base + change
    policy, _, log_ratio = normalise(logits, log_base)
    exact = divergence(policy, log_ratio, base)
    rounding = jnp.minimum(_ROUNDING * (jnp.abs(change) + jnp.abs(logits)), 1.0)
    unsure = jnp.where(policy > 0, policy * jnp.abs(log_ratio - exact) * rounding, 0.0).sum()
    return exact + unsure, unsure, policy


def _rate(binds, slope, change):
    """The change of alpha along which D stays at the allowance, which itself changes by `change` beyond D; 0 where the
    allowance does not bind. `slope` is dD / dalpha."""
    safe = binds & (slope > 0)
    return jnp.where(safe, change / jnp.where(safe, slope, 1.0), 0.0)


def _solve(cost: Callable, allowance, start):
    """(alpha, whether the allowance binds). The guess `start` is tried first, and where there is none the proposal
    itself; where that does not settle it, Newton on sqrt(D), which is nearly linear in alpha, inside a bracket. A step
    that leaves the bracket goes to its geometric middle instead; while no feasible alpha is known its lower end falls
    faster and faster, so that gaps of 1e15 take few steps as well.

    Args:
        cost: alpha -> (D with the worst rounding of the logits added, its derivative by log alpha).
    """
    aim = allowance * (1 - _CLOSE / 4)

    def unfinished(state):
        low, high, _, at_low, count = state
        apart = (at_low < allowance * (1 - _CLOSE)) & (low < high * (1 - _RESOLVED))
        return (count == 0) | (low < 1) & (allowance > _LEAST) & apart & (count < _EVALUATIONS)

    def step(state):
        low, high, alpha, at_low, count = state
        divergence, rise = cost(alpha)
        feasible, root = divergence <= allowance, jnp.sqrt(divergence)
        low, at_low = jnp.where(feasible, alpha, low), jnp.where(feasible, divergence, at_low)
        high = jnp.where(feasible, high, alpha)
        newton = alpha * (1 - (root - jnp.sqrt(aim)) * 2 * root / jnp.maximum(rise, 1e-30))
        newton = jnp.where(alpha < 1, newton, jnp.sqrt(aim) / jnp.maximum(root, 1e-30))     # from the proposal: a line
        known, top = high <= 1, jnp.minimum(high, 1.0)
        bottom = jnp.where(low > 0, low, top * 16.0 ** -(count + 1.0))
        inside = (newton > low) & ((newton < high) | ~known)
        alpha = jnp.where(inside, jnp.minimum(newton, 1.0), jnp.sqrt(bottom) * jnp.sqrt(top)).astype(low.dtype)
        return low, high, alpha, at_low, count + 1

    zero = jnp.zeros_like(allowance)
    guess = jnp.where((start > 0) & (start < 1), start, 1.0).astype(zero.dtype)
    alpha, *_ = jax.lax.while_loop(unfinished, step, (zero, zero + 2, guess, zero, 0))
    return alpha, (alpha > 0) & (alpha < 1)
