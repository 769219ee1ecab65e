"""How a sweep is divided into programs, and the directory that they share."""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import storage, validation
from kl_reg.runs import directory as run_directory


class Sweep(NamedTuple):
    """A sweep of several programs. `programs`: the numbers of each one's members, which share all static settings."""

    workdir: storage.Path
    config: ConfigDict
    programs: list[list[int]]

    def folder(self, number: int) -> storage.Path:
        """The program's directory, that of an ordinary run."""
        return self.workdir / f"programs/{number}"

    def log(self, number: int) -> storage.Path:
        """What the program printed, in all its attempts."""
        return self.workdir / f"logs/{number}.txt"

    def done(self, number: int) -> bool:
        """Whether its members are trained and evaluated."""
        return (self.folder(number) / "summary.json").is_file()

    def missing(self) -> list[int]:
        """Programs that are not done."""
        return [number for number in range(len(self.programs)) if not self.done(number)]

    def name(self, number: int) -> str:
        """For people: "program 3 (members 4 to 7)"."""
        return f"program {number} ({named(self.programs[number])})"


def named(members: list[int]) -> str:
    """For people: "members 4 to 7"."""
    whole = members == list(range(members[0], members[-1] + 1)) and len(members) > 2
    listed = f"{members[0]} to {members[-1]}" if whole else ", ".join(map(str, members))
    return f"member{'s' * (len(members) > 1)} {listed}"


def divide(config: ConfigDict, members_per_job: int | None = None) -> list[list[int]]:
    """Members with the same static settings make one program, or several of at most `members_per_job`.

    Raises:
        ValueError: a setting is wrong.
        FileNotFoundError: the model folder is missing.
    """
    validation.validate(config)
    if members_per_job is not None and members_per_job < 1:
        raise ValueError(f"members_per_job={members_per_job} must be at least 1")
    numbers = [[number for number, _ in group] for group in run_directory.groups(config)]
    return [own[i:i + (members_per_job or len(own))] for own in numbers
            for i in range(0, len(own), members_per_job or len(own))]


def plan(config: ConfigDict, workdir: str | os.PathLike, members_per_job: int | None = None) -> Sweep:
    """A sweep in a directory; writes nothing. One that holds the same sweep keeps its division.

    Raises:
        ValueError: a setting is wrong, or the directory's division is another one.
        FileNotFoundError: the model folder is missing.
        FileExistsError: the directory holds something else.
    """
    config, workdir = config.copy_and_resolve_references(), storage.path(workdir)
    programs = divide(config, members_per_job)
    if not (workdir / "sweep.json").is_file():
        if (workdir / "config.json").is_file():
            raise FileExistsError(f"{workdir} holds a run of one process; continue it with the default --backend=local "
                                  "and none of its options, or choose another --workdir")
        if storage.holds_something(workdir):
            raise FileExistsError(f"{workdir} is not empty and holds no sweep.json; choose another --workdir")
        return Sweep(workdir, config, programs)
    found = read(workdir)
    if configs.fingerprint(found.config) != configs.fingerprint(config):
        raise FileExistsError(f"{workdir} holds another sweep; choose another --workdir, or the configuration in its "
                              "sweep.json to continue it")
    if members_per_job is not None and programs != found.programs:
        raise ValueError(f"members_per_job={members_per_job}: {workdir} is divided into {len(found.programs)} programs "
                         f"of at most {max(map(len, found.programs))} members; leave it out, or choose another "
                         "--workdir")
    return found._replace(config=config)


def write(sweep: Sweep) -> None:
    """Makes the directory this sweep's."""
    (sweep.workdir / "logs").mkdir(parents=True, exist_ok=True)
    storage.write_json(sweep.workdir / "sweep.json",
                       {"config": json.loads(sweep.config.to_json()), "programs": sweep.programs})


def read(workdir: str | os.PathLike) -> Sweep:
    """The sweep of a directory.

    Raises:
        FileNotFoundError: it holds none that is divided.
    """
    workdir = storage.path(workdir)
    file = workdir / "sweep.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: python -m launch.sweep with --jobs, --members_per_job or another "
                                "--backend than local writes it")
    stored = storage.read_json(file)
    return Sweep(workdir, run_directory.from_stored(stored["config"], file), stored["programs"])


def config_of(sweep: Sweep, number: int) -> ConfigDict:
    """The configuration of one program: the same with a smaller sweep."""
    swept = configs.members(sweep.config)
    config = sweep.config.copy_and_resolve_references()
    config.sweep = [{key: (value,) for key, value in swept[i].items()} for i in sweep.programs[number] if swept[i]]
    return config


@contextlib.contextmanager
def locked(file: storage.Path, otherwise: str | None = None) -> Iterator[None]:
    """Within, no other process is in here; the system frees it when a process dies. A store has no locks: there it is
    up to whoever starts the processes.

    Raises:
        BlockingIOError: `otherwise`, if that is given and another one is; else this waits.
    """
    if not storage.is_local(file):
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError:
            raise BlockingIOError(otherwise) from None
        except OSError:         # some network file systems have no locks: there it is up to the scheduler
            pass
        yield
