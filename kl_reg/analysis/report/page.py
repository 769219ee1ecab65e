"""One self-contained page about a sweep: no model is run, nothing is fetched."""
from __future__ import annotations

import base64
import functools
import os

import numpy as np

from kl_reg import storage
from kl_reg.analysis.report import equal_kl, figures, frontier, silence, stats, tables, transcripts
from kl_reg.analysis.report.conditions import kl_name, warnings
from kl_reg.analysis.report.results import Sweep, read
from kl_reg.analysis.report.tables import escaped
from kl_reg.pretrained import tokenizer

SHOWN_EPISODES = 4


def write_report(workdir: str | os.PathLike) -> storage.Path:
    """Writes `report.html` and `figures/*.png` from the files that a sweep left in `workdir`; the page's path.

    Raises:
        FileNotFoundError: a file is missing (named, with what writes it).
        ValueError: a file does not hold what it should (named, with what was expected).
    """
    workdir = storage.path(workdir)
    sweep, page = read(workdir), workdir / "report.html"
    storage.write_text(page, _page(sweep, workdir / "figures"))
    return page


def _page(sweep: Sweep, folder: storage.Path) -> str:
    """Draws the figures into `folder` and puts the page together."""
    points, base = frontier.points(sweep.settings), sweep.base["final"]
    positions = {m["member"]: _positions(sweep.evaluations[m["member"]]) for s in sweep.settings for m in s.members}
    parts = [stats.mean_by_position([positions[m["member"]] for m in s.members]) for s in sweep.settings]
    silent = silence.learned(sweep.settings, sweep.base, parts)
    sections = [
        _headline(sweep), _glance(sweep, points, parts, silent), _silence(sweep, silent, positions, folder),
        _section("Reward against KL", "One point a setting: the mean over its seeds at the final evaluation. Up and "
                 "left is better: more reward, closer to the reference. coef: reward per nat; budget and target: nats "
                 "per episode.",
                 _image(figures.draw_frontier(points, base, folder / "frontier.png"), "Frontier")),
        _equal_kl(sweep, folder),
        _section("Training", "Sampled episodes, a thin line a seed, a thick one for their mean. Dotted: targets and "
                 "budgets.",
                 _image(figures.draw_training(sweep.settings, sweep.curves, folder / "training.png"),
                        "Training curves")),
        _section("Where in the episode the KL is spent", "Exact D(π‖β) at each agent token, mean over the evaluation's "
                 "episodes and over seeds. A cumulative curve that rises at once and then runs flat is a cost paid up "
                 "front. Late positions are reached in fewer agent tokens, so the first panel is noisier there.",
                 _image(figures.draw_positions(sweep.settings, parts, folder / "positions.png"), "KL per position")),
        _where(sweep), _empty_turns(sweep, folder),
        _section("Every run", "Final evaluation, ± 1 standard error: over episodes for a run, over seeds for a mean. "
                 f"{escaped(kl_name(sweep.settings))}, in nats. Best: the training iterate with the highest return "
                 "minus kl.coef times KL (means over five iterations).", tables.every_run(sweep.base, sweep.settings)),
        _section("Transcripts", f"The first {SHOWN_EPISODES} evaluation episodes of the base and of the first seed of "
                 "each setting: the same indices for all, not selected. Hover over a token for its cost.",
                 _transcripts(sweep, points)),
    ]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kl_reg: {escaped(sweep.fingerprint)}'
            f'</title><meta name="viewport" content="width=device-width"><style>{CSS}{transcripts.CSS}</style></head>'
            f'<body><main>{"".join(sections)}</main></body></html>\n')


def _positions(evaluation):
    return stats.kl_by_position(evaluation["roles"], evaluation["turns"], evaluation["kl"])


def _section(title, lead, body):
    return f"<section><h2>{title}</h2><p>{lead}</p>{body}</section>"


def _image(path, alt):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{data}">'


def _headline(sweep):
    config, rows, episodes = sweep.config, sweep.settings, sweep.settings[0].members[0]["final"]["episodes"]
    notes = warnings(rows)
    if not sweep.independent and len(sweep.base_returns()) > 1:
        notes.append("all seeds were evaluated on the same random numbers, as in earlier versions: errors over seeds "
                     "leave that part out; the same command evaluates the run anew")
    seeds, iterations = ("–".join(str(n) for n in sorted(set(map(len, lists))))
                         for lists in ([s.members for s in rows], sweep.curves.values()))
    terms = " or ".join(f"<b>{escaped(x)}</b>" for x in dict.fromkeys(s.penalty for s in rows if s.penalty)) or "none"
    return (f"<header><h1>What the KL regulariser bought</h1><p>{_count(len(sweep.curves), 'run')}: "
            f"{_count(len(rows), 'setting')} × {_count(seeds, 'seed')}, after {iterations} iterations; "
            f"model <b>{escaped(config.model.path)}</b>, environment <b>{escaped(config.env.name)}</b>, reward "
            f"<b>{escaped(config.reward.name)}</b>, KL term: {terms}.<br>{_measured(sweep)}<br>Evaluated on {episodes} "
            "episodes a run, the base on as many for each seed; configuration "
            f"<code>{escaped(sweep.fingerprint)}</code>.</p>"
            + _start(sweep) + "".join(f"<p class=warning>{escaped(line)}</p>" for line in notes) + "</header>")


