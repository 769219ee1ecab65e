"""What a configuration needs of a topology, whether it fits, and what its sweep costs."""
from __future__ import annotations

import math
import pathlib
import tempfile
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from kl_reg.planning import abstract, compiled, estimate
from kl_reg.planning.accelerators import GIB, Topology
from kl_reg.sharding import mesh as meshes
from kl_reg.training.compile import check_mesh


class StagePlan(NamedTuple):
    """Rollout or update of one program on one device: bytes that it `needs` in all, at least where it does not compile;
    its matrix products' operations; bytes of memory traffic; collectives; seconds at the least (None: unknown)."""

    name: str
    needs: float
    compiled: bool
    flops: float
    memory: float
    moved: list[estimate.Moved]
    times: estimate.Times | None
    unknown: list[str]


class ProgramPlan(NamedTuple):
    """One program of the sweep; `iterations` of training, and as many `rollouts` in its evaluation."""

    members: list[int]
    resident: compiled.Resident
    stages: list[StagePlan]
    iterations: int
    rollouts: int

    def seconds(self) -> float | None:
        """Of all its iterations and its evaluation."""
        if any(stage.times is None for stage in self.stages):
            return None
        rollout, update = (stage.times.seconds for stage in self.stages)
        return self.iterations * (rollout + update) + self.rollouts * rollout


class Plan(NamedTuple):
    """Of a sweep on one mesh. `guessed`: the opening's length, for want of a tokenizer."""

    topology: Topology
    axes: dict[str, int]
    parameters: int
    guessed: int
    notes: list[str]
    programs: list[ProgramPlan]

    @property
    def needs(self) -> float:
        """Bytes of the device that has most to hold, at the worst time."""
        return max(stage.needs for program in self.programs for stage in program.stages)

    @property
    def fits(self) -> bool:
        stages = [stage for program in self.programs for stage in program.stages]
        return all(stage.compiled for stage in stages) and self.needs <= self.topology.accelerator.hbm

    @property
    def chip_hours(self) -> float | None:
        """Of the whole sweep, rewards and compilation not counted."""
        seconds = [program.seconds() for program in self.programs]
        return None if None in seconds else sum(seconds) * self.topology.count / 3600


def read(config: ConfigDict) -> list[abstract.Abstract]:
    """The sweep's programs, of shapes alone; raises as `abstract.programs` does."""
    with tempfile.TemporaryDirectory() as scratch:
        return abstract.programs(config, pathlib.Path(scratch))


def make(programs: list[abstract.Abstract], settings: ConfigDict, topology: Topology) -> Plan:
    """Compiles every program of the sweep for the mesh of `settings`, a `config.parallel`.

    Raises:
        ValueError: the axes do not multiply to the topology's chips, or do not divide what there is.
    """
    if settings.slices != topology.slices:
        raise ValueError(f"parallel.slices={settings.slices}: {topology.name} has {topology.slices}")
    mesh = meshes.mesh_of(settings, topology.devices)
    for own in programs:
        check_mesh(own.program, settings.mode, len(own.members), own.shapes.experts, mesh)
    given = [compiled.arguments(own, mesh) for own in programs]
    kept = [compiled.resident(own, args, mesh) for own, args in zip(programs, given, strict=True)]
    states = sum(own.params + own.optimizer + own.other for own in kept)
    plans = []
    for own, args, resident in zip(programs, given, kept, strict=True):
        beside = states - (resident.params + resident.optimizer + resident.other)       # of the other programs
        stages = [_stage(own, compiled.compile_stage(name, own, args, mesh), resident, beside, topology, mesh)
                  for name in compiled.STAGES]
        plans.append(_program(own, resident, stages))
    notes = meshes.undivided(programs[0].frozen.base, meshes.DECODER, mesh)
    return Plan(topology, dict(mesh.shape), count(programs), programs[0].guessed, notes, plans)


def count(programs) -> int:
    """Parameters of the base model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(programs[0].frozen.base))


def _stage(own, stage, resident, beside, topology, mesh) -> StagePlan:
    flops = own.flops[stage.name]
    if stage.refused is not None:
        missing = resident.optimizer if stage.name == "rollout" else 0.0        # which that program does not see
        return StagePlan(stage.name, stage.refused + missing + beside, False, flops / topology.count, 0.0, [],
                         None, [])
    traffic = stage.traffic
    needs = resident.during(stage.name) + beside + stage.own
    return StagePlan(stage.name, needs, True, flops / topology.count, traffic.memory,
                     estimate.summary(topology, mesh, traffic.collectives),
                     estimate.times(topology, mesh, flops, traffic.memory, traffic.collectives), traffic.unknown)


def _program(own, resident, stages) -> ProgramPlan:
    rl, episodes = own.config.rl, own.config.evaluation.episodes
    each = math.ceil(episodes / rl.episodes)
    base = math.ceil(own.seeds * each / len(own.members))       # on every seed's keys; each member draws a batch of it
    return ProgramPlan(own.members, resident, stages, rl.iterations, each + base)


def excess(plan: Plan) -> float:
    """GiB that a device lacks; negative: that are left."""
    return (plan.needs - plan.topology.accelerator.hbm) / GIB
