"""The gradient of a budgeted policy, against enumeration of all 27 sequences over 3 symbols and 3 steps.

The policy is two tables, one row a prefix: the proposal's logits and a budget neuron. A token may cost
sigmoid(neuron) * (what is left of the budget), the proposal is tilted to that, and the exact KL is charged. The oracle
is float64 numpy with scipy's root finder, differentiated by central differences.
"""
from __future__ import annotations

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, rel_entr, softmax
from three_tokens import ROWS, SEQUENCES, all_episodes, hyper, program, single, tables

from kl_reg import algorithms
from kl_reg.algorithms import advantages, reductions
from kl_reg.kl import budget as budgets
from kl_reg.kl.estimators import KLConfig, build
from kl_reg.kl.operations import OPERATIONS
from kl_reg.kl.spends import SPENDS, sampled_log_ratio
from kl_reg.training import objective, scoring
from kl_reg.training.targets import targets
from kl_reg.types import Frozen

BUDGETS = [0.3, 1.0, 4.0]


MOVED = {"tilt": lambda log_base, gap, a: log_softmax(log_base + a * gap),
         "mixture": lambda log_base, gap, a: np.log(a * softmax(log_base + gap) + (1 - a) * np.exp(log_base))}
"""Log-probabilities between the base's and the proposal's."""


