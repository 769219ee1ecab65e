"""Slices at an index that is not known before, which `vmap` leaves what they are. Of `lax.dynamic_slice` and
`lax.dynamic_update_slice` it makes a gather and a scatter, for which XLA copies whole arrays. All that is mapped has
one index."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def take(x: Shaped[Array, ...], index: Int[Array, ""], size: int, axis: int) -> Shaped[Array, ...]:
    """`size` entries of x from `index` on along `axis`."""
    return _mapped(lambda axis: lambda x, index: jax.lax.dynamic_slice_in_dim(x, index, size, axis), axis)(x, index)


def write(kept: Shaped[Array, ...], new: Shaped[Array, ...], index: Int[Array, ""], axis: int
          ) -> Shaped[Array, ...]:
    """`kept` with `new` from `index` on along `axis`, in place: nothing that reads it writes it once more."""
    def at(axis):
        return lambda kept, new, index: jax.lax.optimization_barrier(
            jax.lax.dynamic_update_slice_in_dim(kept, new, index, axis))

    return _mapped(at, axis)(kept, new, index)


def _mapped(at: Callable, axis: int) -> Callable:
    """at(axis), whose `vmap` is at(axis + 1)."""
    function = jax.custom_batching.custom_vmap(at(axis))

    @function.def_vmap
    def over(size, batched, *args):
        *arrays, index = args
        if batched[-1]:
            raise NotImplementedError("slices at an index for each of what is mapped")
        arrays = [x if own else jnp.broadcast_to(x, (size, *x.shape))
                  for x, own in zip(arrays, batched[:-1], strict=True)]
        return _mapped(at, axis + 1)(*arrays, index), True

    return function
