"""The figure of a comparison: each quantity by position in the episode, by turn of the agent, and along a run."""
from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import matplotlib.lines
import matplotlib.ticker
import numpy as np

from kl_reg import storage
from kl_reg.analysis.report.conditions import Setting
from kl_reg.analysis.report.figures import STYLE, looks, new, save

_BANDS = 3       # lines in a panel up to which their intervals can be told apart
_MODEL = {"color": "#31688e", "linestyle": "-", "marker": "o"}
_ROWS = ("per agent token, by position", "per episode, by turn", "per episode, along the run")


def draw(report: dict, settings: Sequence[Setting], others: Sequence[Setting], path: storage.Path) -> storage.Path:
    """Writes the PNG. A line is a pair of policies, a colour the setting of the run's member, as in the run's report.

    Args:
        report: of `compare.compare`. Of several checkpoints the last one's positions and turns are drawn.
        settings: of the run, of B's where both sides are one; none without.
        others: of A's where both sides are one: their warnings stand below as well.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in report["rows"]:
        groups.setdefault((row["a"]["member"], row["b"]["member"]), []).append(row)
    along = max(map(len, groups.values())) > 1
    side = "b" if report["b"]["kind"] == "run" else "a"
    styles = {member["member"]: look for setting, look in zip(settings, looks(settings), strict=True)
              for member in setting.members}
    shown = {rows[-1][side]["member"] for rows in groups.values()}
    settings = [setting for setting in settings if any(member["member"] in shown for member in setting.members)]
    with matplotlib.rc_context(STYLE):
        figure = new(14.0, 2.9 * (2 + along) + 1.0, [*settings, *others])
        panels = figure.subplots(2 + along, len(report["quantities"]), sharex="row")
        for (key, quantity), column in zip(report["quantities"].items(), panels.T, strict=True):
            for rows in groups.values():
                look = styles[rows[-1][side]["member"]] if settings else _MODEL
                curves = [(0, rows[-1]["by_position"][key]), (1, rows[-1]["by_turn"][key])]
                curves += [(_iterations(rows), _column(rows, key))] * along
                for axes, (start, table) in zip(column, curves, strict=True):
                    _line(axes, start, table, look, len(groups) <= _BANDS)
            column[0].set_title(heading(quantity))
            for axes, name in zip(column, ("tokens after the opening", "turn of the agent", "iteration"), strict=False):
                axes.set_ylim(bottom=0)
                axes.set_xlabel(name)
            column[1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for axes, row in zip(panels[:, 0], _ROWS, strict=False):
            axes.set_ylabel(row)
        figure.suptitle(title(report), x=0.01, ha="left", fontsize=10.5)
        lines = [(look["color"], look["linestyle"]) for look in (styles[s.members[0]["member"]] for s in settings)]
        handles = [matplotlib.lines.Line2D([], [], color=color, ls=dashes, lw=2.2) for color, dashes in lines]
        if handles:
            figure.legend(handles, [s.label for s in settings], loc="outside right upper", handlelength=2.6)
        return save(figure, path)


def heading(quantity: dict) -> str:
    """Title and unit of a quantity; a star where its sum over an episode is the KL of whole episodes."""
    return quantity["title"] + f", {quantity['unit']}" * bool(quantity["unit"]) + " *" * quantity["whole_episodes"]


def title(report: dict) -> str:
    """Which policies on which episodes, and what is the KL of whole episodes."""
    on = "held-out human conversations" if report["on"] == "held_out" else f"episodes that {report['on']} sampled"
    whole = [f"* summed over an episode: {q['per_episode']}" for q in report["quantities"].values()
             if q["whole_episodes"]] or ["No sum here is the KL of whole episodes"]
    return (f"A = {report['a']['name']}, B = {report['b']['name']}; {report['episodes']} {on}. {whole[0]}.")


def _iterations(rows):
    return np.array([max(row[side]["iteration"] or 0 for side in "ab") for row in rows])


def _column(rows, key):
    return {name: [row["per_episode"][key][name] for row in rows] for name in ("mean", "low", "high")}


def _line(axes, start, table, look, band):
    """One curve with its band, from x = start or at these; gaps where nothing is known or a mean is infinite."""
    mean, low, high = (np.array([np.nan if value in (None, "inf") else value for value in table[name]], np.float64)
                       for name in ("mean", "low", "high"))
    x = start if np.ndim(start) else start + np.arange(len(mean))
    dots = {} if np.ndim(start) == 0 and start == 0 else {"marker": look["marker"], "ms": 3.5}
    axes.plot(x, mean, color=look["color"], ls=look["linestyle"], lw=1.3, **dots)
    if band:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
