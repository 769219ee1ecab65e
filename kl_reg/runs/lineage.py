"""A run that starts from another's final state: parameters, optimizer, controller and the reference's memory."""
from __future__ import annotations

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.kl.controllers import Progress
from kl_reg.runs import checkpoint, directory

_KEPT = ("model.path", "model.dtype", "model.quantize", "policy.kind", "policy.actor", "policy.layers", "policy.hidden",
         "policy.rank", "policy.targets", "policy.critic_layers", "reference.name")
"""Settings that decide the shape of a state, or what its parameters belong to."""


class Start(NamedTuple):
    """Another run at an iteration. `address` is as it was given, `changes` what differs in the settings. `states` are
    by member of the new run, arrays of the host without a member axis (None: not read), and `digests` are theirs. The
    controller of a state is None where the new run has another kind."""

    address: str
    iteration: int
    digests: list[str]
    changes: list[str]
    states: dict[int, dict] | None = None

    def record(self) -> dict:
        """What config.json says of it."""
        return {key: value for key, value in self._asdict().items() if key != "states"}


def recorded(workdir: storage.Path) -> Start | None:
    """What the run in `workdir` started from, its states not read; None: from nothing, or there is no run."""
    file = workdir / "config.json"
    stored = storage.read_json(file).get("from") if file.is_file() else None
    return None if stored is None else Start(**stored)


def open_start(text: str, config: ConfigDict, base: str, iteration: int | None = None) -> Start:
    """The states from which the members of `config` start.

    Args:
        text: RUN, whose members start the new run's in their order; or RUN:MEMBER, which starts all of them.
        config: of the new run.
        base: the digest of its base model.
        iteration: instead of that of `text`.

    Raises:
        ValueError: `text` is no run, has another number of members, another base model, or a setting differs on which
            the shape of a state depends.
        FileNotFoundError: it has no checkpoint.
    """
    address = directory.parse(text)
    if address is None:
        raise ValueError(f"--from={text!r}: there is no run; give RUN or RUN:MEMBER, as runs/x:3")
    if directory.programs(address.workdir):
        raise ValueError(f"--from={text!r}: it was trained as several programs; give one of them, "
                         f"{address.workdir}/programs/0")
    stored = storage.read_json(address.workdir / "config.json")
    if stored.get("base", base) != base:
        raise ValueError(f"--from={text!r}: it was trained on another base model than model.path="
                         f"{config.model.path!r}")
    have, wanted = directory.iterations(address.workdir), address.iteration if iteration is None else iteration
    if not have or wanted not in (None, *have):
        raise FileNotFoundError(f"--from={text!r}: there are checkpoints of iterations "
                                f"{', '.join(map(str, have)) or 'none'}")
    iteration = have[-1] if wanted is None else wanted
    parents, old = {}, directory.config_of(address.workdir)
    for state, members in zip(checkpoint.read(address.workdir / "checkpoints", iteration), directory.groups(old),
                              strict=True):
        for i, (number, own) in enumerate(members):
            parents[number] = own, jax.tree.map(lambda x, i=i: np.asarray(x[i]), state)
    members = configs.members(config)
    numbers = [address.member] * len(members) if address.member is not None else range(len(members))
    if address.member is None and len(parents) != len(members) or address.member not in (None, *parents):
        raise ValueError(f"--from={text!r}: it has members 0 to {len(parents) - 1}, the new run {len(members)}; with "
                         "RUN they must be as many, and RUN:MEMBER names one of them")
    changes, states, digests = {}, {}, []
    for i, (member, number) in enumerate(zip(members, numbers, strict=True)):
        (parent, states[i]), own = parents[number], configs.override(config, member)
        changes |= _changes(text, parent, own)
        leaves = jax.tree.leaves(states[i])
        digests.append(hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest())
        if parent.kl.controller != own.kl.controller:
            states[i] = states[i] | {"controller": None}
    changes = [f"{key} {a!r} -> {b!r}" for key, (a, b) in changes.items()]
    return Start(text, iteration, digests, changes, states)


def _changes(text, old, new):
    """Settings of a member that differ and count -> (old, new); raises where one decides the state's shape."""
    old, new = configs.flat(old), configs.flat(new)
    changes = {key: (old[key], new[key]) for key in new if old[key] != new[key] and configs.counts(key)}
    for key in _KEPT:
        if key in changes:
            a, b = changes[key]
            raise ValueError(f"--from={text!r}: {key} is {a!r} there and {b!r} here; a run goes on with the same "
                             "model, kind of policy and reference")
    return changes


def begin(start: Start, members: list[int], state):
    """The new state of a program's members [m], whose arrays lie as those of `state`, its untrained one. Schedules of
    the KL coefficient begin anew, as those of the learning rate, and so does a controller of another kind."""
    own = [start.states[number] for number in members]
    anew = isinstance(state.controller, Progress) or any(parent["controller"] is None for parent in own)

    def taken(name):
        target = getattr(state, name)
        leaves = [jax.tree.leaves(parent[name]) for parent in own]
        shapes = [x.shape[1:] for x in jax.tree.leaves(target)]
        if [x.shape for x in leaves[0]] != shapes:
            raise ValueError(f"--from={start.address!r}: its {name} has arrays of shapes "
                             f"{[x.shape for x in leaves[0]]}, this run's {shapes}")
        stacked = [np.stack(x) for x in zip(*leaves, strict=True)]
        placed = [jax.device_put(x, like.sharding) for x, like in zip(stacked, jax.tree.leaves(target), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(target), placed)

    count = jax.device_put(np.full(len(members), start.iteration, np.int32), state.iteration.sharding)
    kept = ("params", "opt_state", "reference") if anew else ("params", "opt_state", "reference", "controller")
    return state._replace(iteration=count, **{name: taken(name) for name in kept})
