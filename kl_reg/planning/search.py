"""Meshes ranked without compiling them, by rules of thumb: what is divided, gathered and added up, at published rates.
"""
from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from kl_reg.planning import compiled, estimate
from kl_reg.planning.abstract import Abstract
from kl_reg.planning.accelerators import Topology
from kl_reg.sharding import mesh


class Guess(NamedTuple):
    """One mesh: sizes of its axes, bytes that a device needs, seconds of rollout and update of all programs."""

    axes: dict[str, int]
    needs: float
    rollout: estimate.Times
    update: estimate.Times

    @property
    def seconds(self) -> float:
        return self.rollout.seconds + self.update.seconds


def candidates(programs: list[Abstract], topology: Topology) -> list[dict[str, int]]:
    """All that divide the members, episodes, heads and experts that there are; slices lie on member or data."""
    shapes, out = programs[0].shapes, []
    members = math.gcd(*(len(own.members) for own in programs))
    rows = math.gcd(*(own.program.schedule.rows for own in programs))
    columns = math.gcd(shapes.mlp_width, shapes.heads * shapes.head_width)
    bounds = {"member": members, "tensor": columns, "expert": max(shapes.experts, 1)}
    divisors = [size for size in range(1, topology.count + 1) if topology.count % size == 0]
    for shape in itertools.product(divisors, repeat=len(mesh.AXES) - 1):
        rest = topology.count // math.prod(shape) if topology.count % math.prod(shape) == 0 else 0
        axes = dict(zip(mesh.AXES, (*shape, rest), strict=True))
        whole = rest and rows % (axes["data"] * axes["fsdp"]) == 0
        slices = axes["member"] % topology.slices == 0 or axes["data"] % topology.slices == 0
        if whole and slices and all(bound % axes[name] == 0 for name, bound in bounds.items()):
            out.append(axes)
    return out


def rank(programs: list[Abstract], topology: Topology) -> list[Guess]:
    """The fastest first, behind them those that do not fit, the smallest first."""
    found = [guess(programs, axes, topology) for axes in candidates(programs, topology)]
    limit = topology.accelerator.hbm
    return sorted(found, key=lambda own: (own.needs > limit, own.seconds if own.needs <= limit else own.needs))


def guess(programs: list[Abstract], axes: dict[str, int], topology: Topology) -> Guess:
    """Of one mesh."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    kept, stages = [], []
    for own in programs:
        resident = compiled.resident(own, compiled.arguments(own, mesh), mesh)
        kept.append(resident)
        stages.append((_rollout(own, resident, axes, topology), _update(own, resident, axes, topology)))
    states = sum(own.params + own.optimizer + own.other for own in kept)
    needs = kept[0].frozen + states + max(_most(own, resident, axes)
                                          for own, resident in zip(programs, kept, strict=True))
    total = [estimate.Times(*map(sum, zip(*own, strict=True))) for own in zip(*stages, strict=True)]
    return Guess(axes, needs, *total)


def _rows(own, axes):
    """Of the trunk's batch, on a device."""
    return len(own.members) * own.program.schedule.episodes / (axes["member"] * axes["data"] * axes["fsdp"])


def _trains_trunk(own):
    return own.config.policy.kind != "head"


def _most(own, resident, axes):
    """Beside what stays: the rollout's cache, copied weights and logits; the update's gradients and activations."""
    shapes, schedule, length = own.shapes, own.program.schedule, own.program.task.env.length
    vocabulary, item = 4 * shapes.vocab, jax.numpy.dtype(shapes.dtype).itemsize
    logits = 6 * _rows(own, axes) * vocabulary
    rollout = resident.cache + resident.episodes + own.program.execution.copies * _copies(own, resident) + logits
    read = min(own.program.execution.chunk, _rows(own, axes) * length * shapes.vocab) * 4 / axes["tensor"]
    tokens = _rows(own, axes) / schedule.minibatches / schedule.accumulate * length
    numbers = shapes.width if own.config.model.remat else 8 * shapes.width + 3 * shapes.mlp_width / axes["tensor"]
    activations = tokens * item * numbers * shapes.layers if _trains_trunk(own) else 0.0
    return max(rollout, resident.episodes + resident.params + read + activations)


def _copies(own, resident):
    """Of the frozen base, and in its dtype of a trunk that is trained in float32."""
    trained = resident.params if own.config.policy.kind == "full" else 0.0
    return resident.frozen + trained * jax.numpy.dtype(own.shapes.dtype).itemsize / 4


def _rollout(own, resident, axes, topology):
    chip, shapes, length = topology.accelerator, own.shapes, own.program.task.env.length
    gathered = _copies(own, resident) * axes["fsdp"]
    memory = length * (gathered + resident.cache / 2)
    payload = _rows(own, axes) * shapes.width * jax.numpy.dtype(shapes.dtype).itemsize
    sums = 2 * shapes.layers * length * _ring(topology, 2 * payload, axes["tensor"] * axes["expert"])
    gathers = shapes.layers * length * _ring(topology, gathered / shapes.layers, axes["fsdp"])
    return estimate.Times(own.flops["rollout"] / topology.count / chip.flops, memory / chip.bandwidth, sums + gathers)


def _update(own, resident, axes, topology):
    chip, shapes, schedule = topology.accelerator, own.shapes, own.program.schedule
    steps, divided = schedule.epochs * schedule.minibatches, axes["data"] * axes["fsdp"]
    trunk = 3 * schedule.accumulate * resident.frozen * axes["fsdp"] if _trains_trunk(own) else 0.0
    memory = steps * (trunk + 3 * resident.params + 2 * resident.optimizer)
    payload = _rows(own, axes) * own.program.task.env.length * shapes.width * jax.numpy.dtype(shapes.dtype).itemsize
    sums = steps * _ring(topology, 2 * resident.params, divided)
    if _trains_trunk(own):
        sums += schedule.epochs * 4 * shapes.layers * _ring(topology, 2 * payload, axes["tensor"] * axes["expert"])
        sums += 3 * steps * schedule.accumulate * _ring(topology, resident.frozen * axes["fsdp"], axes["fsdp"])
    return estimate.Times(own.flops["update"] / topology.count / chip.flops, memory / chip.bandwidth, sums)


def _ring(topology, sent, members):
    """Seconds in which each of so many devices sends that much around a ring, on a torus folded into a square."""
    if members == 1:
        return 0.0
    hops = members - 1 if members <= 8 else 2 * (math.sqrt(members) - 1)
    both = 2 if topology.devices else 1
    return sent * (members - 1) / members / (both * topology.accelerator.link) + hops * estimate.HOP
