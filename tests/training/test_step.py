"""One update of a group of three members, recorded once: by hand, against its parts, and against solo updates."""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from kl_reg import algorithms
from kl_reg import config as configs
from kl_reg.algorithms import advantages, reductions
from kl_reg.kl import controllers, estimators
from kl_reg.kl.estimators import KLConfig
from kl_reg.pretrained import weights
from kl_reg.program import Program
from kl_reg.sampling import rollout
from kl_reg.training import ledger, objective, optimizer, scoring, step
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.training.optimizer import safe_norm, schedule
from kl_reg.training.targets import targets
from kl_reg.types import Episodes, Frozen, Hyper, TrainState, Transcript
from tests.programs import by_hand, changed, descending

ITERATIONS = 11


class Group(NamedTuple):
    """Three members that differ in coefficient, budget and learning rate, and six episodes of each."""

    program: Program
    frozen: Frozen
    params: dict
    hyper: Hyper
    episodes: Episodes
    rewards: jax.Array


@pytest.fixture(scope="module")
def group(tiny_folder):
    model = weights.load(str(tiny_folder))
    params = model.params | {"embed": 3 * model.params["embed"],
                             "layers": jax.tree.map(lambda x: x[:2], model.params["layers"])}
    model = model._replace(config=dataclasses.replace(model.config, layers=2), params=params)
    config = configs.default()
    config.model.path, config.policy.layers, config.policy.hidden = str(tiny_folder), 2, 8
    config.policy.spend_init, config.rl.epochs = 0.3, 1
    config.env.opening, config.env.end, config.env.length, config.rl.episodes = "<|start|>A: hi\n", " ", 12, 6
    config.kl.budget, config.rl.iterations, config.rl.entropy_coef, config.optim.warmup = 1.0, ITERATIONS, 0.01, 3
    config.optim.max_grad_norm = 1e9
    static, hyper, _ = configs.split(config)
    program = build(static, model)
    compiled = compile_program(program)
    hyper = jax.tree.map(lambda x: jnp.broadcast_to(x, (3,)), hyper)._replace(
        kl_coef=jnp.array([0.0, 0.1, 1.0]), kl_budget=jnp.array([1.0, 3.0, 10.0]),
        learning_rate=jnp.array([0.01, 0.03, 0.1]))
    state, rng = compiled.init(model.params, jnp.arange(3), hyper), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(x + rng.normal(0, 0.3, x.shape)), jax.device_get(state.params))
    frozen = Frozen(model.params)
    episodes = compiled.sample(params, (), hyper, frozen, rollout.member_keys(state.seed, state.iteration),
                               jnp.zeros(3, jnp.int32))
    # the streams end at different places, as those of real episodes do
    lengths = jnp.array([12, 3, 9, 1, 6, 12])[None, :, None]
    mask = episodes.mask & (jnp.arange(12)[None, None] < lengths)
    episodes = jax.tree.map(lambda x: x, episodes)._replace(mask=mask, **{
        name: jnp.where(mask, getattr(episodes, name), 0)
        for name in ("slot", "action", "fraction", "log_prob", "log_ratio", "kl", "entropy", "value", "spent_before")})
    rewards = jnp.where(mask, jnp.float32(rng.normal(0, 1, mask.shape)), 0.0)
    return Group(program, frozen, params, hyper, episodes, rewards)


SUM = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params: (
    jax.tree.map(jnp.zeros_like, grads), jax.tree.map(jnp.add, state, grads)))
"""Moves nothing and keeps the sum of the gradients it was given as its state."""


def fresh(group, program):
    """A state of the three members; `update` donates it."""
    params = jax.tree.map(jnp.copy, group.params)
    opt_state = jax.vmap(program.algorithm.optimizer.init)(params)
    return TrainState(params, opt_state, jnp.arange(3), jnp.zeros(3, jnp.int32))


def member(tree, k):
    return jax.tree.map(lambda x: x[k:k + 1], tree)


