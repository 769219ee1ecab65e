"""The oracles: scipy and numpy in float64, on the float32 log-probabilities that the code gets; identities; by hand."""
from __future__ import annotations

from functools import partial

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import kl_div, log_softmax, logsumexp

from kl_reg.kl.divergences import DIVERGENCES, renyi

NAMES = DIVERGENCES.names()
SYMMETRIC = ("jensen_shannon", "total_variation", "renyi_half")
ORDERS = (0.1, 0.5, 0.999, 1.0, 1.0001, 1.7, 2.0, 10.0, np.inf)
pairs = arrays.arrays(np.float32, (2, 9), elements=st.floats(-40, 40, width=32)).map(
    lambda logits: np.float32(log_softmax(np.float64(logits), axis=1)))
every = jax.jit(lambda p, q: {name: DIVERGENCES[name](p, q) for name in NAMES})
renyis = jax.jit(lambda p, q: {order: renyi(p, q, order) for order in ORDERS})


def wide_renyi(log_p, log_q, order):
    """In float64, normalised there, from the definition and its two limits."""
    log_p, log_q = log_softmax(np.float64(log_p)), log_softmax(np.float64(log_q))
    if order == 1:
        return kl_div(np.exp(log_p), np.exp(log_q)).sum()
    if order == np.inf:
        return (log_p - log_q).max()
    return logsumexp(order * log_p + (1 - order) * log_q) / (order - 1)


def wide(log_p, log_q):
    """All of them in float64, normalised there."""
    p, q = np.exp(log_softmax(np.float64(log_p))), np.exp(log_softmax(np.float64(log_q)))
    return {"kl": kl_div(p, q).sum(), "forward_kl": kl_div(q, p).sum(), "jensen_shannon": jensenshannon(p, q)**2,
            "total_variation": 0.5 * np.abs(p - q).sum(), "renyi_half": -2 * np.log(np.sqrt(p * q).sum()),
            "renyi_2": np.log((p**2 / q).sum())}


def normal(rng, vocab, scale):
    return np.float32(log_softmax(rng.normal(0, scale, vocab)))


def test_the_oracle_knows_every_name():
    assert set(wide(np.log([0.5, 0.5]), np.log([0.5, 0.5]))) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_are_a_minimum(name):
    """The derivative in the logits is 0 there."""
    log_p = jnp.asarray(normal(np.random.default_rng(0), 7, 2.0))
    by_logits = jax.grad(lambda logits: DIVERGENCES[name](jax.nn.log_softmax(logits), log_p))(log_p)
    np.testing.assert_allclose(by_logits, 0, atol=1e-6)


@given(pairs)
def test_values_are_those_of_float64(pair):
    got, expected = every(*pair), wide(*pair)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for order, value in renyis(*pair).items():
        np.testing.assert_allclose(value, wide_renyi(*pair, order), rtol=2e-5, atol=1e-6, err_msg=str(order))


@given(pairs)
def test_none_is_negative_and_all_are_zero_at_equality(pair):
    assert all(value >= 0 for value in every(*pair).values())
    assert all(value >= 0 for value in renyis(*pair).values())
    assert all(value == 0 for value in every(pair[0], pair[0]).values())
    assert all(value == 0 for value in renyis(pair[0], pair[0]).values())


@given(pairs)
def test_exchanging_p_and_q(pair):
    there, back = every(*pair), every(*pair[::-1])
    for name in SYMMETRIC:
        np.testing.assert_allclose(there[name], back[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert there["kl"] == back["forward_kl"] and there["forward_kl"] == back["kl"]


def test_the_others_are_not_symmetric():
    p, q = np.float32(np.log([0.5, 0.5])), np.float32(np.log([0.9, 0.1]))
    there, back = every(p, q), every(q, p)
    assert {name for name in NAMES if abs(there[name] - back[name]) > 0.05} == set(NAMES) - set(SYMMETRIC)


@given(pairs)
def test_inequalities_between_them(pair):
    """Pinsker; the bounds of Jensen-Shannon (Lin, 1991: at most TV ln 2); of TV; Renyi in the order."""
    got = every(*pair)
    assert got["total_variation"]**2 <= got["kl"] / 2 * (1 + 1e-5) + 1e-6
    assert got["total_variation"] <= 1 + 1e-6
    assert got["jensen_shannon"] <= np.log(2) * got["total_variation"] * (1 + 1e-5) + 1e-6
    grown = list(renyis(*pair).values())
    assert all(low <= high * (1 + 1e-5) + 1e-5 for low, high in zip(grown, grown[1:], strict=False))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1])
