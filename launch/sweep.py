"""Trains all members of a sweep on one shared base model, evaluates them, and writes a report.

    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/quickstart

Settings of the file are overridden on the command line: --config.rl.iterations=5. A second call with the same workdir
resumes from the last checkpoint. The sweep's grids are `config.sweep`; every setting is described in kl_reg/config.py.
"""
from absl import app

from launch import command

CONFIG, WORKDIR = command.define()


def main(argv):
    command.run(argv, CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
