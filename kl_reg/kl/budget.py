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

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kl_reg.kl.exact import divergence, exact_sum, normalise

_EVALUATIONS = 40      # for adversarial proposals; those of a language model take 1 to 7
_CLOSE = 1e-4          # stop when D is within this part below the allowance
_RESOLVED = 2.0**-22   # or when the bracket holds no more than a few numbers of float32
_LEAST = 1e-12         # nats; no smaller D can be told from the rounding of logits
_ROUNDING = 2.0**-23   # of a logit, relative to its summands


def tilt(gap: Float[Array, " v"], allowance: Float[Array, ""], log_base: Float[Array, " v"]) -> Float[Array, ""]:
    """The strength alpha in [0, 1] of the tilt; differentiable in `gap` and `allowance` (implicit function theorem).

    The softmax of `log_base + alpha * gap`, however float32 rounds these logits, has D <= allowance (1 + 1e-5); where
    their rounding is worth a part of the allowance, alpha stays that far below the root.

    Zero where no alpha > 0 is feasible, one where the proposal itself is affordable; there, and without an allowance,
    the derivative is zero.

    Args:
        gap: proposal logits minus base logits, finite (`finite`).
        allowance: nats that this token may cost; infinite: no limit.
        log_base: normalised log-probabilities of the base, a constant.
    """
    chex.assert_equal_shape([gap, log_base])
    return _tilt(gap, allowance, jax.lax.stop_gradient(log_base))


def tilted(log_base: Float[Array, " v"], gap: Float[Array, " v"], allowance: Float[Array, ""]) -> Float[Array, " v"]:
    """The logits log_base + alpha gap of the tilt that the allowance admits; `gap` may be infinite (`finite`)."""
    gap = finite(gap)
    return log_base + tilt(gap, allowance, log_base) * gap


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
    """(alpha, whether the allowance binds). Newton on sqrt(D), which is nearly linear in alpha, inside a bracket.

    A step that leaves the bracket goes to its geometric middle instead. While no feasible alpha is known, the bracket
    starts at D <= alpha max(g - E_beta g), so that gaps of 1e15 take few steps as well.
    """
    base = jnp.exp(log_base)
    binds = ~(_evaluate(gap, 1.0, log_base, base)[0] <= allowance)
    centred = gap - (base * gap).sum()
    first = jnp.minimum(jnp.sqrt(2 * allowance / jnp.maximum((base * centred**2).sum(), 1e-30)), 1.0)
    largest = jnp.where(log_base > -jnp.inf, centred, 0.0).max()
    surely = jnp.minimum(allowance / jnp.maximum(largest, 1e-30), 1.0)
    aim, zero = allowance * (1 - _CLOSE / 4), jnp.zeros_like(allowance)

    def unfinished(state):
        low, high, _, at_low, count = state
        apart = (at_low < allowance * (1 - _CLOSE)) & (low < high * (1 - _RESOLVED))
        return binds & (allowance > _LEAST) & apart & (count < _EVALUATIONS)

    def step(state):
        low, high, alpha, at_low, count = state
        divergence, rise = _evaluate(gap, alpha, log_base, base)
        feasible = divergence <= allowance
        low, at_low = jnp.where(feasible, alpha, low), jnp.where(feasible, divergence, at_low)
        high = jnp.where(feasible, high, alpha)
        root = jnp.sqrt(divergence)
        newton = alpha * (1 - (root - jnp.sqrt(aim)) * 2 * root / jnp.maximum(rise, 1e-30))
        bottom = jnp.where(low > 0, low, jnp.minimum(surely, high) / 16)
        inside = (newton > low) & (newton < high)
        return low, high, jnp.where(inside, newton, jnp.sqrt(bottom) * jnp.sqrt(high)), at_low, count + 1

    low, *_ = jax.lax.while_loop(unfinished, step, (zero, zero + 1, first, zero, 0))
    return jnp.where(binds, low, 1.0), binds & (low > 0)


