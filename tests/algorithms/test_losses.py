"""Policy-gradient losses by hand, and contracts over their registry."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.algorithms import LOSSES
from kl_reg.config import default, split

HYPER = split(default())[1]._replace(clip_high=jnp.float32(0.3), truncation=jnp.float32(2), dual_clip=jnp.float32(3))
OLD = jnp.log(jnp.array([0.1, 0.2, 0.5, 0.9]))
ADVANTAGE = jnp.array([2.0, -2.0, 0.5, 0.0])
ALL = jnp.ones(4, bool)
MIXES_TOKENS = {"gspo"}                        # a token's loss depends on the other tokens of its episode
WEIGHT = {name: lambda a: a for name in LOSSES.names()} | {"awr": lambda a: np.minimum(np.exp(a), 20)}
"""What the gradient of log pi is multiplied with on-policy."""


@pytest.fixture(autouse=True, scope="module")
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@functools.cache
def compiled(name):
    """(loss, its Jacobian in the new log-probabilities)."""
    both = lambda *args: (LOSSES[name](*args), jax.jacrev(LOSSES[name])(*args))  # noqa: E731
    return jax.jit(both)


def by_hand(name, ratio, advantage, **settings):
    """Loss and Jacobian of one stream whose old probabilities are 0.3, without the padding that it gets."""
    count, zeros = len(ratio), np.zeros(4 - len(ratio))
    old = np.full(count, np.log(0.3))
    streams = (jnp.array([*x, *zeros], jnp.float32) for x in (old + np.log(ratio), old, advantage))
    hyper = HYPER._replace(**{key: jnp.float32(value) for key, value in settings.items()})
    value, jacobian = compiled(name)(*streams, jnp.array(np.arange(4) < count), hyper)
    return value[:count], jacobian[:count, :count]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), [
    (1.5, 2.0, -2.6, 0.0),          # above, and asked to rise: -1.3 * 2
    (1.25, 2.0, -2.5, -2.5),        # the room above is wider than below
    (0.5, 2.0, -1.0, -1.0),         # below, and asked to rise: -0.5 * 2, whose derivative in log pi is itself
    (1.5, -2.0, 3.0, 3.0),          # above, and asked to fall
    (0.5, -2.0, 1.6, 0.0),          # below, and asked to fall: 0.8 * 2
    (1.1, 2.0, -2.2, -2.2), (0.9, 2.0, -1.8, -1.8), (1.1, -2.0, 2.2, 2.2), (0.9, -2.0, 1.8, 1.8)])
@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip"])
def test_the_clips_by_hand(name, ratio, advantage, loss, gradient):
    value, jacobian = by_hand(name, [ratio], [advantage])
    np.testing.assert_allclose(value, [loss], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[gradient]], rtol=1e-5)


@pytest.mark.parametrize(("name", "loss", "gradient"), [("ppo_clip", 8.0, 8.0), ("dual_clip", 6.0, 0.0)])
def test_only_the_dual_clip_bounds_a_bad_token(name, loss, gradient):
    value, jacobian = by_hand(name, [4.0], [-2.0])          # 4 * 2, or at most 3 * 2
    np.testing.assert_allclose(value, [loss], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[gradient]], rtol=1e-5)


@pytest.mark.parametrize(("name", "ratio", "weight"), [
    ("reinforce", 0.5, 0.5), ("reinforce", 1.5, 1.5), ("reinforce", 5.0, 2.0),       # at most 2
    ("cispo", 0.5, 0.8), ("cispo", 1.1, 1.1), ("cispo", 5.0, 1.3)])                  # from 1 - 0.2 to 1 + 0.3
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_weighted_log_likelihoods_by_hand(name, ratio, weight, advantage):
    value, jacobian = by_hand(name, [ratio], [advantage])
    np.testing.assert_allclose(value, [-weight * advantage * np.log(0.3 * ratio)], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[-weight * advantage]], rtol=1e-5)


@pytest.mark.parametrize(("advantage", "weight"), [(0.0, 1.0), (1.0, np.exp(0.5)), (-3.0, np.exp(-1.5)), (9.0, 20.0),
                                                   (500.0, 20.0)])
def test_awr_by_hand(advantage, weight):
    value, jacobian = by_hand("awr", [1.5], [advantage], temperature=2.0)
    np.testing.assert_allclose(value, [-weight * np.log(0.45)], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[-weight]], rtol=1e-5)


def test_gspo_by_hand():
    # the geometric mean of 2 and 0.5 is 1: neither token's own ratio is clipped, and each moves the mean by half
    value, jacobian = by_hand("gspo", [2.0, 0.5], [3.0, 3.0])
    np.testing.assert_allclose(value, [-3.0, -3.0], rtol=1e-5)
    np.testing.assert_allclose(jacobian, [[-1.5, -1.5], [-1.5, -1.5]], rtol=1e-5)
    value, jacobian = by_hand("gspo", [2.0, 2.0], [3.0, 3.0])
    np.testing.assert_allclose(value, [-3.9, -3.9], rtol=1e-5)
    assert not jacobian.any()


@pytest.mark.parametrize("name", LOSSES.names())
def test_the_gradient_on_policy(name):
    _, jacobian = compiled(name)(OLD, OLD, ADVANTAGE, ALL, HYPER)
    weight = WEIGHT[name](np.asarray(ADVANTAGE))
    expected = np.tile(weight[:, None] / 4, 4) if name in MIXES_TOKENS else np.diag(weight)
    np.testing.assert_allclose(jacobian, -expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"awr"}))
def test_a_loss_is_zero_without_an_advantage(name):
    value, jacobian = compiled(name)(OLD + jnp.array([0.5, -0.5, 0.1, -2.0]), OLD, jnp.zeros(4), ALL, HYPER)
    assert not value.any() and not jacobian.any()


LOG_RATIO = st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4)


@pytest.mark.parametrize("name", LOSSES.names())
@given(moved=LOG_RATIO, advantage=st.floats(-5, 5, width=32), truncation=st.sampled_from([2.0, float("inf")]))
def test_no_loss_pushes_against_the_advantage_or_overflows(name, moved, advantage, truncation):
    hyper = HYPER._replace(truncation=jnp.float32(truncation))
    value, jacobian = compiled(name)(OLD + jnp.array(moved, jnp.float32), OLD, jnp.full(4, advantage), ALL, hyper)
    assert value.shape == (4,) and value.dtype == jnp.float32
    assert np.isfinite(value).all() and np.isfinite(jacobian).all()
    assert (np.asarray(jacobian) * WEIGHT[name](np.float32(advantage)) <= 0).all()
    if name not in MIXES_TOKENS:
        assert not np.asarray(jacobian)[~np.eye(4, dtype=bool)].any()


@pytest.mark.parametrize("name", LOSSES.names())
def test_what_stands_behind_the_stream_changes_nothing(name):
    new, mask = OLD + jnp.array([0.5, -0.5, 0.1, -2.0]), jnp.arange(4) < 3
    old, new, advantage = (jnp.where(mask, x, 0.0) for x in (OLD, new, ADVANTAGE))
    value, jacobian = compiled(name)(new, old, advantage, mask, HYPER)
    alone, alone_jacobian = compiled(name)(new[:3], old[:3], advantage[:3], jnp.ones(3, bool), HYPER)
    np.testing.assert_allclose(value[:3], alone, rtol=1e-6)
    np.testing.assert_allclose(jacobian[:3, :3], alone_jacobian, rtol=1e-6)
    assert not jacobian[:3, 3].any() and np.isfinite(value).all() and np.isfinite(jacobian).all()