def one(tree, k=1):
    return jax.tree.map(lambda x: x[k], tree)


def vector(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def assert_close(got, expected, part):
    got, expected = vector(got), vector(expected)
    np.testing.assert_allclose(got, expected, rtol=part, atol=part * np.abs(expected).max())


def gradient(program, group, episodes=None, rewards=None, k=1, limit=1e9):
    """The sum of the clipped gradients of one update of member k."""
    episodes = one(group.episodes, k) if episodes is None else episodes
    rewards = one(group.rewards, k) if rewards is None else rewards
    program = descending(program, SUM, limit)
    new, *_ = jax.jit(partial(step.update, program))(
        one(fresh(group, program), k), one(group.hyper, k), group.frozen, episodes, rewards)
    return new.opt_state[1]         # that of the second transformation in the chain


@pytest.fixture(scope="module")
def usual(group):
    """The gradient of member 1."""
    return gradient(group.program, group)


# Members

@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_member_of_a_group_is_updated_as_alone(group, name):
    """Two updates on the same episodes. The change is compared, not the parameter; Adam amplifies rounding."""
    program, part = {"sgd": (descending(group.program), 1e-4), "adam": (group.program, 1e-2)}[name]
    compiled = compile_program(program)

    def twice(state, *rest):
        for _ in range(2):
            state, *_ = compiled.update(state, *rest)
        return state

    together = twice(fresh(group, program), group.hyper, group.frozen, group.episodes, group.rewards)
    changes = jax.tree.map(jnp.subtract, together.params, group.params)
    for k in range(3):
        alone = twice(member(fresh(group, program), k), member(group.hyper, k), group.frozen,
                      member(group.episodes, k), member(group.rewards, k))
        assert_close(member(together.params, k), alone.params, 1e-4)
        assert_close(member(changes, k), jax.tree.map(jnp.subtract, alone.params, member(group.params, k)), part)
        assert int(alone.iteration[0]) == 2 and int(alone.seed[0]) == k


def test_each_hyper_parameter_reaches_its_member(group):
    """On the same episodes and parameters, members with another setting get another update."""
    same = jax.tree.map(lambda x: jnp.stack([x[1]] * 3), group._replace(program=(), frozen=()))
    drift = jnp.float32(np.random.default_rng(0).normal(0, 0.2, (6, 12)))      # ratios other than 1, for the clip
    episodes = same.episodes._replace(log_prob=same.episodes.log_prob + jnp.where(same.episodes.mask, drift[None], 0))
    program = descending(group.program)
    state = fresh(group, program)._replace(params=same.params)
    values = {"kl_coef": 2.0, "learning_rate": 0.5, "clip": 0.01, "entropy_coef": 0.5, "value_coef": 5.0,
               "discount": 0.5, "gae_lambda": 0.2}
    update = jax.jit(jax.vmap(partial(step.update, program), in_axes=(0, 0, None, 0, 0)))
    for name, value in values.items():
        hyper = same.hyper._replace(**{name: getattr(same.hyper, name).at[1].set(value)})
        params = update(state, hyper, group.frozen, episodes, same.rewards)[0].params
        np.testing.assert_allclose(vector(one(params, 0)), vector(one(params, 2)), rtol=1e-6)
        assert np.abs(vector(one(params, 0)) - vector(one(params, 1))).max() > 1e-4, name


def test_the_value_head_may_have_a_learning_rate_of_its_own(group):
    """Plain descent along gradients g: everything by -0.1 g, but the value head by -0.4 g."""
    program = descending(group.program, learning_rate=optax.constant_schedule(1.0))
    state = fresh(group, program)
    update = jax.jit(jax.vmap(partial(step.update, program), in_axes=(0, 0, None, 0, 0)))

    def change(**rates):
        rates = {name: jnp.full(3, value) for name, value in rates.items()}
        new = update(state, group.hyper._replace(**rates), group.frozen, group.episodes, group.rewards)
        return jax.tree.map(jnp.subtract, new[0].params, group.params)

    usual = change(learning_rate=0.1)
    own = change(learning_rate=0.1, value_learning_rate=0.4)
    for name in usual["scalars"]:
        usual["scalars"][name] = jax.tree.map(lambda x, n=name: 4 * x if n.startswith("value") else x,
                                              usual["scalars"][name])
    assert np.abs(vector(usual["scalars"]["value"])).max() > 1e-3 and set(usual["scalars"]) == {
        "value", "value_hidden", "spend", "spend_hidden"}
    assert_close(own, usual, 1e-4)


# Invariance

def test_padding_of_the_stream_changes_nothing(group, usual):
    """Five more positions without a token, whatever their features say."""
    episodes = one(group.episodes)
    pad = lambda x, value=0: jnp.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2), constant_values=value)  # noqa: E731
    longer = jax.tree.map(pad, episodes._replace(transcript=(), asked=(), judged=()))
    longer = longer._replace(transcript=episodes.transcript, asked=episodes.asked, judged=episodes.judged,
                             features=pad(episodes.features, 3.0))
    assert_close(gradient(group.program, group, longer, pad(one(group.rewards))), usual, 1e-5)


