"""What each KL penalty descends under each way to spend a hard budget, against enumeration over all actions jointly:
the tokens, and the budget fractions where they are drawn.

The oracle is float64 numpy, differentiated by central differences. Its functionals read the policy in three places: the
probabilities of the drawn fractions, those of the tokens that are visited, and what is measured on them. Where a
gradient leaves one of these out, that one is held.
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
from scipy.special import expit, log_softmax
from three_tokens import ROWS, SEQUENCES, all_episodes, hyper, program, single, tables

from kl_reg import algorithms
from kl_reg.algorithms import advantages
from kl_reg.kl import estimators
from kl_reg.kl.estimators import ESTIMATORS, KLConfig, build
from kl_reg.kl.spends import SPENDS
from kl_reg.training import objective, scoring
from kl_reg.training.targets import targets
from kl_reg.types import Frozen, WeightedMetric

CASES = [(name, *key) for name in ESTIMATORS.names() for key in ESTIMATORS[name].effects]
BUDGET, CAP, LEVELS, COEF = 2.2, 0.8, 1, 0.7     # the cap on each token leaves something for the last one of "greedy"
COUNTS = np.array(list(itertools.product(range(LEVELS + 1), repeat=3)))
STEP = 1e-5
ADVANTAGE = jax.jit(advantages.ADVANTAGES["monte_carlo"])      # it is traced once for all penalties


def actions(spend):
    """Each joint sequence's number among the 27 of tokens, and its fractions as counts of `LEVELS` [n, 3]."""
    if not SPENDS.facts(spend)["drawn"]:
        return np.arange(27), np.zeros((27, 3))
    pairs = np.array(list(itertools.product(range(27), range(len(COUNTS)))))
    return pairs[:, 0], COUNTS[pairs[:, 1]]


class Process:
    """Log-probabilities of the fractions [n, 3], of all tokens and of the base [n, 3, 3], along each joint sequence."""

    def __init__(self, params, base, spend):
        sequence, counts = actions(spend)
        rows, self.drawn = ROWS[sequence], SEQUENCES[sequence]
        neuron, self.base = expit(params["neuron"])[rows], log_softmax(base, axis=1)[rows]
        gap = params["logits"][rows] - self.base
        self.fractions, self.policy, self.free = np.zeros(rows.shape), np.zeros(gap.shape), np.ones(rows.shape, bool)
        if spend == "sampled":
            self.fractions = scipy.stats.binom.logpmf(counts, LEVELS, neuron)
        remaining = np.full(len(rows), BUDGET)
        for t in range(3):
            fraction = {"neuron": neuron[:, t], "sampled": counts[:, t] / LEVELS, "greedy": 1.0, "uniform": 1 / (3 - t)}
            allowance = fraction[spend] * np.minimum(remaining, CAP)
            self.policy[:, t], self.free[:, t] = _tilted(gap[:, t], self.base[:, t], allowance)
            remaining = remaining - (allowance if spend == "sampled" else _kl(self.policy[:, t], self.base[:, t]))

    def pick(self, table):
        """What a table [n, 3, 3] says of the tokens that were drawn [n, 3]."""
        return np.take_along_axis(table, self.drawn[..., None], axis=-1)[..., 0]

    def ratio(self):
        return self.pick(self.policy) - self.pick(self.base)


def _kl(left, right):
    return (np.exp(left) * (left - right)).sum(-1)


def _tilted(gap, base, allowance):
    """log-probabilities by bisection of the strength, and where the proposal itself is within the allowance."""
    at = lambda strength: log_softmax(base + strength[:, None] * gap, axis=1)  # noqa: E731
    low, high = np.zeros(len(gap)), np.ones(len(gap))
    free = _kl(at(high), base) <= allowance
    for _ in range(55):
        middle = (low + high) / 2
        inside = _kl(at(middle), base) <= allowance
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return at(np.where(free, 1.0, low)), free


