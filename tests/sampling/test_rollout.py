"""Sampling. One batch of each kind of policy, with and without a budget, is sampled once and looked at from all sides.

Oracles: a walk over the transcript in plain Python, `decoder.forward` without a cache, float64 cumulative sums, and the
scorer, which reads recorded tokens instead of drawing them.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from kl_reg import config as configs
from kl_reg.models import decoder
from kl_reg.policies import student
from kl_reg.pretrained import weights
from kl_reg.program import Program
from kl_reg.sampling import rollout
from kl_reg.sampling.action import inverse_cdf
from kl_reg.training import build as builder
from kl_reg.training import scoring
from kl_reg.training.compile import Compiled, compile_program
from kl_reg.types import AGENT, FORCED, OPENING, PAD, STUDENT, Episodes, Frozen, Hyper, Openings
from tests.programs import changed

BUDGETS = (0.0, 0.1, 3.0, 20.0)
KINDS = [(kind, constrained) for kind in ("head", "full") for constrained in (False, True)]
END, TEACHER, STUDENT_PREFIX = "\n", "A:", "B:"
draw_of = jax.jit(inverse_cdf)


# Drawing one token

def draw(probs, uniform):
    with np.errstate(divide="ignore"):
        return int(draw_of(np.log(np.float32(probs)), np.float32(uniform)))


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; a vocabulary of 150 with zeros, which is no multiple of the block."""
    rng = np.random.default_rng(0)
    probs = rng.gamma(0.5, size=150) * (rng.random(150) > 0.3)
    probs[-3:] = 0
    probs /= probs.sum()
    uniforms = jax.random.uniform(jax.random.key(0), 20_000)
    with np.errstate(divide="ignore"):
        tokens = jax.jit(jax.vmap(inverse_cdf, (None, 0)))(np.log(np.float32(probs)), uniforms)
    counts, expected = np.bincount(tokens, minlength=150), 20_000 * probs
    assert (counts[probs == 0] == 0).all()
    common = expected >= 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    assert common.sum() > 50
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize("vocab", [3, 64, 65, 200])
def test_ends_of_the_distribution(vocab):
    """Uniform 0 gives the first possible token, and the largest uniform below 1 the last."""
    probs = np.zeros(vocab)
    probs[1:-1] = 1 / (vocab - 2)
    assert draw(probs, 0.0) == 1
    assert draw(probs, np.nextafter(np.float32(1), np.float32(0))) == vocab - 2


def test_draws_by_hand():
    probs = [0.0, 0.25, 0.0, 0.5, 0.25, 0.0]
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999)] == [1, 1, 3, 3, 4, 4]


rows = st.sampled_from([2, 64, 65, 130]).flatmap(
    lambda vocab: arrays.arrays(np.float32, vocab, elements=st.floats(-80, 0, width=32)))


@given(rows, st.data(), st.floats(0, 1, exclude_max=True, width=32))
def test_a_draw_is_possible_and_where_the_uniform_points(logits, data, uniform):
    impossible = data.draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1))
    logits[list(impossible)] = -np.inf
    assume(uniform == 0 or uniform > 1e-30)
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    token = int(draw_of(log_probs, uniform))
    assert token not in impossible
    probs = np.exp(np.float64(log_probs))
    cumulative = np.cumsum(probs)
    assert cumulative[token] - probs[token] - 1e-6 <= uniform * cumulative[-1] <= cumulative[token] + 1e-6


# Whole episodes

class Case(NamedTuple):
    """A program, parameters far from the base, and what was sampled with them [4, 4, ...]."""

    program: Program
    shapes: decoder.DecoderConfig
    compiled: Compiled
    pair: Compiled     # of two episodes
    base: dict
    frozen: Frozen
    fresh: dict                 # parameters as initialised
    params: dict                # perturbed
    hyper: Hyper
    score: Callable             # (params, episodes, hyper), of all members
    keys: jax.Array
    episodes: Episodes