def test_order_of_episodes_changes_nothing(group, usual):
    order = jnp.array([3, 0, 5, 1, 4, 2])
    shuffled = jax.tree.map(lambda x: x[order], (one(group.episodes), one(group.rewards)))
    assert_close(gradient(group.program, group, *shuffled), usual, 1e-5)


def test_an_epoch_of_minibatches_sees_every_episode_once(group):
    """With as many tokens in every episode, gradients of 3 minibatches add up to 3 times that of the whole."""
    mask = jnp.broadcast_to(jnp.arange(12) < 1, (6, 12))
    episodes, rewards = one(group.episodes)._replace(mask=mask), jnp.where(mask, one(group.rewards), 0.0)
    whole = gradient(group.program, group, episodes, rewards)
    parts = gradient(changed(group.program, epochs=2, minibatches=3), group, episodes, rewards)
    assert_close(parts, jax.tree.map(lambda x: 2 * 3 * x, whole), 1e-4)


# Episodes that no reward function could judge

def test_an_episode_that_was_not_judged_adds_nothing(group):
    """As if it were not in the batch, whatever its rewards say, with a loss that imitates what has no advantage and a
    reduction that counts episodes; and far from the policy that drew it."""
    program = changed(group.program, loss=algorithms.LOSSES["awr"], normalise=True,
                      reduction=reductions.REDUCTIONS["fixed_length"])
    episodes, rewards, others = one(group.episodes), one(group.rewards).at[2].set(100.0), jnp.array([0, 1, 3, 4, 5])
    episodes = episodes._replace(log_prob=episodes.log_prob.at[2].add(-200.0))
    expected = gradient(program, group, *jax.tree.map(lambda x: x[others], (episodes, rewards)))
    assert_close(gradient(program, group, episodes._replace(judged=jnp.arange(6) != 2), rewards), expected, 1e-5)


def test_where_nothing_was_judged_nothing_moves(group):
    """Not even by what the optimizer remembers, nor the KL coefficient; but the next iteration is another one."""
    program = changed(group.program, controller=controllers.CONTROLLERS["pi"](ITERATIONS, 6), minibatches=2)
    episodes, hyper, params = one(group.episodes), one(group.hyper), jax.tree.map(jnp.copy, one(group.params))
    memory = jax.tree.map(lambda x: x + 1, program.algorithm.optimizer.init(params))
    state = TrainState(params, memory, jnp.int32(0), jnp.int32(3), program.algorithm.controller.init(hyper))
    update = jax.jit(partial(step.update, program))
    for judged in (jnp.zeros(6, bool), jnp.ones(6, bool)):
        new, metrics, *_ = update(state, hyper, group.frozen, episodes._replace(judged=judged), one(group.rewards))
        same = [bool((x == y).all()) for x, y in zip(jax.tree.leaves((new.params, new.opt_state, new.controller)),
                                                     jax.tree.leaves((params, memory, state.controller)), strict=True)]
        assert not any(same) if judged.any() else all(same)
        assert int(new.iteration) == 4 and all(jnp.isfinite(x) for x in metrics.values())


