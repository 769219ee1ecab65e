"""The oracles are hand computation and, in the loop, the enumerated optimum pi* ∝ beta exp(r / lambda), found by scipy.

The policy in the loop has 3 symbols and 3 steps, one row of logits a prefix, and climbs the exact gradient.
"""
from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax
from scipy.stats import norm

from kl_reg.kl.controllers import CONTROLLERS
from kl_reg.types import Hyper

TARGETED = [name for name in CONTROLLERS.names() if "kl_target" in CONTROLLERS.facts(name)["reads"]]
ITERATIONS, EPISODES = 11, 100


def hyper_of(**settings):
    """Every setting of a controller is positive, the rest are ones."""
    given = {"kl_coef": 0.2, "kl_target": 10.0, "kl_horizon": 1000.0, "kl_rate": 0.5, "kl_gain": 2.0, "kl_final": 0.05}
    return Hyper(**{name: np.float32((given | settings).get(name, 1.0)) for name in Hyper._fields})


def build(name):
    return CONTROLLERS[name](ITERATIONS, EPISODES)


@partial(jax.jit, static_argnums=0)
def states_of(name, kls, hyper):
    """The state before the first batch and after each."""
    controller = build(name)

    def step(state, kl):
        state = controller.update(state, kl, hyper)
        return state, state

    start = controller.init(hyper)
    states = jax.lax.scan(step, start, kls)[1]
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)


@partial(jax.jit, static_argnums=0)
def coefficients(name, kls, hyper):
    """Of the first iteration and after each batch, [1 + len(kls)]."""
    states, read = states_of(name, kls, hyper), build(name).read
    if states == ():
        return jnp.broadcast_to(read((), hyper), 1 + len(kls))
    return jax.vmap(read, (0, None))(states, hyper)


