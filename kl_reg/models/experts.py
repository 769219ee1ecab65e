"""The sparse mixture of experts of a layer. Axes: n tokens, d model, c chosen experts of a token, e experts, i, o inner
and outer width of a kernel."""
from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.custom_batching import sequential_vmap
from jax.sharding import PartitionSpec as P

from kl_reg.models.layers import ACTIVATIONS, Linear
from kl_reg.sharding.constraints import auto_mesh
from kl_reg.sharding.mesh import ROWS, fitting


class Experts(nn.Module):
    """A sparse mixture of gated MLPs: each token goes to the `chosen` experts its router likes best, none is dropped.

    Their outputs are weighted by the router's softmax, renormalised over the chosen. Source: Jiang et al. (2024),
    "Mixtral of Experts".
    """

    width: int
    experts: int
    chosen: int
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        d, init = x.shape[-1], nn.initializers.normal(0.02)
        shapes = {"gate": (d, self.width), "up": (d, self.width), "down": (self.width, d)}
        kernels = [self.param(name, init, (self.experts, *shape), jnp.float32) for name, shape in shapes.items()]
        flat = x.reshape(-1, d)
        logits = Linear(self.experts, self.dtype, name="router")(flat).astype(jnp.float32)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), self.chosen)
        weights /= weights.sum(-1, keepdims=True)
        if self.has_variable("params", "gate_scale"):
            scales = [self.get_variable("params", f"{name}_scale") for name in shapes]
            y = _scaled_experts(self.activation, flat, chosen, weights.astype(self.dtype), kernels, scales)
        else:
            kernels = [kernel.astype(self.dtype) for kernel in kernels]
            y = _experts(self.activation, flat, chosen, weights.astype(self.dtype), *kernels)
        return y.reshape(x.shape)


def _experts_of(activation, x, chosen, weights, gate, up, down):
    """x [n, d], chosen and weights [n, c] -> [n, d]; tokens sorted by expert, so that each kernel is read once.

    Over a mesh each device asks its own experts, or its part of their width, of its own rows, and the answers are added
    up: rows stay where they are.
    """
    mesh = auto_mesh()
    if mesh is None:
        return _asked(activation, x, chosen, weights, gate, up, down)
    rows, (here,) = fitting((ROWS,), x.shape[:1], mesh), fitting(("expert",), gate.shape[:1], mesh)
    (inner,) = fitting(("tensor",), gate.shape[2:], mesh)

    def own(x, chosen, weights, gate, up, down):
        first = jax.lax.axis_index("expert") * len(gate) if here else 0
        mine = (chosen >= first) & (chosen < first + len(gate))
        chosen = jnp.where(mine, chosen - first, len(gate))         # behind all others, where nothing is multiplied
        y = _asked(activation, x, chosen, weights, gate, up, down, mine)
        axes = tuple(axis for axis in (here, inner) if axis)
        return jax.lax.psum(y, axes) if axes else y

    kernels = P(here, None, inner), P(here, None, inner), P(here, inner)
    return jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, rows, *kernels), out_specs=rows, check_vma=False)(
        x, chosen, weights, gate, up, down)


def _asked(activation, x, chosen, weights, gate, up, down, mine=None):
    """What these experts say; `mine` [n, c]: only of those choices (None: of all)."""
    count, order = chosen.shape[1], jnp.argsort(chosen.ravel(), stable=True)
    sizes = jnp.bincount(chosen.ravel(), length=len(gate)).astype(jnp.int32)
    kept = (lambda y: y) if mine is None else lambda y: jnp.where(mine.ravel()[order][:, None], y, 0)
    rows = kept(x[order // count])
    hidden = ACTIVATIONS[activation](jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = kept(jax.lax.ragged_dot(kept(hidden), down, sizes) * weights.ravel()[order][:, None])
    return jnp.zeros_like(x).at[order // count].add(out)


# `ragged_dot` and its gradient do not vmap in general; one member after the other does.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(activation, *args):
    return sequential_vmap(partial(_experts_of, activation))(*args)


def _experts_forward(activation, *args):
    return _experts(activation, *args), args


def _experts_backward(activation, args, cotangent):
    @sequential_vmap
    def backward(x, chosen, kernels, cotangent):
        run = lambda x, kernels: _experts_of(activation, x, chosen, *kernels)  # noqa: E731
        return jax.vjp(run, x, kernels)[1](cotangent)

    x, chosen, *kernels = args
    grad, grads = backward(x, chosen, kernels, cotangent)
    return grad, np.zeros(chosen.shape, jax.dtypes.float0), *grads


_experts.defvjp(_experts_forward, _experts_backward)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _scaled_experts(activation, x, chosen, weights, kernels, scales):
    """`_experts` with int8 kernels [e, i, o] and their scales [e, o]; `ragged_dot` takes them in float."""
    dense = [(kernel * jnp.broadcast_to(scale[:, None], kernel.shape)).astype(x.dtype)
             for kernel, scale in zip(kernels, scales, strict=True)]
    return _experts(activation, x, chosen, weights, *dense)
