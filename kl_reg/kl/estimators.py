r"""What a KL penalty is made of, where it acts, and what that descends.

L = log pi(a) - log beta(a) with a drawn from pi. D(pi || beta) is the *reverse* direction ("KL to the base" in this
field), D(beta || pi) the *forward* one. The estimators of the latter use the same samples, weighted by
\rho = e^{-L} = beta / pi: they are \rho k(-L), the reverse estimator k with the roles exchanged. An estimator's *value*
and what it *descends* are two facts, and the second depends on where it is put; each is stated here and checked against
enumeration.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kl_reg.kl.exact import TokenTerms
from kl_reg.registry import Registry

ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "abs": "absolute", "full": "exact"}
"""Names that other trainers give to the same formulas."""

DIRECTIONS, PLACEMENTS, REDUCTIONS = ("reverse", "forward"), ("reward", "loss", "full"), ("token", "sequence")

NOTHING = "nothing"
EPISODE = "D(pi || beta) of the whole episode, its effect on later tokens included"
TOKEN = "D(pi || beta) of each token at the states that pi visits; its effect on later tokens is left out"
EPISODE_FORWARD = "D(beta || pi) of the whole episode"
TOKEN_FORWARD = "D(beta || pi) of each token at the states that pi visits; its effect on later tokens is left out"
VISITED_FORWARD = "the sum of D(beta || pi) over the states that pi visits, its effect on later states included"
VARIATION = "the L1 distance of pi and beta, twice their total variation, in place of the KL"
SQUARES = "E_beta[L^2] / 2 in place of the KL"
MIXED = "E_beta[L^2] / 2 on top of D(beta || pi)"
PATHWISE = "the pathwise part of its value alone, which is no divergence's gradient"
SCORE = "the gradient of its value without the pathwise part"
HELD = ", the drawn budget fractions held"
"""Added to what a combination descends where the policy's log-probability of the fractions gets no gradient from it."""


class Effect(NamedTuple):
    """What the expected gradient descends, and why the combination is refused ("": it is sound).

    On-policy, undiscounted, advantages not biased by a value function: PPO's clip, later epochs and lambda < 1 trade
    some of that for variance, as they do with the reward.
    """

    descends: str
    refused: str = ""


class Value(NamedTuple):
    """What an estimator's value says of the divergence in its direction, tokens drawn from pi."""

    unbiased: bool
    non_negative: bool


class Estimator(NamedTuple):
    """`of_ratio` is k(L), elementwise; None: exact, from the whole vocabulary.

    `weighted` multiplies by pi / pi_old, differentiated: the gradient is then that of the expected value. `effects` is
    keyed by (direction, placement, reduction); what has no entry does not exist. `inverse_ratio` is the factor of
    e^{-L} in k(L): its mean falls short of 1 by the missing mass of a semi-distribution, and that many times this mass
    is added to the value. None: not stated, so only for proper references.
    """

    of_ratio: Callable | None
    value: Value
    effects: dict[tuple[str, str, str], Effect]
    weighted: bool = False
    inverse_ratio: float | None = None

    def effect(self, config: KLConfig) -> Effect | None:
        """The effect of that configuration; None: the combination does not exist.

        Where the budget fraction is drawn too, it decides what D_t is, so a penalty has a gradient in the fraction's
        log-probability. The reward reaches it, and so does a loss that is weighted with pi / pi_old; any other loss
        holds the fractions as they were drawn.
        """
        effect = self.effects.get((config.direction, config.placement, config.reduction))
        held = config.drawn and config.placement == "loss" and self.of_ratio is not None and not self.weighted
        if effect is None or not held or effect.descends == NOTHING:
            return effect
        return Effect(effect.descends + HELD, effect.refused or (
            "gives no gradient to the log-probability of the budget fraction, which kl.spend draws and which decides "
            "the token's KL"))


ESTIMATORS = Registry("kl.estimator", Estimator)