BY_HAND = {
    # e = -0.2 (of -0.5), 0.1, 0.2 (of 3), 0 times episodes / horizon = 0.1
    "adaptive": ([5.0, 11.0, 40.0, 10.0], [0.2, 0.196, 0.19796, 0.2019192, 0.2019192]),
    # e = -0.2 (of -1), 0.1, 1 (of 99), 0 times 0.5
    "lagrangian": ([0.0, 11.0, 1000.0, 10.0], [0.2 * math.exp(x) for x in (0, -0.1, -0.05, 0.45, 0.45)]),
    # the same, plus 2 e
    "pi": ([0.0, 11.0, 1000.0, 10.0], [0.2 * math.exp(x) for x in (0, -0.5, 0.15, 2.45, 0.45)]),
    "fixed": ([0.0, 1e4], [0.2] * 3),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    kls, expected = BY_HAND[name]
    np.testing.assert_allclose(coefficients(name, jnp.array(kls), hyper_of()), expected, rtol=2e-6)


@pytest.mark.parametrize("name, quarter", [("linear", 0.2 - 0.15 * 0.2), ("cosine", 0.05 + 0.15 * 0.9045085)])
def test_schedules_at_both_ends_and_in_the_middle(name, quarter):
    """Iteration 10 is the last of 11; cos(pi / 5) = 0.8090170 at iteration 2. Later ones stay at the end."""
    values = coefficients(name, jnp.full(15, 3.0), hyper_of())
    np.testing.assert_array_equal(values[np.array([0, 10, 11, 15])], np.float32([0.2, 0.05, 0.05, 0.05]))
    np.testing.assert_allclose(values[np.array([2, 5])], [quarter, 0.125], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_of_one_iteration_is_its_start(name):
    controller = CONTROLLERS[name](1, EPISODES)
    assert controller.read(controller.init(hyper_of()), hyper_of()) == np.float32(0.2)


@pytest.mark.parametrize("name", ["adaptive", "lagrangian", "pi"])
def test_range_is_a_factor_of_a_thousand_and_is_left_again(name):
    """No coefficient holds an unreachable target; back from the floor it takes log(1000) / rate full errors at most."""
    hyper = hyper_of(kl_horizon=20.0, kl_gain=0.0)         # a step of 1 for the adaptive controller
    for kl, end in ((0.0, 2e-4), (1e4, 200.0)):
        values = coefficients(name, jnp.full(200, kl), hyper)
        np.testing.assert_allclose(values[-1], end, rtol=1e-5)
    back = 1 + math.ceil(math.log(1000) / 0.5)
    assert coefficients(name, jnp.array([0.0] * 200 + [1e4] * back), hyper)[-1] > 0.2


def test_anti_windup_of_pi_holds_the_sum_in_the_range_too():
    values = coefficients("pi", jnp.full(200, 1e4), hyper_of(kl_gain=5.0))
    np.testing.assert_allclose(values[-1], 200.0, rtol=1e-5)


values_of = lambda low, high: st.floats(math.log10(low), math.log10(high)).map(lambda x: 10.0**x)  # noqa: E731
settings_of = st.fixed_dictionaries({
    "kl_coef": values_of(1e-6, 1e3), "kl_target": values_of(1e-2, 1e3), "kl_horizon": values_of(1, 1e6),
    "kl_rate": values_of(1e-3, 10), "kl_gain": values_of(1e-3, 100), "kl_final": st.floats(0, 1e3)})
kls_of = st.lists(st.one_of(st.just(0.0), st.floats(0, 100), st.floats(0, 1e4)), min_size=12, max_size=12)


@pytest.mark.parametrize("name", CONTROLLERS.names())
@given(settings=settings_of, kls=kls_of)
@example(settings={"kl_horizon": 1.0}, kls=[0.0] * 12)      # the factor of Ziegler's update alone would be negative
def test_contract_coefficient_is_finite_and_not_negative(name, settings, kls):
    hyper = hyper_of(**settings)
    values = coefficients(name, jnp.array(kls), hyper)
    assert values.dtype == jnp.float32 and values[0] == hyper.kl_coef
    assert jnp.isfinite(values).all() and (values >= 0).all()
    if name in TARGETED:
        assert (values >= hyper.kl_coef * 0.999e-3).all() and (values <= hyper.kl_coef * 1.001e3).all()


@pytest.mark.parametrize("name", TARGETED)
@given(settings=settings_of, off=st.floats(0.01, 0.99))
def test_contract_stays_at_the_target_grows_above_and_shrinks_below(name, settings, off):
    hyper = hyper_of(**settings | {"kl_horizon": min(settings["kl_horizon"], 1e4)})
    held, above, below = (coefficients(name, jnp.full(3, x) * hyper.kl_target, hyper) for x in (1, 1 + off, 1 - off))
    np.testing.assert_array_equal(held, held[0])
    assert above[1] > held[1] > below[1]
    assert (jnp.diff(above) >= 0).all() and (jnp.diff(below) <= 0).all()


@pytest.mark.parametrize("name", CONTROLLERS.names())
def test_contract_reads_what_its_facts_say(name):
    kls = jnp.array([9.5, 10.3, 9.0, 10.8])                 # inside every bound, so that each setting counts
    usual = coefficients(name, kls, hyper_of())
    for field in Hyper._fields:
        changed = coefficients(name, kls, hyper_of()._replace(**{field: 1.1 * getattr(hyper_of(), field)}))
        assert bool((changed != usual).any()) == (field in CONTROLLERS.facts(name)["reads"]), field


@pytest.mark.parametrize("name", CONTROLLERS.names())
def test_contract_what_must_be_positive_is_what_it_cannot_work_without(name):
    """At zero the coefficient is not a number or a lasting error does not move it; the other settings may be zero."""
    assert set(CONTROLLERS.facts(name)["positive"]) <= set(CONTROLLERS.facts(name)["reads"])
    for field in CONTROLLERS.facts(name)["reads"]:
        values = coefficients(name, jnp.array([0.0, 10.0, 11.0, 11.0]), hyper_of(**{field: 0.0}))
        works = jnp.isfinite(values).all() and (name not in TARGETED or values[-1] > values[-2])
        assert works == (field not in CONTROLLERS.facts(name)["positive"]), field


def test_every_controller_states_its_needs():
    assert all(CONTROLLERS.facts(name)["reads"] for name in CONTROLLERS.names())
    assert CONTROLLERS.stated("a.path.that_is_not_imported") == {"reads": None, "positive": ()}


@pytest.mark.parametrize("name", CONTROLLERS.names())
def test_members_are_as_alone(name):
    hypers = [hyper_of(), hyper_of(kl_coef=3.0, kl_target=2.0, kl_final=7.0), hyper_of(kl_rate=0.01, kl_horizon=100.0)]
    kls = jnp.asarray(np.random.default_rng(0).uniform(0, 30, (3, 6)), jnp.float32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
    together = jax.vmap(partial(coefficients, name))(kls, stacked)
    for row, kl, hyper in zip(together, kls, hypers, strict=True):
        np.testing.assert_allclose(row, coefficients(name, kl, hyper), rtol=1e-6)


@pytest.mark.parametrize("name", CONTROLLERS.names())
def test_state_saved_and_restored_goes_on_bit_equal(name, tmp_path):
    """Members' states through a file; the state is donated, as training does, while `hyper` lives on."""
    hypers = jax.tree.map(lambda *x: jnp.stack(x), hyper_of(), hyper_of(kl_coef=0.03))
    controller = build(name)
    update = jax.jit(jax.vmap(controller.update), donate_argnums=0)
    kls = jnp.asarray(np.random.default_rng(1).uniform(0, 20, (8, 2)), jnp.float32)
    state = jax.jit(jax.vmap(controller.init))(hypers)
    for kl in kls[:4]:
        state = update(state, kl, hypers)
    leaves, shape = jax.tree.flatten(state)
    assert all(leaf.dtype == jnp.float32 and leaf.shape == (2,) for leaf in leaves)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as file:
        restored = jax.tree.unflatten(shape, [jnp.asarray(file[key]) for key in file.files])
    for kl in kls[4:]:
        state, restored = update(state, kl, hypers), update(restored, kl, hypers)
    jax.tree.map(np.testing.assert_array_equal, state, restored)
    read = jax.vmap(controller.read)
    np.testing.assert_array_equal(read(state, hypers), read(restored, hypers))


SEQUENCES = np.array(list(itertools.product(range(3), repeat=3)))
ROWS = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)
BASE, REWARD = np.random.default_rng(0).normal(0, 1, (13, 3)), np.random.default_rng(1).normal(0, 1, 27)
TARGET = 0.6


def return_and_kl(table):
    """Of the policy with these logits, by enumeration; float32."""
    ours = jax.nn.log_softmax(table)[ROWS, SEQUENCES].sum(1)
    theirs = jnp.asarray(log_softmax(BASE, axis=1)[ROWS, SEQUENCES].sum(1), jnp.float32)
    return (jnp.exp(ours) * jnp.asarray(REWARD, jnp.float32)).sum(), (jnp.exp(ours) * (ours - theirs)).sum()


@partial(jax.jit, static_argnums=0)
def train(name, hyper):
    """KL, return and coefficient, each [1500]."""
    controller = build(name)

    def step(carry, _):
        table, state = carry
        (gained, kl), pull = return_and_kl(table), jax.jacrev(return_and_kl)(table)
        coef = controller.read(state, hyper)
        table = table + 0.5 * (pull[0] - coef * pull[1])
        return (table, controller.update(state, kl, hyper)), (kl, gained, coef)

    start = (jnp.asarray(BASE, jnp.float32), controller.init(hyper))
    return jax.lax.scan(step, start, length=1500)[1]


@pytest.fixture(scope="module")
def optimum():
    """(lambda, return) of pi* ∝ beta exp(r / lambda) with D(pi* || beta) = TARGET, over the 27 sequences in float64."""
    log_base = log_softmax(BASE, axis=1)[ROWS, SEQUENCES].sum(1)

    def best(coef):
        log_policy = log_softmax(log_base + REWARD / coef)
        return np.exp(log_policy) @ REWARD, np.exp(log_policy) @ (log_policy - log_base)

    coef = brentq(lambda x: best(x)[1] - TARGET, 0.05, 50)
    return coef, best(coef)[0]


STARTS = (0.1, 1.0, 10.0)


@pytest.fixture(scope="module", params=TARGETED)
def runs(request, optimum):
    """KL, return, coefficient, each [3, 1500], from a tenth of, just, and ten times what the target costs."""
    hypers = [hyper_of(kl_coef=start * optimum[0], kl_target=TARGET, kl_rate=0.05, kl_gain=2.0, kl_horizon=2000.0)
              for start in STARTS]
    return jax.vmap(partial(train, request.param))(jax.tree.map(lambda *x: jnp.stack(x), *hypers))


def test_reaches_the_target_and_there_the_exact_optimum(runs, optimum):
    kl, gained, coef = runs
    assert kl[0].max() > 1.5 * TARGET and kl[2, :50].max() < 0.5 * TARGET            # the starts were wrong
    np.testing.assert_allclose(kl[:, -500:], TARGET, rtol=0.05)
    np.testing.assert_allclose(kl[:, -1], TARGET, rtol=0.01)
    np.testing.assert_allclose(gained[:, -1], optimum[1], rtol=0.002)
    np.testing.assert_allclose(coef[:, -1], optimum[0], rtol=0.01)


def test_first_iterations_below_the_target_do_not_wind_up(runs, optimum):
    """From the right coefficient: tens of iterations far below the target, a price that stays, a small overshoot."""
    kl, _, coef = (x[1] for x in runs)
    assert (kl[:30] < 0.8 * TARGET).all()
    assert kl.max() < 1.35 * TARGET
    assert coef.min() > 0.4 * optimum[0]


@pytest.mark.parametrize("name", ["lagrangian", "pi"])
@pytest.mark.parametrize("scatter, below", [(0.2, 0.02), (0.3, 0.055)])
def test_noise_settles_as_far_below_the_target_as_stated(name, scatter, below):
    """Batches at the quantiles of a normal distribution: the mean error changes its sign there."""
    noise, signs = 1 + scatter * norm.ppf((np.arange(1000) + 0.5) / 1000), []
    for mean in (1 - below - 0.005, 1 - below + 0.005):
        batches = jnp.asarray(10 * mean * noise, jnp.float32)[:, None]
        signs.append(np.sign(jnp.log(jax.vmap(partial(coefficients, name), (0, None))(batches, hyper_of())[:, 1] / 0.2)
                             .mean()))
    assert signs == [-1, 1]
