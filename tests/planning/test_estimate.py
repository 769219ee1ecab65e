import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from kl_reg.planning import accelerators, estimate
from kl_reg.planning.accelerators import Accelerator, Topology
from kl_reg.planning.hlo import Collective

CHIP = Accelerator("a chip", flops=100.0, hbm=1.0, bandwidth=10.0, link=4e6, network=1e6, source="by hand")


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, int, int]
    slice_index: int
    id: int
    platform: str = "tpu"


def torus(slices=1):
    """Two by four devices with axes data=2 and tensor=4; with two slices one a row."""
    devices = np.array([[Device((i, j, 0), i * (slices > 1), 4 * i + j) for j in range(4)] for i in range(2)])
    return Topology("by hand", CHIP, 8, slices, tuple(devices.ravel())), Mesh(devices, ("data", "tensor"))


ROWS, COLUMNS, ALL = np.arange(8).reshape(2, 4), np.arange(8).reshape(2, 4).T, np.arange(8)[None]


@pytest.mark.parametrize("groups, axes", [(ROWS, ("tensor",)), (COLUMNS, ("data",)), (ALL, ("data", "tensor"))])
def test_the_axes_that_a_collective_runs_over(groups, axes):
    assert estimate.axes_of(groups, torus()[1]) == axes


@pytest.mark.parametrize("kind, groups, expected", [
    ("all-reduce", ROWS, 2 * 3 / 4 * 8e6 / 8e6 + 2 * 3e-6),         # three hops there, three back
    ("all-gather", ROWS, 3 / 4 * 8e6 / 8e6 + 3e-6),
    ("reduce-scatter", COLUMNS, 1 / 2 * 8e6 / 8e6 + 1e-6),
    ("all-to-all", ALL, 7 / 8 * 8e6 / 8e6 + 4e-6),                   # corner to corner: one hop and three
    ("collective-permute", COLUMNS, 8e6 / 8e6 + 1e-6), ("all-reduce", np.arange(8)[:, None], 0.0)])
def test_a_ring_by_hand(kind, groups, expected):
    assert estimate.seconds(*torus(), kind, 8e6, groups) == pytest.approx(expected)


def test_between_slices_the_network_counts():
    assert estimate.seconds(*torus(2), "all-reduce", 8e6, COLUMNS) == pytest.approx(2 * 1 / 2 * 8e6 / 1e6 + 2e-6)
    runtime = np.empty((0, 4), int)             # what four slices' runtime sends
    assert estimate.seconds(*torus(2), "all-reduce", 8e6, runtime) == pytest.approx(2 * 3 / 4 * 8e6 / 1e6 + 2e-6)
    assert estimate.axes_of(runtime, torus(2)[1]) == ("slices",)
    assert estimate.seconds(*torus(2), "all-gather", 8e6, ROWS) == pytest.approx(3 / 4 + 3e-6)


def test_the_longest_of_three_counts():
    topology, mesh = torus()
    moved = [Collective("all-gather", 8e6, ROWS, 10), Collective("all-gather", 4e6, ROWS, 2)]
    times = estimate.times(topology, mesh, flops=8000.0, memory=20.0, collectives=moved)
    assert times == pytest.approx((10.0, 2.0, 10 * (6 / 8 + 3e-6) + 2 * (3 / 8 + 3e-6)))
    assert times.seconds == 10.0
    (row,) = estimate.summary(topology, mesh, moved)
    assert (row.kind, row.axes, row.times, row.bytes) == ("all-gather", ("tensor",), 12, 88e6)


@pytest.mark.parametrize("name, says", [
    ("v7:2x2", "accelerators are v4, v5e"), ("v5e", "give an accelerator and its shape"),
    ("h100:2x4", "of GPUs give their number, as h100:8"), ("v5e:2x2x", "give an accelerator")])
def test_a_wrong_topology_says_what_is_accepted(name, says):
    with pytest.raises(ValueError, match=says):
        accelerators.topology(name)


def test_gpus_are_estimated_only():
    topology = accelerators.topology("2*h100:8")
    assert (topology.count, topology.devices, topology.accelerator.name) == (16, (), "NVIDIA H100 SXM")
