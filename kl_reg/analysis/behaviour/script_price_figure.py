"""The figure of the price of scripts: nats of each turn, and what has been spent up to it."""
from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import matplotlib.ticker
import numpy as np

from kl_reg import storage
from kl_reg.analysis.report.figures import STYLE, new, plain, save

BUDGETS = (10.0, 20.0)      # the paper's, nats per episode


def draw(scripts: Sequence[dict], title: str, path: storage.Path) -> storage.Path:
    """Writes the PNG: a line a script with its 95% interval.

    Args:
        scripts: of `price.report`.
        title: what was measured.
    """
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(scripts)))
    with matplotlib.rc_context(STYLE):
        figure = new(11.0, 4.6, [])
        turn, total = figure.subplots(1, 2)
        for script, color in zip(scripts, colors, strict=True):
            name = f"“{plain(script['script'])}”" if script["script"] else "silence"
            _line(turn, script["per_turn"], color, name)
            _line(total, script["cumulative"], color, name)
        turn.set_yscale("log")
        turn.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        lowest = min((x for script in scripts for x in script["per_turn"]["mean"] if x), default=0.1)
        turn.set_ylim(bottom=lowest / 2)
        turn.set(title="what each turn costs (nats per turn)", xlabel="turn of the teacher")
        total.set(title="what it costs up to that turn (nats)", xlabel="turn of the teacher")
        total.set_ylim(0, max(total.get_ylim()[1], 1.05 * BUDGETS[-1]))
        for budget in BUDGETS:
            total.axhline(budget, color="0.25", ls=":", lw=1.2)
            total.annotate(f"{budget:g} nats:\n1 in {math.exp(budget):,.0f}", (1.0, budget), (4, 0), fontsize=8.5,
                           xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color="0.25")
        for axes in (turn, total):
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        turn.legend(title="the teacher always says")
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=10.5)
        return save(figure, path)


def _line(axes, curve, color, name):
    mean, low, high = (np.array([np.nan if x is None else x for x in curve[key]]) for key in ("mean", "low", "high"))
    turns = np.arange(1, len(mean) + 1)
    axes.plot(turns, mean, color=color, lw=1.6, marker="o", ms=3.5, label=name)
    axes.fill_between(turns, np.maximum(low, 1e-6), high, color=color, alpha=0.2, lw=0)