class Around:
    """The process at the parameters, and at both sides of them along each parameter."""

    def __init__(self, spend):
        self.spend, (params, self.base, _) = spend, tables(3)
        self.params = params | {"logits": self.base + 0.5 * (params["logits"] - self.base)}      # some tokens are free
        whole = np.append(self.params["logits"], self.params["neuron"])
        at = lambda x: Process({"logits": x[:39].reshape(13, 3), "neuron": x[39:]}, self.base, spend)  # noqa: E731
        self.here = at(whole)
        self.pairs = [(at(whole + e), at(whole - e)) for e in STEP * np.eye(52)]

    def gradient(self, functional, held=""):
        """Of functional(fractions, visits, measured), three processes, of which those in `held` stay here."""
        def value(moved):
            return functional(*(self.here if role in held else moved for role in "fvm"))

        return np.array([(value(more) - value(less)) / (2 * STEP) for more, less in self.pairs])

    @functools.cached_property
    def sound(self):
        """The gradients of the episode's and the tokens' KL, in either direction."""
        return [descended(self, effect, ("exact", "reverse", "full", reduction)) for effect, reduction in (
            (estimators.EPISODE, "token"), (estimators.TOKEN, "token"), (estimators.VISITED_FORWARD, "token"),
            (estimators.TOKEN_FORWARD, "token"), (estimators.EPISODE_FORWARD, "sequence"))]


# Functionals

def of_tokens(quantity, one_fraction=False):
    """The expected sum over tokens of quantity(process) [n, 3]; with `one_fraction` each token's weight has its
    fraction from the first process, and all other actions from the second."""
    def functional(fractions, visits, measured):
        weights = (visits.fractions + visits.pick(visits.policy)).sum(1, keepdims=True)
        moved = fractions.fractions - visits.fractions
        moved = moved if one_fraction else moved.sum(1, keepdims=True)
        return (np.exp(weights + moved) * quantity(measured)).sum()

    return functional


def of_sequences(quantity, under_base=False):
    """The expectation of quantity(process) [n] over fractions and tokens, these of the policy or of the base."""
    def functional(fractions, visits, measured):
        tokens = visits.pick(visits.base if under_base else visits.policy)
        return (np.exp((fractions.fractions + tokens).sum(1)) * quantity(measured)).sum()

    return functional


def reverse(x):
    return _kl(x.policy, x.base)


def forward(x):
    return _kl(x.base, x.policy)


def squares(ratio):
    return ratio**2 / 2


def rows_of(function):
    """E_beta of a function of L at each token."""
    return lambda x: (np.exp(x.base) * function(x.policy - x.base)).sum(-1)


K = {"k1": lambda ratio: ratio, "k2": squares, "k3": lambda ratio: np.exp(-ratio) - 1 + ratio,
     "k3_weighted": lambda ratio: np.exp(-ratio) - 1 + ratio, "absolute": np.abs}


def value_of(name, direction, reduction):
    """The expected value of an estimator."""
    if name == "exact":
        return of_tokens(reverse if direction == "reverse" else forward)
    k = K[name] if direction == "reverse" else lambda ratio: np.exp(-ratio) * K[name](-ratio)
    if reduction == "sequence":
        return of_sequences(lambda x: k(x.ratio().sum(1)))
    return of_tokens(lambda x: k(x.ratio()))


def variation(reduction):
    if reduction == "token":
        return of_tokens(lambda x: np.abs(np.exp(x.policy) - np.exp(x.base)).sum(-1))

    def functional(fractions, visits, measured):
        difference = np.exp(measured.pick(measured.policy).sum(1)) - np.exp(measured.pick(measured.base).sum(1))
        return (np.exp(fractions.fractions.sum(1)) * np.abs(difference)).sum()

    return functional


def descended(around, descends, case):
    """The gradient that an effect names."""
    name, direction, placement, reduction = case
    held = "f" if descends.endswith(estimators.HELD) else ""
    if reduction == "sequence":
        base_forward = around.gradient(of_sequences(lambda x: -x.ratio().sum(1), under_base=True), held)
        base_squares = of_sequences(lambda x: squares(x.ratio().sum(1)), under_base=True)
    else:
        base_forward = around.gradient(of_tokens(forward, one_fraction=True), held + "v")
        base_squares = of_tokens(rows_of(squares), one_fraction=True)
    value = value_of(name, direction, reduction)
    pathwise = partial(around.gradient, value, "fv")
    return {estimators.NOTHING: lambda: np.zeros(52),
            estimators.EPISODE: lambda: around.gradient(of_tokens(reverse), held),
            estimators.TOKEN: lambda: around.gradient(of_tokens(reverse, one_fraction=True), held + "v"),
            estimators.EPISODE_FORWARD: lambda: base_forward,
            estimators.TOKEN_FORWARD: lambda: base_forward,
            estimators.VISITED_FORWARD: lambda: around.gradient(of_tokens(forward)),
            estimators.VARIATION: lambda: around.gradient(variation(reduction), held + "v"),
            estimators.SQUARES: lambda: around.gradient(base_squares, held + "v"),
            estimators.MIXED: lambda: base_forward + around.gradient(base_squares, held + "v"),
            estimators.PATHWISE: pathwise,
            estimators.SCORE: lambda: around.gradient(value) - pathwise()}[descends.removesuffix(estimators.HELD)]()


