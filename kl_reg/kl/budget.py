r"""The hard KL budget: a policy that is *constructed* to stay inside a number of nats per episode.

At each agent token the base distribution is tilted towards the proposal, pi_alpha ∝ beta exp(alpha g) with
g = proposal logits - base logits, by the largest alpha in [0, 1] with D(pi_alpha || beta) <= allowance. The
allowance is a fraction of what is left of the budget (of the episode, and of caps on a turn and a token), and the exact
D is charged to a ledger. Against a semi-distribution of mass s there is a floor of -log s, which is charged too.

D is increasing in alpha, D'(alpha) = alpha Var_pi(g). Source: Cohen et al. (2024) for the budget, whose paper does not
say how the distribution is moved; the tilt is ours.
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kl_reg.kl.exact import reverse_kl

_EVALUATIONS = 40      # for adversarial proposals; on the embedded model 3 to 6 in the mean, 13 at most
_CLOSE = 1e-4          # stop when D is within this part below the allowance
_NUDGE = 4e-6          # aim that much short of the root, so that the point is feasible in float32


def tilt(gap: Float[Array, " v"], allowance: Float[Array, ""], log_base: Float[Array, " v"]) -> Float[Array, ""]:
    """The strength alpha in [0, 1] of the tilt; differentiable in `gap` and `allowance` (implicit function theorem).

    Zero where no alpha > 0 is feasible, one where the proposal itself is affordable; there, and without an allowance,
    the derivative is zero.

    Args:
        gap: proposal logits minus base logits, finite (`finite`).
        allowance: nats that this token may cost; infinite: no limit.
        log_base: normalised log-probabilities of the base, a constant.
    """
    return _tilt(gap, allowance, jax.lax.stop_gradient(log_base))


def finite(gap: Float[Array, " v"]) -> Float[Array, " v"]:
    """Infinite entries moved to +-1e15: tokens that the proposal forbids or insists on."""
    return jnp.nan_to_num(gap, nan=jnp.nan, posinf=1e15, neginf=-1e15)


@jax.custom_jvp
def _tilt(gap, allowance, log_base):
    return _solve(gap, allowance, log_base)[0]


@_tilt.defjvp
def _tilt_jvp(primals, tangents):
    gap, allowance, log_base = primals
    alpha, binds = _solve(gap, allowance, log_base)
    policy = jax.nn.softmax(log_base + alpha * gap)
    centred = gap - (policy * gap).sum()
    slope = alpha * (policy * centred**2).sum()                       # dD / dalpha
    by_gap = (alpha**2 * policy * centred * tangents[0]).sum()        # dD along the change of the gap
    safe = binds & (slope > 0)
    rate = jnp.where(safe, (tangents[1] - by_gap) / jnp.where(safe, slope, 1.0), 0.0)
    return alpha, rate


def _solve(gap, allowance, log_base):
    """(alpha, whether the allowance binds). Newton on sqrt(D), which is nearly linear in alpha, inside a bracket."""
    moments = lambda alpha: _divergence_and_variance(gap, alpha, log_base)  # noqa: E731
    whole, _ = moments(1.0)
    binds = ~(whole <= allowance)
    _, spread = moments(0.0)
    first = jnp.minimum(jnp.sqrt(2 * allowance / jnp.maximum(spread, 1e-30)), 1.0) * (1 - _NUDGE)

    def unfinished(state):
        low, _, _, at_low, count = state
        return binds & (allowance > 0) & (at_low < allowance * (1 - _CLOSE)) & (count < _EVALUATIONS)

    def step(state):
        low, high, alpha, at_low, count = state
        divergence, variance = moments(alpha)
        feasible = divergence <= allowance
        low, at_low = jnp.where(feasible, alpha, low), jnp.where(feasible, divergence, at_low)
        high = jnp.where(feasible, high, alpha)
        root = jnp.sqrt(divergence)
        newton = alpha - (root - jnp.sqrt(allowance)) * 2 * root / jnp.maximum(alpha * variance, 1e-30)
        newton = newton * (1 - _NUDGE)
        inside = (newton > low) & (newton < high)
        return low, high, jnp.where(inside, newton, 0.5 * (low + high)), at_low, count + 1

    zero = jnp.zeros_like(allowance)
    low, *_ = jax.lax.while_loop(unfinished, step, (zero, zero + 1, first, zero, 0))
    return jnp.where(binds, low, 1.0), binds & (low > 0)


def _divergence_and_variance(gap, alpha, log_base):
    log_policy = jax.nn.log_softmax(log_base + alpha * gap)
    policy = jnp.exp(log_policy)
    mean = (policy * gap).sum()
    return reverse_kl(log_policy, log_base), (policy * (gap - mean)**2).sum()


class Caps(NamedTuple):
    """Hard limits in nats: of the episode, of each turn of the agent, of each of its tokens; infinite: none."""

    episode: Float[Array, ...]
    turn: Float[Array, ...]
    token: Float[Array, ...]


class Ledger(NamedTuple):
    """What was charged so far, nats, in the episode and in the agent's present turn, with what carrying over counts."""

    spent: Float[Array, ...]
    in_turn: Float[Array, ...]
    turn: Int[Array, ...]          # the transcript's number of the present turn
    turns: Float[Array, ...]       # of the agent, the present one included
    tokens: Float[Array, ...]      # of the agent, before the present one


def open_ledger(shape: tuple[int, ...]) -> Ledger:
    """Nothing spent."""
    zero = jnp.zeros(shape)
    return Ledger(zero, zero, jnp.full(shape, -1, jnp.int32), zero, zero)


def enter(ledger: Ledger, turn: Int[Array, ...]) -> Ledger:
    """The ledger at a token of the agent in that turn."""
    new = turn != ledger.turn
    return ledger._replace(in_turn=jnp.where(new, 0.0, ledger.in_turn), turn=turn,
                           turns=jnp.where(new, ledger.turns + 1, ledger.turns))


def left(caps: Caps, ledger: Ledger, carry: bool) -> Float[Array, ...]:
    """Nats that the present token may cost; never negative.

    Args:
        carry: what a turn or a token leaves of its cap is added to the later ones'.
    """
    turn, token = caps.turn - ledger.in_turn, caps.token
    if carry:
        turn = caps.turn * ledger.turns - ledger.spent
        token = caps.token * (ledger.tokens + 1) - ledger.spent
    return jnp.maximum(jnp.minimum(jnp.minimum(caps.episode - ledger.spent, turn), token), 0.0)


def part_left(caps: Caps, ledger: Ledger, nats: Float[Array, ...]) -> Float[Array, ...]:
    """Of the episode's budget, where it has one; else `nats`, of `left`, over the smallest other limit. In [0, 1]."""
    whole = jnp.where(jnp.isfinite(caps.episode), caps.episode, jnp.minimum(caps.turn, caps.token))
    rest = jnp.where(jnp.isfinite(caps.episode), caps.episode - ledger.spent, nats)
    some = jnp.isfinite(whole) & (whole > 0)
    return jnp.where(some, jnp.clip(rest / jnp.where(some, whole, 1.0), 0.0, 1.0), 0.0)


def charge(ledger: Ledger, nats: Float[Array, ...], own: Bool[Array, ...]) -> Ledger:
    """The ledger behind a token that cost `nats`, where it is the agent's `own`."""
    nats = jnp.where(own, nats, 0.0)
    return ledger._replace(spent=ledger.spent + nats, in_turn=ledger.in_turn + nats,
                           tokens=jnp.where(own, ledger.tokens + 1, ledger.tokens))
