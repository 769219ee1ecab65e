"""One token of the agent: from readings of policy and reference to the distribution it is drawn from, and its cost.

Sampler and scorer both read this, so that what is trained is what was sampled. Pure functions of one row; `program` is
static (`kl_reg.training.program.Program`).
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, xlog1py, xlogy
from jaxtyping import Array, Float, Int, UInt8

from kl_reg.kl.budget import finite, tilt
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.kl.spends import SPENDS
from kl_reg.references.interface import Measure


class Choice(NamedTuple):
    """The distribution of one token: the policy's logits, and the reference's log-probabilities on the tokens that can
    be drawn. `allowance` is what the budget lets it cost above the floor, nats."""

    logits: Float[Array, " v"]
    log_ref: Float[Array, " v"]
    floor: Float[Array, ""]
    allowance: Float[Array, ""]


def constrain(program, measure: Measure, kept: UInt8[Array, " w"] | None, left: Float[Array, ""],
              part: Float[Array, ""]) -> Choice:
    """With a budget, the proposal is tilted so far that the token costs `part` of what is left above the floor.

    Args:
        kept: the tokens that can be drawn, a bit each (`pack`); None: all.
        left: nats that the budget has left for this token.
    """
    log_ref, gap = measure.log_probs, measure.gap
    if kept is not None:
        keep = jnp.unpackbits(kept, count=len(log_ref)).astype(bool)
        log_ref, gap = truncate(log_ref, keep), jnp.where(keep, gap, 0.0)
    if not program.constrained:
        return Choice(log_ref + gap, log_ref, measure.floor, jnp.zeros(()))
    allowance, gap = part * jnp.maximum(left - measure.floor, 0.0), finite(gap)
    return Choice(log_ref + tilt(gap, allowance, log_ref) * gap, log_ref, measure.floor, allowance)


def pack(program, log_probs: Float[Array, " v"]) -> UInt8[Array, " w"] | None:
    """The tokens that the reference lets through, a bit each; None where nothing is truncated."""
    return jnp.packbits(program.sampling.keep(log_probs)) if program.sampling.truncates else None


def truncate(log_probs: Float[Array, " v"], keep) -> Float[Array, " v"]:
    """Renormalised on the tokens to keep."""
    return jax.nn.log_softmax(jnp.where(keep, log_probs, -jnp.inf))


def student_log_probs(program, logits: Float[Array, " v"]) -> Float[Array, " v"]:
    """The student as it is sampled."""
    log_probs = jax.nn.log_softmax(logits / program.sampling.temperature)
    return truncate(log_probs, program.sampling.keep(log_probs)) if program.sampling.truncates else log_probs


def terms_of(program, choice: Choice, action: Int[Array, ""]) -> tuple[TokenTerms, Float[Array, ""]]:
    """What a token is to training, the reference's floor included; and what the ledger is charged for it, nats."""
    terms = token_terms(choice.logits, choice.log_ref, action, program.kl.config.direction == "forward")
    terms = terms._replace(log_ratio=terms.log_ratio + choice.floor, kl=terms.kl + choice.floor)
    return terms, choice.allowance + choice.floor if SPENDS[program.spend].drawn else terms.kl


def _inside(spend):
    """Away from 0 and 1, where a log-probability has no derivative."""
    return jnp.clip(spend, 1e-6, 1 - 1e-6)


def draw_part(program, spend: Float[Array, ""], key: Array) -> Float[Array, ""]:
    """The part of the budget as an action: Binomial(levels, spend) / levels; 0 where it is none."""
    if not SPENDS[program.spend].drawn:
        return jnp.zeros_like(spend)
    uniform = jax.random.uniform(jax.random.fold_in(key, 1), (program.levels,))
    return (uniform < jnp.broadcast_to(_inside(spend), uniform.shape)).mean()


def part_log_prob(program, spend: Float[Array, ""], drawn: Float[Array, ""]) -> Float[Array, ""]:
    """log-probability of that action."""
    if not SPENDS[program.spend].drawn:
        return jnp.zeros_like(spend)
    count, spend = jnp.round(drawn * program.levels), _inside(spend)
    ways = gammaln(program.levels + 1.0) - gammaln(count + 1) - gammaln(program.levels - count + 1)
    return ways + xlogy(count, spend) + xlog1py(program.levels - count, -spend)


def part_of(program, spend: Float[Array, ""], drawn: Float[Array, ""], position: Int[Array, ""]) -> Float[Array, ""]:
    """The part of what is left that the token may cost.

    Args:
        spend: the budget neuron.
        drawn: of `draw_part`.
        position: tokens of the episode before this one, whoever wrote them.
    """
    return SPENDS[program.spend].fraction(spend, drawn, jnp.maximum(program.env.length - position, 1))
