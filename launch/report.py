"""Writes one self-contained page about a finished sweep, from the files the sweep left; needs no accelerator.

    python -m launch.report runs/quickstart

The page is WORKDIR/report.html (figures also in WORKDIR/figures/): reward against KL, reward at equal KL where settings
share a target, training curves, where in the episode and on which tokens the KL is spent, empty turns, a table of every
run, and transcripts coloured by what each token cost.
"""
import sys

from launch import command


def main(argv=None):
    command.guarded(["report"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = command.Parser("report", __doc__)
    parser.add_argument("workdir", help="the directory that `launch.sweep --workdir` was given")
    workdir = parser.parse_args(argv).workdir
    from kl_reg.analysis.report.page import write_report

    print(write_report(workdir))


if __name__ == "__main__":
    main()
