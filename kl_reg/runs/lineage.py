"""A run that starts from another's final state: parameters, optimizer, controller and the reference's memory."""
from __future__ import annotations

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.runs import checkpoint, directory

_KEPT = ("model.path", "model.dtype", "model.quantize", "policy.kind", "policy.actor", "policy.layers", "policy.hidden",
         "policy.rank", "policy.targets", "policy.critic_layers", "reference.name")
"""Settings that decide the shape of a state, or what its parameters belong to."""


class Start(NamedTuple):
    """The states of another run at an iteration, by member of the new run; arrays of the host, without a member axis.
    `address` is as it was given, `digests` are of the parameters, `changes` what differs in the settings."""

    address: str
    iteration: int
    states: dict[int, dict]
    digests: list[str]
    changes: list[str]

    def record(self) -> dict:
        """What config.json says of it."""
        return {"address": self.address, "iteration": self.iteration, "changes": self.changes}


def recorded(workdir: storage.Path) -> str | None:
    """The address from which the run in `workdir` started; None: from nothing, or there is no run."""
    file = workdir / "config.json"
    return storage.read_json(file).get("from", {}).get("address") if file.is_file() else None


def open_start(text: str, config: ConfigDict, base: str) -> Start:
    """The states from which the members of `config` start.

    Args:
        text: RUN, whose members start the new run's in their order; or RUN:MEMBER, which starts all of them.
        config: of the new run.
        base: the digest of its base model.

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
    have = directory.iterations(address.workdir)
    if not have or address.iteration not in (None, *have):
        raise FileNotFoundError(f"--from={text!r}: there are checkpoints of iterations "
                                f"{', '.join(map(str, have)) or 'none'}")
    iteration = have[-1] if address.iteration is None else address.iteration
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
    changes = {}
    for member, number in zip(members, numbers, strict=True):
        changes |= _changes(text, parents[number][0], configs.override(config, member))
    states = {i: parents[number][1] for i, number in enumerate(numbers)}
    digests = [hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(state))).hexdigest()
               for state in states.values()]
    return Start(text, iteration, states, digests, [f"{key} {a!r} -> {b!r}" for key, (a, b) in changes.items()])


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
    """The new state of a program's members [m], whose arrays lie as those of `state`, its untrained one. The state of a
    controller of another kind starts anew."""
    own = [start.states[number] for number in members]

    def taken(name):
        target = getattr(state, name)
        leaves = [jax.tree.leaves(parent[name]) for parent in own]
        shapes = [x.shape[1:] for x in jax.tree.leaves(target)]
        if [x.shape for x in leaves[0]] != shapes:
            if name == "controller":
                return target
            raise ValueError(f"--from={start.address!r}: its {name} has arrays of shapes "
                             f"{[x.shape for x in leaves[0]]}, this run's {shapes}")
        stacked = [np.stack(x) for x in zip(*leaves, strict=True)]
        placed = [jax.device_put(x, like.sharding) for x, like in zip(stacked, jax.tree.leaves(target), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(target), placed)

    count = jax.device_put(np.full(len(members), start.iteration, np.int32), state.iteration.sharding)
    return state._replace(iteration=count, **{name: taken(name) for name in (
        "params", "opt_state", "controller", "reference")})
