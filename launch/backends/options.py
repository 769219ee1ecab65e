"""The options of the backends, and what a backend gives `launch.sweep` to watch."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from absl import flags

flags.disclaim_key_flags()     # --help of launch.sweep lists them as its own

BACKENDS = ("local", "slurm", "ray", "tpu_vm")

_OPTIONS = {     # name: (type, backends, what it says)
    "jobs": (int, BACKENDS, "programs that run at once, at most (local: by default all members train in one process; "
             "others: by default all programs run at once)"),
    "members_per_job": (int, BACKENDS, "a program has so many members at most (default: all that share their static "
                        "settings)"),
    "retries": (int, BACKENDS, "how often a program that was killed or preempted starts again (default: 3); one that "
                "ends with an error does not. On Slurm those that ran into their time limit; preemptions do not count"),
    "gpus": (int, ("local", "slurm", "ray"), "GPUs of each program"),
    "cpus": (int, ("slurm", "ray"), "CPU cores of each program"),
    "memory_gb": (int, ("slurm", "ray"), "memory of each program, GB"),
    "minutes": (int, ("slurm",), "time limit of each program; one that reaches it is requeued and goes on"),
    "partition": (str, ("slurm",), "the partition"),
    "account": (str, ("slurm",), "the account"),
    "sbatch": (list, ("slurm",), "another option of sbatch, as --sbatch=qos=low; may be given several times"),
    "ray_address": (str, ("ray",), "of a running cluster, as auto or ray://HOST:10001 (default: RAY_ADDRESS, or a "
                    "cluster on this machine)"),
    "tpus": (int, ("ray",), "TPU chips of each program"),
    "accelerator": (str, ("ray", "tpu_vm"), "ray: the accelerator_type, as A100; tpu_vm: the slice, as v5litepod-8"),
    "zone": (str, ("tpu_vm",), "the zone, as us-west4-a"),
    "runtime": (str, ("tpu_vm",), "the software version, as v2-alpha-tpuv5-lite"),
    "capacity": (str, ("tpu_vm",), "on_demand, spot, queued or queued_spot (default: queued)"),
    "keep": (bool, ("tpu_vm",), "leave the slices when their program has ended"),
}


class Options(NamedTuple):
    """What was given on the command line; None where it was not."""

    jobs: int | None = None
    members_per_job: int | None = None
    retries: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory_gb: int | None = None
    minutes: int | None = None
    partition: str | None = None
    account: str | None = None
    sbatch: list[str] | None = None
    ray_address: str | None = None
    tpus: int | None = None
    accelerator: str | None = None
    zone: str | None = None
    runtime: str | None = None
    capacity: str | None = None
    keep: bool | None = None

    @property
    def attempts(self) -> int:
        """How often a program is started at most."""
        return 1 + (3 if self.retries is None else self.retries)


class Started(NamedTuple):
    """Programs under way. over() -> {number: why it ended, "" where it ended by itself} of those that have; stop() says
    what becomes of the others."""

    over: Callable[[], dict[int, str]]
    stop: Callable[[], str]


def define() -> Callable[[], Options]:
    """Defines the flags, and returns what reads them."""
    makers = {int: flags.DEFINE_integer, str: flags.DEFINE_string, list: flags.DEFINE_multi_string,
              bool: flags.DEFINE_boolean}
    held = {name: makers[kind](name, None, f"[{', '.join(of)}] {text}" if of != BACKENDS else text)
            for name, (kind, of, text) in _OPTIONS.items()}
    return lambda: Options(**{name: flag.value for name, flag in held.items()})


def check(backend: str, options: Options, required: tuple[str, ...] = ()) -> None:
    """Raises ValueError on options that the backend does not have, and on those that it lacks."""
    for name, value in options._asdict().items():
        kind, of, _ = _OPTIONS[name]
        if value is not None and backend not in of:
            raise ValueError(f"--{name} is of --backend={' or '.join(of)}, not of {backend}")
        low = 0 if name in ("retries", "gpus", "tpus") else 1
        if kind is int and value is not None and value < low:
            raise ValueError(f"--{name}={value} must be at least {low}")
    missing = [f"--{name} ({_OPTIONS[name][2]})" for name in required if options._asdict()[name] is None]
    if missing:
        raise ValueError(f"--backend={backend} needs {', '.join(missing)}")
