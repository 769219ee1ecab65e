"""Every estimator, direction, placement and reduction, sound or refused, against enumeration: an autoregressive model
over 3 symbols and 3 steps, one row of logits a prefix.

The oracle is float64 numpy, differentiated by central differences: functionals of the policy's table, some with one of
its roles (which sequences are visited, what is measured on them) held constant.
"""
from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from kl_reg.kl import estimators
from kl_reg.kl.estimators import (
    ALIASES,
    DIRECTIONS,
    ESTIMATORS,
    PLACEMENTS,
    REDUCTIONS,
    Estimator,
    KLConfig,
    Value,
    build,
)
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.training.step import mean
from kl_reg.types import WeightedMetric

SEQUENCES = np.array(list(itertools.product(range(3), repeat=3)))
ROWS = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)
EXISTING = [(name, *key) for name in ESTIMATORS.names() for key in ESTIMATORS[name].effects]
ALL = list(itertools.product(ESTIMATORS.names(), DIRECTIONS, PLACEMENTS, REDUCTIONS))
MASK = jnp.ones(3, bool)
ID = "-".join


@pytest.fixture(scope="module")
def tables():
    """Logits of the policy and of the base [13, 3], float64."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 1.2, (13, 3)), rng.normal(0, 1.2, (13, 3))


def kl_of(name, direction, placement, reduction, **rest):
    return build(KLConfig(direction, name, placement, reduction, allow_biased=True, **rest))


# The oracle

def tokens(table):
    """log-probability of every token of every sequence, [27, 3]."""
    return log_softmax(table, axis=1)[ROWS, SEQUENCES]


def weights(table, steps=3):
    """Probability of every sequence [27] (each prefix of `steps` tokens shared out evenly)."""
    return np.exp(tokens(table)[:, :steps].sum(1)) / 3 ** (3 - steps)


def row_kl(left, right):
    """D(left || right) at every token of every sequence [27, 3]."""
    p, q = (log_softmax(x, axis=1) for x in (left, right))
    return (np.exp(p) * (p - q)).sum(1)[ROWS]


def visited(per_token):
    """The expectation of a sum over tokens, visiting by one table and measuring with another: f(visit, measure)."""
    return lambda visit, measure, base: (weights(visit) * per_token(measure, base).sum(1)).sum()


def whole_ratio(measure, base):
    return (tokens(measure) - tokens(base)).sum(1)


K = {"k1": lambda ratio: ratio, "k2": lambda ratio: ratio**2 / 2, "k3": lambda ratio: np.exp(-ratio) - 1 + ratio,
     "k3_weighted": lambda ratio: np.exp(-ratio) - 1 + ratio, "absolute": np.abs}


def value_functional(name, direction, reduction):
    """E[the estimator's value], as f(visit, measure, base)."""
    if name == "exact":
        return visited(row_kl if direction == "reverse" else lambda measure, base: row_kl(base, measure))
    k = K[name] if direction == "reverse" else lambda ratio: np.exp(-ratio) * K[name](-ratio)
    if reduction == "sequence":
        return lambda visit, measure, base: (weights(visit) * k(whole_ratio(measure, base))).sum()
    return visited(lambda measure, base: k(tokens(measure) - tokens(base)))


def sequence_kl(left, right):
    """The KL of whole sequences, the sum over all 27."""
    p, q = tokens(left).sum(1), tokens(right).sum(1)
    return (np.exp(p) * (p - q)).sum()


def difference(function, table):
    steps = 1e-5 * np.eye(39).reshape(39, 13, 3)
    return np.array([(function(table + e) - function(table - e)) / 2e-5 for e in steps]).reshape(13, 3)


def descended(effect, name, direction, reduction, policy, base):
    """The gradient that the effect names."""
    value = value_functional(name, direction, reduction)
    held = lambda f: difference(lambda table: f(policy, table, base), policy)  # noqa: E731
    forward_rows = visited(lambda measure, base: row_kl(base, measure))
    whole = reduction == "sequence"

    def under_base(function):
        """E_beta of a function of L: over whole sequences, or over tokens at the states that the policy visits."""
        if whole:
            return lambda visit, measure, base: np.exp(tokens(base).sum(1)) @ function(whole_ratio(measure, base))
        rows = lambda measure, base: (np.exp(log_softmax(base, axis=1)) * function(  # noqa: E731
            log_softmax(measure, axis=1) - log_softmax(base, axis=1))).sum(1)[ROWS]
        return visited(rows)

    def variation(visit, measure, base):
        if whole:
            return np.abs(np.exp(tokens(measure).sum(1)) - np.exp(tokens(base).sum(1))).sum()
        gap = np.abs(np.exp(log_softmax(measure, axis=1)) - np.exp(log_softmax(base, axis=1))).sum(1)[ROWS]
        return (weights(visit) * gap.sum(1)).sum()

    forward = difference(lambda t: sequence_kl(base, t), policy) if whole else held(forward_rows)
    pathwise = lambda: held(value)  # noqa: E731
    return {estimators.NOTHING: lambda: np.zeros((13, 3)),
            estimators.EPISODE: lambda: difference(lambda t: sequence_kl(t, base), policy),
            estimators.TOKEN: lambda: held(visited(row_kl)),
            estimators.EPISODE_FORWARD: lambda: difference(lambda t: sequence_kl(base, t), policy),
            estimators.TOKEN_FORWARD: lambda: held(forward_rows),
            estimators.VISITED_FORWARD: lambda: difference(lambda t: forward_rows(t, t, base), policy),
            estimators.VARIATION: lambda: held(variation),
            estimators.SQUARES: lambda: held(under_base(lambda ratio: ratio**2 / 2)),
            estimators.MIXED: lambda: forward + held(under_base(lambda ratio: ratio**2 / 2)),
            estimators.PATHWISE: pathwise,
            estimators.SCORE: lambda: difference(lambda t: value(t, t, base), policy) - pathwise()}[effect]()


# What the code gives

@partial(jax.jit, static_argnums=2)
def expected_gradient(policy, base, kl):
    """What a policy-gradient step with coefficient 1 and no task reward descends: undiscounted, no baseline."""
    log_base, actions = jax.nn.log_softmax(base)[ROWS], jnp.asarray(SEQUENCES)

    def terms(table):
        one = lambda z, b, a: token_terms(z, b, a, kl.config.direction == "forward")  # noqa: E731
        return jax.vmap(jax.vmap(one))(table[ROWS], log_base, actions)

    recorded, missing, masks = terms(policy), jnp.zeros((27, 3)), jnp.ones((27, 3), bool)
    weight = jnp.exp(recorded.log_prob.sum(1))
    penalty = jax.vmap(kl.reward)(recorded, missing, masks)
    advantage = -jnp.cumsum(penalty[:, ::-1], axis=1)[:, ::-1]

    def loss(table):
        new = terms(table)
        ratio = jnp.exp(new.log_prob - recorded.log_prob)
        return (weight[:, None] * (-advantage * new.log_prob + jax.vmap(kl.loss)(new, missing, ratio, masks))).sum()

    return jax.grad(loss)(policy)


def single(tables):
    return [jnp.asarray(x, jnp.float32) for x in tables]


@pytest.mark.parametrize("case", EXISTING, ids=ID)
def test_expected_gradient_is_the_one_that_is_stated(tables, case):
    kl = kl_of(*case)
    expected = descended(kl.effect.descends, case[0], case[1], case[3], *tables)
    np.testing.assert_allclose(expected_gradient(*single(tables), kl), expected, rtol=2e-3,
                               atol=2e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("case", EXISTING, ids=ID)
def test_what_is_sound_descends_a_kl_and_what_is_refused_none_in_its_direction(tables, case):
    """The refusals, from the gradients alone: is it that of the episode's or the token's KL, in either direction?"""
    got, (policy, base) = np.asarray(expected_gradient(*single(tables), kl_of(*case))), tables
    sound = [descended(effect, "exact", "reverse", reduction, policy, base) for effect, reduction in (
        (estimators.EPISODE, "token"), (estimators.TOKEN, "token"), (estimators.EPISODE_FORWARD, "token"),
        (estimators.TOKEN_FORWARD, "token"), (estimators.VISITED_FORWARD, "token"))]
    near = any(np.linalg.norm(got - x) < 0.01 * np.linalg.norm(x) for x in sound)
    assert near == (not ESTIMATORS[case[0]].effects[case[1:]].refused)


def test_the_named_gradients_are_far_apart(tables):
    """Else the test above could not tell them."""
    effects = [estimators.NOTHING, estimators.EPISODE, estimators.TOKEN, estimators.EPISODE_FORWARD,
               estimators.TOKEN_FORWARD, estimators.VISITED_FORWARD, estimators.VARIATION, estimators.SQUARES]
    gradients = [descended(effect, "exact", "reverse", "token", *tables) for effect in effects]
    for one, other in itertools.combinations(gradients, 2):
        assert np.linalg.norm(one - other) > 0.1 * max(np.linalg.norm(one), np.linalg.norm(other))


@pytest.mark.parametrize("name, direction, reduction", sorted({(n, d, r) for n, d, _, r in EXISTING}))
def test_value_is_what_is_stated(tables, name, direction, reduction):
    """Its expectation is the KL, of tokens at visited states or of whole sequences, exactly where it says so."""
    policy, base = tables
    value = ESTIMATORS[name].value
    placement = next(p for n, d, p, r in EXISTING if (n, d, r) == (name, direction, reduction))
    kl = kl_of(name, direction, placement, reduction)
    one = lambda z, b, a: token_terms(z, b, a, True)  # noqa: E731
    terms = jax.vmap(jax.vmap(one))(jnp.float32(policy)[ROWS], jnp.float32(log_softmax(base, axis=1))[ROWS],
                                    jnp.asarray(SEQUENCES))
    if reduction == "token":
        got = (weights(policy) * np.asarray(kl.value(terms, jnp.zeros((27, 3)))).sum(1)).sum()
        truth = value_functional("exact", direction, "token")(policy, policy, base)
    else:
        place = {"reward": lambda t: kl.reward(t, jnp.zeros(3), MASK),
                 "loss": lambda t: kl.loss(t, jnp.zeros(3), jnp.ones(3), MASK)}[placement]
        got = (weights(policy) * np.asarray(jax.vmap(place)(terms)).sum(1)).sum()
        truth = sequence_kl(policy, base) if direction == "reverse" else sequence_kl(base, policy)
    assert (abs(got / truth - 1) < 1e-4) == value.unbiased
    each = np.asarray(kl.value(terms, jnp.zeros((27, 3))))
    assert (each >= 0).all() == value.non_negative


# Refusals

@pytest.mark.parametrize("drawn", [False, True], ids=["", "drawn"])
@pytest.mark.parametrize("case", ALL, ids=ID)
def test_every_combination_is_sound_or_says_why_not(case, drawn):
    name, direction, placement, reduction = case
    config = KLConfig(direction, name, placement, reduction, drawn=drawn)
    effect = ESTIMATORS[name].effect(config)
    if effect and not effect.refused:
        assert build(config).config.estimator == name
        return
    with pytest.raises(ValueError, match=r"Use estimator=") as error:
        build(config)
    if effect:
        assert effect.refused in str(error.value) and "allow_biased" in str(error.value)
        assert effect.descends in kl_of(*case, drawn=drawn).label()
    else:
        with pytest.raises(ValueError, match="does not exist"):
            kl_of(*case, drawn=drawn)


def test_an_error_recommends_what_is_sound_where_fractions_are_drawn():
    with pytest.raises(ValueError, match="no gradient to the log-probability of the budget fraction") as error:
        build(KLConfig(estimator="k2", placement="loss", drawn=True))
    assert "estimator='k1' with placement='reward'" in str(error.value) and "'k3' with" not in str(error.value)


@pytest.mark.parametrize("field, value", [("direction", "backward"), ("placement", "penalty"), ("reduction", "mean")])
def test_unknown_choices_are_listed(field, value):
    with pytest.raises(ValueError, match=f"kl.{field}='{value}'.*choose one of"):
        build(dataclasses.replace(KLConfig(), **{field: value}))


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_aliases_are_the_same_estimator(alias):
    placement = {"k1": "reward", "exact": "full"}.get(ALIASES[alias], "loss")
    assert build(KLConfig(estimator=alias, placement=placement, allow_biased=True)).config.estimator == ALIASES[alias]


@pytest.mark.parametrize("number", [3, "3", " 1 "])
def test_numbers_are_ambiguous(number):
    with pytest.raises(ValueError, match="ambiguous.*k3"):
        estimators.canonical(number)


def test_a_label_warns_only_of_what_is_biased():
    assert "biased" not in build(KLConfig()).label()
    label = build(KLConfig(estimator="k1", placement="loss", allow_biased=True)).label()
    assert "[biased: descends nothing]" in label


# Extremes and padding

def ratios(*values):
    row = jnp.float32(values)
    return TokenTerms(row, row, jnp.abs(row), row, jnp.abs(row))


@pytest.mark.parametrize("case", [case for case in EXISTING if case[3] == "token"], ids=ID)
def test_extreme_ratios(case):
    """k1, k2, absolute and exact to 100 nats, k3 and what is weighted with a ratio to 80: finite, gradients too."""
    name, direction = case[:2]
    kl, bound = kl_of(*case), 80.0 if direction == "forward" or name.startswith("k3") else 100.0

    for ratio in (bound, -bound, 0.0):
        place = lambda terms: jnp.stack([kl.value(terms, jnp.zeros(1)), kl.reward(terms, jnp.zeros(1), MASK[:1]),  # noqa: E731
                                         kl.loss(terms, jnp.zeros(1), jnp.ones(1), MASK[:1])])
        assert jnp.isfinite(place(ratios(ratio))).all()
        assert all(jnp.isfinite(x).all() for x in jax.jacobian(place)(ratios(ratio)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in ESTIMATORS.names() if ESTIMATORS[name].of_ratio])
def test_derivative_on_the_reference(name, direction):
    """At L = 0, where every token of a first update is, by central differences; abs(L) has its minimum there."""
    kl = build(KLConfig(estimator=name, direction=direction, placement="loss", allow_biased=True))
    loss = lambda ratio: kl.loss(ratios(0.0)._replace(log_ratio=ratio[None]), jnp.zeros(1), jnp.ones(1), MASK[:1])[0]  # noqa: E731
    step = jnp.float32(2.0**-10)
    expected = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.0)), expected, atol=2e-3)


