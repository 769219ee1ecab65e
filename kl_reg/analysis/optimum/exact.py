r"""The exact optimum of KL-regularised RL on an enumerable language model: no learned policy can be above it.

With a penalty, max_pi E[r] - lam D(pi || beta) over the agent's tokens, the optimum is pi(a|h) ∝ beta(a|h)
e^{V(ha)/lam}, V(h) = lam log \sum_a beta(a|h) e^{V(ha)/lam} at the agent's tokens and the plain mean at the student's.
Where the agent writes everything this is pi* ∝ beta e^{r/lam} of whole sequences. Sources: Todorov (2006),
"Linearly-solvable Markov decision problems"; Korbak et al. (2022), "RL with KL penalties is better viewed as Bayesian
inference".
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator
from scipy.special import log_softmax

from kl_reg.analysis.optimum.enumeration import Tree, backward

_SAME = 1e-12       # rewards that differ by less, as a part of the largest, are tied where lam = 0
_HARD = 1e-13       # lam below this part of the largest reward counts as 0: rounding would choose
_NO_KL = 1e-9       # nats per episode: what rounding leaves of a policy that is the base
_BISECTIONS = 50    # of a factor of 4


class Optimum(NamedTuple):
    """The best policy at one coefficient `lam`, reward units per nat; it is also the best at its own expected KL."""

    policy: tuple[np.ndarray, ...]      # H of [v**t, v], log-probabilities; the base's at the student's tokens
    reward: float
    kl: float                           # nats per episode, of the agent's tokens
    lam: float

    @property
    def value(self) -> float:
        """What is maximised, reward - lam * kl."""
        return self.reward - (0.0 if math.isinf(self.lam) else self.lam * self.kl)


def soft_optimum(tree: Tree, lam: float) -> Optimum:
    """Exact soft value iteration.

    Args:
        lam: reward units per nat; infinite: the base. At 0 reward alone counts, and among the policies with the most
            reward it is the one with the least KL, the limit of lam -> 0.

    Raises:
        ValueError: lam is negative or not a number.
    """
    if not lam >= 0:
        raise ValueError(f"lam={lam} must be at least 0")
    largest = np.abs(tree.reward).max()
    hard = lam < _HARD * largest
    choose = lambda t, reward, kl: _choose(tree.log_base[t], reward, kl, 0.0 if hard else lam,  # noqa: E731
                                           _SAME * largest)
    return Optimum(*backward(tree, choose), lam)


def _choose(log_base, reward, kl, lam, same):
    """log of beta e^{V/lam}; V/lam is reward/lam - kl, each kept by itself so that a small lam loses no digits."""
    if math.isinf(lam):
        return log_base
    possible = log_base > -np.inf
    behind = np.where(possible, reward - np.where(possible, reward, -np.inf).max(-1, keepdims=True), 0.0)
    scaled = behind / lam if lam > 0 else np.where(behind < -same, -np.inf, 0.0)
    return log_softmax(log_base + scaled - kl, axis=-1)


class Frontier(NamedTuple):
    """The most reward at each KL: one entry a coefficient."""

    lam: np.ndarray
    kl: np.ndarray          # nats per episode
    reward: np.ndarray


def frontier(tree: Tree, lams: Float[np.ndarray, " n"]) -> Frontier:
    """The exact (KL, reward) frontier at these coefficients, in their order; concave in KL, of slope lam."""
    optima = [soft_optimum(tree, float(lam))[1:3] for lam in lams]
    reward, kl = np.array(optima, np.float64).reshape(-1, 2).T
    return Frontier(np.asarray(lams, np.float64), kl, reward)


def expected_budget(tree: Tree, nats: float) -> Optimum:
    """The optimum among policies whose *expected* KL is at most `nats` per episode, by bisection on log lam.

    An upper bound for a budget that no path may exceed (`hard_budget`). Where the policy of the most reward is
    affordable it is that one, with lam = 0; without a budget the base, with lam infinite.

    Raises:
        ValueError: nats is negative or not a number.
    """
    if not nats >= 0:
        raise ValueError(f"nats={nats} must be at least 0")
    if nats == 0:
        return soft_optimum(tree, math.inf)
    best = soft_optimum(tree, 0.0)
    if best.kl <= nats:
        return best
    high = float(np.ptp(tree.reward))
    while (optimum := soft_optimum(tree, high)).kl > nats:
        high *= 4
    if math.isinf(high):
        return optimum
    low = high / 4
    while (cheaper := soft_optimum(tree, low)).kl <= nats:
        optimum, high, low = cheaper, low, low / 4
    for _ in range(_BISECTIONS):
        if optimum.kl >= nats * (1 - 1e-12):
            break
        middle = math.sqrt(low) * math.sqrt(high)
        if (trial := soft_optimum(tree, middle)).kl <= nats:
            optimum, high = trial, middle
        else:
            low = middle
    return optimum


def efficiency(frontier_kl: Float[np.ndarray, " n"], frontier_reward: Float[np.ndarray, " n"], kl: float,
               reward: float) -> float:
    """KL of the optimal policy with the same reward over the learned policy's KL: 1 at the optimum, 0.5 at twice the
    KL that its reward needs.

    Between the frontier's points the root of KL is interpolated over reward, monotonically (PCHIP): it is nearly linear
    there, because reward grows with the root of KL near the base.

    Args:
        frontier_kl, frontier_reward: points of the frontier in any order.
        kl, reward: of the learned policy, in the same units.

    Returns:
        NaN where the reward is outside the range that the frontier's points cover, or kl is no more than rounding.
    """
    order = np.lexsort((frontier_reward, frontier_kl))
    nats, rewards = np.asarray(frontier_kl)[order], np.asarray(frontier_reward)[order]
    rising = np.r_[True, rewards[1:] > np.maximum.accumulate(rewards)[:-1]] if len(rewards) else np.zeros(0, bool)
    nats, rewards = nats[rising], rewards[rising]
    if len(nats) < 2 or not kl > _NO_KL or not rewards[0] <= reward <= rewards[-1]:
        return float("nan")
    return float(PchipInterpolator(rewards, np.sqrt(nats))(reward)) ** 2 / kl
