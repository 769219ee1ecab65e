"""A run's directory as others read it: its configuration and its members' parameters at any checkpoint."""
from __future__ import annotations

import hashlib
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.pretrained import folders
from kl_reg.runs import checkpoint
from kl_reg.settings import SECTIONS, SETTINGS


class Member(NamedTuple):
    """One member of a run at one checkpoint. `config` is its own, without the sweep; `memory` what its reference
    remembers of its policy; `digest` is of its parameters."""

    config: ConfigDict
    params: dict
    memory: object
    iteration: int
    digest: str


class Address(NamedTuple):
    """RUN[:MEMBER][@ITERATION], as "runs/quickstart:3@40"; None: not given."""

    workdir: storage.Path
    member: int | None
    iteration: int | None


def parse(text: str) -> Address | None:
    """What `text` addresses; None where that is no run's directory."""
    place, member, iteration = re.fullmatch(r"(.*?)(?::(\d+))?(?:@(\d+))?", text).groups()
    workdir = storage.path(place)
    file = workdir / "config.json"
    if not file.is_file() or not _has_fingerprint(file):
        return None
    return Address(workdir, *(None if x is None else int(x) for x in (member, iteration)))


def _has_fingerprint(file):
    """True if a config.json is that of a run; another one may be a model's, or no JSON."""
    try:
        stored = storage.read_json(file)
    except ValueError:
        return False
    return isinstance(stored, dict) and "fingerprint" in stored


def config_of(workdir: storage.Path) -> ConfigDict:
    """The resolved configuration, settings that it lacks and those of the log at their defaults."""
    file = workdir / "config.json"
    stored = storage.read_json(file)["config"]
    return from_stored({key: value for key, value in stored.items() if key != "log"}, file)


def from_stored(stored: dict, file: storage.Path) -> ConfigDict:
    """The configuration that `file` holds as JSON.

    Raises:
        ValueError: it has a setting that there is not.
    """
    given = {}
    for key, value in stored.items():
        nested = key in SECTIONS and isinstance(value, dict)
        given |= {f"{key}.{name}": own for name, own in value.items()} if nested else {key: value}
    if strange := sorted(set(given) - set(SETTINGS)):
        raise ValueError(f"{file}: unknown settings {', '.join(strange)}")
    config = configs.default()
    with config.ignore_type():
        for name, value in given.items():
            section, _, last = name.rpartition(".")
            (config[section] if section else config)[last] = value
    return config


def check_base(workdir: storage.Path, folder: pathlib.Path) -> str:
    """The digest of the model in `folder`, on which the run was trained.

    Raises:
        ValueError: it was trained on another one.
    """
    stored, digest = storage.read_json(workdir / "config.json"), folders.digest(folder)
    if "base" in stored and stored["base"] != digest:       # one that was written by hand may lack it
        raise ValueError(f"{workdir}: the run was trained on another model than the one that is in {folder} now")
    return digest


def programs(workdir: storage.Path) -> list[tuple[storage.Path, list[int]]]:
    """The directories of a sweep's programs, runs themselves, and the numbers of their members in the sweep; none where
    one process trained all of it."""
    file = workdir / "sweep.json"
    if not file.is_file():
        return []
    numbers = storage.read_json(file)["programs"]
    return [(workdir / f"programs/{i}", members) for i, members in enumerate(numbers)]


def iterations(workdir: storage.Path) -> list[int]:
    """Iterations of which there is a checkpoint, in order; of all programs where there are several."""
    several = [set(iterations(folder)) for folder, _ in programs(workdir)]
    if several:
        return sorted(set.intersection(*several))
    return checkpoint.steps(workdir / "checkpoints")


def load(workdir: storage.Path, iteration: int | None = None) -> list[Member]:
    """All members at a checkpoint, the last one where no iteration is given.

    Raises:
        FileNotFoundError: there is no such checkpoint; lists those that exist.
    """
    have = iterations(workdir)
    several = programs(workdir)
    if not have or iteration not in (None, *have):
        empty = [f"{folder.name} (members {', '.join(map(str, numbers))})"
                 for folder, numbers in several if not iterations(folder)]
        raise FileNotFoundError(f"{workdir}: no checkpoint {'' if iteration is None else f'of iteration {iteration}'}; "
                                f"there are {', '.join(map(str, have)) or 'none'}"
                                + f", and none at all of program {', '.join(empty)}" * bool(empty))
    iteration = have[-1] if iteration is None else iteration
    if several:
        found = {number: member for folder, numbers in several
                 for number, member in zip(numbers, load(folder, iteration), strict=True)}
        return [found[number] for number in sorted(found)]
    stored = checkpoint.read(workdir / "checkpoints", iteration)
    config, rows = config_of(workdir), {}
    for state, members in zip(stored, groups(config), strict=True):
        for i, (number, own) in enumerate(members):
            params, memory = jax.tree.map(lambda x, i=i: np.asarray(x[i]), (state["params"], state["reference"]))
            leaves = b"".join(x.tobytes() for x in jax.tree.leaves(params))
            rows[number] = Member(own, params, memory, iteration, hashlib.sha256(leaves).hexdigest())
    return [rows[number] for number in sorted(rows)]


def groups(config: ConfigDict) -> list[list[tuple[int, ConfigDict]]]:
    """Members by program, as training groups them: (number in the sweep, its configuration)."""
    by_static = {}
    for number, member in enumerate(configs.members(config)):
        own = configs.override(config, member)
        by_static.setdefault(configs.static_of(own), []).append((number, own))
    return list(by_static.values())
