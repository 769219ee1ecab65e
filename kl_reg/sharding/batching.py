"""What `vmap` would make slow.

Slices at an index that is not known before stay what they are. Of `lax.dynamic_slice` and `lax.dynamic_update_slice` it
makes a gather and a scatter, for which XLA copies whole arrays. All that is mapped has one index.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from kl_reg.sharding.constraints import auto_mesh


def take(x: Shaped[Array, ...], index: Int[Array, ""], size: int, axis: int) -> Shaped[Array, ...]:
    """`size` entries of x from `index` on along `axis`."""
    return _mapped(lambda axis: lambda x, index: jax.lax.dynamic_slice_in_dim(x, index, size, axis), axis)(x, index)


def write(kept: Shaped[Array, ...], new: Shaped[Array, ...], index: Int[Array, ""], axis: int
          ) -> Shaped[Array, ...]:
    """`kept` with `new` from `index` on along `axis`, in place: nothing that reads it writes it once more."""
    def at(axis):
        def put(kept, new, index):
            ones = [i for i, size in enumerate(kept.shape) if size == 1 and i != axis]      # what reads it has none
            bare, piece = jnp.squeeze(kept, ones), jnp.squeeze(new, ones)
            place = axis - sum(i < axis for i in ones)
            whole = jax.lax.optimization_barrier(jax.lax.dynamic_update_slice_in_dim(bare, piece, index, place))
            return jnp.expand_dims(whole, ones)
        return put

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


@jax.custom_batching.custom_vmap
def largest(count: Int[Array, ""]) -> Int[Array, ""]:
    """The largest of the counts of all that is mapped, one number: what depends on it alone is done or left out for all
    of them together, where a `cond` on each one's own would do both."""
    return count


@largest.def_vmap
def _largest_of_all(size, batched, count):
    del size
    return largest(count.max() if batched[0] else count), False


def over_members(function: Callable, axes: Sequence[int | None] | None = None) -> Callable:
    """`jax.vmap(function, axes)` without keywords, `axes` of 0 and None. One member alone on one device has no
    dimension of its own inside: with it some of XLA's reductions take ten times as long on a CPU. Over several devices
    it has: without it the compiler gathers the unembedding for each token of a ledger, and not the token's logits."""
    def over(*args):
        own = (0,) * len(args) if axes is None else axes
        mapped = [x for arg, axis in zip(args, own, strict=True) if axis == 0 for x in jax.tree.leaves(arg)]
        if auto_mesh() is not None or any(len(x) > 1 for x in mapped):
            return jax.vmap(function, own)(*args)
        single = [arg if axis is None else jax.tree.map(lambda x: jnp.squeeze(x, 0), arg)
                  for arg, axis in zip(args, own, strict=True)]
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), function(*single))

    return over