def test_small_values_keep_their_digits(size):
    """Down to 1e-8 nats, to second order: half the Fisher information, times 1/4 for Jensen-Shannon, times the order.

    The perturbed distribution is normalised in float64, so that both add up to one but for rounding.
    """
    rng = np.random.default_rng(0)
    log_q = log_softmax(rng.normal(0, 2, 200))
    log_p = log_softmax(log_q + rng.normal(0, size, 200))
    got, expected = every(np.float32(log_p), np.float32(log_q)), wide(log_p, log_q)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-2, err_msg=name)
    for order in (0.1, 0.999, 1.0001, 10.0):
        plain = renyis(np.float32(log_p), np.float32(log_q))[order]
        np.testing.assert_allclose(plain, wide_renyi(log_p, log_q, order), rtol=1e-2, err_msg=str(order))
        np.testing.assert_allclose(plain, order * got["kl"], rtol=max(5 * size * order, 1e-2))


@pytest.mark.parametrize("ratio", [0.1999, 0.2001, 0.2999, 0.3001, 0.1499, 0.1501, 0.0299, 0.0301])
def test_branches_of_the_series_meet(ratio):
    for p in (0.4 * np.exp(ratio), 0.4 * np.exp(-ratio)):
        pair = np.log([[p, 1 - p], [0.4, 0.6]])
        got, expected = every(*np.float32(pair)), wide(*pair)
        for name in NAMES:
            np.testing.assert_allclose(got[name], expected[name], rtol=3e-5, err_msg=name)
        for order, value in renyis(*np.float32(pair)).items():
            np.testing.assert_allclose(value, wide_renyi(*pair, order), rtol=3e-5, err_msg=str(order))


def test_by_hand():
    """p = (1/2, 1/2), q = (9/10, 1/10), as in a textbook."""
    got = every(np.float32(np.log([0.5, 0.5])), np.float32(np.log([0.9, 0.1])))
    expected = {"kl": 0.5 * np.log(25 / 9), "forward_kl": 0.9 * np.log(1.8) + 0.1 * np.log(0.2),
                "jensen_shannon": 0.25 * np.log(5 / 7 * 5 / 3) + 0.45 * np.log(9 / 7) + 0.05 * np.log(1 / 3),
                "total_variation": 0.4, "renyi_half": -2 * np.log(2 / np.sqrt(5)), "renyi_2": np.log(25 / 9)}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_impossible_tokens():
    with np.errstate(divide="ignore"):
        whole, half, other = (np.float32(np.log(x)) for x in ([0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]))
    got = {name: [float(every(*pair)[name]) for pair in ((half, whole), (whole, half), (whole, other))]
           for name in NAMES}
    one_sided = 0.5 * np.log(1 / 0.75) + 0.25 * (np.log(0.5 / 0.75) + np.log(2))
    assert got == {
        "kl": pytest.approx([np.log(2), np.inf, np.inf]), "forward_kl": pytest.approx([np.inf, np.log(2), np.inf]),
        "jensen_shannon": pytest.approx([one_sided, one_sided, np.log(2)]),
        "total_variation": pytest.approx([0.5, 0.5, 1.0]),
        "renyi_half": pytest.approx([np.log(2), np.log(2), np.inf]),
        "renyi_2": pytest.approx([np.log(2), np.inf, np.inf])}
    assert float(renyis(half, whole)[np.inf]) == pytest.approx(np.log(2))
    assert float(renyis(whole, half)[np.inf]) == np.inf
    assert float(renyis(whole, half)[0.1]) == pytest.approx(np.log(2) * 0.1 / 0.9)


@pytest.mark.parametrize("nats", [60.0, 100.0])
def test_extremes_are_finite_and_right(nats):
    """Log-ratios of +-100 nats, where probabilities underflow in float32."""
    pair = log_softmax(np.array([[nats, 0, 0], [0, nats, 0]]), axis=1)
    got, expected = every(*np.float32(pair)), wide(*pair)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)
    assert expected["renyi_2"] == pytest.approx(nats)
    for order, value in renyis(*np.float32(pair)).items():
        np.testing.assert_allclose(value, wide_renyi(*pair, order), rtol=1e-5, atol=1e-5, err_msg=str(order))


def test_a_very_large_order_is_nearly_the_limit():
    rng = np.random.default_rng(1)
    pair = normal(rng, 20, 2.0), normal(rng, 20, 2.0)
    for order in (1e3, 1e60):
        value = jax.jit(partial(renyi, order=order))(*pair)
        np.testing.assert_allclose(value, wide_renyi(*pair, min(order, 1e9)), rtol=1e-5)


@pytest.mark.parametrize("order", [0.0, -1.0, np.nan])
def test_orders_that_are_none_are_refused(order):
    with pytest.raises(ValueError, match=f"order={order} must be above 0"):
        renyi(jnp.zeros(1), jnp.zeros(1), order)
