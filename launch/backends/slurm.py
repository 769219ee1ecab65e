"""Programs as an array of Slurm jobs, through submitit. The directory is on a file system that all nodes share."""
from __future__ import annotations

import json
import os
import subprocess
from typing import NamedTuple

from kl_reg import storage
from kl_reg.sweeps import job, plan
from launch.backends.options import Options, Started, check


class Attempt(NamedTuple):
    """Runs a program in `directory`. What submitit calls when Slurm announces a preemption or the end of the time is
    `checkpoint`: the same again, in a job that is requeued, goes on from the program's checkpoints."""

    directory: str

    def __call__(self, workdir: str, number: int) -> None:
        os.chdir(self.directory)
        job.run(workdir, number)

    def checkpoint(self, workdir: str, number: int):
        """What the requeued job runs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, workdir, number)


def prepare(sweep: plan.Sweep, options: Options) -> None:
    """Raises ValueError on options that are wrong or missing."""
    check("slurm", options, ("minutes",))
    storage.local(sweep.workdir, "--backend=slurm, whose logs need a directory that all nodes share: --workdir")
    _parameters(sweep, options)


def describe(sweep: plan.Sweep, numbers: list[int], options: Options) -> list[str]:
    """What sbatch would be given, and what each job of the array would run."""
    given = _parameters(sweep, options)
    own = {key: value for key, value in given.items() if key not in ("array_parallelism", "additional_parameters",
                                                                      "stderr_to_stdout")}
    own |= given["additional_parameters"]
    if len(numbers) > 1:
        own["array"] = f"0-{len(numbers) - 1}%{min(len(numbers), given['array_parallelism'])}"
    lines = [f"#SBATCH --{key.replace('_', '-')}" + ("" if value is True else f"={value}")
             for key, value in sorted(own.items())]
    return ["sbatch, through submitit:", *lines,
            *(f"{i}: python -m launch.program {sweep.workdir} {number}   # {sweep.name(number)}"
              for i, number in enumerate(numbers))]


def submit(sweep: plan.Sweep, numbers: list[int], options: Options) -> Started:
    """Submits those that are not in the queue from an earlier call."""
    file = sweep.workdir / "logs/slurm/jobs.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    jobs = {int(number): own for number, own in earlier.items()}
    queue = _queue() if jobs else set()
    new = [number for number in numbers if jobs.get(number) not in queue]
    if new:
        jobs |= dict(zip(new, _sbatch(sweep, new, options), strict=True))
        storage.write_json(file, jobs)
    jobs = {number: jobs[number] for number in numbers}
    print("jobs   ", ", ".join(f"{own}{'' if number in new else ' (from before)'}" for number, own in jobs.items()))

    def over():
        try:
            queue = _queue()
        except ValueError:      # the controller does not answer now
            return {}
        return {number: "" for number, own in jobs.items() if own not in queue}

    return Started(over, lambda: "its jobs stay with Slurm: scancel "
                   + " ".join(sorted({own.split("_")[0] for own in jobs.values()})) + " ends them")


def _sbatch(sweep, numbers, options):
    """Submits an array; the job of each program."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--backend=slurm needs submitit: pip install -e '.[slurm]'") from None
    try:
        executor = submitit.SlurmExecutor(sweep.workdir.absolute() / "logs/slurm", options.attempts - 1)
    except RuntimeError as error:
        raise ValueError(f"--backend=slurm: {error} (--dry_run prints what would be submitted)") from None
    executor.update_parameters(**_parameters(sweep, options))
    for number in numbers:
        job.record(sweep, number, "queued")
    workdir = str(sweep.workdir.absolute())
    try:
        jobs = executor.map_array(Attempt(os.getcwd()), [workdir] * len(numbers), numbers)
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch: {error}") from None
    return [own.job_id for own in jobs]


def _parameters(sweep, options):
    """As submitit's SlurmExecutor has them."""
    more = {}
    for text in options.sbatch or ():
        key, found, value = text.partition("=")
        if not key or key.startswith("-"):
            raise ValueError(f"--sbatch={text}: give NAME=VALUE, or NAME alone, as sbatch has it without the dashes")
        more[key] = value if found else True
    named = {"time": options.minutes, "partition": options.partition, "account": options.account,
             "gpus_per_node": options.gpus, "cpus_per_task": options.cpus,
             "mem": options.memory_gb and f"{options.memory_gb}GB"}
    return {"job_name": f"kl_reg-{sweep.workdir.name}", "array_parallelism": options.jobs or len(sweep.programs),
            **{key: value for key, value in named.items() if value is not None}, "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, **more}}


def _queue() -> set[str]:
    """The user's jobs that wait or run, as 123 or 123_4."""
    call = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        raise ValueError("--backend=slurm: there is no squeue here; is this a machine of the cluster?") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{' '.join(call)} says {(error.stderr or str(error)).strip()!r}") from None
    return set(done.stdout.split())
