"""Checkpoints of a run, and the identity of its directory."""
from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import storage

_COMMITTED = "commit_success.txt"       # by which Orbax tells whole checkpoints in gs:// from others


class Inputs(NamedTuple):
    """Digests of what the settings only name: base model, reward functions, environment and student are the sweep's;
    reference models and functions of the update, where they are not the library's, are listed by program."""

    base: str
    rewards: list[str]
    references: list[list[str]]
    environment: str
    student: str
    functions: list[list[str]]
    start: list[str] = []           # of the states that a run started from


def describe(config: ConfigDict, inputs: Inputs, members: Sequence[Sequence[int]], quantize: dict | None) -> dict:
    """What config.json says of a run: the resolved configuration, its fingerprint, and what it depends on.

    Args:
        members: of each program.
        quantize: how the base was rounded.
    """
    flat = (inputs.base, *inputs.rewards, *itertools.chain(*inputs.references), inputs.environment, inputs.student,
            *itertools.chain(*inputs.functions), *inputs.start)
    return {"config": json.loads(config.to_json()), "fingerprint": configs.fingerprint(config, *flat),
            "base": inputs.base, "references": {str(i): digests for own, digests in
                                                zip(members, inputs.references, strict=True) for i in own},
            "quantize": quantize, "inputs": inputs._asdict()}


def claim(workdir: storage.Path, resolved: dict) -> str:
    """Makes `workdir` this experiment's, or checks that it already is. One that differs in more `rl.iterations` alone
    goes on.

    Args:
        resolved: of `describe`; written as config.json.

    Returns:
        What is to be said of a run that goes on for longer; else "".

    Raises:
        FileExistsError: the directory holds another experiment, or something that is none; lists what differs.
    """
    file = workdir / "config.json"
    if (workdir / "sweep.json").exists():
        raise FileExistsError(f"{workdir} holds a sweep of several programs: continue it with python -m launch.sweep "
                              "--config=... --jobs=1, or choose another --workdir")
    if file.exists():
        stored = storage.read_json(file)
        if stored["fingerprint"] == resolved["fingerprint"]:
            return ""
        changed = _differences(stored, resolved)
        old, new = changed.get("rl.iterations", (0, 0))
        if set(changed) == {"rl.iterations"} and new > old:
            storage.write_json(file, resolved)
            return (f"{workdir}: rl.iterations {old} -> {new}; the run goes on, from here on with the schedules of "
                    f"{new} iterations")
        shown = [f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items()]
        raise FileExistsError(f"{workdir} holds another experiment: {', '.join(shown) or 'another fingerprint'}; "
                              "choose another --workdir, or the configuration in its config.json to resume it (more "
                              "rl.iterations alone would go on)")
    if storage.holds_something(workdir):
        raise FileExistsError(f"{workdir} is not empty and holds no config.json of an experiment; choose another "
                              "--workdir")
    storage.write_json(file, resolved)
    return ""


def _differences(stored, resolved):
    """What counts for a result and differs: setting or input -> (old, new)."""
    old, new = ({key: value for key, value in configs.flat(ConfigDict(own["config"])).items() if configs.counts(key)}
                | {f"the digest of {key}": value for key, value in own.get("inputs", {}).items()}
                for own in (stored, resolved))
    lacking = object()
    pairs = {key: (old.get(key, configs.LATER.get(key, lacking)), value) for key, value in new.items()}
    return {key: (None if before is lacking else before, after) for key, (before, after) in pairs.items()
            if before != after and not (before is lacking and key.startswith("the digest"))}


def steps(folder: storage.Path) -> list[int]:
    """Iterations of which `folder` holds a whole checkpoint, in order."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    whole = found if storage.is_local(folder) else [entry for entry in found if (entry / _COMMITTED).exists()]
    return sorted(int(entry.name) for entry in whole)


class Checkpoints:
    """The states of a run's programs by iteration, the last `keep` of them, written in the background; each with
    `resolved`: the configuration, its fingerprint and the digests of base and references.

    Orbax knows local folders and gs://. For other stores it works in a local folder, and each checkpoint is copied.

    Raises:
        ValueError: several processes write to another store than gs://.
    """

    def __init__(self, folder: storage.Path, resolved: dict, keep: int):
        self._resolved, self._keep, self._store, self._scratch = resolved, keep, None, None
        if not _direct(folder):
            if jax.process_count() > 1:
                raise ValueError(f"{folder}: several processes write checkpoints together to a shared directory or to "
                                 "gs://; choose another --workdir")
            self._store, self._scratch = folder, tempfile.TemporaryDirectory(prefix="kl_reg-")
            folder = pathlib.Path(self._scratch.name)
            for step in steps(self._store)[-1:]:
                storage.copy_tree(self._store / str(step), folder / str(step))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._folder, self._manager = folder, ocp.CheckpointManager(
            storage.absolute(folder), options=options, item_handlers=_handlers())

    def save(self, iteration: int, states: list) -> None:
        """Takes a copy and returns; the states may be donated afterwards."""
        self._manager.save(iteration, args=ocp.args.Composite(state=ocp.args.StandardSave(states),
                                                              config=ocp.args.JsonSave(self._resolved)))
        if self._store is not None:
            self._manager.wait_until_finished()
            storage.copy_tree(self._folder / str(iteration), self._store / str(iteration))
            storage.write_text(self._store / str(iteration) / _COMMITTED, "")
            for old in steps(self._store)[:-self._keep]:
                (self._store / str(old)).rmtree()

    @property
    def latest(self) -> int | None:
        """The iteration of the last checkpoint; None: there is none."""
        return self._manager.latest_step()

    def restore(self, states: list) -> list:
        """The latest states, or `states` themselves where nothing was saved."""
        latest = self.latest
        if latest is None:
            return states
        stored = self._manager.item_metadata(latest).state
        targets = [_with_leaves(state, own["opt_state"]) for state, own in zip(states, stored, strict=True)]
        found = self._manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(targets))).state
        return [_with_leaves(own, state.opt_state) for own, state in zip(found, states, strict=True)]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _handlers():
    return {"state": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}


def _with_leaves(state, shape):
    """The state with the optimizer's arrays in a tree of that shape. Their order is what a checkpoint promises: which
    transformation of the chain holds them is this version's choice."""
    return state._replace(opt_state=jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(state.opt_state)))


def read(folder: storage.Path, iteration: int) -> list:
    """The states of a checkpoint, on the host."""
    with contextlib.ExitStack() as stack:
        if not _direct(folder):
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kl_reg-")))
            storage.copy_tree(folder / str(iteration), scratch / str(iteration))
            folder = scratch
        manager = ocp.CheckpointManager(storage.absolute(folder), item_handlers=_handlers())
        here = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), manager.item_metadata(iteration).state)
        stored = manager.restore(iteration, args=ocp.args.Composite(state=ocp.args.StandardRestore(here))).state
        manager.close()
        return stored


def _direct(folder):
    """Whether Orbax writes there by itself."""
    return storage.is_local(folder) or str(folder).startswith("gs://")
