"""Advantages by hand, against a plain loop, and contracts over their registry."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.algorithms.advantages import ADVANTAGES, CEILING, GROUPS, normalise

NUMBER = st.floats(-5, 5, width=32)
STREAM = st.lists(st.tuples(NUMBER, NUMBER), max_size=6)                # (reward, value) of each token
GROUP = st.tuples(STREAM, STREAM, STREAM)
PART = st.floats(0, 1, width=32)
COMPARED = ("group", "group_batch", "group_mean", "leave_one_out")      # with the other streams of the group
ALONE = sorted(set(ADVANTAGES.names()) - set(COMPARED))


@pytest.fixture(autouse=True, scope="module")
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


COMPILED = {name: jax.jit(jax.vmap(ADVANTAGES[name], (0, 0, 0, None, None, 0), axis_name=GROUPS))
            for name in ADVANTAGES.names()}


def estimate(name, streams, discount=1.0, gae_lambda=1.0, width=6, tail=0.0, judged=None):
    """(advantages, returns, scale) of a group, which is the whole batch; see `estimates`."""
    return [x[0] for x in estimates(name, [streams], discount, gae_lambda, width, tail, judged and [judged])]


def estimates(name, groups, discount=1.0, gae_lambda=1.0, width=6, tail=0.0, judged=None):
    """(advantages, returns, scale) of groups; streams of (reward, value), padded with `tail` to `width`; where one is
    not `judged` (None: all are), its mask is empty."""
    judged = [[True] * len(streams) for streams in groups] if judged is None else judged
    rows = [arrange(*group, width, tail) for group in zip(groups, judged, strict=True)]
    rewards, values, mask, judged = (jnp.stack(x) for x in zip(*rows, strict=True))
    out = COMPILED[name](rewards, values, mask, jnp.float32(discount), jnp.float32(gae_lambda), judged)
    return [np.asarray(x) for x in out]


def arrange(streams, judged, width, tail):
    """(rewards, values, mask, judged) of a group."""
    padded = np.full((2, len(streams), width), tail, np.float32)
    for row, stream in enumerate(streams):
        padded[:, row, :len(stream)] = np.array(stream, np.float32).reshape(-1, 2).T
    mask = np.arange(width) < np.array([len(stream) for stream in streams])[:, None]
    mask &= np.array(judged)[:, None]
    return jnp.array(padded[0]), jnp.array(padded[1]), jnp.array(mask), jnp.array(judged)


def rewarded(*rewards):
    """A stream of values 0."""
    return [(reward, 0.0) for reward in rewards]


def loop(stream, discount, gae_lambda):
    """The definition: A_t is the (discount * lambda)-weighted sum of all later one-step errors, in float64."""
    count, values = len(stream), [value for _, value in stream] + [0.0]
    errors = [reward + discount * values[t + 1] - values[t] for t, (reward, _) in enumerate(stream)]
    advantages = [sum((discount * gae_lambda) ** (later - t) * errors[later] for later in range(t, count))
                  for t in range(count)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=False)]


THREE = [(1, 0.5), (0, 1), (2, 1.5)]


def test_gae_by_hand():
    # errors: 1 + 0.9 * 1 - 0.5 = 1.4, 0 + 0.9 * 1.5 - 1 = 0.35, 2 - 1.5 = 0.5; each step back weighs 0.45
    advantages, returns, scale = estimate("gae", [THREE, THREE[2:]], 0.9, 0.5, width=3)
    np.testing.assert_allclose(advantages, [[1.65875, 0.575, 0.5], [0.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[2.15875, 1.575, 2.0], [2.0, 0, 0]], rtol=1e-6)
    assert scale == 1


def test_monte_carlo_by_hand():
    # returns-to-go: 1 + 0.9 * 1.8, 0.9 * 2, 2
    advantages, returns, scale = estimate("monte_carlo", [THREE, THREE[2:]], 0.9, 0.5, width=3)
    np.testing.assert_allclose(returns, [[2.62, 1.8, 2.0], [2.0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(advantages, [[2.12, 0.8, 0.5], [0.5, 0, 0]], rtol=1e-6)
    assert scale == 1


# returns of whole streams, at a discount of 0.5: 1 + 0.5 * 2, 5, 0 + 0.5 * 0 + 0.25 * 8; their mean is 3
RETURNS_2_5_2 = [[(1, 9.0), (2, -9.0)], [(5, 9.0)], [(0, 9.0), (0, 9.0), (8, 9.0)]]


@pytest.mark.parametrize(("name", "each", "scale"), [
    ("leave_one_out", [2 - 3.5, 5 - 2, 2 - 3.5], 1), ("group_mean", [-1, 2, -1], 2 / 3),
    ("group", np.array([-1, 2, -1]) / (3**0.5 + 1e-4), 2 / 3 / (3**0.5 + 1e-4)),       # (1 + 4 + 1) / (3 - 1)
    ("group_batch", np.array([-1, 2, -1]) / (3**0.5 + 1e-4), 2 / 3 / (3**0.5 + 1e-4))])
def test_a_group_by_hand(name, each, scale):
    advantages, returns, factor = estimate(name, RETURNS_2_5_2, 0.5, 0.3, width=3)
    mask = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    np.testing.assert_allclose(advantages, np.array(each)[:, None] * mask, rtol=1e-6)
    np.testing.assert_allclose(returns, [[2, 2, 0], [5, 0, 0], [2, 4, 8]], rtol=1e-6)
    np.testing.assert_allclose(factor, scale, rtol=1e-6)


FACTOR = 1 / (2 + 1e-4)         # the deviation of 1, 3 and 5 is 2, over n - 1
JUDGED = {"gae": ([1, 3, 0, 5], 1), "monte_carlo": ([1, 3, 0, 5], 1), "group_mean": ([-2, 0, 0, 2], 2 / 3),
          "leave_one_out": ([1 - 4, 0, 0, 5 - 2], 1), "group": (FACTOR * np.array([-2, 0, 0, 2]), FACTOR * 2 / 3),
          "group_batch": (FACTOR * np.array([-2, 0, 0, 2]), FACTOR * 2 / 3)}
"""Advantages and scale of returns 1, 3, one that could not be judged, and 5; one token each, all values 0."""


@pytest.mark.parametrize("name", ADVANTAGES.names())
@pytest.mark.parametrize("unjudged", [0.0, 1e6, float("nan")])
def test_an_episode_that_was_not_judged_is_in_no_baseline(name, unjudged):
    streams, (each, scale) = [rewarded(1), rewarded(3), rewarded(unjudged), rewarded(5)], JUDGED[name]
    advantages, returns, factor = estimate(name, streams, judged=[True, True, False, True])
    np.testing.assert_allclose(advantages[:, 0], each, rtol=1e-6)
    np.testing.assert_allclose(returns[[0, 1, 3], 0], [1, 3, 5], rtol=1e-6)
    np.testing.assert_allclose(factor, scale, rtol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES.names())
@given(streams=GROUP, judged=st.tuples(*[st.booleans()] * 3), discount=PART)
def test_a_group_is_as_without_the_episodes_that_were_not_judged(name, streams, judged, discount):
    advantages, returns, scale = estimate(name, streams, discount, 0.5, judged=judged)
    here = np.array(judged)
    assert np.isfinite(scale) and not advantages[~here].any()
    if here.any():
        expected = estimate(name, [stream for stream, known in zip(streams, judged, strict=True) if known], discount,
                            0.5)
        for ours, theirs in zip((advantages[here], returns[here], scale), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("name", COMPARED)
def test_a_stream_without_a_token_counts_with_its_return_of_zero(name):
    streams = [rewarded(1, 2), [], rewarded(6)]
    advantages, returns, _ = estimate(name, streams)
    expected, _, _ = estimate(name, [rewarded(1, 2), rewarded(0), rewarded(6)])
    np.testing.assert_array_equal(advantages[[0, 2]], expected[[0, 2]])
    assert not advantages[1].any() and not returns[1].any()


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("streams", [[rewarded(1, 2)], [rewarded(0.1)] * 7, [[], [], []], [rewarded(1e4, 0.1)] * 3])
def test_where_nothing_differs_there_is_no_advantage_and_no_deviation_in_the_scale(name, streams):
    advantages, returns, scale = estimate(name, streams)
    np.testing.assert_allclose(advantages, 0, atol=1e-6 * returns.max())
    np.testing.assert_allclose(scale, 1 if name == "leave_one_out" else 1 - 1 / len(streams), rtol=1e-6)


def test_the_batchs_deviation_is_one_factor_for_all_groups():
    """Returns 0, 2 and 10, 14 of the batch 0, 2, 10, 14: mean 6.5, squares 42.25 + 20.25 + 12.25 + 56.25, over 3."""
    groups = [[rewarded(0), rewarded(1, 1)], [rewarded(10), rewarded(14)]]
    advantages, _, scale = estimates("group_batch", groups)
    factor = 1 / ((131 / 3) ** 0.5 + 1e-4)
    np.testing.assert_allclose(advantages[:, :, 0], np.array([[-1, 1], [-2, 2]]) * factor, rtol=1e-6)
    np.testing.assert_allclose(scale, factor / 2, rtol=1e-6)


@pytest.mark.parametrize(("name", "loud", "quiet"), [
    ("group", 1 / (2**0.5 + 1e-4), 100),                 # 1 / (1e-5 / sqrt 2 + 1e-4) would be 9,340
    ("group_batch", 1 / (1**0.5 + 1e-4), 1 / (1**0.5 + 1e-4)),                      # (2.25 + 3 * 0.25) / 3
    ("group_mean", 1, 1), ("leave_one_out", 2, 2)])
def test_a_group_of_next_to_no_spread_is_scaled_by_no_more_than_the_ceiling(name, loud, quiet):
    """Returns 0, 2 beside 0, 1e-5: the factor of the second's advantages, and of a KL in its loss."""
    advantages, _, scale = estimates(name, [[rewarded(0), rewarded(2)], [rewarded(0), rewarded(1e-5)]])
    np.testing.assert_allclose(advantages[:, 1, 0], [loud, quiet * 5e-6], rtol=1e-4)
    np.testing.assert_allclose(scale, np.array([loud, quiet]) / 2, rtol=1e-4)
    assert scale.max() <= CEILING


