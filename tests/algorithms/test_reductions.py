"""Reductions by hand, and contracts over their registry."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.algorithms.reductions import REDUCTIONS

X = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 9.0, 9.0, 9.0], [-1.0, 0.0, 0.0, 0.0]], np.float32)
LENGTHS = (3, 2, 0, 1)


@pytest.fixture(autouse=True, scope="module")
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def compiled(name):
    """(the metric, the gradient of its total)."""
    reduce = lambda x, mask: REDUCTIONS[name](x, mask, 6)  # noqa: E731
    return jax.jit(lambda x, mask: (reduce(x, mask), jax.grad(lambda x: reduce(x, mask).total)(x)))


def of(name, x, lengths):
    mask = np.arange(x.shape[1]) < np.array(lengths)[:, None]
    return compiled(name)(jnp.array(x), jnp.array(mask))


@pytest.mark.parametrize(("name", "total", "weight", "parts"), [
    ("token_mean", 16.0, 6, [1, 1, 0, 1]),                        # 1 + 2 + 3 + 5 + 6 - 1
    ("sequence_mean", 2 + 5.5 - 1, 3, [1 / 3, 1 / 2, 0, 1]),      # the third episode has no token
    ("fixed_length", 16.0, 24, [1, 1, 0, 1])])                    # four episodes of at most six tokens
def test_by_hand(name, total, weight, parts):
    metric, gradient = of(name, X, LENGTHS)
    np.testing.assert_allclose([metric.total, metric.weight, metric.mean()], [total, weight, total / weight], rtol=1e-6)
    mask = np.arange(4) < np.array(LENGTHS)[:, None]
    np.testing.assert_allclose(gradient, np.where(mask, np.array(parts)[:, None], 0.0), rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS.names())
@given(lengths=st.tuples(*[st.integers(0, 4)] * 4), values=st.lists(st.floats(-9, 9, width=32), min_size=16,
                                                                   max_size=16))
def test_parts_of_a_batch_add_up_to_the_whole(name, lengths, values):
    x = np.array(values, np.float32).reshape(4, 4)
    whole, _ = of(name, x, lengths)
    parts = [of(name, x[rows], np.array(lengths)[rows])[0] for rows in ([0, 1], [2, 3])]
    np.testing.assert_allclose(whole.total, sum(part.total for part in parts), rtol=1e-5, atol=1e-5)
    assert whole.weight == sum(part.weight for part in parts)


@pytest.mark.parametrize("name", REDUCTIONS.names())
@pytest.mark.parametrize("tail", [1e6, np.nan, np.inf])
def test_what_stands_outside_the_mask_changes_nothing(name, tail):
    mask = np.arange(4) < np.array(LENGTHS)[:, None]
    expected, expected_gradient = of(name, X, LENGTHS)
    wide = np.pad(np.where(mask, X, np.float32(tail)), ((0, 0), (0, 2)), constant_values=tail)
    metric, gradient = of(name, wide, LENGTHS)
    np.testing.assert_allclose([metric.total, metric.weight], [expected.total, expected.weight], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :4], expected_gradient, rtol=1e-6)
    assert metric.total.dtype == metric.weight.dtype == jnp.float32


@pytest.mark.parametrize("name", REDUCTIONS.names())
def test_a_batch_without_a_token_is_zero(name):
    metric, gradient = of(name, X, (0, 0, 0, 0))
    assert metric.mean() == 0 and not gradient.any()
