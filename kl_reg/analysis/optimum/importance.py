r"""The optimum pi* ∝ beta e^{r/lam} of any language model, from episodes that were sampled of several policies.

The episodes are weighted with w ∝ beta e^{r/lam} / q, q = \sum_k (n_k / n) pi_k the mixture that drew them, and the
weights normalised to 1. With the base among the policies beta / q is bounded by n / n_base; with a policy near the
optimum among them few weights are small. Sources: Hesterberg (1995), "Weighted average importance sampling and
defensive mixture distributions"; Veach and Guibas (1995) for the balance heuristic; Owen and Zhou (2000), "Safe and
effective importance sampling".
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax, logsumexp

from kl_reg.analysis.optimum.enumeration import mean, reverse_kl

_BISECTIONS = 40    # of a factor of 4


class Tilted(NamedTuple):
    """An estimated point of the optimal frontier, with its standard errors (delta method)."""

    lam: float
    reward: float
    reward_se: float
    kl: float               # nats per episode, D(pi* || beta)
    kl_se: float
    ess: float              # effective number of samples, 1 / sum w^2


def importance_frontier(reward: Float[np.ndarray, " n"], log_base: Float[np.ndarray, " n"],
                        log_proposals: Float[np.ndarray, "k n"], counts: Int[np.ndarray, " k"],
                        lams: Float[np.ndarray, " l"], prompt: np.ndarray | None = None,
                        least: float = 100.0) -> list[Tilted]:
    r"""The frontier at these coefficients, where there are samples enough to see it.

    reward = E_w[r] and KL = E_w[r/lam] - log Z, Z = E_beta[e^{r/lam}] itself from weights ∝ beta / q; so the KL needs
    both kinds of weights, and `ess` is the smaller one's. With prompts the optimum is each prompt's own: weights are
    normalised by prompt, values averaged over prompts, and `ess` is the smallest one. Errors are over samples, taken as
    independent draws of the mixture and of the given prompts.

    Only where the agent writes every token: with a student between its turns the optimum is not of this form.

    Args:
        reward, log_base: of the samples; log-probabilities of whole episodes.
        log_proposals: of every sample under every policy that drew some; -inf where it cannot draw it.
        counts: how many samples each drew; of every prompt the same share.
        lams: reward units per nat, above 0; infinite: the base.
        prompt: what each sample answers, any labels [n]; None: all the same.
        least: points with a smaller `ess` are left out.

    Raises:
        ValueError: shapes do not fit, counts do not add up to n, a value is not finite, or a coefficient not above 0.
    """
    _check(reward, log_base, log_proposals, counts, lams, prompt)
    reward, log_base = np.asarray(reward, np.float64), np.asarray(log_base, np.float64)
    with np.errstate(divide="ignore"):
        shares = np.log(np.asarray(counts) / len(reward))
    log_ratio = log_base - logsumexp(shares[:, None] + log_proposals, axis=0)
    labels = np.zeros(len(reward)) if prompt is None else prompt
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    points = []
    for lam in lams:
        each = Tilted(*np.transpose([_tilt(reward[rows], log_ratio[rows], float(lam))[1] for rows in groups]))
        over = lambda errors: float(np.sqrt((errors**2).sum()) / len(errors))  # noqa: E731
        points.append(Tilted(float(lam), float(each.reward.mean()), over(each.reward_se), float(each.kl.mean()),
                             over(each.kl_se), float(each.ess.min())))
    return [point for point in points if point.ess >= least]


def expected_budget(at: Callable[[float], Tilted], nats: float, lam: float) -> Tilted:
    """The most that a policy can do whose *expected* KL is at most `nats` per episode, by bisection on log lam.

    It bounds from above what a hard budget, which binds every single episode, can reach.

    Args:
        at: the frontier's point at a coefficient, whose KL falls with the coefficient.
        lam: the smallest coefficient that is looked at, above 0; its point, where that is affordable.

    Raises:
        ValueError: nats is not above 0, or lam is not.
    """
    if not nats > 0:
        raise ValueError(f"nats={nats} must be above 0")
    _check_lams(lam)
    if (point := at(lam)).kl <= nats:
        return point
    while (point := at(4 * lam)).kl > nats:
        lam *= 4
    low, high = np.log(lam), np.log(4 * lam)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        trial = at(float(np.exp(middle)))
        low, high, point = (low, middle, trial) if trial.kl <= nats else (middle, high, point)
    return point


def _check(reward, log_base, log_proposals, counts, lams, prompt):
    n = len(reward)
    for name, values in (("log_base", log_base), ("log_proposals", log_proposals), ("prompt", prompt)):
        if values is not None and np.shape(values)[-1:] != (n,):
            raise ValueError(f"{name} has shape {np.shape(values)}; reward has {n} samples")
    if len(counts) != len(log_proposals) or np.sum(counts) != n or np.min(counts) < 0:
        raise ValueError(f"counts={list(counts)} must be {len(log_proposals)} numbers, one a policy, that add up to "
                         f"the {n} samples")
    drawn = np.max(np.where(np.reshape(counts, (-1, 1)) > 0, log_proposals, -np.inf), 0)
    for name, values in (("reward", reward), ("log_base", log_base), ("log_proposals", drawn)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: sample {int(np.argmin(np.isfinite(values)))} has a value that is not finite")
    _check_lams(lams)


def _check_lams(lams):
    if not np.all(np.asarray(lams) > 0):
        raise ValueError(f"lam={lams} must be above 0")


def _tilt(reward, log_ratio, lam):
    """(log-weights, the point) of samples with weights ∝ e^{log_ratio + reward/lam}; log_ratio = log beta - log q."""
    base = log_softmax(log_ratio)
    log_weights = log_softmax(log_ratio + (reward - reward.max()) / lam)
    weights, n = np.exp(log_weights), len(reward)
    value, kl = float(mean(log_weights, reward)), float(reverse_kl(log_weights, base))
    excess = np.where(weights > 0, log_weights - base - kl, 0.0)               # reward/lam less its mean
    influence = np.stack([weights * (reward - value), weights * (excess - 1) + np.exp(base)])
    reward_se, kl_se = np.sqrt((influence**2).sum(1) * n / (n - 1)) if n > 1 else (np.nan, np.nan)
    ess = np.exp(-max(logsumexp(2 * log_weights), logsumexp(2 * base)))
    return log_weights, Tilted(lam, value, float(reward_se), kl, float(kl_se), float(ess))


class Resampled(NamedTuple):
    """Samples of the base, drawn anew as from the optimum: their indices, and what the weights say of it."""

    indices: np.ndarray     # [count]
    point: Tilted


def sample_tilted(rng: np.random.Generator, rewards: Float[np.ndarray, " n"], lam: float, count: int) -> Resampled:
    """About what the optimum at `lam` would say to a prompt, without learning: base samples drawn again, with
    replacement and weights ∝ e^{r/lam} (sampling/importance resampling, Rubin 1988).

    Exact as n grows; trust it while `point.ess` is well above `count`.

    Args:
        rewards: of samples of the base, all to one prompt.
        lam: reward units per nat, above 0.

    Raises:
        ValueError: no rewards, one that is not finite, or lam not above 0.
    """
    _check_lams(lam)
    if not len(rewards) or not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be at least one finite number; they are {rewards}")
    log_weights, point = _tilt(rewards, np.zeros(len(rewards)), float(lam))
    weights = np.exp(log_weights)
    return Resampled(rng.choice(len(rewards), count, p=weights / weights.sum()), point)
