"""What each algorithm descends, against enumerated objectives of a tabular policy; and how its settings are resolved.

Episodes have at most three tokens out of three; the last token ends them, so there are 15, of three lengths. Objectives
are numpy in float64, differentiated by central differences.
"""
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.algorithms import ALGORITHMS, LOSSES, resolve
from kl_reg.algorithms.advantages import ADVANTAGES
from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.algorithms.reductions import REDUCTIONS
from kl_reg.config import default, split

END, HORIZON = 2, 3
EPISODES = [e for k in range(1, HORIZON + 1) for e in itertools.product(range(3), repeat=k)
            if END not in e[:-1] and (k == HORIZON or e[-1] == END)]
HISTORIES = sorted({e[:t] for e in EPISODES for t in range(len(e))})
LENGTH = np.array([len(e) for e in EPISODES])
MASK = np.arange(HORIZON) < LENGTH[:, None]
ROW = np.array([[HISTORIES.index(e[:t]) if t < len(e) else 0 for t in range(HORIZON)] for e in EPISODES])
ACTION = np.array([[*e, *[0] * (HORIZON - len(e))] for e in EPISODES])

RNG = np.random.default_rng(1)
THETA = RNG.normal(size=(len(HISTORIES), 3))
REWARD = np.where(MASK, RNG.normal(size=(len(HISTORIES), 3))[ROW, ACTION], 0.0)      # of each token
RETURN = REWARD.sum(1)
LAMBDA = 0.7
HYPER = split(default())[1]


def token_log_probs(theta):
    return np.where(MASK, (theta - np.log(np.exp(theta).sum(1, keepdims=True)))[ROW, ACTION], 0.0)


def probabilities(theta):
    return np.exp(token_log_probs(theta).sum(1))


NOW = probabilities(THETA)
TO_GO = REWARD[:, ::-1].cumsum(1)[:, ::-1]
VALUE_OF_ROW = np.array([(NOW[:, None] * TO_GO * MASK)[row == ROW].sum() / (NOW[:, None] * MASK)[row == ROW].sum()
                         for row in range(len(HISTORIES))])
VALUE = np.where(MASK, VALUE_OF_ROW[ROW], 0.0)                     # the policy's true value function
WRONG_VALUE = np.where(MASK, RNG.normal(size=len(HISTORIES))[ROW], 0.0)


def gradient(objective):
    out = np.zeros_like(THETA)
    for index in np.ndindex(THETA.shape):
        step = np.zeros_like(THETA)
        step[index] = 1e-5
        out[index] = (objective(THETA + step) - objective(THETA - step)) / 2e-5
    return out


def weighted_by_value(value):
    """E of sum_t min(exp(A_t / T), 20) log pi(a_t), the episodes drawn and weighted once and for all; T is 1."""
    error = REWARD + np.pad(value, ((0, 0), (0, 1)))[:, 1:] - value
    advantage = sum(LAMBDA**later * np.pad(error, ((0, 0), (0, later)))[:, later:] for later in range(HORIZON))
    return lambda theta: NOW @ (np.minimum(np.exp(advantage), 20) * token_log_probs(theta)).sum(1)


def against_another(weight):
    """E of weight * (how the episode compares with one of the old policy, in a group of the two), the latter held."""
    difference = RETURN[:, None] - RETURN
    score = difference / 2 * np.minimum(1 / (np.abs(difference) / math.sqrt(2) + 1e-4), 100)
    return lambda theta: probabilities(theta) @ (weight * (score @ NOW))


def expected_return(theta):
    return probabilities(theta) @ RETURN


TOKENS = NOW @ LENGTH                                              # of an episode, in expectation
OBJECTIVES = {
    "reinforce": lambda theta: expected_return(theta) / TOKENS,
    "ppo": lambda theta: expected_return(theta) / TOKENS,
    "ppo_dual_clip": lambda theta: expected_return(theta) / TOKENS,
    "rloo": lambda theta: expected_return(theta) / HORIZON,
    "dr_grpo": lambda theta: expected_return(theta) / HORIZON / 2,          # (g - 1) / g
    "grpo": against_another(1 / LENGTH),
    "gspo": against_another(1 / LENGTH),
    "dapo": against_another(1 / TOKENS),
    "cispo": against_another(1 / TOKENS),
    "awr": lambda theta: weighted_by_value(WRONG_VALUE)(theta) / TOKENS}
"""What a step ascends at the policy that drew a large batch, with groups of two."""

VALUES = {"ppo": VALUE, "ppo_dual_clip": VALUE}        # generalised advantages are unbiased with the true values alone