def _start(sweep):
    """The run that this one went on from, and what has changed."""
    if sweep.start is None:
        return ""
    start, changes = sweep.start, ", ".join(sweep.start["changes"]) or "nothing"
    return (f"<p>It went on from <b>{escaped(start['address'])}</b>, iteration {start['iteration']}; changed: "
            f"{escaped(changes)}.</p>")


def _measured(sweep):
    """What the KL of this page is measured to, and counted at."""
    to, counted = (dict.fromkeys(column) for column in zip(*((s.reference, s.counted) for s in sweep.settings),
                                                           strict=True))
    unknown = " (which weights these are was not recorded)" * (not sweep.fingerprinted)
    at = "; ".join(escaped(text or "no truncation, temperature 1") for text in counted) if any(counted) else ""
    return (f"KL is D(π‖β), in nats, to {' or '.join(f'<b>{escaped(name)}</b>' for name in to)}{unknown}"
            + f", counted at <b>{at}</b>, as sampled" * bool(at) + ".")


def _count(n, noun):
    return f"{n} {noun}" + "s" * (str(n) != "1")


def _equal_kl(sweep, folder):
    """Only where two settings share a target."""
    found = equal_kl.blocks(sweep.settings, sweep.base_returns(), sweep.evaluations)
    if not found:
        return ""
    drawn = [block for block in found if len(block.ranked) > 1]
    image = _image(equal_kl.draw(drawn, sweep.settings, folder / "equal_kl.png"),
                   "Reward at equal KL") if drawn else ""
    lead = (f"Settings whose KL lies within {equal_kl.TOLERANCE * 100:g} % of the same target, by return; the others "
            "that aim at it, or at none, below. ± 1 standard error, over seeds or, of one seed, over its episodes; "
            "small dots: seeds. Gain per nat: return minus the base's on the same random numbers, over KL. Runs of one "
            "seed are evaluated on the same random numbers, so neighbours are compared in pairs, seed by seed or, of "
            "one seed, episode by episode; settings with different seeds as independent ones (Welch). 19 times in 20 "
            "the difference of equal settings is within the limit. An error over episodes says nothing of other seeds. "
            "The KLs differ by the last column.")
    return _section("Reward at equal KL", lead, image + "".join(map(tables.equal, found)))


def _where(sweep):
    """Only where the runs recorded it."""
    body = tables.where_kl_sits(sweep.settings)
    lead = ("Share of the KL of the final evaluation on each kind of token, ± 1 standard error over seeds or, of one "
            "seed, over its episodes. The first four add up to all of it; groups in italics are the configuration's "
            "and may overlap. Last: the tokens with the highest KL.")
    return _section("Where the KL sits", lead, body) if body else ""


def _empty_turns(sweep, folder):
    human = stats.binomial(*sweep.human) if sweep.human else None
    bars = figures.empty_rows(sweep.base, sweep.settings, human)
    return _section("Empty turns", "How often a finished turn says nothing. Bar: mean over runs; dots: each run ± 1 "
                    "standard error over its episodes." + " Human: held-out turns of both speakers." * bool(human),
                    _image(figures.draw_empty_turns(bars, sweep.settings, folder / "empty_turns.png"), "Empty turns")
                    + tables.empty_turns(sweep.base, sweep.settings, sweep.human))


def _silence(sweep, silent, positions, folder):
    """Only where an agent has learned to say nothing."""
    if not silent:
        return ""
    best = silent[0].setting
    member = best.members[0]
    shown = [(f"base, evaluation episode 0: return {_first(sweep, 'base')}", "base"),
             (f"{best.label}, seed {member['hyper']['seed']}, episode 0: return {_first(sweep, member['member'])}",
              member["member"])]
    texts = [(title, silence.lines(sweep.evaluations[key], _pieces(sweep))) for title, key in shown]
    costs = {number: part.per_turn for number, part in positions.items()}
    return _section("Silence", "A simple behaviour is paid for once and repeated almost for free: empty turns in "
                    "training, what each turn of the teacher costs in the evaluation (mean over all episodes), and the "
                    "first evaluation episode of the base and of the most silent setting's first seed, not selected.",
                    _image(silence.draw(sweep.settings, sweep.curves, costs, texts, folder / "silence.png"),
                           "Silence, turn by turn"))


