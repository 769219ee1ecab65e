r"""The best policy that on no path spends more than a budget, on an enumerable language model.

W_t(h, b) = max_d max { \sum_a pi(a) W_{t+1}(ha, b - d) : D(pi || beta(.|h)) <= d } at the agent's tokens and the plain
mean at the student's, b the nats that are left. The inner maximum is an exponential tilt pi ∝ beta e^{theta W} with D =
d, or the base restricted to the best tokens where that is affordable. d and b are multiples of nats / levels.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from kl_reg.analysis.optimum.enumeration import AGENT, Tree, evaluate, mean, reverse_kl

_CLOSE = 1e-9       # a tilt's D is within this part below what it may spend
_STEPS = 80
_CHUNK = 2**21      # numbers in a table of tilts


class Constrained(NamedTuple):
    """The best policy found under a hard budget."""

    policy: tuple[np.ndarray, ...]      # H of [v**t, v], log-probabilities; the base's at the student's tokens
    reward: float
    kl: float                           # nats per episode, expected
    most: float                         # nats on the dearest path that can happen: within the budget, to 1e-14


def hard_budget(tree: Tree, nats: float, levels: int = 64) -> Constrained:
    """The optimum under a budget that bounds every path, by dynamic programming over history and what is left of it.

    Every policy on the grid is feasible, so its reward is a lower bound; it rises to the true value with `levels`, and
    does not fall when they are doubled.

    Args:
        nats: the budget, nats per episode; infinite: none.
        levels: amounts are multiples of nats / levels. Time and memory grow with their square.

    Raises:
        ValueError: nats is negative or not a number, or levels below 1.
    """
    if not nats >= 0 or levels < 1:
        raise ValueError(f"nats={nats} must be at least 0, and levels={levels} at least 1")
    grid = np.linspace(0.0, min(nats, _dearest(tree)), levels + 1)
    worth, later, spends = tree.reward[:, None], [], []      # worth [v**t, levels + 1]; [v**t, 1] without agent tokens
    for log_base, writer in zip(tree.log_base[::-1], tree.writers[::-1], strict=True):
        worth = worth.reshape(*log_base.shape, -1)
        later.append(worth)
        if writer == AGENT:
            worth, spend = _step(log_base, worth, grid)
        else:
            worth, spend = np.einsum("nv,nvj->nj", np.exp(log_base), worth), None
        spends.append(spend)
    policy, most = _follow(tree, later[::-1], spends[::-1], grid)
    return Constrained(policy, *evaluate(tree, policy), most)


def _dearest(tree):
    """Nats that no policy exceeds: the sum of each agent token's largest -log beta."""
    return sum(-table[table > -np.inf].min() for table, writer in zip(tree.log_base, tree.writers, strict=True)
               if writer == AGENT)


def _step(log_base, later, grid):
    """(worth [n, levels + 1], index of the amount to spend there) at the agent's token, of later [n, v, levels + 1]."""
    levels, (n, vocab, lasting) = len(grid) - 1, later.shape
    spend, rest = np.nonzero(np.add.outer(np.arange(levels + 1), np.arange(levels + 1)) <= levels)
    if lasting == 1:                     # the agent's last token: nothing is worth saving
        spend, rest = np.arange(levels + 1), np.zeros(levels + 1, int)
    worth, chosen = np.empty((n, levels + 1)), np.empty((n, levels + 1), int)
    size = max(1, _CHUNK // (len(spend) * vocab))
    for low in range(0, n, size):
        here = slice(low, low + size)
        values = later[here][:, :, rest].swapaxes(1, 2)
        base = np.broadcast_to(log_base[here, None], values.shape)
        policy = _tilted(base.reshape(-1, vocab), values.reshape(-1, vocab), np.tile(grid[spend], len(values)))
        table = np.full((len(values), levels + 1, levels + 1), -np.inf)
        table[:, spend, spend + rest] = mean(policy.reshape(values.shape), values)
        worth[here], chosen[here] = table.max(1), table.argmax(1)
    return worth, chosen


def _follow(tree, later, spends, grid):
    """The policy's tables from the first token on, each history with what is left there, and the dearest path."""
    left, spent, policy = np.array([len(grid) - 1]), np.zeros(1), []
    for log_base, worth, spend in zip(tree.log_base, later, spends, strict=True):
        chosen = log_base
        if spend is not None:
            amount = spend[np.arange(len(left)), left]
            left = left - amount
            column = np.minimum(left, worth.shape[-1] - 1)
            chosen = _tilted(log_base, worth[np.arange(len(left)), :, column], grid[amount])
            spent = spent + reverse_kl(chosen, log_base)
        policy.append(chosen)
        left = left.repeat(log_base.shape[1])
        spent = np.where(chosen > -np.inf, spent[:, None], -np.inf).reshape(-1)
    return tuple(policy), float(spent.max())


def _tilted(log_base, values, nats):
    """log pi [n, v], of most mean value with D(pi || base) <= nats: base e^{theta values}, one problem a row."""
    possible = log_base > -np.inf
    behind = np.where(possible, values - np.where(possible, values, -np.inf).max(-1, keepdims=True), 0.0)
    span = -behind.min(-1, keepdims=True)
    behind = np.divide(behind, span, out=np.zeros_like(behind), where=span > 0)
    behind[behind > -1e-12] = 0.0                                   # tied with the best, but for rounding
    best = np.where(behind == 0, log_base, -np.inf)
    saturated = -logsumexp(best, axis=-1) <= nats
    out = np.where(saturated[:, None], log_softmax(best, axis=-1), log_base)
    binds = np.flatnonzero(~saturated & (nats > 0))
    theta = np.exp(_log_theta(log_base[binds], behind[binds], nats[binds]))
    out[binds] = log_softmax(log_base[binds] + theta[:, None] * behind[binds], axis=-1)
    return out


def _log_theta(log_base, behind, nats):
    """log theta with D = nats (1 - 1e-9, 1]: Newton on log D over log theta inside a bracket; its feasible end.

    It starts at D <= theta^2 / 8, which holds for values of span 1 (Hoeffding's lemma).
    """
    low, high = 0.5 * np.log(8 * nats), np.full(len(nats), np.inf)
    at, active = low.copy(), np.arange(len(nats))
    for _ in range(_STEPS):
        x, far, allowed = at[active], behind[active], nats[active]
        theta = np.exp(x)
        log_policy = log_softmax(log_base[active] + theta[:, None] * far, axis=-1)
        kl, centred = reverse_kl(log_policy, log_base[active]), far - mean(log_policy, far)[:, None]
        kl, feasible = np.maximum(kl, 1e-300), kl <= allowed
        low[active], high[active] = np.where(feasible, x, low[active]), np.where(feasible, high[active], x)
        slope = theta**2 * mean(log_policy, centred**2) / kl        # d log D / d log theta
        newton = x + np.log(allowed * (1 - _CLOSE / 2) / kl) / np.maximum(slope, 1e-12)
        top = np.minimum(high[active], low[active] + 4)
        inside = (newton > low[active]) & (newton < top)
        at[active] = np.where(inside, newton, 0.5 * (low[active] + top))
        active = active[~(feasible & (kl >= allowed * (1 - _CLOSE))) & (high[active] - low[active] > 1e-14)]
        if not len(active):
            break
    return low
