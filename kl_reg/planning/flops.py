"""Operations of matrix products, counted in a traced program; loops count as often as they run."""
from __future__ import annotations

import math

import jax
from jax.extend import core


def count(jaxpr: core.Jaxpr, turns: int = 1) -> float:
    """Multiplications and additions of all matrix products and convolutions of one run of a program for one device.

    Args:
        turns: of a `while` loop whose body has any; `scan` says its own. Of a `cond` the dearest branch counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [count(getattr(x, "jaxpr", x), turns) for x in jax.tree.leaves(
            list(params.values()), is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)))
            if isinstance(x, (core.Jaxpr, core.ClosedJaxpr))]
        if name == "dot_general":
            total += _dot(equation)
        elif name in ("ragged_dot", "ragged_dot_general"):
            total += _ragged(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(inner)
        else:
            total += {"scan": params.get("length"), "while": turns}.get(name, 1) * sum(inner)
    return total


def _sizes(shape, dims):
    return math.prod(shape[i] for i in dims)


def _dot(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * _sizes(equation.invars[0].aval.shape, contracted)


def _ragged(equation):
    """Each row of the left side meets one group's matrix; where the rows are contracted, the result has all groups."""
    numbers, left = equation.params["ragged_dot_dimension_numbers"], equation.invars[0].aval.shape
    (contracted, _), _ = numbers.dot_dimension_numbers
    out = math.prod(equation.outvars[0].aval.shape)
    if set(numbers.lhs_ragged_dimensions) & set(contracted):
        out //= equation.invars[2].aval.shape[-1]
    return 2.0 * out * _sizes(left, contracted)


def _convolution(equation):
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