# By hand

def settings(learning_rate=1e-3):
    values = configs.split(configs.default())[1]._replace(learning_rate=learning_rate, gae_lambda=1.0)
    return jax.tree.map(jnp.float32, values)


def one_episode(estimator, placement, normalise=False):
    """Advantages, returns and factor of one episode of three tokens, coefficient 2, behind it a padded position."""
    program = by_hand(kl=estimators.build(KLConfig(estimator=estimator, placement=placement)), normalise=normalise)
    row = lambda *x: jnp.array([x], jnp.float32)  # noqa: E731
    zero, whole = row(0, 0, 0, 0), jnp.zeros((1, 4), jnp.int32)
    fields = dict.fromkeys(Episodes._fields, zero) | {
        "transcript": Transcript(whole, whole, whole, jnp.zeros(1, jnp.int32)), "slot": whole, "action": whole,
        "mask": jnp.array([[True, True, True, False]]), "log_ratio": row(0.5, -0.1, 0.2, 0),
        "kl": row(0.1, 0.2, 0.3, 0), "judged": jnp.ones(1, bool)}
    return targets(program, Episodes(**fields), row(1, 2, 3, 0), jnp.float32(2.0), settings())[:3]


@pytest.mark.parametrize("estimator, placement, expected", [
    ("exact", "full", [1 - 2 * 0.2 + 2 - 2 * 0.3 + 3, 2 - 2 * 0.3 + 3, 3]),       # r_t - c D_{t+1}
    ("exact", "loss", [6, 5, 3]),
    ("k1", "reward", [6 - 2 * 0.6, 5 - 2 * 0.1, 3 - 2 * 0.2])])                   # r_t - c L_t
def test_penalty_in_the_reward(estimator, placement, expected):
    advantage, returns, coef = one_episode(estimator, placement)
    np.testing.assert_allclose(advantage[0], [*expected, 0], rtol=1e-6)
    np.testing.assert_allclose(returns, advantage)
    assert coef == 2.0


def test_normalised_advantages_and_the_factor():
    """Mean 0 and deviation 1 over the tokens that exist; the loss's KL is scaled as the reward's."""
    plain, (advantage, returns, coef) = one_episode("exact", "full"), one_episode("exact", "full", True)
    values = np.asarray(plain[0])[0, :3]
    np.testing.assert_allclose(advantage[0, :3], (values - values.mean()) / values.std(), rtol=1e-4)
    np.testing.assert_allclose(coef, 2 / values.std(), rtol=1e-4)
    np.testing.assert_allclose(returns, plain[1])


@pytest.mark.parametrize("iteration, part", [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (6, 0.55), (10, 0.1), (11, 0.1)])
def test_learning_rate_warms_up_and_decays(iteration, part):
    np.testing.assert_allclose(schedule(warmup=3, final=0.1, iterations=11)(jnp.int32(iteration)), part, rtol=1e-5)


@pytest.mark.parametrize("warmup, iterations, iteration, part", [(1, 5, 0, 1.0), (1, 5, 4, 0.1), (1, 1, 0, 1.0),
                                                                (5, 5, 4, 1.0)])
def test_learning_rate_of_short_runs(warmup, iterations, iteration, part):
    np.testing.assert_allclose(schedule(warmup, 0.1, iterations)(jnp.int32(iteration)), part, rtol=1e-5)


def whole_objective(program, params, frozen, episodes, aims, hyper):
    """Of a whole minibatch."""
    @jax.jit
    def whole(*args):
        weights = objective.weights_of(program, episodes)
        return objective.objective(program, params, (), frozen, *args, weights, scoring.PLAIN)

    return whole(episodes, aims, hyper)


