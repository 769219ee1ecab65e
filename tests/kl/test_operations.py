"""Operations of the budget: the mixture against float64 and its root's derivative, both in extremes, and where they
agree. The tilt by itself is in test_tilt.py."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax, rel_entr
from test_tilt import VOCAB, extremes, kl_of_logits, language_model_like, problems

from kl_reg.kl.budget import Caps, charge, left, open_ledger
from kl_reg.kl.operations import OPERATIONS, mixed
from kl_reg.kl.spends import SPENDS, sampled_log_ratio
from kl_reg.references.interface import Measure
from kl_reg.sampling.agent_step import choose, settle
from tests.programs import by_hand

apply = {name: jax.jit(OPERATIONS[name]) for name in OPERATIONS.names()}


def moved(name, gap, allowance, log_base):
    """The logits, of a vocabulary that is padded with impossible tokens so that all compile once."""
    pad = (0, VOCAB - len(gap))
    log_base = np.pad(log_base, pad, constant_values=-np.inf)
    return np.asarray(apply[name](log_base, np.pad(gap, pad), np.float32(allowance)).logits)[:len(gap)]


def check(gap, allowance, log_base, tight=True):
    """Feasible, and tight: nothing is left unspent unless the proposal itself is affordable."""
    logits = moved("mixture", gap, allowance, log_base)
    spent = kl_of_logits(logits, log_base)
    assert np.isfinite(logits).all() and spent <= allowance * (1 + 1e-5) + 1e-12
    if tight:
        whole = kl_of_logits(np.float64(log_base) + np.float64(gap), log_base)
        assert spent >= 0.999 * min(allowance, whole) - 1e-7


@settings(max_examples=300)
@given(problems())
def test_the_mixture_is_feasible_and_tight(problem):
    check(*problem)


@given(problems(), st.integers(0, VOCAB - 1), st.sampled_from([-np.inf, np.inf]))
def test_a_proposal_that_forbids_or_insists_is_feasible(problem, token, infinite):
    gap, allowance, log_base = problem
    gap[token % len(gap)] = infinite
    check(gap, allowance, log_base, tight=False)


@jax.jit
def episodes_of(gaps, log_bases, budget_nats, part):
    """(logits, charged) of an episode's tokens under each operation, as sampler and scorer compute them."""
    def token(program, ledger, given):
        gap, log_base = given
        remaining = left(Caps(budget_nats, jnp.inf, jnp.inf), ledger, False)
        chosen = choose(program, Measure(log_base, gap, jnp.zeros(()), None), None, remaining, part, jnp.zeros(()),
                        jnp.int32(0))
        _, cost = settle(program, chosen, jnp.int32(0))
        return charge(ledger, cost, jnp.array(True)), (chosen.logits, cost)

    programs = [by_hand(constrained=True, operation=OPERATIONS[name]) for name in OPERATIONS.names()]
    return [jax.lax.scan(lambda ledger, given, own=own: token(own, ledger, given), open_ledger(()),
                         (gaps, log_bases))[1] for own in programs]


@settings(max_examples=300)
@given(extremes(), st.floats(-7, 2), st.sampled_from([1.0, 0.5, 0.05]))
def test_no_path_exceeds_a_hard_budget_under_either_operation(problem, magnitude, part):
    gaps, log_bases = problem
    whole = np.float32(10.0**magnitude)
    for logits, charged in episodes_of(gaps, log_bases, whole, np.float32(part)):
        spent = np.array([kl_of_logits(*row) for row in zip(np.asarray(logits), log_bases, strict=True)])
        assert spent.sum() <= whole * (1 + 1e-5) and spent[0] <= part * whole * (1 + 1e-5)
        np.testing.assert_array_less(spent, np.asarray(charged) * (1 + 1e-5) + 1e-12)


def mixture_of(gap, allowance, log_base):
    """Its log-probabilities, float64."""
    proposal, base = np.exp(log_softmax(log_base + gap)), np.exp(log_base)
    at = lambda alpha: alpha * proposal + (1 - alpha) * base  # noqa: E731
    cost = lambda alpha: rel_entr(at(alpha), base).sum() - allowance  # noqa: E731
    return np.log(at(1.0 if cost(1.0) <= 0 else brentq(cost, 0, 1, xtol=1e-15, rtol=1e-14)))


