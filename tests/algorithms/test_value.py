"""The value head's loss by hand, and what its clip may and may not change."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.algorithms.value import squared_error

NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)


@jax.jit
def loss_and_gradient(value, old, returns, clip):
    with jax.numpy_dtype_promotion("strict"):
        return (squared_error(value, old, returns, clip),
                jax.grad(lambda v: squared_error(v, old, returns, clip).sum())(value))


def of(value, old, returns, clip):
    loss, gradient = loss_and_gradient(*(jnp.array(x, jnp.float32) for x in (value, old, returns)), jnp.float32(clip))
    return np.asarray(loss), np.asarray(gradient)


def test_without_a_clip_by_hand():
    loss, gradient = of([1.0, 2.0, -1.0], [9.0, -9.0, -1.0], [1.0, -1.0, 0.0], np.inf)
    np.testing.assert_allclose(loss, [0.0, 4.5, 0.5])
    np.testing.assert_allclose(gradient, [0.0, 3.0, -1.0])


@pytest.mark.parametrize(("value", "loss", "gradient"), [
    (0.3, 0.5 * 1.7**2, -1.7),      # within 0.5 of the old value, 0: plain
    (1.0, 0.5 * 1.5**2, 0.0),       # moved to the return, 2, by more: held at 0.5
    (-1.0, 0.5 * 3.0**2, -3.0),     # moved away from it: plain
    (9.0, 0.5 * 7.0**2, 7.0)])      # far past it: plain again, because it is the larger error
def test_the_clip_by_hand(value, loss, gradient):
    losses, gradients = of([value] * 3, [0.0] * 3, [2.0] * 3, 0.5)
    np.testing.assert_allclose(losses, [loss] * 3, rtol=1e-6)
    np.testing.assert_allclose(gradients, [gradient] * 3, rtol=1e-6)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_an_infinite_clip_is_the_plain_squared_error(value, old, returns):
    loss, gradient = of(value, old, returns, np.inf)
    difference = np.array(value) - np.array(returns)
    np.testing.assert_allclose(loss, difference**2 / 2, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(gradient, difference, rtol=1e-5, atol=1e-5)


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(1 / 64, 5, width=32))
def test_a_clip_only_takes_gradients_away(value, old, returns, clip):
    loss, gradient = of(value, old, returns, clip)
    plain, plain_gradient = of(value, old, returns, np.inf)
    assert (loss >= plain).all()
    part = np.divide(gradient, plain_gradient, out=np.zeros(3, np.float32), where=plain_gradient != 0)
    assert (part > -1e-6).all() and (part < 1 + 1e-6).all()
    near = np.abs(np.subtract(value, old)) < clip * 0.999
    np.testing.assert_allclose(gradient[near], plain_gradient[near], rtol=1e-6)
