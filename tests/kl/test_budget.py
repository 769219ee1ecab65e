"""The budget's ledger: what remains at each token, by hand and in float64."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_reg.kl.budget import Caps, charge, enter, left, open_ledger, ramped


def caps(episode=np.inf, turn=np.inf, token=np.inf):
    return Caps(*map(jnp.float32, (episode, turn, token)))


def limits(given, costs, turns, carry):
    """What the ledger allows at each token of one stream, when the tokens cost `costs`."""
    ledger, allowed = open_ledger(()), []
    for cost, turn in zip(costs, turns, strict=True):
        ledger = enter(ledger, jnp.int32(turn))
        allowed.append(float(left(given, ledger, carry)))
        ledger = charge(ledger, jnp.float32(cost), jnp.array(True))
    return allowed


TURNS = [0, 0, 2, 2, 2, 6]


@pytest.mark.parametrize("given, carry, expected", [
    (caps(episode=2), False, [2, 1.5, 1, 0.75, 0.5, 0.25]),
    (caps(episode=0), False, [0, 0, 0, 0, 0, 0]),
    (caps(turn=1), False, [1, 0.5, 1, 0.75, 0.5, 1]),
    (caps(turn=1), True, [1, 0.5, 2 - 1, 2 - 1.25, 2 - 1.5, 3 - 1.75]),
    (caps(token=0.5), False, [0.5] * 6),
    (caps(token=0.5), True, [0.5, 0.5, 0.5, 0.75, 1.0, 1.25]),
    (caps(episode=1.6, turn=1, token=0.6), False, [0.6, 0.5, 0.6, 0.35, 0.1, 0.0])])
def test_what_is_left_by_hand(given, carry, expected):
    costs = [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    np.testing.assert_allclose(limits(given, costs, TURNS, carry), expected, atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.floats(0, 3), st.floats(0, 2), st.floats(0, 1),
       st.booleans())
@settings(max_examples=30)
def test_whoever_stays_within_what_is_left_stays_within_every_cap(parts, episode, turn, token, carry):
    """Tokens that cost any part of what is left: sums by episode and turn, recomputed in float64."""
    given, ledger, costs = caps(episode, turn, token), open_ledger(()), []
    for part, number in zip(parts, TURNS, strict=True):
        ledger = enter(ledger, jnp.int32(number))
        costs.append(np.float32(part) * float(left(given, ledger, carry)))
        ledger = charge(ledger, jnp.float32(costs[-1]), jnp.array(True))
    costs, turns = np.array(costs), np.array(TURNS)
    slack = lambda cap: cap * (1 + 1e-5) + 1e-6  # noqa: E731
    assert costs.sum() <= slack(episode)
    for count, number in enumerate(dict.fromkeys(TURNS), 1):
        assert costs[turns <= number].sum() <= slack(turn * count)
        assert carry or costs[turns == number].sum() <= slack(turn)
    assert carry or (costs <= slack(token)).all()


def test_others_tokens_are_not_charged():
    ledger = charge(open_ledger((2,)), jnp.array([3.0, 3.0]), jnp.array([True, False]))
    np.testing.assert_array_equal(ledger.spent, [3.0, 0.0])
    np.testing.assert_array_equal(ledger.tokens, [1.0, 0.0])


def test_thousands_of_charges_below_float32s_resolution_count():
    """20,000 tokens of 4e-7 nats, after 19.9 of 20: each is less than half a unit in the last place of 19.9."""
    ledger = charge(open_ledger(()), jnp.float32(19.9), jnp.array(True))
    ledger = jax.jit(lambda first: jax.lax.fori_loop(
        0, 20_000, lambda _, ledger: charge(ledger, jnp.float32(4e-7), True), first))(ledger)
    for carry, limit in ((False, caps(episode=20)), (False, caps(turn=20)), (True, caps(turn=20))):
        rest = left(limit, ledger._replace(turns=jnp.float32(1)), carry)
        np.testing.assert_allclose(rest, 20 - np.float64(np.float32(19.9)) - 20_000 * 4e-7, rtol=1e-4)


def test_budgets_grow_linearly_in_the_first_part_of_a_run():
    """In the first half of ten iterations: a fifth of the limits at the first, all of them from the fifth on."""
    caps = Caps(jnp.float32(10.0), jnp.float32(jnp.inf), jnp.float32(0.0))
    for iteration, part in ((0, 0.2), (1, 0.4), (4, 1.0), (9, 1.0)):
        now = ramped(caps, jnp.float32(0.5), jnp.int32(iteration), 10)
        np.testing.assert_allclose(now, (10.0 * part, np.inf, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(ramped(caps, jnp.float32(0.0), jnp.int32(0), 10), caps)
