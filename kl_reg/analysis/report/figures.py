"""The report's figures. A colour means the same setting in all: fixed coefficients from green (small) to purple, moving
ones from blue to pink, budgets in oranges, the base model black; line and marker tell apart what differs otherwise."""
from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence

import matplotlib
import matplotlib.lines
import matplotlib.text
import matplotlib.ticker
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kl_reg import storage
from kl_reg.analysis.report.conditions import Setting, kl_name, warnings
from kl_reg.analysis.report.frontier import INTERVALS, Point
from kl_reg.analysis.report.stats import ByPosition, number, silent_rates

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "axes.axisbelow": True, "axes.titlesize": 10.5, "axes.titlelocation": "left",
         "legend.frameon": False, "savefig.dpi": 150, "figure.constrained_layout.use": True}
CURVES = (("return", "return per episode"), ("kl/nats_per_episode", "{kl} (nats per episode)"),
          ("student/silent_rate", "student turns that are empty"),
          ("entropy/nats_per_token", "entropy (nats per token)"))
COEF = "kl/coef"
BASE, HUMAN = "black", "0.55"
_COLORS = {"coef": ("viridis", 0.8, 0.0), "controlled": ("hsv", 0.55, 0.95), "budget": ("Oranges", 0.5, 0.95)}
_MARKERS = {"coef": "osv^P*", "controlled": "^vXP<>", "budget": "Dds8pH"}
_DASHES = {"coef": ("-", (0, (7, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1))),
           "controlled": ("-", (0, (6, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1))),
           "budget": ((0, (4, 1.5)), (0, (8, 2)), (0, (2, 1)), (0, (4, 1, 1, 1)))}


def looks(settings: Sequence[Setting]) -> list[dict]:
    """Colour, line style and marker of each setting. No two have the same colour: within a kind it goes with the value,
    line and marker with the variant."""
    result = []
    for s in settings:
        kind = sorted((o for o in settings if o.kind == s.kind), key=lambda o: (o.value, o.variant, o.label))
        variants = sorted({o.variant for o in kind})
        name, first, last = _COLORS[s.kind]
        place, variant = kind.index(s) / max(len(kind) - 1, 1), variants.index(s.variant)
        result.append({"color": matplotlib.colormaps[name](first + (last - first) * place),
                       "linestyle": _DASHES[s.kind][variant % len(_DASHES[s.kind])],
                       "marker": _MARKERS[s.kind][variant % len(_MARKERS[s.kind])]})
    return result


def new(width: float, height: float, shown: Sequence[Setting]) -> Figure:
    """A figure, at its foot the warnings of the settings that it shows."""
    lines = [line for text in warnings(shown) for line in textwrap.wrap(text, 150)]
    figure = Figure(figsize=(width, height + 0.18 * len(lines)))
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8.5, color="#a40000")
    return figure


def save(figure: Figure, path: storage.Path) -> storage.Path:
    """Writes the PNG."""
    data = io.BytesIO()
    figure.savefig(data, metadata={"Software": None})
    storage.write_bytes(path, data.getvalue())
    return path


def plain(text: str) -> str:
    """The text without formulas: matplotlib would read what two $ enclose as one."""
    return text.replace("$", r"\$")


def draw_frontier(points: Sequence[Point], base: dict, path: storage.Path) -> storage.Path:
    """Return per episode against nats per episode; the base's return with a band of its standard error.

    Args:
        base: the base model's `final` of the summary.
    """
    settings, reward, error = [p.setting for p in points], number(base["return"]), number(base["return_se"])
    with matplotlib.rc_context(STYLE):
        figure = new(10.4, 5.4, settings)
        axes = figure.subplots()
        axes.axhspan(reward - error, reward + error, color=BASE, alpha=0.08, lw=0)
        axes.axhline(reward, color=BASE, lw=0.8, ls=":")
        for family in dict.fromkeys((s.kind, s.variant) for s in settings if s.kind != "budget"):
            line = [p for p in points if (p.setting.kind, p.setting.variant) == family]
            axes.plot([p.kl for p in line], [p.reward for p in line], color="0.6", lw=1.2, zorder=1)
        for p, look in zip(points, looks(settings), strict=True):
            axes.plot(p.kl_bar, (p.reward, p.reward), color=look["color"], lw=1.4)
            axes.plot((p.kl, p.kl), p.reward_bar, color=look["color"], lw=1.4)
            if len(p.seeds) > 1:
                axes.plot(*p.seeds.T, ls="", marker=".", ms=7, color=look["color"], alpha=0.55, mec="none")
            axes.plot(p.kl, p.reward, ls="", marker=look["marker"], ms=8, color=look["color"], mec="white", zorder=3)
        kl = max(0.0, number(base["kl/nats_per_episode"]))
        axes.plot(kl, reward, ls="", marker="*", ms=15, color=BASE, mec="white", zorder=4, clip_on=False)
        _scale_kl(axes, np.concatenate([[kl], *(p.seeds[:, 0] for p in points)]))
        axes.set(xlabel=f"{kl_name(settings)} (nats per episode)", ylabel="return per episode")
        kinds = "; ".join(INTERVALS[kind] for kind in dict.fromkeys(p.interval for p in points))
        axes.set_title(f"Bars: {kinds}. Band: base ± 1 standard error.", fontsize=9, color="0.35")
        axes.margins(y=0.12)
        _label(figure, axes, [("base", kl, reward, BASE)] + [
            (p.setting.label, p.kl, p.reward, look["color"]) for p, look in zip(points, looks(settings), strict=True)])
        return save(figure, path)