@pytest.mark.parametrize("nats", [15.0, -15.0, 60.0])
def test_nothing_is_clamped(nats):
    """A token of 15 nats is booked as 15, not as 10."""
    terms = ratios(nats)
    assert kl_of("k1", "reverse", "reward", "token").value(terms, jnp.zeros(1)) == nats
    assert kl_of("k2", "reverse", "loss", "token").value(terms, jnp.zeros(1)) == nats**2 / 2
    np.testing.assert_allclose(kl_of("k3", "reverse", "loss", "token").value(terms, jnp.zeros(1)),
                               np.exp(-np.float64(nats)) - 1 + nats, rtol=1e-6)


@given(st.floats(-0.3, 0.3))
def test_k3_keeps_its_digits_near_zero(ratio):
    ratio = np.float32(ratio)
    wide = np.float64(ratio)
    exact = np.expm1(-wide) + wide if abs(wide) > 1e-3 else wide**2 * (1 / 2 - wide / 6 + wide**2 / 24)
    np.testing.assert_allclose(estimators.k3(jnp.asarray(ratio)), exact, rtol=2e-5, atol=1e-30)


@settings(max_examples=10)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_changes_nothing(values, padding):
    """Whatever stands behind the stream's end, rewards and losses of the tokens before it are the same."""
    size, width = len(values), 8
    values = np.float32(values)
    row = lambda fill: jnp.asarray(np.append(values, np.full(width - size, fill, np.float32)))  # noqa: E731
    mask = jnp.arange(width) < size
    for case in EXISTING:
        kl = kl_of(*case)
        both = []
        for fill in (0.0, np.float32(3.0 + padding)):
            terms = TokenTerms(*[row(fill)] * 5)
            out = jnp.stack([kl.reward(terms, jnp.zeros(width), mask),
                             kl.loss(terms, jnp.zeros(width), jnp.ones(width), mask)])
            both.append(np.asarray(out)[:, :size])
        np.testing.assert_array_equal(*both)


