"""How long a stage takes at the least: its arithmetic, its memory traffic or its collectives at published rates."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from kl_reg.planning.accelerators import Topology
from kl_reg.planning.hlo import Collective

HOP = 1e-6
"""Seconds that a message takes to a neighbour on the torus; on GPUs of a node a collective takes so long to start."""

NODE = 8
"""GPUs that NVLink connects."""

ASSUMPTION = ("compute, memory traffic and collectives run at the published peak and overlap wholly, so that the "
              f"longest counts; a collective is a ring over one torus axis, both ways, and {HOP * 1e6:g} us a hop")


class Times(NamedTuple):
    """Seconds of one run of a stage."""

    compute: float
    memory: float
    collectives: float

    @property
    def seconds(self) -> float:
        return max(self)


class Moved(NamedTuple):
    """All collectives of one kind over the same axes: `bytes` of their payloads, all runs together, and seconds."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: float
    seconds: float


def times(topology: Topology, mesh: Mesh, flops: float, memory: float, collectives: Sequence[Collective]) -> Times:
    """Of a stage with so many operations on all devices, and so many bytes of memory traffic on each."""
    chip = topology.accelerator
    return Times(flops / topology.count / chip.flops, memory / chip.bandwidth,
                 sum(moved.seconds for moved in summary(topology, mesh, collectives)))


def summary(topology: Topology, mesh: Mesh, collectives: Sequence[Collective]) -> list[Moved]:
    """By kind and axes, the longest first."""
    found = {}
    for one in collectives:
        kept = found.setdefault((one.kind, axes_of(one.groups, mesh)), [0, 0.0, 0.0])
        for i, value in enumerate((1, one.bytes, seconds(topology, mesh, one.kind, one.bytes, one.groups))):
            kept[i] += value * one.times
    rows = [Moved(kind, axes, *kept) for (kind, axes), kept in found.items()]
    return sorted(rows, key=lambda moved: -moved.seconds)


def axes_of(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh in which the partitions of a group differ; without partitions, the slices."""
    if not len(groups):
        return ("slices",)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))                 # [axes, n, size]
    return tuple(name for name, own in zip(mesh.axis_names, places, strict=True) if (own != own[:, :1]).any())


def seconds(topology: Topology, mesh: Mesh, kind: str, size: float, groups: np.ndarray) -> float:
    """Of one collective with `size` bytes of payload: what a ring sends over a link, and its hops.

    Of n devices each sends 2 (n - 1) / n of the payload of an all-reduce, (n - 1) / n of that of an all-gather,
    reduce-scatter or all-to-all, and all of a permute's.
    """
    members = groups.shape[1]
    if members == 1:
        return 0.0
    passes = 2 if kind == "all-reduce" else 1
    sent = size * (1 if kind == "collective-permute" else passes * (members - 1) / members)
    hops, rate = _route(topology, mesh, groups)
    return sent / rate + passes * hops * HOP


def _route(topology, mesh, groups):
    """Hops across the widest group, and bytes per second of a device."""
    chip, devices = topology.accelerator, mesh.devices.ravel()
    if not len(groups):
        return 1, chip.network
    if not topology.devices:
        across = any(len({i // NODE for i in group}) > 1 for group in groups.tolist())
        return 1, chip.network if across else chip.link
    hops = 0
    for group in groups.tolist():
        own = [devices[i] for i in group]
        if topology.slices > 1 and len({device.slice_index for device in own}) > 1:
            return 1, chip.network
        places = np.array([device.coords for device in own])
        hops = max(hops, int((places.max(0) - places.min(0)).sum()))
    return hops, 2 * chip.link