@given(GROUP, PART, PART)
def test_gae_is_the_plain_loops(streams, discount, gae_lambda):
    advantages, returns, _ = estimate("gae", streams, discount, gae_lambda)
    for row, stream in enumerate(streams):
        expected, expected_returns = loop(stream, discount, gae_lambda)
        np.testing.assert_allclose(advantages[row, :len(stream)], expected, atol=1e-4)
        np.testing.assert_allclose(returns[row, :len(stream)], expected_returns, atol=1e-4)


@given(GROUP, PART)
def test_gae_at_lambda_one_is_monte_carlo(streams, discount):
    gae = estimate("gae", streams, discount, 1.0)
    monte_carlo = estimate("monte_carlo", streams, discount, 0.3)
    for ours, theirs in zip(gae, monte_carlo, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@given(GROUP, PART)
def test_leave_one_out_is_the_plain_difference(streams, discount):
    advantages, _, _ = estimate("leave_one_out", streams, discount)
    whole = [sum(discount**t * reward for t, (reward, _) in enumerate(stream)) for stream in streams]
    for row, stream in enumerate(streams):
        others = (sum(whole) - whole[row]) / 2
        np.testing.assert_allclose(advantages[row, :len(stream)], whole[row] - others, atol=1e-4)


@given(GROUP, PART)
def test_a_group_is_scaled_and_its_mean_is_not(streams, discount):
    mean, (scaled, _, scale) = estimate("group_mean", streams, discount)[0], estimate("group", streams, discount)
    np.testing.assert_allclose(scaled, 1.5 * scale * mean, rtol=1e-4, atol=1e-5)      # (g - 1) / g apart
    whole = np.array([sum(discount**t * reward for t, (reward, _) in enumerate(stream)) for stream in streams])
    if whole.std() > 1e-2:
        np.testing.assert_allclose(1.5 * scale, 1 / (whole.std(ddof=1) + 1e-4), rtol=1e-2)


@pytest.mark.parametrize("name", ADVANTAGES.names())
@given(streams=GROUP, discount=PART, gae_lambda=PART, tail=st.sampled_from([0.0, 3.0, -1e6, float("nan")]))
def test_what_stands_behind_a_stream_changes_nothing(name, streams, discount, gae_lambda, tail):
    expected = estimate(name, streams, discount, gae_lambda)
    padded = estimate(name, streams, discount, gae_lambda, 9, tail)
    assert padded[2] == expected[2]
    mask = np.arange(9) < np.array([len(stream) for stream in streams])[:, None]
    for ours, theirs in zip(padded[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(ours[:, :6], theirs)
        assert ours.dtype == np.float32 and not ours[~mask].any()


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_a_reward_of_the_last_token_reaches_the_first_of_its_stream_alone(name):
    advantages, _, _ = estimate(name, [rewarded(0, 0, 0, 1), rewarded(0, 0), rewarded(0, 0, 0)], 1.0, 0.95)
    assert (advantages[0, :4] > 0.6).all()
    assert (advantages[1:] <= 0).all()
    if name in ALONE:
        assert not advantages[1:].any()


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_the_order_of_streams_does_not_matter(name):
    order, forward = [2, 0, 1], estimate(name, RETURNS_2_5_2, 0.9, 0.5)
    turned = estimate(name, [RETURNS_2_5_2[row] for row in order], 0.9, 0.5)
    np.testing.assert_allclose(turned[0], forward[0][order], rtol=1e-5)
    np.testing.assert_allclose(turned[2], forward[2], rtol=1e-5)


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


def test_advantages_of_next_to_no_spread_are_normalised_by_no_more_than_the_ceiling():
    x = jnp.array([[0.3, 0.3 + 1e-6]])
    out, factor = normalise(x, jnp.ones((1, 2), bool))
    assert factor == CEILING
    np.testing.assert_allclose(out, (x - x.mean()) * CEILING, rtol=1e-6)


def test_equal_advantages_and_an_empty_batch_are_normalised_to_zero():
    for mask in (jnp.ones((2, 3), bool), jnp.zeros((2, 3), bool)):
        out, factor = normalise(jnp.full((2, 3), 1.5), mask)
        assert not out.any() and jnp.isfinite(factor)
