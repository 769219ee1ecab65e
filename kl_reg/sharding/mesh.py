"""The devices of a run as a mesh, and where everything lies on it.

Axes: "member" divides the members of a sweep, "data" and "fsdp" the episodes of each, "fsdp" also the weights, by the
rows of their matrices, "tensor" the columns, heads and vocabulary, "expert" a mixture's experts. Nothing here changes a
number of a result but for the order of sums. What models, rollout and step know of it is in divided.py.
"""
from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kl_reg.sharding.partition_rules import DECODER, STATE, Rule

AXES = ("member", "data", "fsdp", "tensor", "expert")
"""From the slowest links to the fastest."""

EPISODES = ("data", "fsdp")
"""What the episodes of a member are divided over."""

ROWS = ("member", *EPISODES)
"""What the rows of the trunk's flat batch are divided over."""

MODES = ("jit", "pmap")


def sizes(settings: ConfigDict, count: int) -> tuple[int, ...]:
    """The size of each axis on so many devices; the axis that is -1 takes what the others leave.

    Raises:
        ValueError: they do not multiply to `count`.
    """
    asked = [settings[axis] for axis in AXES]
    known = math.prod(size for size in asked if size != -1)
    out = tuple(count // known if size == -1 else size for size in asked)
    if math.prod(out) != count:
        said = ", ".join(f"parallel.{axis}={size}" for axis, size in zip(AXES, asked, strict=True) if size != 1)
        raise ValueError(f"{said or 'parallel: no axis'}: there are {count} devices; the axes must multiply to that, "
                         "and one of them may be -1, what the others leave")
    return out


def mesh_of(settings: ConfigDict, devices: Sequence | None = None) -> Mesh:
    """The mesh of `config.parallel`.

    Args:
        devices: of any kind, abstract ones of a topology too; None: all there are.

    Raises:
        ValueError: as `grid_of`.
    """
    grid = grid_of(settings, jax.devices() if devices is None else list(devices))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def grid_of(settings: ConfigDict, devices: Sequence) -> np.ndarray:
    """The devices, an array with the dimensions AXES.

    Slices of a pod, which a slower network joins, are divided over "member" if that is a multiple of them, as members
    never communicate, and else over "data".

    Raises:
        ValueError: the axes do not multiply to the number of devices, or the slices do not divide them.
    """
    shape, slices = sizes(settings, len(devices)), settings.slices
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    there = {getattr(device, "slice_index", 0) for device in devices}       # which only TPU devices have
    if len(there) != slices:
        raise ValueError(f"parallel.slices={slices}: the devices are those of {len(there)}")
    by_axis = dict(zip(AXES, shape, strict=True))
    axis = next((axis for axis in ("member", "data") if by_axis[axis] % slices == 0), None)
    if axis is None:
        raise ValueError(f"parallel.slices={slices} must divide parallel.member={by_axis['member']} or "
                         f"parallel.data={by_axis['data']}")
    outer = [slices if name == axis else 1 for name in AXES]
    inner = [size // slow for size, slow in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def mesh_for(settings: ConfigDict) -> Mesh | None:
    """`mesh_of` all devices; None where one is enough. Raises as `mesh_of`."""
    if all(settings[axis] == 1 for axis in AXES) and jax.process_count() == 1:
        return None
    return mesh_of(settings)


def describe(mesh: Mesh, params, states: Sequence) -> str:
    """What a user should know of a mesh: its axes, and what it could not divide."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    notes = dict.fromkeys(undivided(params, DECODER, mesh))
    for state in states:
        notes |= dict.fromkeys(undivided(state, STATE, mesh, lead=("member",)))
    return "\n".join([f"mesh: {axes}" + f"; {jax.process_count()} processes" * (jax.process_count() > 1), *notes])


def fitting(axes: Sequence, shape: Sequence[int], mesh) -> P:
    """The spec of an array whose dimensions have these axes, each a name, several or None; a dimension that they do not
    divide stays whole."""
    whole = [size % math.prod(mesh.shape[name] for name in _several(own)) != 0
             for own, size in zip(axes, shape, strict=True)]
    return P(*(None if no else own for own, no in zip(axes, whole, strict=True)))


def _several(axes):
    """The names of a dimension's axes."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def axes_of(path: str, shape: Sequence[int], rules: Sequence[Rule], lead: Sequence = ()) -> tuple:
    """The axis of each dimension of the parameter at `path`.

    Args:
        rules: (regular expression, axes of the last dimensions), the first that is found in the path counts.
        lead: axes of the first dimensions, which no rule speaks of.

    Raises:
        ValueError: no rule names it, or one with more dimensions than it has.
    """
    for pattern, axes in rules:
        if re.search(pattern, path):
            between = len(shape) - len(lead) - len(axes)
            if between < 0:
                raise ValueError(f"{path} has shape {tuple(shape)}; its rule {pattern!r} divides {len(axes)} dimensions"
                                 f" behind the first {len(lead)}")
            return (*lead, *[None] * between, *axes)
    raise ValueError(f"no partition rule names the parameter {path}; add one to "
                     "kl_reg.sharding.partition_rules (axes () put it on every device)")


def specs(tree, rules: Sequence[Rule], mesh, lead: Sequence = ()):
    """Partition specs of a tree of arrays or `jax.ShapeDtypeStruct`, by their paths; arguments and errors as of
    `axes_of`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: fitting(axes_of(name_of(path), x.shape, rules, lead), x.shape, mesh), tree)


def partition(tree, rules: Sequence[Rule], mesh: Mesh, lead: Sequence = ()):
    """`specs` as shardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs(tree, rules, mesh, lead))


def name_of(path) -> str:
    """A leaf's path as "layers/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def undivided(tree, rules: Sequence[Rule], mesh: Mesh, lead: Sequence = ()) -> list[str]:
    """What a user should know: the parameters of which each device holds more than their rule says, because a dimension
    is no multiple of its axis."""
    notes = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        wanted = axes_of(name_of(path), x.shape, rules, lead)
        lost = [f"{size} by {' x '.join(f'{name}={mesh.shape[name]}' for name in _several(own))}"
                for size, own, given in zip(x.shape, wanted, fitting(wanted, x.shape, mesh), strict=True)
                if own != given]
        if lost:
            notes.append(f"{name_of(path)}: a dimension is not divided, {', '.join(lost)}")
    return notes


def model_shardings(params, mesh: Mesh):
    """The shardings of a frozen decoder, or of several stacked."""
    return partition(params, DECODER, mesh)


def sharding_of(mesh: Mesh | None) -> Callable | None:
    """(path, shape) -> the sharding of a frozen decoder's parameter, as `weights.load` takes it."""
    if mesh is None:
        return None
    return lambda path, shape: NamedSharding(mesh, fitting(axes_of(path, shape, DECODER), shape, mesh))


def state_shardings(state, mesh: Mesh):
    """The shardings of a `TrainState` of all members, or its shapes (`jax.eval_shape` of `Compiled.init`)."""
    return partition(state, STATE, mesh, lead=("member",))


def episode_shardings(tree, mesh: Mesh):
    """The shardings of arrays [m, b, ...]: recorded episodes, their rewards."""
    return _shardings(tree, mesh, "member", EPISODES)


def member_shardings(tree, mesh: Mesh):
    """The shardings of arrays [m, ...]: settings, seeds, keys."""
    return _shardings(tree, mesh, "member")


def _shardings(tree, mesh, *axes):
    return jax.tree.map(lambda x: NamedSharding(mesh, leading(x, axes, mesh)), tree)


def leading(x, axes: Sequence, mesh) -> P:
    """The spec of an array whose first dimensions have these axes."""
    return fitting((*axes, *[None] * (x.ndim - len(axes))), x.shape, mesh)


def put(tree, shardings):
    """Arrays of the host, the same on all hosts, as they lie on the mesh."""
    def one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    with jax.transfer_guard("allow"):       # whoever calls it means it
        return jax.tree.map(one, tree, shardings)


def put_members(tree, mesh: Mesh | None):
    """Arrays [m, ...] of the host on the devices; None: one device."""
    return jax.device_put(tree) if mesh is None else put(tree, member_shardings(tree, mesh))


def put_episodes(tree, mesh: Mesh | None):
    """Arrays [m, b, ...] of the host on the devices; None: one device."""
    return jax.device_put(tree) if mesh is None else put(tree, episode_shardings(tree, mesh))


def readable(tree):
    """Arrays that this process can read: where there are several processes, copies on all devices. All call it."""
    if jax.process_count() == 1:
        return tree
    return _copies(NamedSharding(jax.tree.leaves(tree)[0].sharding.mesh, P()))(tree)


@functools.cache
def _copies(sharding):
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def fetch(tree):
    """Arrays of the devices on the host. All processes call it."""
    return jax.device_get(readable(tree))
