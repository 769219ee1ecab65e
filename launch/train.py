"""Trains one member: a sweep's configuration without its sweep.

    python -m launch.train --config=configs/quickstart.py --config.kl.budget=20. --workdir=runs/b20

    python -m launch.train --from=runs/b20 --config.rl.iterations=20 --config.env.length=128 --workdir=runs/b20b

The second starts from the final state of another run, with its settings but for those that are given, and with keys
that continue its count.

Settings of the file are overridden on the command line; docs/settings.md has all of them. A second call with the same
workdir resumes from the last checkpoint.
"""
from absl import app

from launch import command

CONFIG, WORKDIR = command.define()


def main(argv):
    config = CONFIG.value
    config.sweep = []
    command.run(argv, config, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