def perturb(params, size, seed=0):
    """Adds noise to every array, in its own units; in units of 1 where it is zero."""
    rng = np.random.default_rng(seed)
    noise = lambda x: size * (x.std() if x.any() else 1.0) * rng.normal(size=x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x + noise(x), jnp.float32), jax.device_get(params))


@pytest.fixture(scope="module")
def case(tiny_folder):
    """A function (kind, constrained) -> Case; every one is compiled and sampled once.

    The model has two layers, which compile faster, and its next token is made surer.
    """
    model = weights.load(str(tiny_folder))
    params = model.params | {"embed": 3 * model.params["embed"],
                             "layers": jax.tree.map(lambda x: x[:2], model.params["layers"])}
    model = model._replace(config=dataclasses.replace(model.config, layers=2), params=params)

    @functools.cache
    def build(kind, constrained):
        config = configs.default()
        config.model.path, config.policy.kind, config.policy.hidden = str(tiny_folder), kind, 16
        config.env.opening, config.env.length, config.rl.episodes = "<|start|>A: hi\n", 24, 4
        config.policy.layers, config.policy.spend_init, config.kl.budget = 2, 0.3, 1.0 if constrained else None
        static, hyper, _ = configs.split(config)
        program = builder.build(static, model)
        compiled = compile_program(program)
        hyper = jax.tree.map(lambda x: jnp.broadcast_to(x, (4,)), hyper)
        if constrained:
            hyper = hyper._replace(kl_budget=jnp.array(BUDGETS))
        state, frozen = compiled.init(model.params, jnp.arange(4), hyper), Frozen(model.params)
        params, keys = perturb(state.params, 0.5), rollout.member_keys(state.seed, jnp.full(4, 7))
        episodes = compiled.sample(params, (), hyper, frozen, keys, jnp.zeros(4, jnp.int32))
        pair = compile_program(changed(program, episodes=2))

        def score(params, episodes, hyper):
            return scoring.score(program, params, (), frozen, episodes, scoring.caps_of(hyper))

        return Case(program, model.config, compiled, pair, model.params, frozen, state.params, params, hyper,
                    jax.jit(jax.vmap(score)), keys, episodes)

    return build


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{'budget' if p[1] else 'free'}")
def each(request, case):
    return case(*request.param)


@pytest.fixture(scope="module", params=["head", "full"])
def budgeted(request, case):
    return case(request.param, True)


def member(tree, k):
    """Member k alone, with its axis."""
    return jax.tree.map(lambda x: x[k:k + 1], tree)


def test_scorer_agrees_with_the_sampler(each):
    """Log-probabilities, KL, entropy and value: read from the recorded tokens, and as recorded when drawn."""
    episodes = each.episodes
    scores = each.score(each.params, episodes, each.hyper)
    assert np.abs(episodes.kl).max() > 0.05 and np.abs(episodes.value).max() > 0.01
    for name, values in (*scores.terms._asdict().items(), ("value", scores.value)):
        np.testing.assert_allclose(values, getattr(episodes, name), atol=1e-4, err_msg=name)


def test_scorer_under_other_parameters(each):
    """Fresh parameters on what perturbed ones drew: no KL, and the log-probabilities are the base's."""
    scores = each.score(each.fresh, each.episodes, each.hyper)
    np.testing.assert_allclose(scores.terms.kl, 0.0, atol=1e-8)
    np.testing.assert_allclose(scores.terms.log_prob, each.episodes.log_prob - each.episodes.log_ratio, atol=1e-4)


def test_kl_terms_are_consistent(each):
    """Non-negative KL, and the ledger is the sum of what the earlier tokens cost."""
    episodes = each.episodes
    assert (episodes.kl >= 0).all()
    before = np.cumsum(np.float64(episodes.kl), axis=-1) - episodes.kl
    np.testing.assert_allclose(episodes.spent_before, np.where(episodes.mask, before, 0), rtol=1e-5, atol=1e-6)