@dataclasses.dataclass(frozen=True)
class KLConfig:
    """How the KL is penalised; hashable. `temperature` is the sampling temperature that it counts at, of pi and beta.

    `reduction`: the estimator of each token, or of the sequence's summed L. `allow_biased` accepts what is refused.
    `drawn`: whether each token's budget fraction is an action beside it (`kl_reg.kl.spends`). KL is then that of the
    token given the fraction, and policies draw both.
    """

    direction: str = "reverse"
    estimator: str | int = "exact"
    placement: str = "full"
    reduction: str = "token"
    temperature: float = 1.0
    allow_biased: bool = False
    drawn: bool = False


class KL(NamedTuple):
    """One object for penalty, log, controller and report, built by `build`. All over one stream [k], nats.

    reward(terms, missing, mask): subtracted from the reward, times the coefficient.
    loss(terms, missing, weight, mask): added to the loss, times the coefficient; weight = pi / pi_old.
    value(terms, missing): the estimate of each token, as the log shows it; any shape.
    exact(terms): the divergence itself of each token, in the same direction: what controllers read; any shape.
    exact_in_loss: whether `loss` has a gradient in it.
    `missing` is the mass that a semi-distribution lacks, 0 for a proper reference.
    """

    config: KLConfig
    effect: Effect
    reward: Callable
    loss: Callable
    value: Callable
    exact: Callable
    exact_in_loss: bool

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The terms of a token that a loss may depend on; and in the forward direction its KL, which controllers and
        metrics read, and which is computed only if it is named."""
        exact = ("forward_kl",) if self.config.direction == "forward" else ("kl",) * self.exact_in_loss
        return "log_prob", "entropy", *exact

    def label(self) -> str:
        """For plots: what is penalised, where, and a warning where it is not sound."""
        c = self.config
        text = f"{c.estimator} {c.direction} KL, {c.placement}" + ", whole sequence" * (c.reduction == "sequence")
        text += f", temperature {c.temperature:g}" * (c.temperature != 1)
        return text + f" [biased: descends {self.effect.descends}]" * bool(self.effect.refused)


def k1(log_ratio: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """L. Source: Schulman (2020), "Approximating KL divergence", as k2 and k3."""
    return log_ratio


def k2(log_ratio: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """L^2 / 2: biased by the third moment of L."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """e^{-L} - 1 + L, finite for L above -88; a series near 0, where the difference would lose its digits."""
    near = jnp.abs(log_ratio) < 0.1
    small = jnp.where(near, log_ratio, 0.0)
    series = small**2 * (1 / 2 - small * (1 / 6 - small * (1 / 24 - small / 120)))
    return jnp.where(near, series, jnp.expm1(-log_ratio) + log_ratio)


def absolute(log_ratio: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """|L|: its mean is at least the KL. Its derivative at 0 is 0, where that of `jnp.abs` is 1."""
    return jnp.maximum(log_ratio, -log_ratio)


def _effects(rows):
    """From (directions, placements, reductions) -> Effect rows to single keys."""
    return {(d, p, r): effect for (ds, ps, rs), effect in rows.items()
            for d in ds.split() for p in ps.split() for r in rs.split()}


_EITHER = "token sequence"
_IN_REWARD = Effect(SCORE, "lacks the part of its gradient that goes through its value: in the reward only k1 is right")

ESTIMATORS.register("k1", Estimator(k1, Value(True, False), _effects({
    ("reverse", "reward", _EITHER): Effect(EPISODE),
    ("reverse", "loss", _EITHER): Effect(NOTHING, "has zero expected gradient, because E_pi[grad log pi] = 0"),
    ("forward", "reward", _EITHER): _IN_REWARD,
    ("forward", "loss", _EITHER): Effect(MIXED, "descends D(beta || pi) and E_beta[L^2] / 2 at once")}),
    inverse_ratio=0.0))
ESTIMATORS.register("k2", Estimator(k2, Value(False, True), _effects({
    ("reverse", "loss", "token"): Effect(TOKEN),
    ("reverse", "loss", "sequence"): Effect(EPISODE),
    ("reverse forward", "reward", _EITHER): _IN_REWARD,
    ("forward", "loss", _EITHER): Effect(PATHWISE, "descends no divergence")}), inverse_ratio=0.0))
ESTIMATORS.register("k3", Estimator(k3, Value(True, True), _effects({
    ("reverse", "loss", "token"): Effect(TOKEN_FORWARD),
    ("reverse", "loss", "sequence"): Effect(EPISODE_FORWARD),
    ("reverse forward", "reward", _EITHER): _IN_REWARD,
    ("forward", "loss", _EITHER): Effect(SQUARES, "descends E_beta[L^2] / 2, not D(beta || pi)")}),
    inverse_ratio=1.0))
ESTIMATORS.register("k3_weighted", Estimator(k3, Value(True, True), _effects({
    ("reverse", "loss", "token"): Effect(TOKEN),
    ("reverse", "loss", "sequence"): Effect(EPISODE),
    ("forward", "loss", "token"): Effect(TOKEN_FORWARD),
    ("forward", "loss", "sequence"): Effect(EPISODE_FORWARD),
    ("reverse forward", "reward", _EITHER): _IN_REWARD}), weighted=True, inverse_ratio=1.0))
ESTIMATORS.register("absolute", Estimator(absolute, Value(False, True), _effects({
    ("reverse", "loss", _EITHER): Effect(VARIATION, "descends the total variation, not the KL"),
    ("forward", "loss", _EITHER): Effect(PATHWISE, "descends no divergence"),
    ("reverse forward", "reward", _EITHER): _IN_REWARD}), inverse_ratio=0.0))
ESTIMATORS.register("exact", Estimator(None, Value(True, True), _effects({
    ("reverse", "full", "token"): Effect(EPISODE),
    ("reverse", "loss", "token"): Effect(TOKEN),
    ("forward", "full", "token"): Effect(VISITED_FORWARD),
    ("forward", "loss", "token"): Effect(TOKEN_FORWARD),
    ("reverse forward", "reward", "token"): Effect(
        SCORE, "gives the token no gradient of its KL, because D_t does not depend on which token is drawn")}),
    inverse_ratio=0.0))


def canonical(estimator: str | int) -> str:
    """The name here of what another trainer may call otherwise.

    Raises:
        ValueError: a number, which trainers count differently, or an unknown name.
    """
    if not isinstance(estimator, str) or estimator.strip().isdigit():
        raise ValueError(f"kl.estimator={estimator!r} is ambiguous: write the name, one of "
                         f"{', '.join(ESTIMATORS.names())}")
    name = ALIASES.get(estimator, estimator)
    ESTIMATORS[name]  # noqa: B018 - raises for an unknown name
    return name


def build(config: KLConfig) -> KL:
    """The KL object of that configuration.

    Raises:
        ValueError: an unknown name, or a combination with no, wrong or double effect (accepted with `allow_biased`), or
            one that does not exist; says why and what is sound.
    """
    for name, choices in (("direction", DIRECTIONS), ("placement", PLACEMENTS), ("reduction", REDUCTIONS)):
        if getattr(config, name) not in choices:
            raise ValueError(f"kl.{name}={getattr(config, name)!r} is unknown; choose one of {', '.join(choices)}")
    config = dataclasses.replace(config, estimator=canonical(config.estimator))
    estimator = ESTIMATORS[config.estimator]
    exists = estimator.effect(config)
    effect = exists or Effect(NOTHING, "does not exist: " + _why_missing(estimator, config))
    if effect.refused and not (config.allow_biased and exists):
        biased = ", or kl.allow_biased=True to have it all the same" * (exists is not None)
        raise ValueError(f"kl.estimator={config.estimator!r} with kl.placement={config.placement!r}, direction "
                         f"{config.direction!r}, reduction {config.reduction!r} {effect.refused}. Use "
                         f"{_sound(config)}{biased} (docs/kl.md).")
    return KL(config, effect, *_functions(config, estimator),
              exact_in_loss=estimator.of_ratio is None and config.placement != "reward")


def check_semi(config: KLConfig) -> None:
    """Raises a ValueError where a KL to a semi-distribution cannot be counted that way."""
    estimator = ESTIMATORS[canonical(config.estimator)]
    if config.direction == "forward" or config.reduction == "sequence" or estimator.inverse_ratio is None:
        raise ValueError(f"kl.direction={config.direction!r}, kl.reduction={config.reduction!r} and kl.estimator="
                         f"{config.estimator!r}: this reference is a semi-distribution, a part of its mass is missing; "
                         "use 'reverse', 'token' and an estimator that states its `inverse_ratio` (docs/kl.md)")


def _sound(config):
    """The combinations of that direction that are not refused, as text."""
    def is_sound(name, p, r):
        return not ESTIMATORS[name].effect(dataclasses.replace(config, placement=p, reduction=r)).refused

    return "; ".join(f"estimator={name!r} with placement={p!r}" + f" and reduction={r!r}" * (r != "token")
                     for name in ESTIMATORS.names() for d, p, r in ESTIMATORS[name].effects
                     if d == config.direction and is_sound(name, p, r))


def _why_missing(estimator, config):
    if estimator.of_ratio is None:
        return "the exact KL is per token, and `full` sums it over the episode"
    if config.placement == "full":
        return f"{config.estimator} is sampled, and `full` needs the exact D_t"
    return "its effect is not stated"


def _functions(config, estimator):
    """reward, loss, value and exact, by placement."""
    forward, of_ratio = config.direction == "forward", estimator.of_ratio

    def exact(terms: TokenTerms) -> Float[Array, ...]:
        return terms.forward_kl if forward else terms.kl

    def of(log_ratio, missing):
        if forward:
            return jnp.exp(-log_ratio) * of_ratio(-log_ratio)
        return of_ratio(log_ratio) + (estimator.inverse_ratio or 0.0) * missing

    def value(terms, missing):
        return exact(terms) if of_ratio is None else of(terms.log_ratio, missing)

    def nothing(terms, missing, *rest):
        return jnp.zeros_like(terms.log_ratio)

    def to_go(terms, missing, mask: Bool[Array, " k"]):
        """The rewards of `full`. D_t does not depend on which token is drawn, so only later tokens' KL is a reward of
        it. A drawn budget fraction decides D_t, so there the token's KL is a reward too."""
        each = jnp.where(mask, exact(terms), 0.0)
        return each if config.drawn else jnp.append(each[1:], 0.0)

    def whole(terms, missing, mask):
        """The sequence's estimate at its last token: every token is rewarded with it."""
        total = of(jnp.where(mask, terms.log_ratio, 0.0).sum(), 0.0)
        return jnp.zeros_like(terms.log_ratio).at[jnp.maximum(mask.sum() - 1, 0)].set(jnp.where(mask.any(), total, 0.0))

    def in_loss(terms, missing, weight, mask):
        if config.reduction == "sequence":
            total = whole(terms, missing, mask)
            return total * jnp.where(mask, weight, 1.0).prod() if estimator.weighted else total
        each = value(terms, missing)
        # The exact D_t in the loss alone: its mean over a drawn budget fraction has a gradient in the fraction, too.
        weighted = estimator.weighted or of_ratio is None and config.drawn and config.placement == "loss"
        return each * weight if weighted else each

    in_reward = whole if config.reduction == "sequence" else lambda terms, missing, mask: value(terms, missing)
    reward, loss = {"reward": (in_reward, nothing), "loss": (nothing, in_loss), "full": (to_go, in_loss)}[
        config.placement]
    return reward, loss, value, exact
