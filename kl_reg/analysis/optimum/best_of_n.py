"""What the base model reaches without learning: the best of n samples, and its KL."""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln, xlogy


class BestOfN(NamedTuple):
    """The policy that draws n samples of the base and says the one with the most reward, ties broken at random."""

    n: int
    reward: float           # expected
    reward_se: float        # over samples (jackknife), of the given prompts; NaN where there are only n of a prompt
    kl: float               # nats per episode, estimated: `best_of_n_kl` of the samples' rewards
    kl_bound: float         # log n - (n - 1) / n, that the KL never exceeds


def best_of_n(rewards: Float[np.ndarray, "p s"], n: int) -> BestOfN:
    r"""Best-of-n from s samples of the base to each of p prompts, averaged over prompts.

    The reward is the unbiased estimate \sum_i r_(i) C(i - 1, n - 1) / C(s, n), the mean of the largest over all subsets
    of size n, r_(1) <= ... <= r_(s). The KL estimate takes the samples for all there is, each of mass 1 / s: where
    rewards are continuous it is low unless s is well above n.

    Raises:
        ValueError: n is not between 1 and s, or a reward is not finite.
    """
    rewards = np.sort(np.asarray(rewards, np.float64), axis=-1)
    if rewards.ndim != 2 or not rewards.size or not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, of shape [prompts, samples]; they have shape {rewards.shape}")
    p, s = rewards.shape
    if not 1 <= n <= s:
        raise ValueError(f"n={n} must be between 1 and the number of samples of a prompt, {s}")
    errors = _jackknife(rewards, n) if s > n else np.full(p, np.nan)
    kl = np.mean([best_of_n_kl(row, np.full(s, 1 / s), n) for row in rewards])
    return BestOfN(n, float((rewards @ _chances(s, n)).mean()), float(np.sqrt((errors**2).sum()) / p), float(kl),
                   math.log(n) - (n - 1) / n)


def _chances(s, n):
    """[s]: how likely each of s sorted samples is the largest of n that are drawn without replacement."""
    rank = np.arange(s)
    log_choose = lambda a, b: gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)  # noqa: E731
    return np.where(rank >= n - 1, np.exp(log_choose(np.maximum(rank, n - 1), n - 1) - log_choose(s, n)), 0.0)


def _jackknife(rewards, n):
    """Standard errors [p] of the expected reward from leaving out each sample in turn; rewards [p, s] sorted."""
    s, chances = rewards.shape[1], _chances(rewards.shape[1] - 1, n)
    below = np.cumsum(rewards[:, :-1] * chances, 1)         # those below the one left out keep their rank
    above = np.cumsum((rewards[:, 1:] * chances)[:, ::-1], 1)[:, ::-1]
    without = np.pad(below, ((0, 0), (1, 0))) + np.pad(above, ((0, 0), (0, 1)))
    return np.sqrt((s - 1) * without.var(1))


def best_of_n_kl(rewards: Float[np.ndarray, " m"], masses: Float[np.ndarray, " m"], n: int) -> float:
    r"""D(best-of-n || base) in nats per episode, exact for a base with these masses of outcomes.

    \sum_j m_j log(m_j / p_j), m_j = F_j^n - F_{j-1}^n, over the distinct rewards in ascending order with masses p_j and
    distribution function F_j: within one reward best-of-n chooses as the base does. At most log n - (n - 1) / n.
    Source: Beirami et al. (2024), "Theoretical guarantees on the best-of-n alignment policy".

    Args:
        rewards: of the outcomes, in any order, with ties.
        masses: their probabilities, that sum to 1.
    """
    _, level = np.unique(rewards, return_inverse=True)
    p = np.bincount(level, masses)
    p = p[p > 0]
    up_to = np.cumsum(p)
    with np.errstate(divide="ignore"):      # log1p(-1) of the lowest level
        # m_j = F_j^n (1 - (1 - p_j / F_j)^n), because the difference of the powers would lose digits
        mass = up_to**n * -np.expm1(n * np.log1p(-p / up_to))
    return float((xlogy(mass, mass) - xlogy(mass, p)).sum())
