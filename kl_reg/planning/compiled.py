"""Rollout and update of a program, compiled for devices that are not there: what they need and what they move."""
from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kl_reg.planning import hlo
from kl_reg.planning.abstract import Abstract
from kl_reg.sharding import mesh as meshes
from kl_reg.training.compile import compile_program

STAGES = ("rollout", "update")


class Stage(NamedTuple):
    """Rollout or update of one program, of one device: `own` bytes of memory that it needs beside what it is given, and
    its `traffic`. Where it does not compile, only `refused` says what it needs in all, bytes."""

    name: str
    own: float
    traffic: hlo.Traffic | None
    refused: float | None


class Resident(NamedTuple):
    """Bytes of one device that stay in memory: frozen parameters, the policies' own, the optimizer's and everything
    else of the train state; `cache` of keys and values and `episodes` as recorded are there during an iteration, and
    the cache only during the rollout."""

    frozen: float
    params: float
    optimizer: float
    other: float
    episodes: float
    cache: float

    def during(self, stage: str) -> float:
        """Without the cache, which is the rollout's own."""
        kept = self.frozen + self.params + self.optimizer + self.other
        return kept + (self.episodes if stage == "update" else 0.0)


class Arguments(NamedTuple):
    """What rollout and update are called with, in its shards."""

    state: object
    hyper: object
    frozen: object
    keys: object
    first: object
    episodes: object
    rewards: object


def arguments(abstract: Abstract, mesh: Mesh | AbstractMesh) -> Arguments:
    """As the training loop puts them on the mesh."""
    place = lambda tree, shardings: jax.tree.map(  # noqa: E731
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings(tree, mesh))
    own, members, rows = abstract.stream, meshes.member_shardings, meshes.episode_shardings
    return Arguments(
        place(abstract.state, meshes.state_shardings), place(abstract.hyper, members),
        place(abstract.frozen, meshes.model_shardings), place(own.keys, members), place(own.first, members),
        place(own.episodes, rows), place(own.rewards, rows))


def size(tree) -> float:
    """Bytes of one device's shards."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def resident(abstract: Abstract, given: Arguments, mesh: Mesh | AbstractMesh) -> Resident:
    """What stays in memory, and the rollout's cache."""
    state = given.state
    rest = size(state) - size(state.params) - size(state.opt_state)
    return Resident(size(given.frozen), size(state.params), size(state.opt_state), rest,
                    size(given.episodes) + size(given.rewards), _cache(abstract, mesh))


def _cache(abstract, mesh):
    """Rows over the axes of episodes, heads over "tensor"."""
    rows = len(abstract.members) * abstract.program.schedule.episodes

    def own(x):
        axes = (meshes.ROWS if x.shape[0] == rows else None, "tensor")
        sharding = NamedSharding(mesh, meshes.fitting(axes, x.shape[:2], mesh))
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return float(sum(own(x) for x in jax.tree.leaves(abstract.stream.cache) if x.ndim > 2))


def compile_stage(name: str, abstract: Abstract, given: Arguments, mesh: Mesh) -> Stage:
    """Compiles rollout or update."""
    run = compile_program(abstract.program, mesh)
    if name == "rollout":
        traced = run.draw.trace(given.state.params, given.state.reference, given.hyper, given.frozen, given.keys,
                                given.first, group=abstract.program.algorithm.group)
    else:
        traced = run.update.trace(given.state, given.hyper, given.frozen, given.episodes, given.rewards)
    try:
        done = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Stage(name, 0.0, None, _refused(error))
    memory = done.memory_analysis()
    own = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return Stage(name, own, hlo.traffic(hlo.parse(done.as_text())), None)


def _refused(error) -> float:
    """Bytes that a program needs in all that does not fit."""
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", str(error))
    if not found:
        raise error
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * 1024**("KMGT".index(unit) + 1)