def test_fresh_policy_is_the_base(each):
    """KL and log-ratios are zero, with any budget."""
    episodes = each.compiled.sample(each.fresh, (), each.hyper, each.frozen, each.keys, jnp.zeros(4, jnp.int32))
    assert float(episodes.kl.max()) <= 1e-10
    np.testing.assert_allclose(episodes.log_ratio, 0.0, atol=2e-5)


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_no_episode_spends_more_than_its_budget(budgeted, size):
    """However far the proposal is off, and whatever the neuron says."""
    params = perturb(budgeted.fresh, size, seed=1)
    episodes = budgeted.compiled.sample(params, (), budgeted.hyper, budgeted.frozen, budgeted.keys,
                                        jnp.zeros(4, jnp.int32))
    spent = np.float64(episodes.kl).sum(-1)
    for budget, paths in zip(BUDGETS, spent, strict=True):
        assert paths.max() <= budget * (1 + 1e-5) + 1e-9
        assert paths.max() >= 0.5 * min(budget, 3.0)


def test_no_budget_is_the_base(budgeted):
    """Budget 0: nothing is spent, and a perturbed policy says what the base says."""
    fresh = budgeted.compiled.sample(budgeted.fresh, (), budgeted.hyper, budgeted.frozen, budgeted.keys,
                                     jnp.zeros(4, jnp.int32))
    nothing, something = (jax.tree.map(lambda x, k=k: x[k], budgeted.episodes) for k in (0, 3))
    assert float(nothing.kl.max()) <= 1e-6
    np.testing.assert_array_equal(nothing.transcript.tokens, fresh.transcript.tokens[0])
    assert (something.transcript.tokens != fresh.transcript.tokens[3]).any()


