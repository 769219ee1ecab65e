"""Means with their errors and their differences, and where in the episode KL is spent."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from kl_reg.types import AGENT, OPENING


def silent_rates(rows: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    """By speaker, the share of finished turns that are empty and its standard error, for each row of the summary."""
    return {who: [(number(row["final"][f"{who}/silent_rate"]), number(row["final"][f"{who}/silent_rate_se"]))
                  for row in rows] for who in ("teacher", "student")}


def number(value: float | None) -> float:
    """A metric as a float; null (no such event happened) is NaN."""
    return float("nan") if value is None else float(value)


def mean_and_error(x) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 and its standard error, s / sqrt(n) with s over n - 1; NaNs are left out.

    With n = 0 the mean is NaN; with n < 2 the error is NaN, because one value does not tell its own spread.
    """
    x = np.asarray(x, np.float64)
    here = np.isfinite(x)
    n = here.sum(0)
    mean = np.where(n > 0, np.where(here, x, 0).sum(0) / np.maximum(n, 1), np.nan)
    squares = np.where(here, (x - mean) ** 2, 0).sum(0)
    error = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    return mean, np.where(n > 1, error, np.nan)


def t_interval(x, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Student's interval (low, high) for the mean over axis 0; NaN where fewer than two values are finite."""
    mean, error = mean_and_error(x)
    n = np.isfinite(np.asarray(x, np.float64)).sum(0)
    half = stdtrit(np.maximum(n - 1, 1), 0.5 + level / 2) * error
    return np.asarray(mean - half), np.asarray(mean + half)


class Mean(NamedTuple):
    """An estimated mean and the independent parts of its variance, each with its degrees of freedom."""

    value: float
    parts: tuple[tuple[float, float], ...]

    @property
    def error(self) -> float:
        """Standard error; NaN where a part is not known."""
        return sum(variance for variance, _ in self.parts) ** 0.5


def mean_over_seeds(values) -> Mean:
    """The mean of one value a seed."""
    value, error = mean_and_error(values)
    return Mean(float(value), ((float(error) ** 2, len(values) - 1),))


def mean_over_episodes(values: Sequence[float], errors: Sequence[float], episodes: Sequence[int]) -> Mean:
    """The mean over runs of each run's mean, its error that over their episodes: it says nothing of other seeds.

    Args:
        values, errors, episodes: of each run.
    """
    n = len(values)
    return Mean(float(np.mean(values)), tuple(((error / n) ** 2, count - 1)
                                              for error, count in zip(errors, episodes, strict=True)))


def paired_over_episodes(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> Mean:
    """The mean over a's runs minus that over b's, its error that over episodes: it says nothing of other seeds.

    Episodes of one seed and one index were drawn with the same key, so that they are subtracted before their spread is
    taken; different seeds are independent.

    Args:
        a, b: one value an episode of each run, by seed.
    """
    parts = []
    for seed in {**a, **b}:
        columns = [sign * np.asarray(side[seed], np.float64) / len(side)
                   for sign, side in ((1, a), (-1, b)) if seed in side]
        column = sum(columns)
        column = column[np.isfinite(column)]                    # of episodes that were judged
        parts.append((column, len(column)))
    value = sum(float(mean_and_error(column)[0]) for column, _ in parts)
    return Mean(value, tuple((float(mean_and_error(column)[1]) ** 2, count - 1) for column, count in parts))


class Difference(NamedTuple):
    """Between two means; `limit` is how large it is at most, at the level, where there is none. NaN: not known."""

    value: float
    error: float
    limit: float


def difference(a: Mean, b: Mean, level: float = 0.95) -> Difference:
    """a - b with unequal variances, the two independent; see `limited`."""
    return limited(Mean(a.value - b.value, a.parts + b.parts), level)


def limited(mean: Mean, level: float = 0.95) -> Difference:
    """A difference that was estimated as one mean; `limit` is Student's quantile times the standard error.

    Source: Welch (1947), "The generalization of 'Student's' problem"; degrees of freedom (sum v)^2 / sum(v^2 / n).
    """
    variances, freedoms = np.array(mean.parts, np.float64).T
    total = variances.sum()
    error = float(np.sqrt(total)) if total > 0 else float("nan")
    if not error > 0:
        return Difference(mean.value, error, error)
    freedom = total**2 / (variances**2 / np.maximum(freedoms, 1)).sum()
    return Difference(mean.value, error, float(stdtrit(freedom, 0.5 + level / 2)) * error)


def binomial(events: int, n: int) -> tuple[float, float]:
    """A rate and its standard error, the n taken as independent."""
    rate = events / n
    return rate, (rate * (1 - rate) / n) ** 0.5


def show(value: float, error: float) -> str:
    """HTML of `value ± error`, rounded to two digits of the error; a dash for an unknown value."""
    if not np.isfinite(value):
        return "–"
    if not np.isfinite(error) or error <= 0:
        return f"{value:.2f}"
    places = int(np.clip(1 - np.floor(np.log10(error)), 0, 4))
    return f"{value:.{places}f} <small>± {error:.{places}f}</small>"


def show_percent(rate: float, error: float) -> str:
    """As `show`, of a rate in percent."""
    return "–" if not np.isfinite(rate) else show(100 * rate, 100 * error) + " %"


class ByPosition(NamedTuple):
    """KL along the episode, nats; position 0 is the first slot after the opening."""

    per_token: np.ndarray       # [t] mean over the episodes with an agent token there; NaN where none has one
    per_position: np.ndarray    # [t] mean over all episodes: what the position adds to nats per episode
    cumulative: np.ndarray      # [t] spent up to and including the position; ends at nats per episode
    per_turn: np.ndarray        # [n] the same total by the agent's n-th turn


def first_slot(roles: np.ndarray) -> int:
    """The slot where all episodes begin: the one after the last opening slot. roles: [e, s]."""
    opening = np.flatnonzero((roles == OPENING).any(0))
    return int(opening[-1]) + 1 if opening.size else 0


def kl_by_position(roles: np.ndarray, turns: np.ndarray, kl: np.ndarray) -> ByPosition:
    """Where the KL of evaluation episodes is spent. roles, turns, kl: [e, s]; kl in nats per token."""
    start = first_slot(roles)
    agent = roles[:, start:] == AGENT
    nats = np.where(agent, kl[:, start:], 0.0).astype(np.float64)
    count = agent.sum(0)
    per_token = np.where(count > 0, nats.sum(0) / np.maximum(count, 1), np.nan)
    per_position = nats.mean(0)
    agent_turns = turns[:, start:][agent]
    order = np.unique(agent_turns)
    per_turn = np.array([nats[agent][agent_turns == turn].sum() for turn in order]) / len(roles)
    return ByPosition(per_token, per_position, per_position.cumsum(), per_turn)


def mean_by_position(parts: Sequence[ByPosition]) -> ByPosition:
    """The mean over seeds; a turn that a seed never reached counts as 0 there."""
    longest = max(len(part.per_turn) for part in parts)
    turns = [np.pad(part.per_turn, (0, longest - len(part.per_turn))) for part in parts]
    return ByPosition(mean_and_error([part.per_token for part in parts])[0],
                      np.mean([part.per_position for part in parts], 0),
                      np.mean([part.cumulative for part in parts], 0), np.mean(turns, 0))


def share_spent_early(cumulative: np.ndarray, part: float = 0.25) -> float:
    """The share of an episode's KL that lies in the first `part` of its positions; NaN without KL."""
    total = cumulative[-1]
    return float(cumulative[max(1, round(part * len(cumulative))) - 1] / total) if total > 0 else float("nan")
