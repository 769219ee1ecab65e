"""What a program knows, while it is traced, of the devices that it is divided over. On one device nothing here does
anything.

In mode "jit" the mesh is set (`jax.sharding.use_abstract_mesh`), the compiler divides all arrays, and `constrain` tells
it how where it could not know. In mode "pmap" each device runs the program on its own episodes, along an axis with a
name, and what is a sum over episodes is a sum over that axis, too.
"""
from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, AxisType

from kl_reg.sharding.mesh import EPISODES, leading, specs
from kl_reg.sharding.partition_rules import STATE


def auto_mesh() -> AbstractMesh | None:
    """The mesh that is set, where the compiler divides arrays over it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Auto not in mesh.axis_types else mesh


def constrain(tree, *axes):
    """Divides arrays over the mesh that is set, if one is: an entry for each of their first dimensions, a name, several
    or None. Under `vmap` what is done with the mapped dimension is the compiler's choice."""
    mesh = auto_mesh()
    return tree if mesh is None else jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, leading(x, axes, mesh)), tree)


def constrain_state(state):
    """A train state on the mesh that is set, if one is."""
    mesh = auto_mesh()
    return state if mesh is None else jax.lax.with_sharding_constraint(
        state, specs(state, STATE, mesh, lead=("member",)))


def spread(axes: tuple[str, ...] = EPISODES) -> int:
    """Over how many devices the compiler divides what lies along these axes: by default the episodes of a member."""
    mesh = auto_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in axes)


def total(tree, axis: str | None):
    """The sum over the devices that each hold a part of the episodes, along that axis; None: one holds them all."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def together(tree, axis: str | None):
    """The arrays of such devices, one behind the other along their first dimension."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def back(tree, axis: str | None):
    """This device's rows of what `together` made of all."""
    if axis is None:
        return tree
    count, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * (len(x) // count), len(x) // count), tree)


def part(x: jax.Array, axis: str | None) -> jax.Array:
    """This device's part of the last dimension of what they all have."""
    if axis is None:
        return x
    size = x.shape[-1] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, axis=x.ndim - 1)