def test_objective_at_the_recorded_parameters(group):
    """The ratio is 1, so every term is a mean over tokens of what was recorded."""
    episodes, hyper, rewards = one(group.episodes), one(group.hyper), one(group.rewards)
    aims = targets(group.program, episodes, rewards, hyper.kl_coef, hyper)
    total, (parts, scores) = whole_objective(group.program, one(group.params), group.frozen, episodes, aims, hyper)
    advantage, returns, coef, _ = (np.asarray(x) for x in aims)
    mask = np.asarray(episodes.mask)
    assert 12 < mask.sum() < 60
    mean = lambda x: np.asarray(x)[mask].mean()  # noqa: E731
    expected = {"loss/policy_avg": -mean(advantage), "loss/kl": coef[0] * mean(episodes.kl),
                "loss/value_avg": 0.5 * mean((np.asarray(episodes.value) - returns) ** 2),
                "policy/entropy_avg": mean(episodes.entropy)}
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    policy, penalty, value, entropy = expected.values()
    np.testing.assert_allclose(total, policy + penalty + 0.5 * value - 0.01 * entropy, rtol=1e-3)
    assert parts["policy/clipfrac_avg"] == 0 and abs(parts["policy/approxkl_avg"]) < 1e-9
    np.testing.assert_allclose(parts["val/ratio"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(scores.terms.log_ratio, episodes.log_ratio, rtol=1e-3, atol=1e-5)


def test_each_group_has_its_own_advantages_and_price():
    """Two groups of two episodes of one token, the KL in the loss: the advantages of a group have deviation 1 (TRL's,
    over g - 1, plus 1e-4). The KL of its episodes is multiplied by the same factor and by (g - 1) / g: an episode is
    half of its own baseline."""
    program = by_hand(kl=estimators.build(KLConfig(estimator="exact", placement="loss")), group=2,
                      advantage=advantages.ADVANTAGES["group"])
    rewards, zero, whole = jnp.array([[1.0], [3.0], [5.0], [15.0]]), jnp.zeros((4, 1)), jnp.zeros((4, 1), jnp.int32)
    fields = dict.fromkeys(Episodes._fields, zero) | {
        "transcript": Transcript(whole, whole, whole, jnp.zeros(4, jnp.int32)), "slot": whole, "action": whole,
        "mask": jnp.ones((4, 1), bool), "judged": jnp.ones(4, bool)}
    advantage, _, price, scale = targets(program, Episodes(**fields), rewards, jnp.float32(2.0), settings())
    factors = 1 / (np.sqrt(2) + 1e-4), 1 / (np.sqrt(50) + 1e-4)
    np.testing.assert_allclose(advantage[:, 0], np.array([-1, 1, -5, 5]) * np.repeat(factors, 2), rtol=1e-5)
    np.testing.assert_allclose(price, 2 * np.repeat(factors, 2) / 2, rtol=1e-5)
    np.testing.assert_allclose(scale, np.repeat(factors, 2) / 2, rtol=1e-5)


@pytest.mark.parametrize("limit, same_as", [(1e-10, 1), (np.inf, 3)])
def test_an_iteration_ends_early_at_a_distance_from_the_sampling_policy(group, limit, same_as):
    """Of three epochs; at the first one the distance is 0, from the second on it is not."""
    hyper = one(group.hyper)._replace(stop_kl=jnp.float32(limit), learning_rate=jnp.float32(1.0))

    def update(epochs):
        program = changed(descending(group.program), epochs=epochs)
        return jax.jit(partial(step.update, program))(
            one(fresh(group, program)), hyper, group.frozen, one(group.episodes), one(group.rewards))

    stopped, expected = update(3), update(same_as)
    moved = [jax.tree.map(jnp.subtract, state.params, one(group.params)) for state in (stopped[0], expected[0])]
    assert_close(*moved, 1e-6)
    assert np.abs(vector(moved[0])).max() > 1e-3
    np.testing.assert_allclose(stopped[1]["policy/stopped_avg"], 1 - same_as / 3, rtol=1e-6)


def test_all_parts_of_the_loss_are_reduced_as_the_algorithm_says(group):
    """Sums over tokens per slot of the episodes, instead of per token."""
    episodes, hyper, rewards = one(group.episodes), one(group.hyper), one(group.rewards)
    aims = targets(group.program, episodes, rewards, hyper.kl_coef, hyper)
    count = float(episodes.mask.sum())
    totals = [whole_objective(changed(group.program, reduction=reductions.REDUCTIONS[name]), one(group.params),
                              group.frozen, episodes, aims, hyper)[0] for name in ("token_mean", "fixed_length")]
    np.testing.assert_allclose(totals[1], totals[0] * count / (6 * 12), rtol=1e-5)


def test_reinforce_is_the_score_weighted_with_the_return_to_go(group):
    program = changed(group.program, loss=algorithms.LOSSES["reinforce"],
                      advantage=advantages.ADVANTAGES["monte_carlo"], normalise=False)
    episodes, rewards, mask = one(group.episodes, 0), np.asarray(one(group.rewards, 0)), one(group.episodes.mask, 0)
    hyper = one(group.hyper, 0)._replace(value_coef=jnp.float32(0), entropy_coef=jnp.float32(0))
    to_go = np.zeros_like(rewards)
    for e, t in np.argwhere(mask):
        to_go[e, t] = rewards[e, t:].sum() - episodes.value[e, t]

    @jax.jit
    def weighted(params):
        scores = scoring.score(program, params, (), group.frozen, episodes, scoring.caps_of(hyper))
        return -(to_go * scores.terms.log_prob).sum() / mask.sum()

    expected = jax.grad(weighted)(one(group.params, 0))
    got = gradient(program, group._replace(hyper=jax.tree.map(lambda x: x[None], hyper)), k=0)
    assert_close(got, expected, 1e-4)


def test_update_moves_against_the_gradient_at_the_scheduled_rate(group, usual):
    """One epoch of plain gradient descent; iteration 0 of a warm-up of three."""
    program = descending(group.program)
    state, metrics, *_ = jax.jit(partial(step.update, program))(
        one(fresh(group, program)), one(group.hyper), group.frozen, one(group.episodes), one(group.rewards))
    np.testing.assert_allclose(metrics["optim/learning_rate"], 0.03 / 3, rtol=1e-6)
    expected = jax.tree.map(lambda g: -0.01 * g, usual)
    assert_close(jax.tree.map(jnp.subtract, state.params, one(group.params)), expected, 1e-3)
    np.testing.assert_allclose(metrics["optim/grad_norm"], np.linalg.norm(vector(usual)), rtol=1e-4)
    episodes, rewards, hyper = one(group.episodes), one(group.rewards), one(group.hyper)
    *_, factor = targets(program, episodes, rewards, hyper.kl_coef, hyper)
    np.testing.assert_allclose(metrics["advantage/factor_max"], factor.max(), rtol=1e-5)
    assert int(state.iteration) == 1


def test_explained_variance_by_hand():
    values, returns = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[2.0, 4.0, 7.0]])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(step._explained(values, returns, mask, None), 1 - 0.25 / 1.0)
    np.testing.assert_allclose(step._explained(returns, returns, mask, None), 1.0)


