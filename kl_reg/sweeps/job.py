"""One program of a sweep, run by whatever started this process."""
from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator

from kl_reg import storage
from kl_reg.sweeps import gather, plan


class ProgramFailed(RuntimeError):
    """Its error is in the program's log, with where it came from."""


def run(workdir: str | os.PathLike, number: int) -> None:
    """Trains and evaluates one program from where its checkpoints are; what is printed goes to its log. The one that
    ends last gathers the sweep. Where several processes run a program together (`multihost.join`), the first keeps its
    record.

    Raises:
        BlockingIOError: another process is at it.
        ProgramFailed: training or gathering raised.
    """
    sweep = plan.read(workdir)
    if not 0 <= number < len(sweep.programs):
        raise ValueError(f"{workdir} has programs 0 to {len(sweep.programs) - 1}; there is no {number}")
    from kl_reg.sharding import multihost

    multihost.join()
    if not multihost.writes():
        with _into(sweep.workdir / f"logs/{number}.{multihost.index()}.txt"):
            _run(sweep, number)
        return
    with plan.locked(sweep.workdir / f"logs/{number}.lock", otherwise=busy(sweep, number)), _into(sweep.log(number)):
        try:
            _train(sweep, number)
            if not sweep.missing():
                gather.gather(sweep.workdir)
        except Exception as error:
            traceback.print_exc()
            raise ProgramFailed(f"{sweep.name(number)}: {_line(error)} ({sweep.log(number)})") from None


def busy(sweep: plan.Sweep, number: int) -> str:
    """Why a program cannot start now."""
    return f"{sweep.name(number)} of {sweep.workdir} is being trained by another process"


def record(sweep: plan.Sweep, number: int, state: str, **facts) -> None:
    """Says of a program how it stands, for who looks: logs/<number>.json."""
    storage.write_json(sweep.workdir / f"logs/{number}.json", {"state": state, "time": time.time(), **facts})


def _train(sweep, number):
    place = {"host": socket.gethostname(), "pid": os.getpid()}
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {sweep.name(number)} on {place['host']}, process {place['pid']}")
    record(sweep, number, "running", **place)
    try:
        _run(sweep, number)
    except Exception as error:
        record(sweep, number, "failed", error=_line(error), **place)
        raise
    except BaseException as stopped:        # a signal: whoever sent it may start it again
        record(sweep, number, "stopped", error=type(stopped).__name__, **place)
        raise
    record(sweep, number, "done", **place)


def _run(sweep, number):
    import kl_reg

    kl_reg.train(plan.config_of(sweep, number), workdir=sweep.folder(number))


def _line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _into(file: storage.Path) -> Iterator[None]:
    """Within, what this process and those that it starts write to stdout and stderr is appended to `file`."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with storage.appended(file) as here, \
                open(here, "a", buffering=1, encoding="utf-8", errors="replace") as target, \
                contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
            os.dup2(target.fileno(), 1)
            os.dup2(target.fileno(), 2)
            yield
    finally:
        for own, handle in enumerate(kept, 1):
            os.dup2(handle, own)
            os.close(handle)