def _scale_kl(axes, kls):
    """Logarithmic, with a linear part from 0 to the smallest KL's decade, where the KLs span more than one decade."""
    positive = kls[kls > 1e-3]
    if positive.size and positive.max() > 10 * positive.min():
        threshold = max(10.0 ** np.floor(np.log10(positive.min())), positive.max() / 1e4)
        axes.set_xscale("symlog", linthresh=threshold, linscale=0.6)
        decades = threshold * 10.0 ** np.arange(0, np.ceil(np.log10(positive.max() / threshold)) + 1)
        axes.set_xticks([0, *decades], [f"{v:g}" for v in (0, *decades)])
        axes.set_xticks([m * d for d in decades for m in range(2, 10)], minor=True)
        axes.set_xlim(-0.15 * threshold, positive.max() * 1.6)
    else:
        top = max(kls.max(), 1e-3)
        axes.set_xlim(-0.04 * top, top * 1.15)


def _label(figure, axes, items):
    """Names beside the points: of several offsets, the first that covers the fewest lines and points, and above all
    other names."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    taken = [(1, box) for line in axes.lines for box in _boxes(line)]
    offsets = [(-9, 6), (9, -14), (9, 6), (-9, -14), (0, 14), (0, -22), (14, 20), (-14, 20), (14, -28), (-14, -28),
               (0, 30), (0, -38), (0, 46), (0, -54), (-30, 36), (30, 36), (-30, -44), (30, -44), (0, 62), (0, -70)]
    for name, x, y, color in items:
        tried = []
        for dx, dy in offsets:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", color=color, fontsize=9,
                                 ha="left" if dx > 0 else "right" if dx < 0 else "center", zorder=5,
                                 arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5} if abs(dy) > 16 else None)
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = matplotlib.text.Text.get_window_extent(text, renderer).extents    # without the arrow
            outside = box[0] < axes.bbox.x0 or box[2] > axes.bbox.x1 or box[1] < axes.bbox.y0 or box[3] > axes.bbox.y1
            hits = sum(weight for weight, (a, b, c, d) in taken
                       if box[0] < c and a < box[2] and box[1] < d and b < box[3])
            text.remove()
            tried.append((hits + 1000 * outside, text, box))
        _, text, box = min(tried, key=lambda candidate: candidate[0])
        axes.add_artist(text)
        taken.append((10, box))


def _boxes(line, half=3.0, steps=40):
    """Small boxes (x0, y0, x1, y1) in pixels that cover a drawn line or its markers."""
    places = line.get_transform().transform(line.get_xydata())
    if line.get_linestyle() != "None":
        along = np.linspace(0, len(places) - 1, steps * (len(places) - 1) + 1)
        places = np.stack([np.interp(along, np.arange(len(places)), part) for part in places.T], 1)
    return [(x - half, y - half, x + half, y + half) for x, y in places]


def legend(figure: Figure, settings: Sequence[Setting]) -> None:
    """One legend for all panels, above them."""
    handles = [matplotlib.lines.Line2D([], [], color=look["color"], ls=look["linestyle"], lw=2.2)
               for look in looks(settings)]
    labels = [s.label for s in settings]
    columns = max(1, min(len(labels), 130 // (max(map(len, labels)) + 9)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6)


def draw_training(settings: Sequence[Setting], curves: dict[int, list[dict]], path: storage.Path) -> storage.Path:
    """Metrics against iteration: a thin line a seed, a thick one for their mean; targets and budgets dotted.

    Args:
        curves: member -> metrics.jsonl. Where a coefficient moves, it has a panel.
    """
    moving = [s for s in settings if any(len({r[COEF] for r in curves[m["member"]] if COEF in r}) > 1
                                         for m in s.members)]
    names = [(key, name.format(kl=kl_name(settings))) for key, name in CURVES]
    names += [(COEF, "KL coefficient (reward per nat)")] if moving else []
    with matplotlib.rc_context(STYLE):
        figure = new(10.4, 3.1 * math.ceil(len(names) / 2), settings)
        panels = figure.subplots(math.ceil(len(names) / 2), 2, sharex=True)
        for axes, (key, name) in zip(panels.flat, names, strict=False):
            for setting, look in zip(settings, looks(settings), strict=True):
                if key != COEF or setting in moving:
                    curve(axes, [curves[m["member"]] for m in setting.members], key,
                           {"color": look["color"], "ls": look["linestyle"]})
            axes.set_title(name)
            axes.tick_params(labelbottom=True)
            if key == "kl/nats_per_episode":
                axes.set_ylim(bottom=0)
                for target in sorted({s.target for s in settings if s.target}):
                    axes.axhline(target, color="0.25", ls=":", lw=1.2)
            if key == "student/silent_rate":
                axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            if key == COEF:
                _scale_coef(axes)
        for axes in list(panels.flat)[len(names):]:
            axes.set_axis_off()
        for axes in list(panels.flat)[max(0, len(names) - 2):len(names)]:
            axes.set_xlabel("iteration")
        legend(figure, settings)
        return save(figure, path)


def _scale_coef(axes):
    """Logarithmic, every tick labelled where there is little more than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if high < 15 * low else matplotlib.ticker.NullFormatter())