def test_the_norm_of_enormous_and_of_tiny_gradients():
    """As k3 has them at 80 nats, whose squares are no float32."""
    tree = {"a": jnp.array([3e34, 0.0]), "b": jnp.array(-4e34)}
    for norm in (safe_norm, jax.jit(safe_norm)):
        np.testing.assert_allclose(norm(tree), 5e34, rtol=1e-6)
    several = jax.tree.map(lambda x: jnp.stack([x, x / 1e34, x * jnp.nan, x / 1e34 * 1e-24]), tree)
    np.testing.assert_allclose(jax.vmap(safe_norm)(several), [5e34, 5.0, np.nan, 5e-24], rtol=1e-6)
    assert safe_norm({"a": jnp.zeros(3)}) == 0.0


def test_gradients_are_clipped_to_the_norm(group, usual):
    """To a tenth of their norm, and not below it."""
    norm = np.linalg.norm(vector(usual))
    for part in (0.1, 2.0):
        clipped = gradient(group.program, group, limit=part * float(norm))
        assert_close(clipped, jax.tree.map(lambda x, part=part: min(part, 1.0) * x, usual), 1e-4)
    assert_close(gradient(group.program, group, limit=None), usual, 1e-6)


@pytest.mark.parametrize(("small", "parts", "size"), [(0, 9, 8), (2**14, 12, 6)], ids=["parts", "positions"])
def test_nothing_is_kept_of_the_unembedding_for_each_part_or_position(group, monkeypatch, small, parts, size):
    """What the map over tokens closes over is no residual of it: of a real vocabulary that would be gigabytes."""
    monkeypatch.setattr(ledger, "_SMALL", small)
    members, table = 3, group.frozen.base["embed"].shape
    program = changed(descending(group.program), chunk=4 * members * 8 * table[0])      # 8 tokens a part
    update = compile_program(program).update
    jaxpr = jax.make_jaxpr(update)(fresh(group, program), group.hyper, group.frozen, group.episodes, group.rewards)
    shapes = {var.aval.shape for inner in every_jaxpr(jaxpr.jaxpr) for eqn in inner.eqns for var in eqn.outvars}
    assert table in {x.shape for x in jax.tree.leaves(group.frozen)}
    assert (members, parts, size, table[0]) not in shapes and (members, size, table[0]) in shapes
    assert any(parts in shape for shape in shapes)
    assert not any(shape[-2:] == table and parts in shape[:-2] for shape in shapes)


