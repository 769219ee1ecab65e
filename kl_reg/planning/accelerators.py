"""Published numbers of accelerators, and the devices of a topology that nobody has rented."""
from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

GIB = 2**30


class Accelerator(NamedTuple):
    """One chip. FLOP/s are dense, bfloat16; `hbm` is what programs may use, bytes; bandwidths are bytes per second:
    `bandwidth` of device memory, `link` of one link to a neighbour, one way, `network` of the data centre's network,
    a chip's share."""

    name: str
    flops: float
    hbm: float
    bandwidth: float
    link: float
    network: float
    source: str


_CLOUD = "Cloud TPU documentation, page TPU {}; usable HBM as libtpu 0.0.42 says"
ACCELERATORS = {
    "v4": Accelerator("TPU v4", 275e12, 30.75 * GIB, 1228e9, 50e9, 6.25e9, _CLOUD.format("v4")),
    "v5e": Accelerator("TPU v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, _CLOUD.format("v5e")),
    "v5p": Accelerator("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9, _CLOUD.format("v5p")),
    "v6e": Accelerator("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, _CLOUD.format("v6e")),
    "a100": Accelerator("NVIDIA A100 SXM 80GB", 312e12, 80e9, 2039e9, 300e9, 25e9, "NVIDIA A100 data sheet"),
    "h100": Accelerator("NVIDIA H100 SXM", 989e12, 80e9, 3350e9, 450e9, 50e9, "NVIDIA H100 data sheet"),
    "h200": Accelerator("NVIDIA H200 SXM", 989e12, 141e9, 4800e9, 450e9, 50e9, "NVIDIA H200 data sheet"),
}
"""TPUs by the names of libtpu's topologies; GPUs are connected by NVLink in nodes of eight."""


class Topology(NamedTuple):
    """`count` chips, in `slices` that a data centre's network joins; `devices` are those to compile for, () where
    nothing compiles for them here and all is estimated."""

    name: str
    accelerator: Accelerator
    count: int
    slices: int
    devices: Sequence


def topology(name: str) -> Topology:
    """What "v5e:8x8" means: chips of a TPU and their torus; "4*v5e:16x16": four such slices; "h100:8": so many GPUs.

    Raises:
        ValueError: an unknown accelerator or shape.
        ImportError: libtpu is not installed, which compiles for TPUs.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[2] not in ACCELERATORS:
        raise ValueError(f"--topology={name}: give an accelerator and its shape, as v5e:8x8, 4*v5e:16x16 (slices) or "
                         f"h100:8; accelerators are {', '.join(ACCELERATORS)}")
    slices, chip, shape = int(found[1] or 1), ACCELERATORS[found[2]], [int(size) for size in found[3].split("x")]
    if not chip.name.startswith("TPU"):
        if len(shape) > 1:
            raise ValueError(f"--topology={name}: of GPUs give their number, as {found[2]}:8")
        return Topology(name, chip, slices * shape[0], slices, ())
    devices = _tpus(name, f"{found[2]}:{found[3]}", slices, found[2])
    return Topology(name, chip, len(devices), slices, devices)


def _tpus(name, one, slices, kind):
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed, which compiles for TPUs: pip install -e '.[tpu]'")
    # It looks for TPUs and their host otherwise, and says much where there is none.
    for key, value in (("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("TPU_SKIP_MDS_QUERY", "1"), ("TF_CPP_MIN_LOG_LEVEL", "3"),
                       ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4")):
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    options |= {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(one, "tpu", **options).devices
    except Exception as error:      # of several kinds, none of them a ValueError
        raise ValueError(f"--topology={name}: libtpu knows no such shape of {kind} ("
                         f"{str(error).splitlines()[0]})") from None