def assert_same_episodes(got, expected):
    np.testing.assert_array_equal(got.transcript.tokens, expected.transcript.tokens)
    np.testing.assert_array_equal(got.mask, expected.mask)
    for name in ("log_prob", "log_ratio", "kl", "entropy", "value", "spent_before"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_a_sample_depends_on_neither_neighbours_nor_batch(budgeted, k, first):
    """Member k alone, two episodes from `first` on: the same as in a batch of four members and four episodes."""
    solo = budgeted.pair.sample(member(budgeted.params, k), (), member(budgeted.hyper, k), budgeted.frozen,
                                budgeted.keys[k:k + 1], jnp.array([first]))
    expected = jax.tree.map(lambda x: x[k:k + 1, first:first + 2], budgeted.episodes)
    assert_same_episodes(solo, expected)


def test_members_and_episodes_differ(each):
    tokens = np.asarray(each.episodes.transcript.tokens).reshape(16, -1)
    assert len(np.unique(tokens, axis=0)) == 16


def test_left_padding_of_the_opening_changes_nothing(case):
    """Three slots of padding in front of the opening, whatever stands in them."""
    plain = case("head", True)
    openings = plain.program.task.env.openings
    padded = Openings(np.pad(openings.tokens, [(0, 0), (3, 0)], constant_values=5), openings.start + 3)
    program = changed(plain.program, env=plain.program.task.env._replace(openings=padded))
    got = compile_program(program).sample(plain.params, (), plain.hyper, plain.frozen, plain.keys,
                                                   jnp.zeros(4, jnp.int32))
    stripped = got.transcript._replace(tokens=got.transcript.tokens[..., 3:])
    assert_same_episodes(got._replace(transcript=stripped), plain.episodes)
    np.testing.assert_array_equal(jnp.where(got.mask, got.slot - 3, 0), plain.episodes.slot)


@pytest.mark.parametrize("first", [0, 4])
def test_the_episodes_of_a_group_have_one_opening(case, first):
    """Of eight openings; in groups of one they are those of the groups' first episodes."""
    plain = case("head", False)
    tokens = np.repeat(plain.program.task.env.openings.tokens, 8, axis=0)
    tokens[:, 0] = np.arange(8)
    openings = Openings(tokens, np.repeat(plain.program.task.env.openings.start, 8))
    program = changed(plain.program, env=plain.program.task.env._replace(openings=openings, length=2))
    sample = compile_program(program).sample
    given = plain.params, (), plain.hyper, plain.frozen, plain.keys, jnp.full(4, first)
    single, pairs = (sample(*given, size) for size in (1, 2))
    alone, opening = np.asarray(single.transcript.opening), np.asarray(pairs.transcript.opening)
    np.testing.assert_array_equal(opening, np.repeat(alone[:, ::2], 2, axis=1))
    assert (alone[:, 1::2] != alone[:, ::2]).any()
    np.testing.assert_array_equal(pairs.transcript.tokens[..., 0], opening)


def test_nobody_writes_behind_the_end_that_an_environment_makes(case):
    """Over after three tokens: as without an end up to there, and then padding."""
    plain = case("head", False)
    env = plain.program.task.env

    class State(NamedTuple):
        env: object
        turn: jax.Array
        written: jax.Array

    def turn(state):
        role, token = env.turn(state.env)
        return jnp.where(state.written >= 3, PAD, role), token

    def observe(state, token):
        inner = env.observe(state.env, token)
        return State(inner, inner.turn, state.written + 1)

    start = env.reset()
    ending = env._replace(reset=lambda: State(start, start.turn, jnp.int32(0)), turn=turn, observe=observe)
    got = compile_program(changed(plain.program, env=ending)).sample(
        plain.params, (), plain.hyper, plain.frozen, plain.keys, jnp.zeros(4, jnp.int32))
    end = env.openings.tokens.shape[1] + 3
    np.testing.assert_array_equal(got.transcript.tokens[..., :end], plain.episodes.transcript.tokens[..., :end])
    np.testing.assert_array_equal(got.transcript.roles[..., :end], plain.episodes.transcript.roles[..., :end])
    assert (got.transcript.roles[..., end:] == PAD).all() and not got.transcript.tokens[..., end:].any()
    assert (got.transcript.turns[..., end:] == -1).all() and not got.asked.any()


# Transcripts and streams

def walk(tokens, opening, markers):
    """Roles and turns of a transcript, by following the rules of the game."""
    end, student, teacher = markers
    roles, turns, writer, turn, forced = [OPENING] * opening, [-1] * opening, AGENT, 0, []
    for token in tokens[opening:]:
        turns.append(turn)
        if forced:
            assert token == forced.pop(0)
            roles.append(FORCED)
            continue
        roles.append(writer)
        if token == end:
            writer, turn, forced = (STUDENT, turn + 1, [student]) if writer == AGENT else (AGENT, turn + 1, [teacher])
    return roles, turns


@pytest.fixture(scope="module")
def markers(tiny_tokenizer):
    ids = [tiny_tokenizer.encode(text, add_special_tokens=False).ids for text in (END, STUDENT_PREFIX, TEACHER)]
    assert [len(x) for x in ids] == [1, 1, 1]
    return [x[0] for x in ids]


def test_transcripts_follow_the_rules_and_streams_the_transcripts(each, markers):
    """Every slot has its writer; the stream holds the agent's tokens in order and nobody else's."""
    seen = set()
    width = each.program.task.env.openings.tokens.shape[1]
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(16, *x.shape[2:]), each.episodes._replace(features=()))
    for e in range(16):
        tokens, roles = flat.transcript.tokens[e], flat.transcript.roles[e]
        expected_roles, expected_turns = walk(tokens.tolist(), width, markers)
        assert roles.tolist() == expected_roles and flat.transcript.turns[e].tolist() == expected_turns
        slots = np.flatnonzero(roles == AGENT)
        count = flat.mask[e].sum()
        assert count == len(slots) and flat.mask[e, :count].all()
        np.testing.assert_array_equal(flat.slot[e, :count], slots)
        np.testing.assert_array_equal(flat.action[e, :count], tokens[slots])
        for name in ("slot", "action", "log_prob", "log_ratio", "kl", "entropy", "value", "spent_before"):
            assert not getattr(flat, name)[e, count:].any()
        seen |= set(roles)
    assert seen == {OPENING, AGENT, FORCED, STUDENT}


@functools.partial(jax.jit, static_argnums=0)
def log_probs_without_cache(config, params, tokens):
    hidden = decoder.forward(config, params, tokens, jnp.zeros(len(tokens), jnp.int32)).last
    return jax.nn.log_softmax(hidden @ decoder.unembedding(params).T)


