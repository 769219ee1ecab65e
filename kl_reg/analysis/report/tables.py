"""The report's tables, as HTML."""
from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

import numpy as np

from kl_reg.analysis.report import equal_kl, stats
from kl_reg.analysis.report.conditions import Setting, varying

_GROUPS = {"first": "first tokens of turns", "end": "end markers", "punctuation": "punctuation", "other": "other"}
_HELP = ("help/rate_per_token", "help/asked_rate")
_TOP = "kl/top1_share"


def escaped(value) -> str:
    """`value` escaped."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], blocks: Sequence[Sequence[Sequence[str]]]) -> str:
    """A table, one tbody a block; cells are HTML already."""
    body = "".join("<tbody>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows) + "</tbody>"
                   for rows in blocks)
    return f"<div class=wide><table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>{body}</table></div>"


def empty_turns(base: dict, settings: Sequence[Setting], human: tuple[int, int] | None) -> str:
    """Rates of empty turns of each run, folded; `human`: empty turns among held-out turns."""
    rows = []
    if human:
        empty, turns = human
        rate = stats.show_percent(*stats.binomial(empty, turns)) + f" <small>({empty} of {turns:,} turns)</small>"
        rows.append(["human, held out", rate, rate])
    rows += [[name, *(stats.show_percent(*stats.silent_rates([member])[who][0]) for who in ("teacher", "student"))]
             for name, member in [("base", base)] + [
                 (f"{escaped(s.label)}, seed {escaped(m['hyper']['seed'])}", m) for s in settings for m in s.members]]
    return f"<details><summary>In numbers, each run</summary>{table(['', 'teacher', 'student'], [rows])}</details>"


def every_run(base: dict, settings: Sequence[Setting]) -> str:
    """What each run reached, and the mean over the seeds of each setting; help where a run may ask for it."""
    members = [m for s in settings for m in s.members]
    keys = [key for key in varying(members) if key != "seed"] + ["seed"]
    asks = any(m["final"][_HELP[0]] for m in (base, *members) if _HELP[0] in m["final"])
    head = ["run", *map(escaped, keys), "return", "KL per episode", "KL per token", "replies", "teacher empty",
            "student empty", *["help per token", "episodes that asked"] * asks, "best: return, KL"]
    blocks = [[["base", *[""] * len(keys), *_measures([base], asks), ""]]]
    for s in settings:
        bests = [m["best"] for m in s.members]
        rows = [[escaped(m["member"]), *(_hyper(m["hyper"][key]) for key in keys), *_measures([m], asks),
                 f"{best['iteration']}: {stats.show(stats.number(best['return']), 0.0)}, "
                 f"{best['kl/nats_per_episode']:.2f}"]
                for m, best in zip(s.members, bests, strict=True)]
        if len(rows) > 1:
            shared = [_hyper(s.members[0]["hyper"][key]) for key in keys[:-1]]
            rows.append(["<b>mean</b>", *shared, f"{len(rows)} seeds", *_measures(s.members, asks), ""])
        blocks.append(rows)
    return table(head, blocks)


def _measures(rows, asks):
    """The measured columns of one run, or of the mean over runs."""
    per_token = [float(x) for x in stats.mean_and_error([stats.number(row["final"]["kl/nats_per_token"])
                                                         for row in rows])]
    return [_column(rows, "return", stats.show), _column(rows, "kl/nats_per_episode", stats.show),
            stats.show(*per_token) if len(rows) > 1 else _places(per_token[0]), _column(rows, "replies", stats.show),
            _column(rows, "teacher/silent_rate", stats.show_percent),
            _column(rows, "student/silent_rate", stats.show_percent),
            *(_column(rows, key, stats.show_percent) for key in _HELP if asks)]


def _column(rows, key, how):
    """One metric of a run with its error over episodes, or its mean over runs with that over seeds."""
    values = [stats.number(row["final"][key]) for row in rows]
    if len(rows) > 1:
        return how(*map(float, stats.mean_and_error(values)))
    return how(values[0], stats.number(rows[0]["final"][f"{key}_se"]))


def _places(value):
    return f"{value:.4f}" if np.isfinite(value) else "–"


def _hyper(value):
    return "none" if value is None else escaped(f"{value:g}" if isinstance(value, float) else value)


def where_kl_sits(settings: Sequence[Setting]) -> str:
    """Shares of a setting's KL by kind of token; "" where no run recorded them for all."""
    finals = [m["final"] for s in settings for m in s.members]
    shared = [key for key in finals[0] if all(key in final for final in finals)]
    names = [key.split("/")[2] for key in shared if key.startswith("kl/group/") and key.endswith("/share")]
    if not names and _TOP not in shared:
        return ""
    ordered = [name for name in _GROUPS if name in names] + [name for name in names if name not in _GROUPS]
    head = ["", *(_GROUPS[name] if name in _GROUPS else f"<i>{escaped(name)}</i>" for name in ordered)]
    rows = [[escaped(s.label), *(_column(s.members, f"kl/group/{name}/share", stats.show_percent) for name in ordered)]
            for s in settings]
    if _TOP in shared:
        head.append("top 1 % of tokens")
        for s, row in zip(settings, rows, strict=True):
            top, error = stats.mean_and_error([stats.number(m["final"][_TOP]) for m in s.members])
            row.append(stats.show_percent(float(top), float(error)))
    return table(head, [rows])


def equal(block: equal_kl.Block) -> str:
    """One target: the ranked settings, how neighbours differ, and the settings that are not ranked."""
    head = ["setting", "return", "KL per episode", "from the target", "gain per nat", "seeds"]
    ranked, off = ([_entry(entry, block.target) for entry in rows] for rows in (block.ranked, block.off))
    if off:
        ranked.append(["<i>off the target, not ranked</i>", *[""] * (len(head) - 1)])
    parts = [f"<h3>{block.target:g} nats per episode, KL to {escaped(block.measured)}</h3>", table(head, [ranked, off])]
    if len(block.ranked) > 1:
        pairs = [_comparison(a, b) for a, b in itertools.pairwise(block.ranked)]
        parts.append(table(["neighbours", "difference in return", "95 % limit", "beyond it?", "error over",
                            "difference in KL"], [pairs]))
    return "".join(parts)


def _entry(entry, target):
    return [escaped(entry.setting.label), stats.show(entry.reward.value, entry.reward.error),
            stats.show(entry.kl.value, entry.kl.error), f"{100 * (entry.kl.value / target - 1):+.0f} %",
            stats.show(*entry.per_nat), str(len(entry.seeds))]


def _comparison(a, b):
    reward, over = equal_kl.compare(a, b)
    verdict = "not known" if not np.isfinite(reward.limit) else "yes" if abs(reward.value) > reward.limit else "no"
    limit = f"{reward.limit:.2g}" if np.isfinite(reward.limit) else "–"
    return [escaped(f"{a.setting.label} − {b.setting.label}"), stats.show(reward.value, reward.error), limit, verdict,
            over, f"{a.kl.value - b.kl.value:+.2f}"]
