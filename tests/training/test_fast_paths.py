"""No number depends on how it is computed. Every short cut is held against the plain path: each episode reads its own
opening, base and policy side by side, one position after the other, one batch, gradients by automatic differentiation.
"""
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kl_reg import config as configs
from kl_reg.algorithms import LOSSES
from kl_reg.kl import estimators
from kl_reg.kl.estimators import KLConfig
from kl_reg.pretrained import weights
from kl_reg.program import ALONE, AT_ONCE, FUSED, WITH_REFERENCE, Program
from kl_reg.sampling import rollout
from kl_reg.training import build as builder
from kl_reg.training import chunks, objective, scoring, step
from kl_reg.training.compile import compile_program
from kl_reg.training.targets import targets
from kl_reg.types import Episodes, Frozen, Hyper, TrainState
from tests.programs import changed

MEMBERS, EPISODES, LENGTH = 2, 4, 10
KINDS = ("head", "lora", "full")


class Case(NamedTuple):
    """A program, parameters away from the start, and what they sampled [m, b, ...] along the plain path."""

    program: Program
    frozen: Frozen
    hyper: Hyper
    params: dict
    episodes: Episodes


def plain(program):
    """The program without its short cuts."""
    def each(params, base, tokens, start, chosen, slots, group):
        rows = jnp.repeat(chosen, group, axis=1)
        own = jnp.arange(rows.size).reshape(rows.shape)
        return program.agent.policy.prefill(params, base, tokens[rows.ravel()], start[rows.ravel()], own, slots)

    return changed(program, policy=program.agent.policy._replace(prefill=each, factored=None, alone=None), copies=False)


def sample(program, case, group=2):
    keys = rollout.member_keys(jnp.arange(MEMBERS), jnp.full(MEMBERS, 3))
    run = compile_program(program).sample
    return run(case.params, (), case.hyper, case.frozen, keys, jnp.zeros(MEMBERS, jnp.int32), group)


@pytest.fixture(scope="module")
def case(tiny_folder, tmp_path_factory):
    """kind and settings -> its case; several prompts, of different lengths, each for two episodes."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("A: hi\nhello there\nA: what a day it is\n")

    @functools.cache
    def build(kind, **settings):
        config = configs.default()
        config.model.path, config.policy.kind, config.policy.hidden = str(tiny_folder), kind, 8
        config.policy.layers = 2
        config.env.name, config.env.openings, config.env.end, config.env.length = "completion", str(file), "e", LENGTH
        config.rl.algorithm, config.rl.group, config.rl.episodes, config.rl.epochs = "rloo", 2, EPISODES, 1
        config.kl.placement, config.rl.entropy_coef = "loss", 0.01
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
        static, hyper, _ = configs.split(config)
        model = weights.load(config.model.path)     # of two layers, which compile faster
        params = model.params | {"layers": jax.tree.map(lambda x: x[:2], model.params["layers"])}
        model = model._replace(config=dataclasses.replace(model.config, layers=2), params=params)
        program = builder.build(static, model)
        hyper = jax.tree.map(lambda x: jnp.broadcast_to(x, MEMBERS), hyper)._replace(kl_coef=jnp.array([0.3, 2.0]))
        params, rng = compile_program(program).init(model.params, jnp.arange(MEMBERS), hyper).params, \
            np.random.default_rng(0)
        scale = {"head": 0.3, "lora": 0.1, "full": 0.05}[kind]
        params = jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape).astype(x.dtype), params)
        empty = Case(program, Frozen(model.params), hyper, params, None)
        return empty._replace(episodes=sample(plain(program), empty))

    return build


def assert_same_record(got, expected):
    np.testing.assert_array_equal(got.transcript.tokens, expected.transcript.tokens)
    np.testing.assert_array_equal(got.transcript.roles, expected.transcript.roles)
    for name in ("log_prob", "log_ratio", "kl", "estimate", "entropy", "value", "spent_before", "forward_kl"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_are_the_same_however_they_are_sampled(case, kind):
    """Openings read once for a group, the base afterwards, a copy of the weights; and each of it left out."""
    own = case(kind)
    assert [program.execution.sampler for program in (own.program, plain(own.program))] == [ALONE, WITH_REFERENCE]
    assert own.program.execution.copies
    assert np.abs(own.episodes.kl).max() > 0.01 and len(np.unique(own.episodes.mask.sum(-1))) > 1
    assert_same_record(sample(own.program, own), own.episodes)


def test_the_forward_kl_is_recorded_whatever_the_estimator(case):
    """Controllers read it, also where the penalty is of sampled log-ratios."""
    own = case("head", kl__direction="forward", kl__estimator="k3_weighted")
    assert own.program.execution.sampler == ALONE and own.episodes.forward_kl.max() > 0.01
    assert_same_record(sample(own.program, own), own.episodes)


@pytest.mark.parametrize("kind, members", [("full", 1), ("full", 2), ("lora", 2)])
def test_the_loop_copies_no_cache(case, tiny_folder, kind, members):
    """In the compiled program, whose loops stand before its entry."""
    own, shapes = case(kind), weights.load_config(str(tiny_folder))
    first = lambda tree: jax.tree.map(lambda x: x[:members], tree)  # noqa: E731
    keys = rollout.member_keys(jnp.arange(members), jnp.zeros(members, jnp.int32))
    draw, begin = compile_program(own.program).draw, jnp.zeros(members, jnp.int32)
    text = draw.lower(first(own.params), (), first(own.hyper), own.frozen, keys, begin, 2).compile().as_text()
    place = text.index("ENTRY")
    cached = re.compile(rf"= f32\[[\d,]*\b{LENGTH},{shapes.head_width}\]\S* (copy|dynamic-update-slice)\(")
    assert cached.findall(text[:place]) == ["dynamic-update-slice"] * 2 * 2         # keys and values of two layers


@pytest.mark.parametrize("kind", ["head", "full"])
def test_an_opening_that_all_episodes_have_is_read_once(case, kind):
    """Beside the same opening written down twice, which nobody knows to be the same."""
    own = case(kind)
    one = jax.tree.map(lambda x: x[:1], own.program.task.env.openings)
    two = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), own.program.task.env.openings)
    single, double = (changed(own.program, env=own.program.task.env._replace(openings=x)) for x in (one, two))
    assert rollout.shared_openings(single, 1) == EPISODES and rollout.shared_openings(double, 1) == 1
    assert_same_record(sample(single, own, 1), sample(double, own, 1))


def gradient(program, own, episodes=None, cost=scoring.PLAIN):
    """Of member 1's loss, with what went into it."""
    episodes = own.episodes if episodes is None else episodes
    params, hyper, episodes = jax.tree.map(lambda x: x[1], (own.params, own.hyper, episodes))
    rewards = jnp.where(episodes.mask, jnp.float32(np.random.default_rng(1).normal(size=episodes.mask.shape)), 0.0)

    @jax.jit
    def run(params, episodes):
        aims = targets(program, episodes, rewards, hyper.kl_coef, hyper)
        return objective.gradient(program, params, (), own.frozen, episodes, aims, hyper, cost)

    return run(params, episodes)


