"""Programs as processes of this machine."""
from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from kl_reg import storage
from kl_reg.sweeps import job, plan
from launch.backends.options import Options, Started, check


def prepare(sweep: plan.Sweep, options: Options) -> None:
    """Raises ValueError on options that cannot be met."""
    check("local", options)
    if options.gpus:
        have, want = len(_gpus()), _at_once(sweep, options) * options.gpus
        if want > have:
            raise ValueError(f"--gpus={options.gpus}: {_at_once(sweep, options)} programs at once need {want} GPUs; "
                             f"there are {have}. --jobs says how many run at once")


def describe(sweep: plan.Sweep, numbers: list[int], options: Options) -> list[str]:
    """The commands of the programs that would run."""
    out = [f"# {min(len(numbers), _at_once(sweep, options))} at once"]
    for number in numbers:
        out.append(f"{shlex.join(_command(sweep, number))} >> {shlex.quote(str(sweep.log(number)))}   "
                   f"# {sweep.name(number)}")
    return out


def submit(sweep: plan.Sweep, numbers: list[int], options: Options) -> Started:
    """Starts them, `jobs` at a time; raises BlockingIOError if another process is at one of them."""
    size, processes, stopping = _at_once(sweep, options), {}, []
    free = [_gpus()[i * options.gpus:(i + 1) * options.gpus] for i in range(size)] if options.gpus else [None] * size
    for number in numbers:
        with plan.locked(sweep.workdir / f"logs/{number}.lock", otherwise=job.busy(sweep, number)):
            job.record(sweep, number, "queued")
    pool = ThreadPoolExecutor(size)

    def one(number):
        gpus = free.pop()       # as many as there are threads
        try:
            return _attempts(sweep, number, options.attempts, gpus, processes, stopping)
        finally:
            free.append(gpus)

    futures = {number: pool.submit(one, number) for number in numbers}

    def stop():
        stopping.append(True)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes.values()):
            process.terminate()
        for process in list(processes.values()):
            process.wait()
        return "its processes are stopped"

    return Started(lambda: {number: future.result() for number, future in futures.items()
                            if future.done() and not future.cancelled()}, stop)


def _at_once(sweep, options):
    return min(options.jobs or len(sweep.programs), len(sweep.programs))


def _command(sweep, number):
    return [sys.executable, "-m", "launch.program", str(sweep.workdir), str(number)]


def _attempts(sweep, number, attempts, gpus, processes, stopping):
    """Runs a program until it ends by itself; why it did not, or nothing."""
    environment = os.environ | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})
    killed = ""
    for _ in range(attempts):
        if stopping:
            break
        with storage.appended(sweep.log(number)) as file, open(file, "ab") as log:
            process = processes[number] = subprocess.Popen(_command(sweep, number), stdout=log, stderr=log,
                                                           stdin=subprocess.DEVNULL, env=environment)
        code = process.wait()
        if code >= 0:
            return f"exit status {code}" if code else ""
        killed = f"killed by {signal.Signals(-code).name}"
        if not stopping:
            job.record(sweep, number, "lost", error=killed)
    return killed


def _gpus():
    """Names of the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listed.splitlines()))]