def half_of_k3(log_ratio):
    """L + (e^{-L} - 1) / 2."""
    return (log_ratio + estimators.k3(log_ratio)) / 2


def k3_by_another_name(log_ratio):
    """The formula of k3, written down again."""
    return jnp.expm1(-log_ratio) + log_ratio


OWN = {"own_k3": Estimator(k3_by_another_name, Value(True, True), {}, inverse_ratio=1.0),
       "own_half": Estimator(half_of_k3, Value(True, False), {}, inverse_ratio=0.5)}
UNBIASED = [name for name in ESTIMATORS.names() if ESTIMATORS[name].value.unbiased]


@pytest.mark.parametrize("name", [*UNBIASED, *OWN])
def test_what_is_unbiased_counts_the_missing_mass(name, monkeypatch):
    """Against a semi-distribution the mean of e^{-L} is 1 less the missing mass; the mean of each value is D."""
    rng = np.random.default_rng(1)
    policy, log_mass = log_softmax(rng.normal(size=5)), np.log(0.6)
    semi = log_softmax(rng.normal(size=5)) + log_mass
    ratio, truth = jnp.float32(policy - semi), (np.exp(policy) * (policy - semi)).sum()
    estimator = (ESTIMATORS._objects | OWN)[name]
    key = next((key for key in estimator.effects if key[0] == "reverse"), ("reverse", "loss", "token"))
    own = estimator._replace(effects={key: estimators.Effect("")})
    monkeypatch.setitem(ESTIMATORS._objects, "tested", own)
    kl = kl_of("tested", *key)
    value = kl.value(TokenTerms(ratio, ratio, jnp.full(5, jnp.float32(truth)), ratio, ratio), jnp.full(5, 0.4))
    np.testing.assert_allclose((np.exp(policy) * np.asarray(value)).sum(), truth, rtol=1e-5)