def _first(sweep, member):
    """The return of a member's first evaluation episode, a dash where it was not judged."""
    return stats.show(float(sweep.evaluations[member]["returns"][0]), 0.0)


def _glance(sweep, points, parts, silent):
    """Computed facts: what was gained at what cost, when it was paid, and what it did to both speakers."""
    base = sweep.base["final"]
    best = points[_highest(points)]
    early = [(stats.share_spent_early(part.cumulative), p.setting.label) for p, part in zip(points, parts, strict=True)]
    early = sorted(pair for pair in early if np.isfinite(pair[0]))
    before = stats.show(stats.number(base["return"]), stats.number(base["return_se"]))
    facts = [escaped(silence.sentence(one, sweep.base)) for one in silent]
    facts += [f"Return: base {before} → <b>{stats.show(float(best.reward), 0.0)}</b> at "
             f"<b>{escaped(best.setting.label)}</b>, for {best.kl:.2f} nats per episode."]
    if early:
        facts.append(f"Paid early: the first quarter of an episode's positions carries <b>{early[0][0]:.0%}</b> "
                     f"({escaped(early[0][1])}) to <b>{early[-1][0]:.0%}</b> ({escaped(early[-1][1])}) of its KL.")
    for who in ("student",) if silent else ("teacher", "student"):
        empty = [(float(stats.mean_and_error(stats.silent_rates(p.setting.members)[who])[0][0]), p.setting.label)
                  for p in points]
        empty = [pair for pair in empty if np.isfinite(pair[0])]
        if empty:
            before = stats.show_percent(*stats.silent_rates([sweep.base])[who][0])
            facts.append(f"Empty {who} turns: base {before} → up to <b>{max(empty)[0]:.1%}</b> "
                         f"({escaped(max(empty)[1])}).")
    return f"<ul class=glance>{''.join(f'<li>{fact}</li>' for fact in facts)}</ul>"


def _transcripts(sweep, points):
    rows = [("base", sweep.base)] + [(f"{p.setting.label}, seed {p.setting.members[0]['hyper']['seed']}",
                                        p.setting.members[0]) for p in points]
    shown = [(name, row["final"], sweep.evaluations[row["member"]]) for name, row in rows]
    return transcripts.folded(shown, _pieces(sweep), SHOWN_EPISODES,
                              opened=1 + _highest(points))


def _highest(points):
    """Which point has the highest return; one without a judged episode has none."""
    return int(np.argmax([-np.inf if np.isnan(p.reward) else p.reward for p in points]))


def _pieces(sweep):
    return functools.partial(tokenizer.pieces, tokenizer.load(sweep.folder))


CSS = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--dim:#6e7781;--line:#d0d7de;--panel:#f6f8fa;--student:#0550ae}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--bg:#0d1117;--dim:#8b949e;--line:#30363d;--panel:#161b22;
--student:#79c0ff}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:1.5rem 1.25rem 4rem}h1{font-size:1.6rem;margin:0 0 .4rem}
h2{font-size:1.2rem;margin:2.2rem 0 .3rem;border-top:1px solid var(--line);padding-top:1.2rem}
h3{font-size:1rem;margin:1.2rem 0 .2rem}
.warning{border-left:4px solid #a40000;padding:.3rem .8rem;background:var(--panel)}
h4{margin:.2rem 0;font-size:.85rem}h4 span,small{font-weight:normal;color:var(--dim)}
p{margin:.3rem 0 .8rem;max-width:64rem}
img{display:block;width:100%;box-sizing:border-box;padding:8px;background:#fff;border-radius:8px}
.glance{background:var(--panel);border-left:4px solid #35608d;border-radius:4px;
padding:.7rem 1rem .7rem 2rem;margin:1rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.2rem .45rem;text-align:right;white-space:nowrap}th{font-weight:600;border-bottom:1px solid var(--fg)}
th:first-child,td:first-child{text-align:left}tbody{border-bottom:1px solid var(--line)}
details{border:1px solid var(--line);border-radius:6px;margin:.6rem 0;padding:.4rem .8rem}
summary{cursor:pointer;font-weight:600}
.episodes{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:.8rem 1.4rem;margin:.6rem 0}
article{border-top:1px solid var(--line);padding-top:.3rem;min-width:0}
"""
