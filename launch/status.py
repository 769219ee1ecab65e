"""Shows how far every member of a run is: a table that follows it until nothing more comes.

    python -m launch.status runs/x
    python -m launch.status runs/x --once

Reads files only, so it may run anywhere that sees the directory, also of a run that is not divided into programs.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch import command

_STYLES = {"done": "green", "running": "cyan", "failed": "bold red", "lost": "bold red", "stopped": "yellow"}


def main(argv=None):
    command.guarded(["status"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = command.Parser("status", __doc__)
    parser.add_argument("workdir", help="the directory that `launch.sweep --workdir` was given")
    parser.add_argument("--once", action="store_true", help="print the table and end")
    parser.add_argument("--every", type=int, default=2, metavar="SECONDS", help="between two looks (default: 2)")
    args = parser.parse_args(argv)
    command.check_whole(args, every=1)
    from kl_reg.sweeps import progress

    rows = progress.rows(args.workdir)
    if args.once:
        wide(Console()).print(table(rows))
    else:
        follow(args.workdir, lambda rows: all(row.state in progress.OVER for row in rows), args.every)
    for line in problems(args.workdir):
        print(line)


def follow(workdir: str | os.PathLike, ended: Callable[[list], bool], every: int) -> None:
    """Shows the table until ended(rows); where there is no terminal, a line whenever a program's state changes."""
    from kl_reg.sweeps import progress

    console, told = Console(), {}
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Lines() as live:
        while True:
            rows = progress.rows(workdir)
            if console.is_terminal:
                live.update(table(rows), refresh=True)
            else:
                told = _tell(rows, told)
            if ended(rows):
                break
            time.sleep(every)
    if not console.is_terminal:
        wide(console).print(table(rows))


class _Lines:
    """Stands for `Live` where lines are printed."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def _tell(rows, told):
    """Prints the programs whose state is another than in `told`; the states now."""
    from kl_reg.sweeps import plan

    states = {row.program: row.state for row in rows}
    for program, state in states.items():
        if told.get(program) != state:
            own = plan.named([row.member for row in rows if row.program == program])
            print(f"{time.strftime('%H:%M:%S')}  {'run' if program is None else f'program {program}'} ({own}): {state}",
                  flush=True)
    return states


def wide(console: Console) -> Console:
    """At least as wide as a table needs."""
    return Console(width=max(110, console.width))


def table(rows: list) -> Table:
    """A line a member."""
    out = Table(box=SIMPLE_HEAD)
    for head in ("member", "settings", "program", "state", "iteration", "return", "KL, nats/episode", "tokens/s",
                 "ago"):
        out.add_column(head, no_wrap=head != "settings")
    for row in rows:
        settings = " ".join(f"{key}={value}" for key, value in row.settings.items()) or "–"
        measured = [_number(row.last.get(key), form) for key, form in
                    (("return", ".2f"), ("kl/nats_per_episode", ".2f"), ("tokens_per_second", ".0f"))]
        out.add_row(str(row.member), settings, "–" if row.program is None else str(row.program), row.state,
                    f"{row.iteration}/{row.iterations}", *measured, _ago(row.seconds), style=_STYLES.get(row.state))
    return out


def problems(workdir: str | os.PathLike) -> list[str]:
    """Of each program that failed or was lost: why, and how its log ends."""
    from kl_reg import storage
    from kl_reg.sweeps import plan, progress

    if not (storage.path(workdir) / "sweep.json").is_file():
        return []
    sweep, out = plan.read(workdir), []
    for number in sweep.missing():
        state = progress.state(sweep, number)
        if state in ("failed", "lost"):
            error = progress.recorded(sweep, number).get("error", "its process is gone")
            out += ["", f"{sweep.name(number)} {'was lost' if state == 'lost' else 'failed'}: {error}",
                    f"{sweep.log(number)} ends with", *(f"  | {line}" for line in progress.log_end(sweep, number))]
    return out


def _number(value, form):
    return "–" if value is None else format(value, form)


def _ago(seconds):
    if seconds is None:
        return "–"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
