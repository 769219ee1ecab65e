"""Trains one program of a sweep that `launch.sweep` has planned: what its backends start, and what may be run by hand.

    python -m launch.program runs/x 3

Resumes from the program's last checkpoint. What it prints is in WORKDIR/logs/3.txt; the program that ends last gathers
the sweep.
"""
import signal
import sys

from launch import command


def main(argv=None):
    command.guarded(["program"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = command.Parser("program", __doc__)
    parser.add_argument("workdir", help="the directory that `launch.sweep --workdir` was given")
    parser.add_argument("number", type=int, help="of the program: WORKDIR/sweep.json lists the members of each, from 0")
    args = parser.parse_args(argv)
    from kl_reg.sweeps import job

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that it is on record, and checkpoints are whole
    try:
        job.run(args.workdir, args.number)
    except job.ProgramFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
