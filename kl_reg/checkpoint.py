"""Checkpoints of a run, and the identity of its directory."""
from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kl_reg import config as configs


class Inputs(NamedTuple):
    """Digests of what the settings only name: base model, reward functions, environment and student are the sweep's;
    reference models and functions of the update, where they are not the library's, are listed by program."""

    base: str
    rewards: list[str]
    references: list[list[str]]
    environment: str
    student: str
    functions: list[list[str]]


def describe(config: ConfigDict, inputs: Inputs, members: Sequence[Sequence[int]], quantize: dict | None) -> dict:
    """What config.json says of a run: the resolved configuration, its fingerprint, and what it depends on.

    Args:
        members: of each program.
        quantize: how the base was rounded.
    """
    flat = (inputs.base, *inputs.rewards, *itertools.chain(*inputs.references), inputs.environment, inputs.student,
            *itertools.chain(*inputs.functions))
    return {"config": json.loads(config.to_json()), "fingerprint": configs.fingerprint(config, *flat),
            "base": inputs.base, "references": {str(i): digests for own, digests in
                                                zip(members, inputs.references, strict=True) for i in own},
            "quantize": quantize, "inputs": inputs._asdict()}


def claim(workdir: pathlib.Path, resolved: dict) -> None:
    """Makes `workdir` this experiment's, or checks that it already is.

    Args:
        resolved: {"config": the resolved configuration, "fingerprint": of it}; written as config.json.

    Raises:
        FileExistsError: the directory holds another experiment, or something that is none.
    """
    file = workdir / "config.json"
    if (workdir / "sweep.json").exists():
        raise FileExistsError(f"{workdir} holds a sweep of several programs: continue it with python -m launch.sweep "
                              "--config=... --jobs=1, or choose another --workdir")
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
        if found != resolved["fingerprint"]:
            raise FileExistsError(f"{workdir} holds another experiment (fingerprint {found}, this one is "
                                  f"{resolved['fingerprint']}); choose another --workdir, or the configuration in its "
                                  "config.json to resume it")
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise FileExistsError(f"{workdir} is not empty and holds no config.json of an experiment; choose another "
                              "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")


class Checkpoints:
    """The states of a run's programs by iteration, the last `keep` of them, written in the background; each with
    `resolved`: the configuration, its fingerprint and the digests of base and references."""

    def __init__(self, folder: pathlib.Path, resolved: dict, keep: int):
        self._resolved = resolved
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, iteration: int, states: list) -> None:
        """Takes a copy and returns; the states may be donated afterwards."""
        self._manager.save(iteration, args=ocp.args.Composite(state=ocp.args.StandardSave(states),
                                                              config=ocp.args.JsonSave(self._resolved)))

    def restore(self, states: list) -> list:
        """The latest states, or `states` themselves where nothing was saved."""
        latest = self._manager.latest_step()
        if latest is None:
            return states
        return self._manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(states))).state

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
