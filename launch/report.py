"""Writes one self-contained page about a finished sweep, from the files the sweep left; needs no accelerator.

    python -m launch.report runs/quickstart

The page is WORKDIR/report.html (figures also in WORKDIR/figures/): reward against KL, reward at equal KL where settings
share a target, training curves, where in the episode and on which tokens the KL is spent, empty turns, a table of every
run, and transcripts coloured by what each token cost.
"""
import argparse
import pathlib
import sys


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, help="the directory that `launch.sweep --workdir` was given")
    workdir = parser.parse_args(argv).workdir
    from kl_reg.analysis.report import write_report

    try:
        print(write_report(workdir))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"launch.report: {error}")


if __name__ == "__main__":
    main()
