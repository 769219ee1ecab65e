"""Trains all members of a sweep, evaluates them, and writes a report: in one process, or as several programs.

    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/q --jobs=2 --members_per_job=4
    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/q --backend=slurm --minutes=120 --gpus=1

Settings of the file are overridden on the command line: --config.rl.iterations=5. A second call with the same workdir
goes on where it stopped and does only what is missing. With another --backend than local, or with any of the options
of one, it is divided into programs, each in a directory of its own, and gathered when they end: docs/launch.md.
--dry_run prints what would be started. The sweep's grids are `config.sweep`; every setting is described in
docs/settings.md.
"""
import importlib
import signal
import sys

from absl import app, flags

from launch import command, status
from launch.backends import options

CONFIG, WORKDIR = command.define()
BACKEND = flags.DEFINE_enum("backend", "local", options.BACKENDS, "what the programs run on")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "print what would be started; nothing is started or written")
WAIT = flags.DEFINE_boolean("wait", True, "[slurm] follow the programs until they end; --nowait: submit and return")
_GIVEN = options.define()


def main(argv):
    given = _GIVEN()
    if BACKEND.value != "local" or given != options.Options() or not WAIT.value \
            or command.guarded(argv, lambda: _is_divided(WORKDIR.value)):
        sys.exit(command.guarded(argv, lambda: _divided(CONFIG.value, WORKDIR.value, given)))
    if DRY_RUN.value:
        command.guarded(argv, lambda: _describe_one(CONFIG.value))
    else:
        command.run(argv, CONFIG.value, WORKDIR.value)


def _is_divided(workdir):
    from kl_reg import storage

    return (storage.path(workdir) / "sweep.json").is_file()


def _describe_one(config):
    from kl_reg.sweeps import plan

    programs = plan.divide(config)
    print("# in this process, in turn:")
    for number, own in enumerate(programs):
        print(f"# program {number} ({plan.named(own)})")


def _divided(config, workdir, given):
    """Plans, and starts what is missing; the exit status."""
    from kl_reg.sweeps import plan

    if flags.FLAGS["from"].value:
        raise ValueError("--from goes on in one process: leave out --backend and its options")
    backend = importlib.import_module(f"launch.backends.{BACKEND.value}")
    if not WAIT.value and BACKEND.value != "slurm":
        raise ValueError(f"--nowait is of --backend=slurm: the programs of {BACKEND.value} need this process")
    sweep = plan.plan(config, workdir, given.members_per_job)
    backend.prepare(sweep, given)
    numbers = sweep.missing()
    if DRY_RUN.value:
        print(f"# programs: {len(sweep.programs)}, done already: {len(sweep.programs) - len(numbers)}")
        print(*backend.describe(sweep, numbers, given), sep="\n")
        return 0
    plan.write(sweep)
    print(f"sweep    members: {sum(map(len, sweep.programs))}, programs: {len(sweep.programs)}, done already: "
          f"{len(sweep.programs) - len(numbers)}")
    if numbers:
        started = backend.submit(sweep, numbers, given)
        if not WAIT.value:
            print(f"follow   python -m launch.status {sweep.workdir}")
            return 0
        _watch(sweep, numbers, started)
    return _close(sweep)


def _watch(sweep, numbers, started):
    """Until all have ended. Who is ended without a word is put on record."""
    from kl_reg.sweeps import job, progress

    def terminate(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        status.follow(sweep.workdir, lambda rows: len(started.over()) == len(numbers), every=1)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped: {started.stop()}. The same command goes on from here.")
    for number, why in started.over().items():
        if not sweep.done(number) and progress.state(sweep, number) not in ("failed", "lost"):
            job.record(sweep, number, "lost", error=why or "it ended without a word")


def _close(sweep):
    """Gathers and reports; 1 where a program is missing."""
    from kl_reg import storage
    from kl_reg.sweeps import gather

    missing = sweep.missing()
    for line in status.problems(sweep.workdir):
        print(line)
    if len(missing) < len(sweep.programs):
        report = gather.gather(sweep.workdir)
        command.print_summary(storage.read_json(sweep.workdir / "summary.json"), sweep.workdir, report)
    if missing:
        print(f"\n{len(missing)} of {len(sweep.programs)} programs are missing: {', '.join(map(sweep.name, missing))}. "
              "The same command trains them and only them.", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
