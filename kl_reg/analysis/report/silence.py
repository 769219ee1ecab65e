"""What an agent that has learned to say nothing does, turn by turn: how often, at what cost, and in which words."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np

from kl_reg import storage
from kl_reg.analysis.report import figures, stats
from kl_reg.analysis.report.conditions import Setting, kl_name
from kl_reg.analysis.report.transcripts import printable
from kl_reg.types import AGENT, PAD, STUDENT

RISE = 0.1          # share of the teacher's turns: a setting with a smaller rise over the base has not learned silence
_LINES, _CHARACTERS = 14, 46
_RATE = "teacher/silent_rate"


class Learned(NamedTuple):
    """A setting whose teacher has become silent; rates are shares of its finished turns, the rest nats per episode,
    all means over seeds. `remaining` is the part of the episode's budget that is not spent; NaN without one."""

    setting: Setting
    rate: float
    first_turn: float
    spent: float
    remaining: float


class Line(NamedTuple):
    """One turn of a transcript: who wrote it, its text and, where the agent did, its KL in nats."""

    speaker: str
    text: str
    nats: float | None


def learned(settings: Sequence[Setting], base: dict, parts: Sequence[stats.ByPosition]) -> list[Learned]:
    """The settings whose teacher is silent in at least `RISE` more of its turns than the base, most silent first.

    Args:
        base: the base model's row of the summary.
        parts: where each setting's KL is spent.
    """
    found, start = [], np.nan_to_num(stats.number(base["final"][_RATE]))
    for setting, part in zip(settings, parts, strict=True):
        (rate, _) = stats.mean_and_error([stats.number(m["final"][_RATE]) for m in setting.members])
        budget = setting.members[0]["hyper"]["kl.budget"]
        spent = float(part.cumulative[-1])
        if rate >= start + RISE:
            found.append(Learned(setting, float(rate), float(part.per_turn[0]), spent,
                                 math.nan if budget is None else budget - spent))
    return sorted(found, key=lambda one: -one.rate)


def sentence(one: Learned, base: dict) -> str:
    """What happened, as plain text: the share of silent turns, what the first turn cost, what remains of the budget."""
    before = stats.number(base["final"][_RATE])
    text = (f"{one.setting.label}: the teacher says nothing in {one.rate:.0%} of its turns"
            + f" (base {before:.0%})" * math.isfinite(before)
            + f". Its first turn costs {one.first_turn:.1f} of the {one.spent:.1f} nats that it spends in an episode")
    return text + (f"; {one.remaining:.1f} nats of the budget remain." if math.isfinite(one.remaining) else ".")


def lines(evaluation: dict[str, np.ndarray], pieces_of: Callable, episode: int = 0) -> list[Line]:
    """The turns of one evaluation episode, in order.

    Args:
        evaluation: tokens, roles, turns and kl [e, s], kl in nats per token.
        pieces_of: token ids -> text pieces that concatenate to their text.
    """
    roles, turns, out = evaluation["roles"][episode], evaluation["turns"][episode], []
    for number in range(turns.max() + 1):
        written = (turns == number) & ((roles == AGENT) | (roles == STUDENT)) & (roles != PAD)
        if written.any():
            text = printable("".join(pieces_of(evaluation["tokens"][episode][written].tolist())).strip())
            agent = roles[written][0] == AGENT
            nats = float(evaluation["kl"][episode][written].sum()) if agent else None
            out.append(Line("teacher" if agent else "student", " ".join(text.split()), nats))
    return out


def draw(settings: Sequence[Setting], curves: dict[int, list[dict]], costs: dict[int, np.ndarray],
         transcripts: Sequence[tuple[str, Sequence[Line]]], path: storage.Path) -> storage.Path:
    """Writes the PNG: silent turns against iteration, nats by turn, and the same episode of two policies.

    Args:
        curves: member -> metrics.jsonl.
        costs: member -> nats per episode [n] that each turn of the agent costs in the evaluation.
        transcripts: a title and the turns of each.
    """
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.new(11.0, 7.4, settings)
        panels = figure.subplots(2, 2, height_ratios=(1.0, 1.15))
        _draw_rates(panels[0, 0], settings, curves)
        _draw_costs(panels[0, 1], settings, costs)
        for axes, (title, turns) in zip(panels[1], transcripts, strict=True):
            _write(axes, title, turns)
        figures.legend(figure, settings)
        return figures.save(figure, path)


def _draw_rates(axes, settings, curves):
    for setting, look in zip(settings, figures.looks(settings), strict=True):
        figures.curve(axes, [curves[m["member"]] for m in setting.members], _RATE,
                      {"color": look["color"], "ls": look["linestyle"]})
    axes.set(title="share of the teacher's turns that are empty, in training", xlabel="iteration", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))


def _draw_costs(axes, settings, costs):
    """A thin line for each seed, a thick one for their mean, over the turns that every seed reaches."""
    for setting, look in zip(settings, figures.looks(settings), strict=True):
        rows = [costs[m["member"]] for m in setting.members]
        common = min(map(len, rows))
        for row in rows if len(rows) > 1 else []:
            axes.plot(np.arange(1, len(row) + 1), row, color=look["color"], lw=0.7, alpha=0.35)
        axes.plot(np.arange(1, common + 1), np.mean([row[:common] for row in rows], 0), color=look["color"], lw=1.9,
                  ls=look["linestyle"], marker=look["marker"], ms=4)
    axes.set(title="what each turn of the teacher costs (nats per episode)", xlabel="turn of the teacher",
             ylabel=f"{kl_name(settings)} (nats)")
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _write(axes, title, turns):
    """One turn a line, the agent's on red as strong as the square root of its share of 10 nats."""
    axes.set_axis_off()
    axes.set(title=title, xlim=(0, 1), ylim=(_LINES + 0.5, -0.5))
    for row, turn in enumerate(itertools.islice(turns, _LINES)):
        agent = turn.nats is not None
        text = turn.text if len(turn.text) <= _CHARACTERS else turn.text[:_CHARACTERS - 1] + "…"
        if agent:
            axes.axhspan(row - 0.45, row + 0.45, color="#e2261e", alpha=0.75 * min(turn.nats / 10, 1) ** 0.5, lw=0)
        axes.text(0.0, row, turn.speaker, va="center", fontsize=8.5, color="0.1" if agent else "#0550ae")
        axes.text(0.12, row, figures.plain(text) or "(nothing)", va="center", fontsize=8.5, family="DejaVu Sans Mono",
                  color="0.1" if agent else "#0550ae", style="normal" if turn.text else "italic")
        if agent:
            axes.text(1.0, row, f"{turn.nats:.2f} nats", va="center", ha="right", fontsize=8.5)