@pytest.mark.parametrize("own_student, temperature", [(False, 1.0), (True, 1.0), (True, 0.05)],
                         ids=["base", "another student", "a student of his own temperature"])
def test_every_token_is_the_draw_of_its_writer(case, own_student, temperature):
    """A whole batch recomputed without a cache, a scan or a mask: the finetuned copy's tokens and the student's.

    A token is where the uniform of its key (seed, iteration, episode, position) falls in the writer's distribution.
    """
    full, k = case("full", False), 1
    episodes, other = full.episodes, full.base
    if own_student:
        other = perturb(full.base, 0.5)
        sampling = dataclasses.replace(full.program.agent.sampling, student_temperature=temperature)
        program = changed(full.program, student=student.other(full.shapes), sampling=sampling)
        episodes = compile_program(program).sample(
            full.params, (), full.hyper, full.frozen._replace(student=other), full.keys, jnp.zeros(4, jnp.int32))
    episodes = jax.tree.map(lambda x: x[k], episodes)
    tokens, roles = np.asarray(episodes.transcript.tokens), np.asarray(episodes.transcript.roles)
    width = full.program.task.env.openings.tokens.shape[1]
    own = jax.tree.map(lambda x: x[k], full.params["trunk"])
    ours, base, theirs = (np.asarray(log_probs_without_cache(full.shapes, params, tokens))
                          for params in (own, full.base, other))
    key = jax.random.fold_in(jax.random.key(k), 7)
    agent_tokens = 0
    for e, s in itertools.product(range(len(tokens)), range(width, tokens.shape[1])):
        if roles[e, s] == FORCED:
            continue
        table = ours[e, s - 1] if roles[e, s] == AGENT else scipy.special.log_softmax(theirs[e, s - 1] / temperature)
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, e), s - width))
        assert tokens[e, s] == np.searchsorted(np.cumsum(np.exp(np.float64(table))), float(uniform), side="right")
        agent_tokens += roles[e, s] == AGENT
    assert agent_tokens == episodes.mask.sum() and (roles == STUDENT).any()
    slots, rows = np.asarray(episodes.slot), np.arange(len(tokens))[:, None]
    actions, mask = np.asarray(episodes.action), np.asarray(episodes.mask)
    log_prob, log_base = (table[rows, slots - 1, actions] for table in (ours, base))
    np.testing.assert_allclose(episodes.log_prob, np.where(mask, log_prob, 0), atol=1e-4)
    np.testing.assert_allclose(episodes.log_ratio, np.where(mask, log_prob - log_base, 0), atol=1e-4)
    kl = (np.exp(ours) * (ours - base)).sum(-1)[rows, slots - 1]
    np.testing.assert_allclose(episodes.kl, np.where(mask, kl, 0), atol=1e-4)
    entropy = -(np.exp(ours) * ours).sum(-1)[rows, slots - 1]
    np.testing.assert_allclose(episodes.entropy, np.where(mask, entropy, 0), atol=1e-4)


def test_a_head_reads_the_trunk_as_without_a_cache(case):
    """Recorded features are the last layers of one forward pass over the transcript; the base's log-probability too."""
    head = case("head", True)
    episodes = jax.tree.map(lambda x: x[2], head.episodes)
    tokens, slots = episodes.transcript.tokens, np.asarray(episodes.slot)
    forward = jax.jit(decoder.forward, static_argnums=(0, 4))
    hidden = forward(head.shapes, head.base, tokens, episodes.transcript.start, 2)
    rows, mask = np.arange(len(tokens))[:, None], np.asarray(episodes.mask)
    np.testing.assert_allclose(np.asarray(episodes.features)[mask], np.asarray(hidden.features)[rows, slots - 1][mask],
                               atol=1e-4)
    log_base = np.asarray(log_probs_without_cache(head.shapes, head.base, tokens))
    log_base = log_base[rows, slots - 1, np.asarray(episodes.action)]
    np.testing.assert_allclose((episodes.log_prob - episodes.log_ratio)[mask], log_base[mask], atol=1e-4)
