"""How far the policies of a run are from the best that any policy could do at their KL to the base.

    python -m launch.optimal runs/sentiment
    python -m launch.optimal runs/sentiment:2@40 --episodes=4096

Only where the agent writes everything (env.name='completion', or 'tabular' without a student): there the optimum is the
base tilted by the reward, and samples of base and members, weighted, say what it is worth. docs/optimum.md explains it.
"""
from __future__ import annotations

import sys

from launch import command


def _arguments(argv):
    parser = command.Parser("optimal", __doc__)
    parser.add_argument("run", metavar="RUN[:MEMBER][@ITERATION]")
    parser.add_argument("--episodes", type=int, default=1024, help="of the base and of each member (default: 1024)")
    parser.add_argument("--least", type=float, default=100.0, metavar="N",
                        help="points of the frontier with fewer effective samples are left out (default: 100)")
    parser.add_argument("--beside", action="append", default=[], metavar="MODEL", help="another model of the same "
                        "vocabulary, as in model.path, held against the frontier, too; may be given several times")
    parser.add_argument("--seed", type=int, help="of the sampling (default: that of the run's evaluation)")
    parser.add_argument("--out", help="the directory for optimal.json and optimal.png (default: "
                        "RUN/optimal)")
    return parser.parse_args(argv)


def main(argv=None):
    command.guarded(["optimal"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    args = _arguments(argv)
    command.check_whole(args, episodes=2, seed=0)       # a standard error needs two
    from kl_reg import storage
    from kl_reg.analysis.optimum import efficiency, efficiency_figure
    from kl_reg.runs import directory as run_directory

    report = efficiency.measure(args.run, args.episodes, args.seed, args.least, args.beside)
    out = storage.path(args.out) if args.out else run_directory.parse(args.run).workdir / "optimal"
    storage.write_json(out / "optimal.json", report, allow_nan=False)
    figure = efficiency_figure.draw(report, out / "optimal.png")
    _print(report)
    print(f"\nnumbers  {out / 'optimal.json'}\nfigure   {figure}")


def _print(report):
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for head in ("policy", "KL, nats", "reward", "best at its KL", "efficiency", "ESS"):
        table.add_column(head, no_wrap=head != "policy")        # numbers are shown whole
    table.add_row("base", "0", f"{report['base_reward']:.3f}")
    for row in report["members"]:
        table.add_row(row["title"] if row["member"] is None else f"{row['member']}  {row['title']}",
                      f"{row['kl']:.2f} ± {row['kl_se']:.2f}", f"{row['reward']:.3f} ± {row['reward_se']:.3f}",
                      _cell(row["best_reward"], ".3f"), _cell(row["efficiency"], ".0%"), f"{row['ess']:.0f}")
    table.add_section()
    for row in report["best_of_n"]:
        table.add_row(f"best of {row['n']}", f"{row['kl']:.2f} (bound {row['kl_bound']:.2f})", f"{row['reward']:.3f}")
    table.add_section()
    for row in report["budgets"]:
        table.add_row(f"bound at {row['nats']:g} nats", f"{row['kl']:.2f}",
                      f"{row['reward']:.3f} ± {row['reward_se']:.3f}", "", "", f"{row['ess']:.0f}")
    console = Console()
    Console(width=max(110, console.width)).print(table)
    print("Per episode; ± is a standard error. Efficiency: KL of the best policy with the same reward over its own KL. "
          "ESS: effective samples of the frontier there.")
    if report["budgets"]:
        print("Bound: what the best policy earns that may spend so much on average; a hard budget allows no more.")


def _cell(value, form):
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    main()
