"""From a checkpoint's tensors under their Hugging Face names to a tree of parameters, and back."""
from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kl_reg.pretrained.source import Source


class Rule(NamedTuple):
    """One tensor of a checkpoint and the parameters that it holds.

    `theirs` is its key, with `{i}` for the layer and `{e}` for the expert: those are the leading axes of our arrays.
    `ours` are paths as "layers/query/kernel", each of one rule; `split` gives an array for each of them, and `join` is
    its inverse.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable
    join: Callable


def plain(ours: str, theirs: str) -> Rule:
    """The same array."""
    return Rule(theirs, (ours,), lambda x: (x,), lambda x: x)


def linear(ours: str, theirs: str) -> Rule:
    """The weight of torch's Linear, [out, in]; ours is [in, out]."""
    return Rule(theirs, (ours,), lambda x: (x.T,), lambda x: x.T)


def dense(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """torch's Linear: kernel and bias."""
    return linear(f"{ours}/kernel", f"{theirs}.weight"), plain(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """torch's LayerNorm: scale and bias."""
    return plain(f"{ours}/scale", f"{theirs}.weight"), plain(f"{ours}/bias", f"{theirs}.bias")


def columns(ours: Sequence[str], theirs: str) -> Rule:
    """Several arrays of one width side by side, last axis."""
    return Rule(theirs, tuple(ours), lambda x: tuple(np.split(x, len(ours), axis=-1)),
                lambda *parts: jnp.concatenate(parts, axis=-1))


def read(rules: Sequence[Rule], shapes: dict, source: Source, dtype: str, optional: Sequence[str] = (),
         renames: Sequence[tuple[str, str]] = (), sharding: Callable | None = None) -> dict:
    """The parameters, tensor by tensor: beside them the host holds one tensor and the arrays of one rule.

    Args:
        shapes: the tree of `jax.ShapeDtypeStruct` that the model's init has; rules whose paths it lacks are left out.
        dtype: of all parameters.
        optional: regular expressions of keys that the checkpoint may have beside.
        renames: (regular expression, replacement) applied to the checkpoint's keys first.
        sharding: (path, shape) -> a Sharding, of which only this process's shards are held; None: one device.

    Raises:
        ValueError: lists all keys that are missing, that are not known, and that have another shape, and all
            parameters that no rule gives.
    """
    flat = flatten_dict(shapes, sep="/")
    names = {rename(key, renames): key for key in source.shapes}
    wanted = [(rule, index, rule.theirs.format(**index)) for rule in rules if set(rule.ours) <= set(flat)
              for index in _indices(rule, flat)]
    _check(source, names, wanted, _without_rule(rules, flat), flat, optional)
    params = {}
    for rule, group in itertools.groupby(wanted, key=lambda entry: entry[0]):
        leaves = {path: _Leaf(flat[path].shape, jnp.dtype(dtype), sharding and sharding(path, flat[path].shape))
                  for path in rule.ours}
        for _, index, key in group:
            for path, part in zip(rule.ours, rule.split(source.read(names[key])), strict=True):
                leaves[path].put(tuple(index.values()), part)
        params |= {path: leaf.array() for path, leaf in leaves.items()}
    return unflatten_dict(params, sep="/")


def write(rules: Sequence[Rule], params: dict) -> Iterator[tuple[str, jax.Array]]:
    """(key, tensor) of a checkpoint with these parameters; rules whose paths they lack are left out.

    Raises:
        ValueError: parameters would be left out, as the scales of int8 matrices.
    """
    flat = flatten_dict(params, sep="/")
    if lost := _without_rule(rules, flat):
        raise ValueError(f"no rule writes {', '.join(lost)} (int8 is no format of checkpoints: `export.as_floats`)")
    for rule in rules:
        if set(rule.ours) <= set(flat):
            for index in _indices(rule, flat):
                parts = (flat[path][tuple(index.values())] for path in rule.ours)
                yield rule.theirs.format(**index), rule.join(*parts)


def rename(key: str, renames: Sequence[tuple[str, str]]) -> str:
    """A checkpoint's key after all (regular expression, replacement)."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _without_rule(rules, flat):
    """Paths that none of the rules in use has."""
    return sorted(set(flat) - {path for rule in rules if set(rule.ours) <= set(flat) for path in rule.ours})


def _indices(rule, flat):
    """All values of a rule's placeholders, as {"i": layer, "e": expert}."""
    names = [name for name in "ie" if f"{{{name}}}" in rule.theirs]
    counts = flat[rule.ours[0]].shape[:len(names)]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*map(range, counts))]


def _check(source, names, wanted, without, flat, optional):
    expected = {}
    for rule, index, key in wanted:
        parts = [jax.ShapeDtypeStruct(flat[path].shape[len(index):], jnp.float32) for path in rule.ours]
        expected[key] = jax.eval_shape(rule.join, *parts).shape
    problems = [f"missing {key}" for key in expected if key not in names]
    problems += [f"extra {names[key]}" for key in names
                 if key not in expected and not any(re.search(pattern, key) for pattern in optional)]
    problems += [f"{names[key]} is {source.shapes[names[key]]}, expected {shape}" for key, shape in expected.items()
                 if key in names and source.shapes[names[key]] != shape]
    problems += [f"no rule gives {path}" for path in without]
    if problems:
        raise ValueError(f"{source.path} does not fit its config.json: " + "; ".join(problems))


class _Leaf:
    """One of our arrays while it is filled: a buffer for each different shard of this process."""

    def __init__(self, shape, dtype, sharding):
        self._shape, self._sharding = shape, sharding
        whole = tuple(slice(0, size) for size in shape)
        places = [whole]
        if sharding is not None:
            places = [tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
                      for index in sharding.addressable_devices_indices_map(shape).values()]
        bounds = {tuple((s.start, s.stop) for s in place) for place in places}
        self._buffers = {bound: np.empty([stop - start for start, stop in bound], dtype) for bound in bounds}

    def put(self, index, part):
        for bound, buffer in self._buffers.items():
            lead, rest = bound[:len(index)], bound[len(index):]
            if all(start <= i < stop for i, (start, stop) in zip(index, lead, strict=True)):
                at = tuple(i - start for i, (start, _) in zip(index, lead, strict=True))
                buffer[at] = part[tuple(slice(*b) for b in rest)]

    def array(self):
        if self._sharding is None:
            (buffer,) = self._buffers.values()
            return jnp.asarray(buffer)
        place = lambda index: self._buffers[tuple(s.indices(size)[:2]  # noqa: E731
                                                  for s, size in zip(index, self._shape, strict=True))]
        return jax.make_array_from_callback(self._shape, self._sharding, place)
