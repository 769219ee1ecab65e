"""Policy-gradient losses by hand, and contracts over their registry."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.config import default, split
from kl_reg.losses import LOSSES
from kl_reg.losses.value import squared_error

HYPER = split(default())[1]
OLD = jnp.log(jnp.array([0.1, 0.2, 0.5, 0.9]))
ADVANTAGE = jnp.array([2.0, -2.0, 0.5, 0.0])


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def loss_and_gradient(name, ratio, advantage):
    """Per token, the gradient in the new log-probability."""
    old = jnp.full(len(ratio), jnp.log(0.3))
    new = old + jnp.log(jnp.array(ratio))
    loss = lambda new: LOSSES[name](new, old, jnp.array(advantage), HYPER)  # noqa: E731
    return loss(new), jax.jacrev(loss)(new)


def test_the_clip_is_the_configured():
    assert HYPER.clip == jnp.float32(0.2)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), [
    (1.5, 2.0, -2.4, 0.0),          # above, and asked to rise: -1.2 * 2
    (0.5, 2.0, -1.0, -1.0),         # below, and asked to rise: -0.5 * 2, whose derivative in log pi is itself
    (1.5, -2.0, 3.0, 3.0),          # above, and asked to fall
    (0.5, -2.0, 1.6, 0.0),          # below, and asked to fall: 0.8 * 2
    (1.1, 2.0, -2.2, -2.2), (0.9, 2.0, -1.8, -1.8), (1.1, -2.0, 2.2, 2.2), (0.9, -2.0, 1.8, 1.8)])
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient):
    value, jacobian = loss_and_gradient("ppo_clip", [ratio], [advantage])
    np.testing.assert_allclose(value, [loss], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[gradient]], rtol=1e-5)


def test_ppo_clip_reads_the_clip_from_hyper():
    old, new = jnp.zeros(1), jnp.log(jnp.array([1.5]))
    loss = LOSSES["ppo_clip"](new, old, jnp.ones(1), HYPER._replace(clip=jnp.float32(0.4)))
    np.testing.assert_allclose(loss, [-1.4], rtol=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_reinforce_by_hand(ratio):
    value, jacobian = loss_and_gradient("reinforce", [ratio], [2.0])
    np.testing.assert_allclose(value, [-2 * np.log(0.3 * ratio)], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[-2.0]])


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_is_the_policy_gradient_at_ratio_one_and_of_its_own_token_alone(name):
    jacobian = jax.jacrev(lambda new: LOSSES[name](new, OLD, ADVANTAGE, HYPER))(OLD)
    np.testing.assert_allclose(jacobian, -np.diag(ADVANTAGE), rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_is_zero_without_an_advantage(name):
    new = OLD + jnp.array([0.5, -0.5, 0.1, -2.0])
    loss = lambda new: LOSSES[name](new, OLD, jnp.zeros(4), HYPER)  # noqa: E731
    assert loss(new).shape == (4,) and loss(new).dtype == jnp.float32
    assert not loss(new).any()
    assert not jax.jacrev(loss)(new).any()


@pytest.mark.parametrize("name", LOSSES.names())
@pytest.mark.parametrize("nats", [-80.0, 80.0])
def test_every_loss_is_finite_at_extreme_ratios(name, nats):
    value, grad = jax.value_and_grad(lambda new: LOSSES[name](new, OLD, ADVANTAGE, HYPER).sum())(OLD + nats)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_squared_error_by_hand():
    value, returns = jnp.array([1.0, 2.0, -1.0]), jnp.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(squared_error(value, returns), [0.0, 4.5, 0.5])
    grad = jax.grad(lambda v: squared_error(v, returns).sum())(value)
    np.testing.assert_allclose(grad, [0.0, 3.0, -1.0])
