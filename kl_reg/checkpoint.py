"""Checkpoints of a run, and the identity of its directory."""
from __future__ import annotations

import json
import pathlib

import orbax.checkpoint as ocp


def claim(workdir: pathlib.Path, resolved: dict) -> None:
    """Makes `workdir` this experiment's, or checks that it already is.

    Args:
        resolved: {"config": the resolved configuration, "fingerprint": of it}; written as config.json.

    Raises:
        FileExistsError: the directory holds another experiment, or something that is none.
    """
    file = workdir / "config.json"
    if file.exists():
        found = json.loads(file.read_text())["fingerprint"]
        if found != resolved["fingerprint"]:
            raise FileExistsError(f"{workdir} holds another experiment (fingerprint {found}, this one is "
                                  f"{resolved['fingerprint']}); choose another --workdir, or the configuration in its "
                                  "config.json to resume it")
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise FileExistsError(f"{workdir} is not empty and holds no config.json of an experiment; choose another "
                              "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(resolved, indent=2) + "\n")


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
