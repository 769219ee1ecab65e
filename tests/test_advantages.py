"""Advantages by hand, against a plain loop, and contracts over their registry."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.advantages import ADVANTAGES, normalise

STREAM = st.lists(st.tuples(*[st.floats(-5, 5, width=32)] * 2), min_size=1, max_size=6)
PART = st.floats(0, 1, width=32)
WIDTHS = (6, 7, 11)


@pytest.fixture(autouse=True, scope="module")
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


COMPILED = {name: jax.jit(lambda *args, name=name: ADVANTAGES[name](*args)) for name in ADVANTAGES.names()}


def estimate(name, rewards, values, discount, gae_lambda, width=None, tail=0.0):
    """(advantages, returns), the stream padded with `tail` to `width`."""
    count, width = len(rewards), width or len(rewards)
    padded = [jnp.array([*x, *[tail] * (width - count)], jnp.float32) for x in (rewards, values)]
    out = COMPILED[name](*padded, jnp.arange(width) < count, jnp.float32(discount), jnp.float32(gae_lambda))
    return [np.asarray(x) for x in out]


def loop(rewards, values, discount, gae_lambda):
    """The definition: A_t is the (discount * lambda)-weighted sum of all later one-step errors, in float64."""
    count, values = len(rewards), [*values, 0.0]
    errors = [rewards[t] + discount * values[t + 1] - values[t] for t in range(count)]
    advantages = [sum((discount * gae_lambda) ** (later - t) * errors[later] for later in range(t, count))
                  for t in range(count)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=False)]


def test_gae_by_hand():
    # errors: 1 + 0.9 * 1 - 0.5 = 1.4, 0 + 0.9 * 1.5 - 1 = 0.35, 2 - 1.5 = 0.5; each step back weighs 0.45
    advantages, returns = estimate("gae", [1, 0, 2], [0.5, 1, 1.5], 0.9, 0.5)
    np.testing.assert_allclose(advantages, [1.65875, 0.575, 0.5], rtol=1e-6)
    np.testing.assert_allclose(returns, [2.15875, 1.575, 2.0], rtol=1e-6)


def test_monte_carlo_by_hand():
    # returns-to-go: 1 + 0.9 * 1.8, 0.9 * 2, 2
    advantages, returns = estimate("monte_carlo", [1, 0, 2], [0.5, 1, 1.5], 0.9, 0.5)
    np.testing.assert_allclose(returns, [2.62, 1.8, 2.0], rtol=1e-6)
    np.testing.assert_allclose(advantages, [2.12, 0.8, 0.5], rtol=1e-6)


@given(STREAM, PART, PART)
def test_gae_is_the_plain_loops(stream, discount, gae_lambda):
    rewards, values = zip(*stream, strict=True)
    advantages, returns = estimate("gae", rewards, values, discount, gae_lambda, width=6)
    expected, expected_returns = loop(rewards, values, discount, gae_lambda)
    np.testing.assert_allclose(advantages[:len(stream)], expected, atol=1e-4)
    np.testing.assert_allclose(returns[:len(stream)], expected_returns, atol=1e-4)


@given(STREAM, PART)
def test_gae_at_lambda_one_is_monte_carlo(stream, discount):
    rewards, values = zip(*stream, strict=True)
    gae = estimate("gae", rewards, values, discount, 1.0, width=6)
    monte_carlo = estimate("monte_carlo", rewards, values, discount, 0.3, width=6)
    np.testing.assert_allclose(gae, monte_carlo, atol=1e-4)


def test_gae_at_lambda_zero_is_the_one_step_error():
    advantages, _ = estimate("gae", [1, 0, 2], [0.5, 1, 1.5], 0.9, 0.0)
    np.testing.assert_allclose(advantages, [1.4, 0.35, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES.names())
@given(stream=STREAM, discount=PART, gae_lambda=PART, tail=st.sampled_from([0.0, 3.0, -1e6, float("nan")]))
def test_what_stands_behind_the_stream_changes_nothing(name, stream, discount, gae_lambda, tail):
    rewards, values = zip(*stream, strict=True)
    expected = estimate(name, rewards, values, discount, gae_lambda, width=WIDTHS[0])
    for width in WIDTHS[1:]:
        padded = estimate(name, rewards, values, discount, gae_lambda, width, tail)
        for ours, theirs in zip(padded, expected, strict=True):
            np.testing.assert_array_equal(ours[:len(stream)], theirs[:len(stream)])
            assert not ours[len(stream):].any()


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_a_reward_of_the_last_token_reaches_the_first(name):
    advantages, _ = estimate(name, [0, 0, 0, 1], [0, 0, 0, 0], 1.0, 0.95)
    assert (advantages > 0.8).all()


def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([5, 0, 3, 1])
    return (3 + 2 * rng.standard_normal((4, 5))).astype(np.float32), np.arange(5) < lengths[:, None]


def test_normalised_advantages_have_mean_zero_and_deviation_one_over_the_mask():
    x, mask = batch()
    out, factor = normalise(jnp.array(x), jnp.array(mask))
    np.testing.assert_allclose(np.asarray(out)[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(out)[mask].std(), 1, rtol=1e-5)
    np.testing.assert_allclose(factor, 1 / x[mask].std(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out)[mask], (x[mask] - x[mask].mean()) * factor, atol=1e-5)
    assert not np.asarray(out)[~mask].any()


@pytest.mark.parametrize("tail", [1e3, float("nan")])
def test_normalisation_looks_at_the_mask_alone(tail):
    x, mask = batch()
    expected = normalise(jnp.array(x), jnp.array(mask))
    wide = np.pad(np.where(mask, x, tail), ((0, 2), (0, 3)), constant_values=tail)
    out, factor = normalise(jnp.array(wide), jnp.array(np.pad(mask, ((0, 2), (0, 3)))))
    np.testing.assert_allclose(out[:4, :5], expected[0], atol=1e-6)
    np.testing.assert_allclose(factor, expected[1], rtol=1e-6)


def test_equal_advantages_and_an_empty_batch_are_normalised_to_zero():
    for mask in (jnp.ones((2, 3), bool), jnp.zeros((2, 3), bool)):
        out, factor = normalise(jnp.full((2, 3), 1.5), mask)
        assert not out.any() and jnp.isfinite(factor)