def _evaluate(gap, alpha, log_base, base):
    """(D(pi_alpha || beta), its derivative by log alpha), where D has the worst rounding of the logits added.

    D is the expression that is charged (`kl.exact`), but of logits that are computed elsewhere: whether a product is
    rounded before the sum is the compiler's choice. To first order, rounding changes D by at most the sum of
    pi |L - D| times the rounding of each logit.
    """
    change = alpha * gap
    logits = log_base + change
    policy, _, log_ratio = normalise(logits, log_base)
    exact = divergence(policy, log_ratio, base)
    rounding = jnp.minimum(_ROUNDING * (jnp.abs(change) + jnp.abs(logits)), 1.0)
    unsure = jnp.where(policy > 0, policy * jnp.abs(log_ratio - exact) * rounding, 0.0).sum()
    mean = (policy * gap).sum()
    return exact + unsure, (policy * (alpha * (gap - mean))**2).sum() + unsure


class Caps(NamedTuple):
    """Hard limits in nats: of the episode, of each turn of the agent, of each of its tokens; infinite: none."""

    episode: Float[Array, ...]
    turn: Float[Array, ...]
    token: Float[Array, ...]


class Ledger(NamedTuple):
    """What was charged so far, nats, in the episode and in the agent's present turn, with what carrying over counts."""

    spent: Float[Array, ...]
    in_turn: Float[Array, ...]
    spent_rest: Float[Array, ...]      # what float32 left out of the two sums: thousands of small charges count
    in_turn_rest: Float[Array, ...]
    turn: Int[Array, ...]          # the transcript's number of the present turn
    turns: Float[Array, ...]       # of the agent, the present one included
    tokens: Float[Array, ...]      # of the agent, before the present one


def open_ledger(shape: tuple[int, ...]) -> Ledger:
    """Nothing spent."""
    zero = jnp.zeros(shape)
    return Ledger(zero, zero, zero, zero, jnp.full(shape, -1, jnp.int32), zero, zero)


def enter(ledger: Ledger, turn: Int[Array, ...]) -> Ledger:
    """The ledger at a token of the agent in that turn."""
    new = turn != ledger.turn
    return ledger._replace(in_turn=jnp.where(new, 0.0, ledger.in_turn),
                           in_turn_rest=jnp.where(new, 0.0, ledger.in_turn_rest), turn=turn,
                           turns=jnp.where(new, ledger.turns + 1, ledger.turns))


def left(caps: Caps, ledger: Ledger, carry: bool) -> Float[Array, ...]:
    """Nats that the present token may cost; never negative.

    Args:
        carry: what a turn or a token leaves of its cap is added to the later ones'.
    """
    def after(cap):
        return cap - ledger.spent - ledger.spent_rest

    turn, token = caps.turn - ledger.in_turn - ledger.in_turn_rest, caps.token
    if carry:
        turn, token = after(caps.turn * ledger.turns), after(caps.token * (ledger.tokens + 1))
    return jnp.maximum(jnp.minimum(jnp.minimum(after(caps.episode), turn), token), 0.0)


def part_left(caps: Caps, ledger: Ledger, nats: Float[Array, ...]) -> Float[Array, ...]:
    """Of the episode's budget, where it has one; else `nats`, of `left`, over the smallest other limit. In [0, 1]."""
    whole = jnp.where(jnp.isfinite(caps.episode), caps.episode, jnp.minimum(caps.turn, caps.token))
    rest = jnp.where(jnp.isfinite(caps.episode), caps.episode - ledger.spent, nats)
    some = jnp.isfinite(whole) & (whole > 0)
    return jnp.where(some, jnp.clip(rest / jnp.where(some, whole, 1.0), 0.0, 1.0), 0.0)


def charge(ledger: Ledger, nats: Float[Array, ...], own: Bool[Array, ...]) -> Ledger:
    """The ledger behind a token that cost `nats`, where it is the agent's `own`."""
    nats = jnp.where(own, nats, 0.0)
    spent, spent_rest = exact_sum(ledger.spent, nats + ledger.spent_rest)
    in_turn, in_turn_rest = exact_sum(ledger.in_turn, nats + ledger.in_turn_rest)
    return ledger._replace(spent=spent, in_turn=in_turn, spent_rest=spent_rest, in_turn_rest=in_turn_rest,
                           tokens=jnp.where(own, ledger.tokens + 1, ledger.tokens))
