"""How far every member of a run is, from its files alone."""
from __future__ import annotations

import json
import os
import socket
from typing import NamedTuple

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import plan

OVER = ("done", "failed", "lost")
"""States in which nothing more comes by itself."""

_TAIL = 1 << 16      # bytes; a line of metrics is a few thousand


class Row(NamedTuple):
    """One member. `program` is None in a run of one process; `state` one of waiting, queued, running, stopped, done,
    failed, lost (the process is gone and said nothing) and, of a run of one process, unfinished. `iteration` of
    `iterations`; `last` is its newest line of metrics, `seconds` old."""

    member: int
    settings: dict
    program: int | None
    state: str
    iteration: int
    iterations: int
    last: dict
    seconds: float | None


def rows(workdir: str | os.PathLike) -> list[Row]:
    """All members in order.

    Raises:
        FileNotFoundError: the directory holds no run.
    """
    workdir = storage.path(workdir)
    if (workdir / "sweep.json").is_file():
        sweep = plan.read(workdir)
        parts = [(number, sweep.folder(number), state(sweep, number), own) for number, own in enumerate(sweep.programs)]
        config = sweep.config
    elif (workdir / "config.json").is_file():
        config = run_directory.config_of(workdir)
        done = "done" if (workdir / "summary.json").is_file() else "unfinished"
        parts = [(None, workdir, done, list(range(len(configs.members(config)))))]
    else:
        raise FileNotFoundError(f"{workdir} holds no run: there is neither a sweep.json nor a config.json")
    swept, found = configs.members(config), []
    for program, folder, current, own in parts:
        for i, member in enumerate(own):
            last, seconds = _last(folder / f"members/{i}/metrics.jsonl")
            found.append(Row(member, swept[member], program, current, last.get("iteration", -1) + 1,
                             config.rl.iterations, last, seconds))
    return sorted(found, key=lambda row: row.member)


def recorded(sweep: plan.Sweep, number: int) -> dict:
    """What `job.record` wrote last of a program."""
    file = sweep.workdir / f"logs/{number}.json"
    return storage.read_json(file) if file.is_file() else {"state": "waiting"}


def state(sweep: plan.Sweep, number: int) -> str:
    """Of a program; its process is looked for where it ran on this machine."""
    if sweep.done(number):
        return "done"
    found = recorded(sweep, number)
    here = found["state"] == "running" and found["host"] == socket.gethostname()
    return "lost" if here and not _alive(found["pid"]) else found["state"]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:         # somebody else's
        return True
    return True


def log_end(sweep: plan.Sweep, number: int, lines: int = 15) -> list[str]:
    """The last lines that a program printed."""
    file = sweep.log(number)
    return storage.tail(file, _TAIL).decode(errors="replace").splitlines()[-lines:] if file.is_file() else []


def _last(file):
    """The newest whole line, and how old it is."""
    if not file.is_file():
        return {}, None
    whole = [line for line in storage.tail(file, _TAIL).split(b"\n")[:-1] if line.startswith(b"{")]
    if not whole:
        return {}, None
    return json.loads(whole[-1]), storage.age(file)