# What the code gives

class Code:
    """The expected gradient of whole updates, through targets and objective; the scorer is compiled once."""

    def __init__(self, around):
        sequence, counts = actions(around.spend)
        episodes = jax.tree.map(lambda x: x[sequence], all_episodes())
        self.settings = hyper(BUDGET, COEF)._replace(kl_token_budget=jnp.float32(CAP))
        self.around, frozen, caps = around, Frozen(single(around.base)), scoring.caps_of(self.settings)
        episodes = episodes._replace(fraction=jnp.float32(counts / LEVELS))
        prog = self.program(build(KLConfig(direction="forward")))       # which forms both directions' KL

        @jax.jit
        def score(params):
            return jax.vjp(lambda p: scoring.score(prog, p, (), frozen, episodes, caps), params)

        self.scores, back = score(single(around.params))
        self.back = partial(jax.jit(lambda back, by_scores: back(by_scores)[0]), back)
        self.episodes = episodes._replace(**self.scores.terms._asdict())

    def program(self, kl):
        return program(True, spend=SPENDS[self.around.spend](LEVELS), kl=kl, normalise=False,
                       group=1, loss=algorithms.LOSSES["reinforce"], advantage=ADVANTAGE,
                       reduction=self.expectation)

    def expectation(self, x, mask, length):
        """The reduction of a loss: the expected sum over a sequence's tokens."""
        here = self.around.here
        weights = jnp.float32(np.exp((here.fractions + here.pick(here.policy)).sum(1, keepdims=True)))
        return WeightedMetric((weights * x).sum(), jnp.ones(()))

    def gradient(self, kl):
        """Of the coefficient's penalty alone, there being no other reward."""
        prog, hyper = self.program(kl), self.settings
        aims = targets(prog, self.episodes, jnp.zeros(self.episodes.mask.shape), hyper.kl_coef, hyper)
        loss = lambda scores: objective.objective(  # noqa: E731
            prog, scores, (), Frozen(()), self.episodes, aims, hyper, objective.Weights(
                jnp.float32(1), jnp.float32(1)), scoring.PLAIN)[0]
        grads = self.back(jax.grad(loss)(self.scores))
        return np.append(grads["logits"], grads["neuron"]) / COEF


@pytest.fixture(scope="module", params=SPENDS.names())
def way(request):
    around = Around(request.param)
    return around, Code(around)


@pytest.fixture(autouse=True)
def scores_are_given(monkeypatch):
    """An objective is differentiated by the scores, and these by the parameters, once for all penalties."""
    monkeypatch.setattr(objective, "score", lambda program, params, *rest: params)


def is_near(one, other, part):
    return np.linalg.norm(one - other) <= part * max(np.linalg.norm(other), 0.2)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_penalty_descends_what_it_states_and_is_refused_where_that_is_no_divergence(way, case):
    """Whether it is sound is read off the gradients: is it that of the episode's or the token's KL, in a direction?"""
    around, code = way
    direction, placement, reduction = case[1:]
    drawn = SPENDS.facts(around.spend)["drawn"]
    kl = build(KLConfig(direction, case[0], placement, reduction, allow_biased=True, drawn=drawn))
    got = code.gradient(kl)
    assert is_near(got, descended(around, kl.effect.descends, case), 3e-3)
    assert any(is_near(got, x, 0.01) for x in around.sound) == (not kl.effect.refused)


def test_the_oracle_limits_what_is_spent(way):
    """The budget binds, the fractions' and tokens' probabilities add up to one, and all parameters matter that can."""
    around, code = way
    here = around.here
    np.testing.assert_allclose(np.exp((here.fractions + here.pick(here.policy)).sum(1)).sum(), 1.0)
    np.testing.assert_allclose(code.scores.terms.kl, reverse(here), rtol=1e-3, atol=1e-4)
    gradient = around.gradient(of_tokens(reverse))
    assert np.linalg.norm(gradient[:39]) > 0.01
    assert np.any(gradient[39:]) == (around.spend in ("neuron", "sampled"))
    assert reverse(here).sum(1).max() <= BUDGET + 1e-9 and reverse(here).max() <= CAP + 1e-9
    assert here.free.any() and not here.free.all()