def test_a_semi_distribution_needs_an_estimator_that_states_its_inverse_ratio(monkeypatch):
    """As it needs the reverse direction and single tokens, for which alone the missing mass is known how to count."""
    silent = Estimator(half_of_k3, Value(True, False), {("reverse", "loss", "token"): estimators.Effect("")})
    monkeypatch.setitem(ESTIMATORS._objects, "silent", silent)
    for config in (KLConfig(estimator="silent"), KLConfig(direction="forward"), KLConfig(reduction="sequence")):
        with pytest.raises(ValueError, match="semi-distribution.*'reverse', 'token'.*inverse_ratio"):
            estimators.check_semi(config)
    for name in ESTIMATORS.names():
        if name != "silent":
            estimators.check_semi(KLConfig(estimator=name))


def test_the_oracle_knows_the_chain_rule(tables):
    """Summed over tokens at visited states, the exact KL is that of the sequences; and its gradient has both parts."""
    policy, base = tables
    np.testing.assert_allclose(visited(row_kl)(policy, policy, base), sequence_kl(policy, base), rtol=1e-12)


def test_the_table_in_the_documentation_is_the_registry():
    """Every row of docs/kl.md, and no other."""
    text = (pathlib.Path(__file__).parents[2] / "docs/kl.md").read_text()
    rows = set()
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0] in ESTIMATORS.names():
            rows |= {(*cells[:3], reduction.strip(), *cells[4:]) for reduction in cells[3].split(",")}
    greek = lambda words: re.sub(r"\bpi\b", "π", words.replace("||", "‖").replace("beta", "β"))  # noqa: E731
    word = lambda kl: "refused" if kl.effect.refused else "sound"  # noqa: E731
    assert rows == {(name, *key, greek(kl_of(name, *key).effect.descends), word(kl_of(name, *key)),
                     word(kl_of(name, *key, drawn=True)))
                    for name in ESTIMATORS.names() for key in ESTIMATORS[name].effects}


@given(st.permutations(range(6)), st.integers(1, 5))
@settings(max_examples=10)
def test_the_order_of_the_reduction_changes_nothing(order, cut):
    """The mean over the tokens of six episodes: shuffled, and as two parts whose sums and counts are added up."""
    rng = np.random.default_rng(0)
    mask = jnp.arange(4)[None] < jnp.asarray(rng.integers(1, 5, (6, 1)))
    values = jnp.where(mask, jnp.float32(rng.normal(0, 3, (6, 4))), 0.0)
    for case in (("k3", "reverse", "loss", "token"), ("k2", "reverse", "loss", "sequence")):
        kl = kl_of(*case)
        each = jax.vmap(kl.loss)(TokenTerms(*[values] * 5), jnp.zeros((6, 4)), jnp.ones((6, 4)), mask)
        order, whole = jnp.asarray(order), float(mean(each, mask).mean())
        first, second = (mean(each[part], mask[part]) for part in (order[:cut], order[cut:]))
        joined = WeightedMetric(first.total + second.total, first.weight + second.weight)
        np.testing.assert_allclose([float(mean(each[order], mask[order]).mean()), float(joined.mean())], whole,
                                   rtol=1e-6)