def assert_same_gradient(got, expected, rtol=5e-4):
    (grads, parts, scores), (other, other_parts, other_scores) = got, expected
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(np.abs(y).max(), 1e-3))
    for name in parts:
        np.testing.assert_allclose(parts[name], other_parts[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(scores), jax.tree.leaves(other_scores), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_however_tokens_are_read(case, kind):
    """Each token's loss differentiated at once, or all tokens read before, in parts of few positions; with openings
    read once for a group."""
    own = case(kind)
    expected = gradient(plain(own.program), own)
    assert own.program.execution.scorer == FUSED and optax.global_norm(expected[0]) > 0.1
    several = changed(own.program, chunk=300 * EPISODES * 4)
    assert chunks.layout(several, own.episodes.mask[0], 300, 1)[2:4] == (3, 14)
    assert_same_gradient(gradient(several, own, cost=scoring.Cost(group=2)), expected)
    apart = changed(several, per_token=False)
    assert apart.execution.scorer == AT_ONCE
    assert_same_gradient(gradient(apart, own), expected)


@pytest.mark.parametrize("settings", [
    {"kl__estimator": "k3"}, {"kl__direction": "forward"}, {"kl__placement": "full", "rl__algorithm": "ppo"},
    {"rl__reduction": "sequence_mean", "sampling__temperature": 0.7}], ids=str)
def test_gradients_of_other_losses_are_the_same_too(case, settings):
    own = case("head", **settings)
    assert own.program.execution.scorer == FUSED
    assert_same_gradient(gradient(own.program, own), gradient(plain(own.program), own))


def test_an_exact_kl_of_ones_own_is_differentiated(case):
    """Whatever its name, where all tokens are read before the loss is."""
    own = case("head")
    kl = estimators.build(KLConfig(estimator="own_pieces.exact_again", placement="loss"))
    silent = changed(own.program, kl=kl, per_token=LOSSES.facts("own_pieces.reinforce")["per_token"])
    assert silent.execution.scorer == AT_ONCE and LOSSES.facts("own_pieces.stated")["per_token"]
    assert_same_gradient(gradient(silent, own), gradient(plain(own.program), own))


def test_parts_of_a_minibatch_add_up(case):
    """Two parts with different numbers of tokens."""
    own = case("full")
    assert own.episodes.mask[1, :2].sum() != own.episodes.mask[1, 2:].sum()
    expected = gradient(own.program, own)
    for program in (own.program, plain(own.program)):
        assert_same_gradient(gradient(changed(program, accumulate=2), own, cost=scoring.Cost(group=2)), expected)


@pytest.mark.parametrize("remat", ["layers", "products"])
def test_recomputed_activations_change_no_gradient(case, remat):
    own = case("full")
    other = case("full", model__remat=remat)
    assert_same_gradient(gradient(other.program, own), gradient(own.program, own))


def test_attention_through_jax_changes_no_gradient(case):
    own = case("full")
    other = case("full", model__attention="xla")
    for cost in (scoring.PLAIN, scoring.Cost(group=2)):
        assert_same_gradient(gradient(other.program, own, cost=cost), gradient(own.program, own, cost=cost))


def test_attention_by_cudnn_is_refused_where_there_is_no_gpu(case):
    with pytest.raises(ValueError, match="model.attention='cudnn': needs an NVIDIA GPU"):
        case("full", model__attention="cudnn", model__dtype="bfloat16")


@pytest.mark.parametrize("kind", ["head", "full"])
def test_one_minibatch_needs_no_record_of_what_was_sampled(case, kind):
    """The whole update, where the record is made by its only minibatch, beside that of a plain program, which has the
    record before: the same parameters, metrics and record."""
    own = case(kind)
    assert own.program.execution.update_records and not plain(own.program).execution.update_records
    keys, rewards = rollout.member_keys(jnp.arange(MEMBERS), jnp.full(MEMBERS, 3)), own.episodes.mask * 0.5
    results = []
    for program in (own.program, plain(own.program)):
        run = compile_program(program)
        state = run.init(own.frozen.base, jnp.arange(MEMBERS), own.hyper)
        state = state._replace(params=jax.tree.map(jnp.copy, own.params), iteration=state.iteration + 3)
        drawn = run.draw(own.params, (), own.hyper, own.frozen, keys, jnp.zeros(MEMBERS, jnp.int32), 2)
        drawn = drawn._replace(judged=drawn.judged.at[:, 1].set(False))     # which has a record all the same
        results.append(run.update(state, own.hyper, own.frozen, drawn, rewards * jnp.arange(EPISODES)[None, :, None]))
    (state, parts, extreme, episodes), (other, other_parts, other_extreme, record) = results
    assert_same_record(episodes, record)
    for name in parts:
        np.testing.assert_allclose(parts[name], other_parts[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for x, y, start in zip(*map(jax.tree.leaves, (state.params, other.params, own.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4)         # Adam's first step is the gradient's sign
        assert x.shape == start.shape
    np.testing.assert_array_equal(extreme.position, other_extreme.position)


def test_minibatches_hold_whole_groups(case):
    """So that a group's opening is read once. Only the first group has an advantage: one minibatch of the two has a
    gradient, however they are drawn."""
    own = case("head")
    count = optax.GradientTransformation(lambda params: jnp.int32(0), lambda grads, seen, params: (
        jax.tree.map(jnp.zeros_like, grads), seen + (optax.global_norm(grads) > 0)))
    program = changed(own.program, minibatches=2, optimizer=optax.with_extra_args_support(count))
    assert scoring.cost_of_update(program, MEMBERS) == scoring.Cost(group=2, members=MEMBERS)
    params, hyper, episodes = jax.tree.map(lambda x: x[1], (own.params, own.hyper, own.episodes))
    hyper = hyper._replace(kl_coef=jnp.float32(0), entropy_coef=jnp.float32(0))
    rewards = jnp.zeros(episodes.mask.shape).at[0, 0].set(1.0)
    update = jax.jit(functools.partial(step.update, program))
    for iteration in range(6):
        state = TrainState(params, jnp.int32(0), jnp.int32(0), jnp.int32(iteration))
        new, *_ = update(state, hyper, own.frozen, episodes, rewards)
        assert int(new.opt_state) == 1


def test_a_linear_actor_is_read_in_every_way_alike(case):
    """Its table is trained, and is another one than the base's."""
    own = case("head", policy__actor="linear")
    assert own.program.execution.scorer == FUSED and own.params["actor"]["table"].shape[1] == 300
    assert_same_record(sample(own.program, own), own.episodes)
    assert_same_gradient(gradient(own.program, own), gradient(plain(own.program), own))
