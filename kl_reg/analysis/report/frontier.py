"""Reward against KL: one point a setting, with its spread over seeds."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kl_reg.analysis.report.conditions import Setting
from kl_reg.analysis.report.stats import number, t_interval

INTERVALS = {"episodes": "± 1 standard error over episodes (one seed)",
             "range": "range of the two seeds (an interval from two says little)",
             "t": "95 % t-interval over seeds"}


class Point(NamedTuple):
    """A setting at its final evaluation. `kl` in nats per episode, `reward` in return per episode: the mean over seeds;
    bars are (low, high), of the kind `interval`, a key of INTERVALS."""

    setting: Setting
    kl: float
    kl_bar: tuple[float, float]
    reward: float
    reward_bar: tuple[float, float]
    interval: str
    seeds: np.ndarray       # [n, 2] (kl, reward) of each seed


def points(settings: Sequence[Setting]) -> list[Point]:
    """The frontier's points in the settings' order."""
    return [_point(setting) for setting in settings]


def _point(setting):
    finals = [member["final"] for member in setting.members]
    kls, rewards = (np.array([number(final[key]) for final in finals])
                    for key in ("kl/nats_per_episode", "return"))
    interval = {1: "episodes", 2: "range"}.get(len(finals), "t")
    kl_bar = _bar(kls, interval, number(finals[0]["kl/nats_per_episode_se"]))
    return Point(setting, kls.mean(), (max(0.0, kl_bar[0]), kl_bar[1]), rewards.mean(),
                 _bar(rewards, interval, number(finals[0]["return_se"])), interval, np.stack([kls, rewards], 1))


def _bar(values, interval, error):
    if interval == "episodes":
        return float(values[0] - error), float(values[0] + error)
    low, high = (values.min(), values.max()) if interval == "range" else t_interval(values)
    return float(low), float(high)
