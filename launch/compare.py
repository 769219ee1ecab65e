"""How far two policies are from each other: exact KL in both directions, Jensen-Shannon and total variation at every
token of the agent, per token and per episode, by position and by turn.

    python -m launch.compare base runs/quickstart
    python -m launch.compare runs/quickstart:3@40 runs/quickstart:3 --on A
    python -m launch.compare base runs/quickstart:0 --steps
    python -m launch.compare base my-model --on held_out

A and B are each `base` (the base of the other side's run), a run as RUN[:MEMBER][@ITERATION] (every member, the last
checkpoint), or a model as in model.path. docs/compare.md says which of the numbers is the KL of whole episodes.
"""
from __future__ import annotations

import pathlib
import sys

from launch import command


def _arguments(argv):
    parser = command.Parser("compare", __doc__)
    parser.add_argument("a", metavar="A", help="base, RUN[:MEMBER][@ITERATION] or a model as in model.path")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--on", choices=("A", "B", "held_out"),
                        help="the transcripts: sampled by that side, or held-out human conversations as they are "
                        "(default: the side that is a run, B first; else held_out)")
    parser.add_argument("--openings", choices=("held_out", "run"), default="held_out",
                        help="how sampled episodes begin: with turns of held-out conversations (default), or as in the "
                        "run")
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--seed", type=int, help="of the sampling (default: that of the run's evaluation)")
    parser.add_argument("--steps", action="store_true", help="along all checkpoints of the run")
    parser.add_argument("--out", help="the directory for compare.json and compare.png (default: "
                        "RUN/compare/<names>, or ./compare without a run)")
    return parser.parse_args(argv)


def main(argv=None):
    command.guarded(["compare"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    args = _arguments(argv)
    from kl_reg import storage
    from kl_reg.analysis.compare import compare, divergence_figure
    from kl_reg.runs import directory as run_directory

    report = compare.compare(args.a, args.b, args.on, args.episodes, args.seed, args.openings, args.steps)
    addresses = [run_directory.parse(args.a), run_directory.parse(args.b)]
    run = addresses[1] or addresses[0]
    out = (storage.path(args.out or "compare") if args.out or not run
           else run.workdir / "compare" / _name(addresses, args, report))
    storage.write_json(out / "compare.json", report, allow_nan=False)
    shown = run, addresses[0] if addresses[1] else None
    settings = [compare.settings_of(address.workdir) if address else [] for address in shown]
    figure = divergence_figure.draw(report, *settings, out / "compare.png")
    _print(report)
    print(f"\nnumbers  {out / 'compare.json'}\nfigure   {figure}")


def _name(addresses, args, report):
    """The folder of this comparison: the same sides on the same transcripts write the same one."""
    run = (addresses[1] or addresses[0]).workdir
    names = []
    for name, address in zip((args.a, args.b), addresses, strict=True):
        if address is None:
            names.append(pathlib.Path(name).resolve().name)
            continue
        member = "all" if address.member is None else str(address.member)
        checkpoint = "" if address.iteration is None else f"@{address.iteration}"
        names.append(f"{member if address.workdir == run else f'{address.workdir.name}-{member}'}{checkpoint}")
    openings = "" if report["openings"] != "run" else "-run"
    return f"{names[0]}_{names[1]}_on_{report['on']}{openings}" + "_steps" * args.steps


def _print(report):
    from rich.console import Console

    from kl_reg.analysis.compare import divergence_figure

    quantities = report["quantities"]
    heads = [divergence_figure.heading(quantity) for quantity in quantities.values()]
    sides = [side for side in "ab" if report[side]["kind"] == "run"]
    console = Console()
    console = Console(width=max(120, console.width))
    table = _table(*(side.upper() for side in sides), "per", heads=heads)
    for row in report["rows"]:
        table.add_row(*(_member(row[side]) for side in sides), "episode",
                      *(_cell(row["per_episode"][key]) for key in quantities))
        table.add_row(*[""] * len(sides), "token", *(_cell(row["per_token"][key]) for key in quantities))
    console.print(divergence_figure.title(report), highlight=False, soft_wrap=True)
    console.print(table)
    if len(report["rows"]) == 1:
        console.print(_places(report["rows"][0], heads, quantities))
    console.print("± is half of the 95 % interval over episodes.", _meanings(quantities), highlight=False,
                  soft_wrap=True)


def _table(*names, heads):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*names, box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def _member(policy):
    return f"{policy['member']}@{policy['iteration']}  {policy['setting']}, seed {policy['hyper']['seed']}"


def _meanings(quantities):
    """What the sums over an episode are, for the terminal."""
    sums = {}
    for q in quantities.values():
        sums.setdefault(q["per_episode"], []).append(q["title"])
    return "Per episode: " + "; ".join(f"{', '.join(titles)}: {text}" for text, titles in sums.items()) + "."


def _cell(table):
    if table["mean"] in (None, "inf"):
        return table["mean"] or "–"
    error = "" if table["high"] is None else f" ± {(table['high'] - table['low']) / 2:.2g}"
    return f"{table['mean']:.3g}{error}"


def _places(row, heads, quantities):
    """Where in the episode one pair of policies differs: by turn of the agent, and by eighths of its positions."""
    table = _table("where", "per", heads=heads)
    for i in range(len(row["by_turn"]["kl_ab"]["mean"])):
        table.add_row(f"turn {i + 1}", "episode", *(_cell({name: values[i] for name, values in
                                                           row["by_turn"][key].items()}) for key in quantities))
    counts = row["by_position"]["agent_tokens"]
    size = -(-len(counts) // 8)
    for first in range(0, len(counts), size):
        part = slice(first, min(first + size, len(counts)))
        means = [_mean(row["by_position"][key]["mean"][part], counts[part]) for key in quantities]
        table.add_row(f"tokens {first + 1} to {part.stop}", "token", *means)
    return table


def _mean(means, counts):
    """Of some positions, weighted by the agent tokens there."""
    if "inf" in means:
        return "inf"
    total = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
    return f"{total / sum(counts):.3g}" if sum(counts) else "–"


if __name__ == "__main__":
    main()