def expected_step(name, values):
    """-(expected gradient of the total) / (expected weight): what parts of a large batch add up to."""
    algorithm = ALGORITHMS[name]
    size = min(algorithm.group, 2)
    groups = jnp.array(list(itertools.product(range(len(EPISODES)), repeat=size)))
    chance = np.prod(NOW[np.asarray(groups)], axis=1)
    rewards, values = jnp.array(REWARD, jnp.float32), jnp.array(values, jnp.float32)
    mask, row, action = jnp.array(MASK), jnp.array(ROW), jnp.array(ACTION)

    def log_probs(theta):
        return jnp.where(mask, jax.nn.log_softmax(theta)[row, action], 0.0)

    def total(theta, group):
        old, new = log_probs(jnp.array(THETA, jnp.float32))[group], log_probs(theta)[group]
        advantages, _, _ = ADVANTAGES[algorithm.advantage](rewards[group], values[group], mask[group], jnp.float32(1),
                                                           jnp.float32(LAMBDA))
        loss = jax.vmap(LOSSES[algorithm.loss], (0, 0, 0, 0, None))(new, old, advantages, mask[group], HYPER)
        metric = REDUCTIONS[algorithm.reduction](loss, mask[group], HORIZON)
        return metric.total, metric.weight

    each = jax.jit(jax.vmap(jax.grad(total, has_aux=True), (None, 0)))
    gradients, weights = each(jnp.array(THETA, jnp.float32), groups)
    return -np.tensordot(chance, np.asarray(gradients, np.float64), 1) / (chance @ np.asarray(weights, np.float64))


def test_the_episodes_are_all():
    assert len(EPISODES) == 15 and len(HISTORIES) == 7
    np.testing.assert_allclose(NOW.sum(), 1)
    np.testing.assert_allclose(VALUE[0, 0], NOW @ RETURN)


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_the_step_ascends_the_objective(name):
    """On-policy; normalisation over a batch, which is a factor and a baseline, is left out."""
    np.testing.assert_allclose(expected_step(name, VALUES.get(name, WRONG_VALUE)), gradient(OBJECTIVES[name]),
                               rtol=1e-4, atol=1e-6)


def test_generalised_advantages_with_wrong_values_are_biased():
    """So that the test above could fail."""
    assert np.abs(expected_step("ppo", WRONG_VALUE) - gradient(OBJECTIVES["ppo"])).max() > 0.01


# One token, drawn from a policy that is not the one that learns.
DRAWN, LEARNS, GAIN = np.log([0.2, 0.3, 0.5]), np.array([0.3, -0.4, 0.2]), np.array([1.0, -0.5, 2.0])


def off_policy_step(name, theta, **settings):
    hyper = HYPER._replace(**{key: jnp.float32(value) for key, value in settings.items()})

    def loss(theta, action):
        return LOSSES[name](jax.nn.log_softmax(theta)[action][None], jnp.array(DRAWN, jnp.float32)[action][None],
                            jnp.array(GAIN, jnp.float32)[action][None], jnp.ones(1, bool), hyper)[0]

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.array(theta, jnp.float32), jnp.arange(3))
    return -np.exp(DRAWN) @ np.asarray(gradients)


@pytest.mark.parametrize(("name", "settings"), [("reinforce", {"truncation": math.inf}),
                                                ("cispo", {"clip": 1.0, "clip_high": math.inf})])
def test_unbounded_weights_give_the_gradient_of_the_new_policys_return(name, settings):
    policy = np.exp(LEARNS) / np.exp(LEARNS).sum()
    exact = policy * (GAIN - policy @ GAIN)                        # of a softmax, by hand
    np.testing.assert_allclose(off_policy_step(name, LEARNS, **settings), exact, rtol=1e-5)
    bounded = {"truncation": 0.8, "clip": 1.0, "clip_high": -0.2}
    assert np.abs(off_policy_step(name, LEARNS, **bounded) - exact).max() > 0.01


def test_awr_is_at_rest_at_the_tilted_policy():
    temperature = 0.9
    step = off_policy_step("awr", DRAWN + GAIN / temperature, temperature=temperature)
    np.testing.assert_allclose(step, 0, atol=1e-6)
    assert np.abs(off_policy_step("awr", DRAWN, temperature=temperature)).max() > 0.1


def resolved(**settings):
    config = default()
    for name, value in settings.items():
        config.rl[name] = value
    return resolve(config.rl)


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_an_algorithms_parts_exist_and_nothing_stays_open(name):
    out = resolved(algorithm=name)
    for part, registry in (("loss", LOSSES), ("advantage", ADVANTAGES), ("reduction", REDUCTIONS)):
        assert out[part] in registry.names()
    assert None not in out.values()
    assert tuple(out) == Algorithm._fields


def test_what_is_given_is_kept_zero_and_false_too():
    given = {"loss": "awr", "advantage": "gae", "reduction": "token_mean", "normalise": False, "group": 2, "clip": 0.1,
             "clip_high": 0.15, "value_coef": 0.0}
    for name in ALGORITHMS.names():
        assert resolved(algorithm=name, **given) == given


def test_the_upper_clip_is_the_algorithms_or_else_the_lower():
    assert resolved(algorithm="ppo", clip=0.1)["clip_high"] == 0.1
    assert resolved(algorithm="dapo", clip=0.1)["clip_high"] == 0.28
    assert resolved(algorithm="dapo", clip_high=0.1)["clip_high"] == 0.1


MINE = ALGORITHMS["ppo"]._replace(loss="cispo")


def test_an_algorithm_may_be_a_dotted_path():
    assert resolved(algorithm=f"{__name__}.MINE")["loss"] == "cispo"


def test_an_unknown_algorithm_lists_the_choices():
    with pytest.raises(ValueError, match="rl.algorithm='pop' is unknown; choose one of awr, .*rloo, or a dotted path"):
        resolved(algorithm="pop")
