"""The figure of a run's policies beside the best that any policy could do at their KL."""
from __future__ import annotations

import matplotlib
import numpy as np

from kl_reg import storage
from kl_reg.analysis.report.figures import BASE, STYLE, new, save


def draw(report: dict, path: storage.Path) -> storage.Path:
    """Writes the PNG: the optimal frontier with its error, the members with their efficiencies, and best-of-n.

    Args:
        report: of `efficiency.measure`.
    """
    points = report["frontier"]
    kl, reward, error = (np.array([point[key] for point in points]) for key in ("kl", "reward", "reward_se"))
    with matplotlib.rc_context(STYLE):
        figure = new(7.5, 4.8, [])
        axes = figure.subplots()
        axes.plot(kl, reward, color="0.25", lw=1.8, label="best possible (estimated)")
        axes.fill_between(kl, reward - 2 * error, reward + 2 * error, color="0.25", alpha=0.15, lw=0)
        axes.plot(0, report["base_reward"], "s", color=BASE, label="base model")
        nears = report["best_of_n"]
        axes.plot([row["kl"] for row in nears], [row["reward"] for row in nears], ":x", color="tab:orange", ms=5,
                  label="best of n (n at the points)")
        for row in nears:
            axes.annotate(str(row["n"]), (row["kl"], row["reward"]), (4, -10), textcoords="offset points", fontsize=8,
                          color="tab:orange")
        own = [row for row in report["members"] if row["member"] is not None]
        others = [row for row in report["members"] if row["member"] is None]
        for rows, color, name in ((own, "tab:blue", "learned"), (others, "tab:red", "beside it")):
            if rows:
                _policies(axes, rows, color, f"{name} (efficiency at the points)")
        axes.set(xlabel="KL to the base (nats per episode)", ylabel="reward per episode",
                 title=f"{report['run']}: {report['episodes']} episodes a policy; bars and band: 2 standard errors")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.legend(loc="lower right")
        return save(figure, path)


def _policies(axes, rows, color, label):
    kl, reward, kl_se, reward_se = ([row[key] for row in rows] for key in ("kl", "reward", "kl_se", "reward_se"))
    axes.errorbar(kl, reward, 2 * np.array(reward_se), 2 * np.array(kl_se), "o", color=color, ms=5, lw=1, label=label)
    for row in rows:
        if row["efficiency"] is not None:
            axes.annotate(f"{row['efficiency']:.0%}", (row["kl"], row["reward"]), (6, -12), textcoords="offset points",
                          fontsize=8.5, color=color)
