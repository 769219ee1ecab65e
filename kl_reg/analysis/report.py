"""One self-contained page about a sweep: no model is run, nothing is fetched."""
from __future__ import annotations

import base64
import functools
import html
import json
import pathlib
from typing import NamedTuple

import numpy as np

from kl_reg.analysis import figures, frontier, stats, transcripts
from kl_reg.models import tokenizer, weights

FINAL = ("return", "return_se", "kl/nats_per_episode", "kl/nats_per_episode_se", "kl/nats_per_token",
         "teacher/silent_rate", "teacher/silent_rate_se", "student/silent_rate", "student/silent_rate_se",
         "replies", "replies_se", "episodes")
CURVE = ("iteration", *(key for key, _ in figures.CURVES))
ARRAYS = ("tokens", "roles", "turns", "kl", "returns")
SHOWN_EPISODES = 4


class Sweep(NamedTuple):
    """A sweep's directory, read. `curves` and `evaluations` are by member; "base" has an evaluation only."""

    config: dict
    fingerprint: str
    summary: list[dict]
    curves: dict[int, list[dict]]
    evaluations: dict[int | str, dict[str, np.ndarray]]
    human: tuple[int, int] | None       # empty turns among the held-out human turns
    folder: pathlib.Path                # of the model, for its tokenizer


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` and `figures/*.png` from the files that a sweep left in `workdir`; the page's path.

    Raises:
        FileNotFoundError: a file is missing (named, with what writes it).
        ValueError: a file does not hold what it should (named, with what was expected).
    """
    sweep = read(pathlib.Path(workdir))
    page = pathlib.Path(workdir) / "report.html"
    page.write_text(_page(sweep, page.parent / "figures"), encoding="utf-8")
    return page


def read(workdir: pathlib.Path) -> Sweep:
    """Reads and checks what a sweep wrote; raises as `write_report` does."""
    stored, summary = _json(workdir / "config.json"), _json(workdir / "summary.json")
    _need(workdir / "config.json", stored, ("config", "fingerprint"))
    _need(workdir / "config.json", stored["config"], ("model", "env", "reward", "kl"))
    for row in summary:
        _need(workdir / "summary.json", row, ("member", "hyper", "final"))
        _need(workdir / "summary.json", row["final"], FINAL)
        if row["member"] != "base":
            _need(workdir / "summary.json", row, ("best",))
            _need(workdir / "summary.json", row["hyper"], ("kl.coef", "kl.budget", "seed"))
    ids = [row["member"] for row in summary]
    if "base" not in ids or len(ids) < 2:
        raise ValueError(f"{workdir / 'summary.json'}: expected at least one member and 'base', found {ids}")
    path = stored["config"]["model"]["path"]
    folder = weights.model_folder(path)
    card = folder / "card.json"
    human = None
    if path == "embedded" and card.is_file():
        facts = _json(card)
        human = (facts["human_empty_turns"], facts["human_turns"])
    return Sweep(stored["config"], stored["fingerprint"], summary,
                 {i: _lines(workdir / f"members/{i}/metrics.jsonl") for i in ids if i != "base"},
                 {i: _arrays(workdir / f"members/{i}/evaluation.npz") for i in ids}, human, folder)


def _present(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a finished sweep writes it (python -m launch.sweep "
                                "--config=... --workdir=...); is this a sweep's directory, and did it end?")
    return file


def _json(file):
    try:
        return json.loads(_present(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _need(file, row, keys):
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(f"{file}: expected {', '.join(missing)} in {json.dumps(row)[:200]}")


def _lines(file):
    rows = []
    for i, line in enumerate(_present(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {i}, is not JSON: {error}") from None
        _need(file, rows[-1], CURVE)
    if not rows:
        raise ValueError(f"{file} is empty: expected a line an iteration")
    return rows


def _arrays(file):
    with np.load(_present(file)) as stored:
        _need(file, dict.fromkeys(stored.files), ARRAYS)
        arrays = {key: stored[key] for key in ARRAYS}
    shape = arrays["tokens"].shape
    if any(arrays[key].shape != shape for key in ("roles", "turns", "kl")) or arrays["returns"].shape != shape[:1]:
        raise ValueError(f"{file}: expected tokens, roles, turns and kl of one shape [episodes, slots] and returns "
                         f"[episodes], found {({key: a.shape for key, a in arrays.items()})}")
    return arrays


def _page(sweep: Sweep, folder: pathlib.Path) -> str:
    """Draws the figures into `folder` and puts the page together."""
    points, base_return = frontier.points(sweep.summary)
    groups = [point.setting for point in points]
    parts = [stats.mean_by_position([_positions(sweep.evaluations[m["member"]]) for m in s.members]) for s in groups]
    bars = figures.empty_rows(_base(sweep), groups, stats.binomial(*sweep.human) if sweep.human else None)
    sections = [
        _headline(sweep, groups), _glance(sweep, points, parts),
        _section("Reward against KL", "One point a setting: the mean over its seeds at the final evaluation. Up and "
                 "left is better: more reward, closer to the base. coef: reward per nat; budget: nats per episode.",
                 _image(figures.draw_frontier(points, base_return, folder / "frontier.png"), "Frontier")),
        _section("Training", "Sampled episodes, a thin line a seed, a thick one for their mean.",
                 _image(figures.draw_training(groups, sweep.curves, folder / "training.png"), "Training curves")),
        _section("Where in the episode the KL is spent", "Exact D(π‖β) at each agent token, mean over the evaluation's "
                 "episodes and over seeds. A cumulative curve that rises at once and then runs flat is a cost paid up "
                 "front. Late positions are reached in fewer agent tokens, so the first panel is noisier there.",
                 _image(figures.draw_positions(groups, parts, folder / "positions.png"), "KL per position")),
        _section("Empty turns", "How often a finished turn says nothing. Bar: mean over runs; dots: each run ± 1 "
                 "standard error over its episodes."
                 + " Human: held-out turns of both speakers." * (sweep.human is not None),
                 _image(figures.draw_empty_turns(bars, folder / "empty_turns.png"),
                       "Empty turns") + _empty_table(sweep, groups)),
        _section("Every run", "Final evaluation, ± 1 standard error: over episodes for a run, over seeds for a mean. "
                 "KL is to the base, in nats. Best: the training iterate with the highest return minus coefficient "
                 "times KL (means over five iterations).",
                 _members_table(sweep, groups)),
        _section("Transcripts", f"The first {SHOWN_EPISODES} evaluation episodes of the base and of the first seed of "
                 "each setting: the same indices for all, not selected. Hover over a token for its cost.",
                 _transcripts(sweep, points)),
    ]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>kl_reg: {_text(sweep.fingerprint)}'
            f'</title><meta name="viewport" content="width=device-width"><style>{CSS}{transcripts.CSS}</style></head>'
            f'<body><main>{"".join(sections)}</main></body></html>\n')


def _positions(evaluation):
    return stats.kl_by_position(evaluation["roles"], evaluation["turns"], evaluation["kl"])


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _section(title, lead, body):
    return f"<section><h2>{title}</h2><p>{lead}</p>{body}</section>"


def _image(path, alt):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{data}">'


def _headline(sweep, groups):
    config, runs = sweep.config, sum(len(s.members) for s in groups)
    seeds = "–".join(str(n) for n in sorted({len(s.members) for s in groups}))
    iterations = "–".join(str(n) for n in sorted({len(rows) for rows in sweep.curves.values()}))
    episodes = sweep.summary[0]["final"]["episodes"]
    return (f"<header><h1>What the KL regulariser bought</h1><p>{_count(runs, 'run')}: "
            f"{_count(len(groups), 'setting')} × {_count(seeds, 'seed')}, after {iterations} iterations; "
            f"model <b>{_text(config['model']['path'])}</b>, environment <b>{_text(config['env']['name'])}</b>, reward "
            f"<b>{_text(config['reward']['name'])}</b>, KL term <b>{_text(config['kl']['estimator'])}</b> in "
            f"<b>{_text(config['kl']['placement'])}</b>.<br>Evaluated on {episodes} episodes a run; configuration "
            f"<code>{_text(sweep.fingerprint)}</code>.</p></header>")


def _count(n, noun):
    return f"{n} {noun}" + "s" * (str(n) != "1")


def _glance(sweep, points, parts):
    """Computed facts: what was gained at what cost, when it was paid, and what it did to both speakers."""
    base = _base(sweep)["final"]
    best = max(points, key=lambda p: p.reward)
    early = [(stats.share_spent_early(part.cumulative), p.setting.label) for p, part in zip(points, parts, strict=True)]
    early = sorted(pair for pair in early if np.isfinite(pair[0]))
    before = stats.show(stats.number(base["return"]), stats.number(base["return_se"]))
    facts = [f"Return: base {before} → <b>{best.reward:.2f}</b> at "
             f"<b>{_text(best.setting.label)}</b>, for {best.kl:.2f} nats per episode."]
    if early:
        facts.append(f"Paid early: the first quarter of an episode's positions carries <b>{early[0][0]:.0%}</b> "
                     f"({_text(early[0][1])}) to <b>{early[-1][0]:.0%}</b> ({_text(early[-1][1])}) of its KL; 25 % "
                     "would be an even spread.")
    for who in ("teacher", "student"):
        silent = [(float(stats.mean_and_error(stats.silent_rates(p.setting.members)[who])[0][0]), p.setting.label)
                  for p in points]
        silent = [pair for pair in silent if np.isfinite(pair[0])]
        if silent:
            before = stats.show_percent(*stats.silent_rates([_base(sweep)])[who][0])
            facts.append(f"Empty {who} turns: base {before} → up to <b>{max(silent)[0]:.1%}</b> "
                         f"({_text(max(silent)[1])}).")
    return f"<ul class=glance>{''.join(f'<li>{fact}</li>' for fact in facts)}</ul>"


def _base(sweep):
    return next(row for row in sweep.summary if row["member"] == "base")


def _empty_table(sweep, groups):
    head = ["", "teacher", "student"]
    rows = []
    if sweep.human:
        empty, turns = sweep.human
        rate = stats.show_percent(*stats.binomial(empty, turns)) + f" <small>({empty} of {turns:,} turns)</small>"
        rows.append(["human, held out", rate, rate])
    rows += [[name, *(stats.show_percent(*stats.silent_rates([member])[who][0]) for who in ("teacher", "student"))]
             for name, member in [("base", _base(sweep))] + [
                 (f"{_text(s.label)}, seed {_text(m['hyper']['seed'])}", m) for s in groups for m in s.members]]
    return f"<details><summary>In numbers, each run</summary>{_table(head, [rows])}</details>"


def _members_table(sweep, groups):
    members = [m for s in groups for m in s.members]
    keys = [key for key in stats.varying(members) if key != "seed"] + ["seed"]
    head = ["run", *map(_text, keys), "return", "KL per episode", "KL per token", "replies", "teacher empty",
            "student empty", "best: return, KL"]
    blocks = [[["base", *[""] * len(keys), *_measures([_base(sweep)]), ""]]]
    for s in groups:
        bests = [m["best"] for m in s.members]
        rows = [[_text(m["member"]), *(_hyper(m["hyper"][key]) for key in keys), *_measures([m]),
                 f"{best['iteration']}: {best['return']:.2f}, {best['kl/nats_per_episode']:.2f}"]
                for m, best in zip(s.members, bests, strict=True)]
        if len(rows) > 1:
            shared = [_hyper(s.members[0]["hyper"][key]) for key in keys[:-1]]
            rows.append(["<b>mean</b>", *shared, f"{len(rows)} seeds", *_measures(s.members), ""])
        blocks.append(rows)
    return _table(head, blocks)


def _measures(rows):
    """The measured columns of one run, or of the mean over runs."""
    def column(key, how):
        values = [stats.number(row["final"][key]) for row in rows]
        if len(rows) > 1:
            return how(*map(float, stats.mean_and_error(values)))
        return how(values[0], stats.number(rows[0]["final"][f"{key}_se"]))
    per_token = [float(x) for x in stats.mean_and_error([stats.number(row["final"]["kl/nats_per_token"])
                                                         for row in rows])]
    return [column("return", stats.show), column("kl/nats_per_episode", stats.show),
            stats.show(*per_token) if len(rows) > 1 else _places(per_token[0]), column("replies", stats.show),
            column("teacher/silent_rate", stats.show_percent), column("student/silent_rate", stats.show_percent)]


def _places(value):
    return f"{value:.4f}" if np.isfinite(value) else "–"


def _hyper(value):
    return "none" if value is None else _text(f"{value:g}" if isinstance(value, float) else value)


def _table(head, blocks):
    """A table, one tbody a block; cells are HTML already."""
    body = "".join("<tbody>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows) + "</tbody>"
                   for rows in blocks)
    return f"<div class=wide><table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>{body}</table></div>"


def _transcripts(sweep, points):
    rows = [("base", _base(sweep))] + [(f"{p.setting.label}, seed {p.setting.members[0]['hyper']['seed']}",
                                        p.setting.members[0]) for p in points]
    shown = [(name, row["final"], sweep.evaluations[row["member"]]) for name, row in rows]
    pieces_of = functools.partial(tokenizer.pieces, tokenizer.load(sweep.folder))
    return transcripts.folded(shown, pieces_of, SHOWN_EPISODES, opened=1 + int(np.argmax([p.reward for p in points])))


CSS = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--dim:#6e7781;--line:#d0d7de;--panel:#f6f8fa;--student:#0550ae}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--bg:#0d1117;--dim:#8b949e;--line:#30363d;--panel:#161b22;
--student:#79c0ff}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:1.5rem 1.25rem 4rem}h1{font-size:1.6rem;margin:0 0 .4rem}
h2{font-size:1.2rem;margin:2.2rem 0 .3rem;border-top:1px solid var(--line);padding-top:1.2rem}
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