@pytest.mark.parametrize("allowance", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_derivatives_are_those_of_the_root(allowance, seed):
    gap, log_base = language_model_like(seed, 8, 3)
    wide, base = np.float64(gap), log_softmax(np.float64(log_base))
    weights = np.random.default_rng(seed).normal(size=8)
    expected = mixture_of(wide, allowance, base)
    assert kl_of_logits(log_softmax(base + wide), base) > 1.1 * allowance
    gap, log_base = jnp.asarray(gap), jnp.asarray(log_base)
    got = jax.nn.log_softmax(mixed(log_base, gap, jnp.float32(allowance)).logits)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    objective = lambda gap, nats: (jax.nn.log_softmax(mixed(log_base, gap, nats).logits) * weights).sum()  # noqa: E731
    by_gap, by_allowance = jax.grad(objective, (0, 1))(gap, jnp.float32(allowance))
    there = lambda gap, nats: mixture_of(gap, nats, base) @ weights  # noqa: E731
    eye, tiny = 1e-5 * np.eye(8), 1e-6 * allowance
    slopes = np.array([(there(wide + e, allowance) - there(wide - e, allowance)) / 2e-5 for e in eye])
    np.testing.assert_allclose(by_gap, slopes, rtol=2e-3, atol=2e-3 * np.abs(slopes).max())
    np.testing.assert_allclose(
        by_allowance, (there(wide, allowance + tiny) - there(wide, allowance - tiny)) / (2 * tiny), rtol=2e-3)


@pytest.mark.parametrize("name", OPERATIONS.names())
@pytest.mark.parametrize("allowance", [0.0, 100.0, np.inf])
def test_without_a_limit_that_binds_it_is_the_proposal_and_with_none_left_the_base(name, allowance):
    """Nothing then depends on the allowance; without any, nothing on the proposal either."""
    gap, log_base = map(jnp.asarray, language_model_like(0, 8))
    expected = log_base if allowance == 0 else log_softmax(log_base + gap)
    got = jax.nn.log_softmax(OPERATIONS[name](log_base, gap, jnp.float32(allowance)).logits)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    total = lambda gap, nats: (OPERATIONS[name](log_base, gap, nats).logits * jnp.arange(8.0)).sum()  # noqa: E731
    by_gap, by_allowance = jax.grad(total, (0, 1))(gap, jnp.float32(allowance))
    assert by_allowance == 0 and np.isfinite(by_gap).all() and np.any(by_gap) == (allowance > 0)


@settings(max_examples=50)
@given(problems())
def test_every_policy_within_the_allowance_is_reached_by_both(problem):
    """It is its own proposal, at alpha = 1. So the best policy under a hard budget does not depend on the operation."""
    gap, _, log_base = problem
    allowance = np.float32(kl_of_logits(np.float64(log_base) + np.float64(gap), log_base) * 1.001 + 1e-6)
    expected = np.exp(log_softmax(np.float64(log_base) + np.float64(gap)))
    for name in OPERATIONS.names():
        np.testing.assert_allclose(np.exp(log_softmax(np.float64(moved(name, gap, allowance, log_base)))), expected,
                                   atol=2e-4)


# The ledger of the paper's authors, which is charged the log-ratio of what was drawn

PATHS = np.array(list(itertools.product(range(2), repeat=8)))


@pytest.mark.parametrize("name", OPERATIONS.names())
@pytest.mark.parametrize("nats, floor, expected", [(0.1, 0.0, 0.293), (0.5, 0.0, 0.645), (0.1, 1e-6, 0.435),
                                                   (0.5, 1e-6, 0.790)])
def test_a_ledger_of_log_ratios_is_not_hard(name, nats, floor, expected):
    """A uniform binary base and everything spent at once on one of its tokens, 8 tokens long: the expected KL of an
    episode, enumerated over its paths, against a recursion in float64 that was done apart."""
    spend = SPENDS["greedy"](1)._replace(charge=sampled_log_ratio)
    program = by_hand(constrained=True, operation=OPERATIONS[name], spend=spend, rerun=False, target_floor=floor)
    log_base, gap = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -jnp.inf])

    @jax.jit
    @jax.vmap
    def episode(path):
        def token(ledger, action):
            remaining = left(Caps(jnp.float32(nats), jnp.inf, jnp.inf), ledger, False)
            measure = Measure(log_base, gap, jnp.zeros(()), None)
            chosen = choose(program, measure, None, remaining, jnp.ones(()), jnp.zeros(()), jnp.int32(0))
            terms, cost = settle(program, chosen, action)
            return charge(ledger, cost, jnp.array(True)), (terms.log_prob, terms.kl)

        log_prob, kl = jax.lax.scan(token, open_ledger(()), path)[1]
        return jnp.exp(log_prob.sum()), kl.sum()

    chance, kl = (np.asarray(x, np.float64) for x in episode(jnp.asarray(PATHS)))
    np.testing.assert_allclose(chance.sum(), 1.0, rtol=1e-4)
    np.testing.assert_allclose((chance * kl).sum(), expected, atol=2e-3)


@pytest.mark.parametrize("allowance, expected", [(0.1, (1.0, 0.33)), (1.0, (1.0, 0.58))])
def test_a_proposal_along_the_reward_is_better_followed_by_the_tilt(allowance, expected):
    """Proposals of 8 r beyond the base's logits, r the reward of 500 tokens: the part of what the allowance admits at
    best that each operation gains. The best is a tilt by r itself; the mixture gains a part that is enumerated here."""
    rng = np.random.default_rng(0)
    parts = [gains(log_softmax(rng.normal(0, 2.5, 500)), rng.normal(size=500), allowance) for _ in range(20)]
    np.testing.assert_allclose(np.mean(parts, axis=0), expected, atol=0.03)


def gains(log_base, reward, allowance):
    """What the tilt and the mixture gain, in parts of the best."""
    at = lambda k: np.exp(log_softmax(log_base + k * reward))  # noqa: E731
    best = at(brentq(lambda k: rel_entr(at(k), np.exp(log_base)).sum() - allowance, 0, 200))
    given = jnp.float32(log_base), jnp.float32(8 * reward), jnp.float32(allowance)
    got = [np.exp(log_softmax(np.float64(apply[name](*given).logits))) for name in ("tilt", "mixture")]
    return [(policy - np.exp(log_base)) @ reward / ((best - np.exp(log_base)) @ reward) for policy in got]
