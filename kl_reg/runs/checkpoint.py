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


def claim(workdir: storage.Path, resolved: dict) -> None:
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
        found = storage.read_json(file)["fingerprint"]
        if found != resolved["fingerprint"]:
            raise FileExistsError(f"{workdir} holds another experiment (fingerprint {found}, this one is "
                                  f"{resolved['fingerprint']}); choose another --workdir, or the configuration in its "
                                  "config.json to resume it")
        return
    if storage.holds_something(workdir):
        raise FileExistsError(f"{workdir} is not empty and holds no config.json of an experiment; choose another "
                              "--workdir")
    storage.write_json(file, resolved)


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

    def restore(self, states: list) -> list:
        """The latest states, or `states` themselves where nothing was saved."""
        latest = self._manager.latest_step()
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