class Enumerated:
    """The process in float64: probabilities and KL of every token of every sequence, by a walk over the 13 prefixes.

    `carried` is a cap on each token, of which what is left counts for the later ones; `looks` as of `program`.
    """

    def __init__(self, params, base, budget, carried=np.inf, operation="tilt", looks=0.0):
        self.log_prob, self.kl, self.strength = np.zeros((13, 3)), np.zeros(13), np.zeros(13)
        spent = np.zeros(13)
        for row in range(13):
            if row:
                spent[row] = spent[(row - 1) // 3] + self.kl[(row - 1) // 3]
            log_base = log_softmax(base[row])
            gap = params["logits"][row] - base[row]
            depth = 0 if row == 0 else 1 if row < 4 else 2
            left = min(budget - spent[row], carried * (depth + 1) - spent[row])
            part = (budget - spent[row]) / budget if np.isfinite(budget) else 0.0
            allowance = expit(params["neuron"][row] + looks * part) * max(left, 0)
            at = partial(MOVED[operation], log_base, gap)
            excess = lambda a, at=at, log_base=log_base, allowance=allowance: (  # noqa: E731
                rel_entr(np.exp(at(a)), np.exp(log_base)).sum() - allowance)
            self.strength[row] = 1.0 if excess(1.0) <= 0 else brentq(excess, 0, 1, xtol=1e-15, rtol=1e-14)
            self.log_prob[row] = at(self.strength[row])
            self.kl[row] = rel_entr(np.exp(self.log_prob[row]), np.exp(log_base)).sum()

    def weight(self):
        """The probability of each sequence [27]."""
        return np.exp(self.log_prob[ROWS, SEQUENCES].sum(1))


def difference(function, params, size=1e-5):
    """The gradient of function(params) by central differences, as one vector: 39 logits, then 13 neurons."""
    point = np.append(params["logits"], params["neuron"])
    whole = lambda x: function({"logits": x[:39].reshape(13, 3), "neuron": x[39:]})  # noqa: E731
    return np.array([(whole(point + e) - whole(point - e)) / (2 * size) for e in size * np.eye(52)])


def score(prog, params, base, budget, episodes=None):
    episodes = all_episodes() if episodes is None else episodes
    return scoring.score(prog, params, (), Frozen(single(base)), episodes, scoring.caps_of(hyper(budget)))


def estimate(params, base, rewards, budget, constrained=True, operation="tilt", looks=0.0):
    """The expected gradient of sum_t A_t log pi(a_t), A_t = return-to-go, through `score`."""
    exact = Enumerated(params, base, budget if constrained else np.inf, operation=operation, looks=looks)
    weight, prog = jnp.float32(exact.weight()), program(constrained, looks, operation=OPERATIONS[operation])
    to_go = jnp.cumsum(jnp.float32(rewards)[:, ::-1], axis=1)[:, ::-1]

    @jax.jit
    def surrogate(params):
        scores = score(prog, params, base, budget)
        return (weight[:, None] * to_go * scores.terms.log_prob).sum()

    grads = jax.grad(surrogate)(single(params))
    return np.append(grads["logits"], grads["neuron"])


def expected_return(params, base, rewards, budget, **how):
    return (Enumerated(params, base, budget, **how).weight() * rewards.sum(1)).sum()


def assert_close(got, expected, part=1e-3):
    np.testing.assert_allclose(got, expected, rtol=part, atol=part * np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget", BUDGETS)
def test_score_is_the_enumerated_process(budget, seed):
    params, base, _ = tables(seed)
    scores = score(program(True), single(params), base, budget)
    exact = Enumerated(params, base, budget)
    assert (exact.strength < 1).sum() >= {0.3: 10, 1.0: 6, 4.0: 1}[budget]
    np.testing.assert_allclose(exact.weight().sum(), 1.0)
    np.testing.assert_allclose(scores.terms.kl, exact.kl[ROWS], rtol=5e-4)
    np.testing.assert_allclose(scores.terms.log_prob, exact.log_prob[ROWS, SEQUENCES], rtol=1e-3, atol=1e-3)
    assert scores.terms.kl.sum(1).max() <= budget * (1 + 1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget", BUDGETS)
def test_expected_gradient_is_the_enumerated_one(budget, seed):
    params, base, rewards = tables(seed)
    expected = difference(lambda p: expected_return(p, base, rewards, budget), params)
    assert_close(estimate(params, base, rewards, budget), expected)


@pytest.mark.parametrize("operation", OPERATIONS.names())
def test_it_is_so_under_each_operation_with_the_remaining_budget_as_an_input(operation):
    params, base, rewards = tables(2)
    how = {"operation": operation, "looks": -2.0}
    expected = difference(lambda p: expected_return(p, base, rewards, 1.0, **how), params)
    assert_close(estimate(params, base, rewards, 1.0, **how), expected)


@pytest.fixture
def frozen_ledger(monkeypatch):
    """What was spent is taken as recorded, not as a function of the parameters."""
    charge = budgets.charge
    monkeypatch.setattr(budgets, "charge", lambda ledger, nats, own: charge(ledger, jax.lax.stop_gradient(nats), own))


def test_a_frozen_ledger_gives_another_gradient(frozen_ledger):
    params, base, rewards = tables(0)
    expected = difference(lambda p: expected_return(p, base, rewards, 1.0), params)
    assert np.linalg.norm(estimate(params, base, rewards, 1.0) - expected) > 0.1 * np.linalg.norm(expected)


def saving_pays():
    """All tokens are proposed to be 0, which pays a little at the first token and much at the last."""
    params = {"logits": np.tile([3.0, 0.0, 0.0], (13, 1)), "neuron": np.zeros(13)}
    return params, np.zeros((13, 3)), (SEQUENCES == 0) * np.array([0.05, 0.0, 1.0])


def test_a_frozen_ledger_sees_the_benefit_of_spending_and_not_its_cost(frozen_ledger):
    """The first neuron's gradient has the wrong sign."""
    case = saving_pays()
    expected = difference(lambda p: expected_return(p, *case[1:], 0.5), case[0])
    assert expected[39] < -0.003 and estimate(*case, 0.5)[39] > 0.003


def test_the_cost_of_spending_is_seen():
    """The same case with the ledger re-run."""
    case = saving_pays()
    assert_close(estimate(*case, 0.5), difference(lambda p: expected_return(p, *case[1:], 0.5), case[0]))


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_budget(seed):
    params, base, rewards = tables(seed)
    expected = difference(lambda p: expected_return(p, base, rewards, np.inf), params)
    got = estimate(params, base, rewards, np.inf, constrained=False)
    assert_close(got, expected)
    np.testing.assert_array_equal(got[39:], 0.0)


@pytest.mark.parametrize("constrained, budget", [(True, 1.0), (True, 4.0), (False, np.inf)])
@pytest.mark.parametrize("estimator, placement", [("exact", "full"), ("k1", "reward")])
def test_penalty_and_budget_together(estimator, placement, constrained, budget):
    """The whole path, targets and objective: what it descends is -(return - coef * KL of the episode)."""
    params, base, rewards = tables(2)
    coef = 0.7
    prog = program(constrained, loss=algorithms.LOSSES["reinforce"], advantage=advantages.ADVANTAGES["monte_carlo"],
                   normalise=False, group=1, reduction=reductions.REDUCTIONS["token_mean"],
                   kl=build(KLConfig(estimator=estimator, placement=placement)))

    def value(p):
        process = Enumerated(p, base, budget)
        return (process.weight() * (rewards.sum(1) - coef * process.kl[ROWS].sum(1))).sum()

    exact, settings, episodes = Enumerated(params, base, budget), hyper(budget, coef), all_episodes()
    log_base = log_softmax(base, axis=1)[ROWS, SEQUENCES]
    log_prob = exact.log_prob[ROWS, SEQUENCES]
    episodes = episodes._replace(log_prob=jnp.float32(log_prob), log_ratio=jnp.float32(log_prob - log_base),
                                 kl=jnp.float32(exact.kl[ROWS]))
    aims = targets(prog, episodes, jnp.float32(rewards), settings.kl_coef, settings)

    @jax.jit
    def loss(params):
        """Three times the mean over a sequence's tokens, weighted by its probability."""
        def sequence(*row):
            episode, target = jax.tree.map(lambda x: x[None], row)
            weights = objective.weights_of(prog, episode)
            return objective.objective(prog, params, (), Frozen(single(base)), episode, target, settings,
                                       weights, scoring.PLAIN)[0]

        return 3 * (jnp.float32(exact.weight()) * jax.vmap(sequence)(episodes, aims)).sum()

    grads = jax.grad(loss)(single(params))
    assert_close(np.append(grads["logits"], grads["neuron"]), -difference(value, params), 2e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cap_on_each_token_that_carries_over(seed):
    """The ledger couples tokens through both limits."""
    params, base, rewards = tables(seed)
    value = lambda p: (Enumerated(p, base, 1.5, 0.4).weight() * rewards.sum(1)).sum()  # noqa: E731
    weight = jnp.float32(Enumerated(params, base, 1.5, 0.4).weight())
    to_go = jnp.cumsum(jnp.float32(rewards)[:, ::-1], axis=1)[:, ::-1]
    caps = scoring.caps_of(hyper(1.5)._replace(kl_token_budget=jnp.float32(0.4)))

    @jax.jit
    def surrogate(params):
        scores = scoring.score(program(True, carry=True), params, (), Frozen(single(base)), all_episodes(), caps)
        return (weight[:, None] * to_go * scores.terms.log_prob).sum()

    grads = jax.grad(surrogate)(single(params))
    assert_close(np.append(grads["logits"], grads["neuron"]), difference(value, params))


# The amount as an action: Binomial(LEVELS, neuron) / LEVELS of what is left, charged in full

LEVELS = 2
AMOUNTS = np.array(list(itertools.product(range(LEVELS + 1), repeat=3)))
JOINT = np.array(list(itertools.product(range(27), range(len(AMOUNTS)))))          # (sequence, amounts)


class Sampled:
    """Every token and amount of every joint sequence in float64; the amount's probability and the token's."""

    def __init__(self, params, base, budget):
        self.log_prob, self.kl, self.charged = np.zeros((3, len(JOINT), 3))
        strength = functools.cache(lambda row, allowance: self._strength(params, base, row, allowance))
        for i, (sequence, amounts) in enumerate(JOINT):
            left = budget
            for t in range(3):
                row, count = ROWS[sequence, t], AMOUNTS[amounts, t]
                allowance = count / LEVELS * left
                log_base = log_softmax(base[row])
                log_policy = log_softmax(log_base + strength(row, allowance) * (params["logits"][row] - base[row]))
                spend = scipy.stats.binom.logpmf(count, LEVELS, expit(params["neuron"][row]))
                self.log_prob[i, t] = spend + log_policy[SEQUENCES[sequence, t]]
                self.kl[i, t] = rel_entr(np.exp(log_policy), np.exp(log_base)).sum()
                self.charged[i, t] = allowance
                left -= allowance

    @staticmethod
    def _strength(params, base, row, allowance):
        gap, log_base = params["logits"][row] - base[row], log_softmax(base[row])
        excess = lambda a: rel_entr(softmax(log_base + a * gap), np.exp(log_base)).sum() - allowance  # noqa: E731
        return 1.0 if excess(1.0) <= 0 else brentq(excess, 0, 1, xtol=1e-15, rtol=1e-14) if allowance > 0 else 0.0

    def weight(self):
        return np.exp(self.log_prob.sum(1))


def test_the_gradient_of_a_sampled_amount_is_the_enumerated_one():
    params, base, rewards = tables(0)
    rewards = rewards[JOINT[:, 0]]
    value = lambda p: (Sampled(p, base, 1.0).weight() * rewards.sum(1)).sum()  # noqa: E731
    process = Sampled(params, base, 1.0)
    weight, to_go = jnp.float32(process.weight()), jnp.cumsum(jnp.float32(rewards)[:, ::-1], axis=1)[:, ::-1]
    episodes = jax.tree.map(lambda x: x[JOINT[:, 0]], all_episodes())
    episodes = episodes._replace(fraction=jnp.float32(AMOUNTS[JOINT[:, 1]] / LEVELS))
    prog = program(True, spend=SPENDS["sampled"](LEVELS))
    np.testing.assert_allclose(process.weight().sum(), 1.0)
    scores = score(prog, single(params), base, 1.0, episodes)
    np.testing.assert_allclose(scores.terms.log_prob, process.log_prob, rtol=1e-3, atol=1e-3)
    assert (scores.terms.kl <= process.charged * (1 + 1e-5) + 1e-6).all() and process.charged.sum(1).max() <= 1 + 1e-9

    @jax.jit
    def surrogate(params):
        return (weight[:, None] * to_go * score(prog, params, base, 1.0, episodes).terms.log_prob).sum()

    grads = jax.grad(surrogate)(single(params))
    assert_close(np.append(grads["logits"], grads["neuron"]), difference(value, params))


# The ledger of log-ratios, as recorded

def test_a_recorded_ledger_is_neither_run_again_nor_differentiated():
    """The gradient is that of tokens whose allowance is a neuron's part of a number that was recorded; by hand, each
    token by itself."""
    params, base, rewards = tables(0)
    spend = SPENDS["neuron"](1)._replace(charge=sampled_log_ratio)
    prog = program(True, spend=spend, rerun=False)
    log_ratio = np.random.default_rng(0).uniform(-0.4, 0.9, (27, 3))
    first = np.zeros(27)                                                # nothing is spent
    second = np.minimum(log_ratio[:, 0], 1)                             # nats spent, some of them given back
    third = np.minimum(second + log_ratio[:, 1], 1)                     # and some of what exceeds the budget forgiven
    recorded = np.stack([first, second, third], axis=1)
    assert (recorded < 0).any() and (recorded == 1).any()
    episodes = all_episodes()._replace(log_ratio=jnp.float32(log_ratio))
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(27, 3))

    def log_prob(params):
        out = np.zeros((27, 3))
        for i, t in itertools.product(range(27), range(3)):
            row = ROWS[i, t]
            log_base, gap = log_softmax(base[row]), params["logits"][row] - base[row]
            allowance = expit(params["neuron"][row]) * max(1.0 - recorded[i, t], 0)
            excess = lambda a, gap=gap, log_base=log_base, allowance=allowance: (  # noqa: E731
                rel_entr(softmax(log_base + a * gap), np.exp(log_base)).sum() - allowance)
            alpha = 1.0 if excess(1.0) <= 0 else brentq(excess, 0, 1, xtol=1e-15, rtol=1e-14) if allowance else 0.0
            out[i, t] = log_softmax(log_base + alpha * gap)[SEQUENCES[i, t]]
        return out

    scores = score(prog, single(params), base, 1.0, episodes)
    np.testing.assert_allclose(scores.terms.log_prob, log_prob(params), rtol=1e-3, atol=1e-3)
    grads = jax.grad(lambda p: (weights * score(prog, p, base, 1.0, episodes).terms.log_prob).sum())(single(params))
    got = np.append(grads["logits"], grads["neuron"])
    assert_close(got, difference(lambda p: (weights * log_prob(p)).sum(), params))


def test_the_miss_of_the_allowance_by_hand():
    """(D - allowance)^2: 0 where the budget binds, and where the proposal is cheaper what is not spent, squared."""
    params, base, _ = tables(0)
    exact = Enumerated(params, base, 4.0)
    spent = np.concatenate([np.zeros((27, 1)), exact.kl[ROWS].cumsum(1)[:, :-1]], axis=1)
    allowance = expit(params["neuron"])[ROWS] * (4.0 - spent)
    got = score(program(True), single(params), base, 4.0).miss
    free = exact.strength[ROWS] == 1
    assert free.any() and not free.all()
    np.testing.assert_allclose(got, np.where(free, (exact.kl[ROWS] - allowance) ** 2, 0.0), rtol=1e-3, atol=1e-6)