def every_jaxpr(jaxpr):
    """It, and those inside it."""
    yield jaxpr
    params = [param for eqn in jaxpr.eqns for param in jax.tree.leaves(list(eqn.params.values()))]
    for inner in params:
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            yield from every_jaxpr(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


@pytest.mark.parametrize("changes, says", [
    ({"loss": lambda log_prob, *rest: -log_prob.sum()}, "rl.loss must return one number for each token"),
    ({"advantage": lambda rewards, values, mask, *rest: (rewards.sum(1), rewards, jnp.ones(()))},
     r"rl.advantage must return \(advantages \[g, k\]")])
def test_a_piece_that_returns_another_shape_is_one_error(group, changes, says):
    """It would be broadcast, and descend something else."""
    update = partial(step.update, changed(group.program, **changes))
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(update, one(fresh(group, group.program)), one(group.hyper), group.frozen, one(group.episodes),
                       one(group.rewards))


def test_the_policy_may_have_a_gradient_limit_of_its_own(group, usual):
    """A tenth of its own norm for actor and budget neuron; the value head's gradient is as it was."""
    labels = group.program.agent.policy.labels(usual)
    own = [x for x, label in zip(jax.tree.leaves(usual), jax.tree.leaves(labels), strict=True) if label == "policy"]
    limit = 0.1 * float(np.linalg.norm(vector(own)))
    chain = optimizer.chain(None, schedule(1, 1.0, 2), group.program.agent.policy.labels, optax.identity(), limit)
    hyper = one(group.hyper)._replace(learning_rate=jnp.float32(1.0))
    updates, _ = chain.update(usual, chain.init(usual), hyper=hyper, iteration=jnp.int32(0), grad_norm=jnp.float32(1.0))
    expected = jax.tree.map(lambda x, label: -x * (0.1 if label == "policy" else 1.0), usual, labels)
    assert_close(updates, expected, 1e-5)
