"""Which setting reaches more reward at equal KL: settings that aim at, or happen to lie at, the same target."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

from kl_reg import storage
from kl_reg.analysis.report import figures, stats
from kl_reg.analysis.report.conditions import Setting, kl_name
from kl_reg.episodes.metrics import rates

TOLERANCE = 0.15     # of the target, either way
_NO_KL = 1e-3        # nats per episode: too few to divide by


class Entry(NamedTuple):
    """A setting at its final evaluation: means over seeds, with errors over them or, of one seed, over its episodes.

    `per_nat`: (return - the base's return on the same random numbers) / KL and its standard error.
    """

    setting: Setting
    reward: stats.Mean
    kl: stats.Mean              # nats per episode
    per_nat: tuple[float, float]
    seeds: np.ndarray           # [n, 2] (kl, reward) of each seed
    returns: dict[int, np.ndarray]      # by seed, of its evaluation's episodes


class Block(NamedTuple):
    """What belongs to one target (nats per episode), KL measured to the same: `ranked` by return, the highest first;
    `off` the settings that aim at it, or at nothing, and lie elsewhere, the nearest first."""

    target: float
    measured: str
    ranked: list[Entry]
    off: list[Entry]


class Comparison(NamedTuple):
    """Of two entries of a block; `over` is what the standard error is over: "pairs of seeds", "seeds" or "episodes"."""

    reward: stats.Difference
    over: str


def blocks(settings: Sequence[Setting], base: Mapping[int, np.ndarray], evaluations: Mapping[int | str, Mapping]
           ) -> list[Block]:
    """A block for each target that two settings aim at or lie at, by target.

    Args:
        base: the base's returns [e] on the random numbers of each seed.
        evaluations: `returns` [e] and `kl` [e, s] of each member.
    """
    entries = [_entry(setting, base, evaluations) for setting in settings]
    found = []
    for measured in dict.fromkeys(s.measured for s in settings):
        own = [entry for entry in entries if entry.setting.measured == measured]
        for target in sorted({e.setting.target for e in own if e.setting.target}):
            distance = {e.setting.label: abs(e.kl.value - target) for e in own}
            near = [e for e in own if distance[e.setting.label] <= TOLERANCE * target]
            off = [e for e in own if distance[e.setting.label] > TOLERANCE * target
                   and e.setting.target in (None, target)]
            if max(len(near), sum(e.setting.target == target for e in own)) > 1:
                found.append(Block(target, measured, sorted(near, key=lambda e: -e.reward.value),
                                   sorted(off, key=lambda e, distance=distance: distance[e.setting.label])))
    return sorted(found, key=lambda block: block.target)


def compare(a: Entry, b: Entry) -> Comparison:
    """a's return minus b's, over seeds where both have several, else over the episodes of the runs that exist.

    Runs of one seed are evaluated on the same random numbers. They are paired: seed by seed where both settings have
    the same seeds, and episode by episode; else means over seeds are taken as independent.
    """
    if min(len(a.returns), len(b.returns)) == 1:
        return Comparison(stats.limited(stats.paired_over_episodes(a.returns, b.returns)), "episodes")
    if a.returns.keys() != b.returns.keys():
        return Comparison(stats.difference(a.reward, b.reward), "seeds")
    return Comparison(stats.limited(stats.mean_over_seeds(a.seeds[:, 1] - b.seeds[:, 1])), "pairs of seeds")


def _entry(setting, base, evaluations):
    finals = [member["final"] for member in setting.members]
    seeds = np.array([[final["kl/nats_per_episode"], final["return"]] for final in finals], np.float64)
    returns = {member["hyper"]["seed"]: evaluations[member["member"]]["returns"] for member in setting.members}
    if len(seeds) > 1:
        kl, reward = (stats.mean_over_seeds(column) for column in seeds.T)
        spent, gained = seeds[:, 0], seeds[:, 1] - [np.nanmean(base[seed], dtype=np.float64) for seed in returns]
    else:
        kl, reward = (_over_episodes(setting, key) for key in ("kl/nats_per_episode", "return"))
        (seed, own), kls = *returns.items(), evaluations[setting.members[0]["member"]]["kl"]
        gained = np.float64(own) - base[seed]
        judged = ~np.isnan(gained)
        spent, gained = np.where(judged, kls.sum(1, dtype=np.float64), 0.0), np.where(judged, gained, 0.0)
    ratio = rates({"": (gained, spent)}) if kl.value > _NO_KL else {"": None, "_se": None}
    return Entry(setting, reward, kl, (stats.number(ratio[""]), stats.number(ratio["_se"])), seeds, returns)


def _over_episodes(setting, key):
    columns = zip(*((stats.number(final[key]), stats.number(final[f"{key}_se"]), final["episodes"])
                    for final in (member["final"] for member in setting.members)), strict=True)
    return stats.mean_over_episodes(*columns)


def draw(found: Sequence[Block], settings: Sequence[Setting], path: storage.Path) -> storage.Path:
    """Return and, beside it, the KL that was reached, of the ranked settings of each block.

    Args:
        settings: all of the report, which decide the colours.
    """
    looks = {s.label: look for s, look in zip(settings, figures.looks(settings), strict=True)}
    rows = [len(block.ranked) for block in found]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.new(10.4, 1.1 * len(found) + 0.34 * sum(rows) + 0.3,
                             [entry.setting for block in found for entry in block.ranked])
        panels = figure.subplots(len(found), 2, squeeze=False, sharey="row", height_ratios=[n + 1 for n in rows])
        for block, (left, right) in zip(found, panels, strict=True):
            shown = [entry.setting for entry in block.ranked]
            for i, entry in enumerate(block.ranked):
                look = looks[entry.setting.label]
                _dot(left, i, entry.reward, entry.seeds[:, 1], look)
                _dot(right, i, entry.kl, entry.seeds[:, 0], look)
            right.axvline(block.target, color="0.3", ls=":", lw=1.2)
            right.axvspan((1 - TOLERANCE) * block.target, (1 + TOLERANCE) * block.target, color="0.5", alpha=0.12, lw=0)
            left.set_yticks(range(len(shown)), [s.label for s in shown])
            left.set(ylim=(len(shown) - 0.4, -0.6), xlabel="return per episode",
                     title=f"target {block.target:g} nats per episode")
            right.set_xlabel(f"{kl_name(shown)} (nats per episode)")
            right.set_title(f"± 1 standard error; shaded: ± {TOLERANCE:.0%}", fontsize=9, color="0.35")
        return figures.save(figure, path)


def _dot(axes, place, mean, seeds, look):
    """A mean with its standard error, the seeds below."""
    axes.errorbar(mean.value, place, xerr=np.nan_to_num(mean.error), color=look["color"], marker=look["marker"], ms=8,
                  mec="white", lw=1.6)
    if len(seeds) > 1:
        axes.plot(seeds, np.full(len(seeds), place + 0.24), ls="", marker=".", ms=6, mec="none", color=look["color"],
                  alpha=0.6)