def curve(axes, runs: Sequence[list[dict]], key: str, style: dict) -> None:
    """One setting's metric in one panel: a thin line for each seed, a thick one for their mean.

    Args:
        runs: metrics.jsonl of each seed.
        style: colour and line style.
    """
    for run in runs if len(runs) > 1 else []:
        axes.plot([r["iteration"] for r in run], [number(r[key]) for r in run], lw=0.7, alpha=0.35, **style)
    common = min(map(len, runs))
    values = np.array([[number(r[key]) for r in run[:common]] for run in runs])
    axes.plot([r["iteration"] for r in runs[0][:common]], values.mean(0), lw=1.9, **style)


def draw_positions(settings: Sequence[Setting], parts: Sequence[ByPosition], path: storage.Path) -> storage.Path:
    """Where in the episode the KL is spent: by agent token, by position, cumulated, by turn of the agent."""
    with matplotlib.rc_context(STYLE):
        figure = new(10.4, 6.6, settings)
        panels = figure.subplots(2, 2)
        titles = ("nats per agent token, at each position", "nats per episode that each position adds",
                  "nats per episode spent so far", "nats per episode, by turn of the agent")
        for part, look in zip(parts, looks(settings), strict=True):
            style = {"color": look["color"], "ls": look["linestyle"]}
            for axes, y in zip(panels.flat, (part.per_token, part.per_position, part.cumulative), strict=False):
                axes.plot(np.arange(len(y)), y, lw=1.9 if y is part.cumulative else 1.1, **style)
            alone = np.flatnonzero(_isolated(part.per_token))
            panels[0, 0].plot(alone, part.per_token[alone], ls="", marker=look["marker"], ms=4, color=look["color"])
            panels[1, 1].plot(np.arange(1, len(part.per_turn) + 1), part.per_turn, lw=1.4, marker=look["marker"], ms=4,
                              **style)
        for axes, title in zip(panels.flat, titles, strict=True):
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set(xlabel="tokens after the opening", ylabel=f"{kl_name(settings)} (nats)")
        panels[1, 1].set_xlabel("turn of the agent")
        panels[1, 1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        legend(figure, settings)
        return save(figure, path)


def _isolated(y):
    """Where a value has none beside it, so that no line shows it."""
    here = np.pad(np.isfinite(y), 1)
    return here[1:-1] & ~here[:-2] & ~here[2:]


def draw_empty_turns(rows: Sequence[tuple[str, object, dict[str, list[tuple[float, float]]]]],
                     settings: Sequence[Setting], path: storage.Path) -> storage.Path:
    """Share of empty turns, teacher and student side by side.

    Args:
        rows: (name, colour, {"teacher": [(rate, standard error) a run], "student": the same}), from the top.
        settings: those among the rows.
        path: the PNG.
    """
    with matplotlib.rc_context(STYLE):
        figure = new(10.4, 1.2 + 0.34 * len(rows), settings)
        panels = figure.subplots(1, 2, sharey=True, sharex=True)
        for axes, who in zip(panels, ("teacher", "student"), strict=True):
            for i, (_, color, rates) in enumerate(rows):
                runs = np.array([r for r in rates[who] if np.isfinite(r[0])]).reshape(-1, 2)
                if not len(runs):
                    continue
                mean, spread = runs[:, 0].mean(), np.linspace(-0.2, 0.2, len(runs)) if len(runs) > 1 else [0.0]
                axes.barh(i, mean, height=0.66, color=color, alpha=0.75)
                axes.errorbar(runs[:, 0], i + np.array(spread), xerr=np.nan_to_num(runs[:, 1]), fmt=".", ms=4,
                              color="0.15", lw=0.9)
                axes.annotate(f"{mean:.1%}", ((runs.sum(1)).max(), i), (5, 0), textcoords="offset points", va="center",
                              fontsize=8.5)
            axes.set(title=f"{who} turns that are empty")
            axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.16)
        panels[0].set_yticks(range(len(rows)), [name for name, _, _ in rows])
        panels[0].invert_yaxis()
        panels[0].set_xlim(left=0)
        return save(figure, path)


def empty_rows(base: dict, settings: Sequence[Setting], human: tuple[float, float] | None) -> list[tuple]:
    """The rows of `draw_empty_turns`; `human` is the rate of both speakers and its standard error."""
    rows = [("human", HUMAN, dict.fromkeys(("teacher", "student"), [human]))] if human else []
    rows.append(("base", BASE, silent_rates([base])))
    return rows + [(s.label, look["color"], silent_rates(s.members))
                   for s, look in zip(settings, looks(settings), strict=True)]
