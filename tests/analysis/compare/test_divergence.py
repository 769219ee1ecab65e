"""Divergences between two policies against float64 enumeration over 3 symbols and 3 steps, and their summaries."""
from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, rel_entr, softmax

from kl_reg import config as configs
from kl_reg.analysis.compare import divergence
from kl_reg.analysis.compare.divergence import Writer, measure, summarise
from kl_reg.kl.budget import Caps
from kl_reg.policies.interface import Policy, Reading
from kl_reg.pretrained import families, weights
from kl_reg.sampling import rollout
from kl_reg.sampling.agent_step import AgentState
from kl_reg.training.build import build
from kl_reg.types import AGENT, OPENING, STUDENT, Frozen, Transcript
from tests.programs import by_hand

SEQUENCES = np.array(list(itertools.product(range(3), repeat=3)))
ROWS = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)
NONE = (np.inf, np.inf, np.inf)
TIGHT = (1.0, 0.5, np.inf)          # binds in the episode and in the turn


def tables(seed):
    rng = np.random.default_rng(seed)
    return {"logits": rng.normal(0, 2.0, (13, 3)), "neuron": rng.normal(0, 1, 13)}, rng.normal(0, 1, (13, 3))


def program(constrained):
    """A policy of two tables, one row a prefix; its budget neuron also looks at what is left and at the time."""
    def reread(params, base, transcript, slot):
        prefixes = [jnp.zeros(len(slot), int), 1 + transcript.tokens[:, 1],
                    4 + 3 * transcript.tokens[:, 1] + transcript.tokens[:, 2]]
        return jnp.take_along_axis(jnp.stack(prefixes, 1), slot - 1, axis=1)

    def read(params, base, features, situation):
        neuron = params["neuron"][features] + (situation.inputs() * jnp.array([[0.0, 1.0, -1.0]])).sum(-1)
        return Reading(base[features], params["logits"][features] - base[features], jnp.zeros(features.shape),
                       jax.nn.sigmoid(neuron))

    policy = Policy(None, None, None, None, reread, read, False, True)
    return by_hand(policy, constrained=constrained)


def writer(params, base, caps):
    single = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return Writer(AgentState(single(params), (), single(Caps(*caps))), Frozen(single(base)))


def transcript(roles, turns):
    """The 27 sequences, behind an opening of one token."""
    rows = lambda first, x: jnp.asarray(np.tile([first, *x], (27, 1)), jnp.int32)  # noqa: E731
    return Transcript(jnp.asarray(np.insert(SEQUENCES, 0, 0, axis=1), jnp.int32), rows(OPENING, roles),
                      rows(-1, turns), jnp.zeros(27, jnp.int32))


def measured(sides, roles=(AGENT,) * 3, turns=(0, 0, 2)):
    """Sides are (parameters, base, caps)."""
    both = tuple(program(caps != NONE) for *_, caps in sides)
    keys = jax.random.split(jax.random.key(0), 27)
    return np.asarray(measure(both, tuple(writer(*side) for side in sides), transcript(roles, turns), keys))


def enumerated(params, base, caps, roles=(AGENT,) * 3, turns=(0, 0, 2)):
    """log pi [27, 3, 3] at each step of each sequence in float64, with a ledger of its own."""
    out = np.zeros((27, 3, 3))
    for e, rows in enumerate(ROWS):
        spent = in_turn = 0.0
        for t, row in enumerate(rows):
            in_turn *= t > 0 and turns[t] == turns[t - 1]
            log_base, gap = log_softmax(base[row]), params["logits"][row] - base[row]
            left = max(min(caps[0] - spent, caps[1] - in_turn), 0.0)
            whole, rest = (min(caps), left) if np.isinf(caps[0]) else (caps[0], max(caps[0] - spent, 0.0))
            share = 0.0 if np.isinf(whole) else rest / whole
            allowance = np.inf if np.isinf(left) else expit(params["neuron"][row] + share - t / 3) * left
            kl = lambda a, log_base=log_base, gap=gap: rel_entr(  # noqa: E731
                softmax(log_base + a * gap), np.exp(log_base)).sum()
            strength = 1.0 if kl(1.0) <= allowance else brentq(lambda a: kl(a) - allowance, 0, 1, xtol=1e-15)  # noqa: B023,E501
            out[e, t] = log_softmax(log_base + strength * gap)
            if roles[t] == AGENT:
                spent, in_turn = spent + kl(strength), in_turn + kl(strength)
    return out


def divergences(log_p, log_q):
    p, q = np.exp(log_p), np.exp(log_q)
    middle = (p + q) / 2
    return np.stack([rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1),
                     (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / 2, np.abs(p - q).sum(-1) / 2], axis=-1)


CASES = [(NONE, NONE), (TIGHT, NONE), (NONE, TIGHT), (TIGHT, (0.3, np.inf, np.inf))]


@pytest.mark.parametrize("caps", CASES)
def test_every_token_is_the_enumerated_one(caps):
    sides = [(*tables(seed), cap) for seed, cap in zip((0, 1), caps, strict=True)]
    rows = [enumerated(*side) for side in sides]
    np.testing.assert_allclose(measured(sides), divergences(*rows), rtol=1e-3, atol=1e-5)
    for row, side in zip(rows, sides, strict=True):     # a budget that is there binds at most of the tokens
        bound = np.abs(row - enumerated(*side[:2], NONE)).max(-1) > 1e-3
        assert bound.mean() > 0.7 if side[2] != NONE else not bound.any()


@pytest.mark.parametrize("caps", CASES)
def test_the_sum_on_samples_of_a_is_the_kl_of_whole_sequences(caps):
    """Over all sequences, weighted by their probability under A: sum of D(A || B) against sum P log(P / Q)."""
    sides = [(*tables(seed), cap) for seed, cap in zip((0, 1), caps, strict=True)]
    log_p, log_q = (np.take_along_axis(enumerated(*side), SEQUENCES[..., None], 2).sum((1, 2)) for side in sides)
    numbers = measured(sides)
    assert (np.exp(log_p) * numbers[..., 0].sum(1)).sum() == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(),
                                                                           rel=1e-3)
    assert (np.exp(log_q) * numbers[..., 1].sum(1)).sum() == pytest.approx((np.exp(log_q) * (log_q - log_p)).sum(),
                                                                           rel=1e-3)


@pytest.mark.parametrize("roles", [(AGENT, STUDENT, AGENT), (STUDENT, AGENT, AGENT), (STUDENT, STUDENT, AGENT)])
def test_the_ledger_counts_the_agents_tokens_alone_and_the_others_are_zero(roles):
    sides = [(*tables(2), TIGHT), (*tables(3), NONE)]
    turns = tuple(itertools.accumulate(a != b for a, b in zip((AGENT, *roles), roles, strict=False)))
    expected = divergences(*(enumerated(*side, roles, turns) for side in sides))
    expected[:, np.array(roles) != AGENT] = 0
    np.testing.assert_allclose(measured(sides, roles, turns), expected, rtol=1e-3, atol=1e-5)


def test_swapped_sides_swap_the_two_kls():
    sides = [(*tables(4), TIGHT), (*tables(5), NONE)]
    there, back = measured(sides), measured(sides[::-1])
    np.testing.assert_array_equal(there[..., :2], back[..., 1::-1])
    np.testing.assert_allclose(there[..., 2:], back[..., 2:], rtol=1e-6)


@pytest.mark.parametrize("caps", [NONE, TIGHT])
def test_a_policy_is_not_away_from_itself(caps):
    side = (*tables(6), caps)
    np.testing.assert_array_equal(measured([side, side]), 0.0)


def some_numbers():
    """Six episodes of five positions, the last of which is never the agent's."""
    rng = np.random.default_rng(0)
    roles = rng.choice([AGENT, STUDENT], (6, 5))
    roles[:, 0], roles[:4, 1], roles[:, 4] = AGENT, AGENT, STUDENT
    turns = np.cumsum(roles != np.roll(roles, 1, axis=1), axis=1)
    numbers = np.where((roles == AGENT)[..., None], rng.exponential(1.0, (6, 5, 4)), 0.0)
    return numbers, roles, turns


def test_means_and_intervals_are_students():
    numbers, roles, turns = some_numbers()
    out = summarise(numbers, roles, turns)
    for i, key in enumerate(divergence.QUANTITIES):
        whole = stats.ttest_1samp(numbers[:, :, i].sum(1), 0.0)
        low, high = whole.confidence_interval()
        assert out["per_episode"][key] == pytest.approx({"mean": numbers[:, :, i].sum(1).mean(), "low": low,
                                                         "high": high})
        there = roles[:, 1] == AGENT
        column = stats.ttest_1samp(numbers[there, 1, i], 0.0).confidence_interval()
        assert out["by_position"][key]["mean"][1] == pytest.approx(numbers[there, 1, i].mean())
        assert (out["by_position"][key]["low"][1], out["by_position"][key]["high"][1]) == pytest.approx(tuple(column))
        assert out["by_position"][key]["mean"][4] is None and out["by_position"][key]["low"][4] is None
    assert out["by_position"]["agent_tokens"] == (roles == AGENT).sum(0).tolist()


def test_the_ratio_per_token_has_the_error_of_a_ratio_over_episodes():
    """Delta method: variance of (sum_e - r n_e) / mean(n) over episodes."""
    numbers, roles, turns = some_numbers()
    sums, counts = numbers[..., 0].sum(1), (roles == AGENT).sum(1)
    ratio = sums.sum() / counts.sum()
    half = stats.t.ppf(0.975, 5) * np.std(sums - ratio * counts, ddof=1) / np.sqrt(6) / counts.mean()
    out = summarise(numbers, roles, turns)
    assert out["agent_tokens_per_episode"] == pytest.approx(counts.mean())
    assert out["per_token"]["kl_ab"] == pytest.approx({"mean": ratio, "low": ratio - half, "high": ratio + half})


def test_turns_are_the_agents_own_and_an_episode_without_one_counts():
    roles = np.array([[AGENT, AGENT, STUDENT, AGENT], [AGENT, STUDENT, STUDENT, STUDENT]])
    turns = np.array([[0, 0, 1, 2], [0, 1, 1, 1]])
    numbers = np.array([[1.0, 2.0, 0.0, 4.0], [8.0, 0.0, 0.0, 0.0]])[..., None].repeat(4, -1)
    assert summarise(numbers, roles, turns)["by_turn"]["kl_ab"]["mean"] == [5.5, 2.0]


def test_an_infinite_divergence_is_not_left_out_of_the_mean():
    numbers, roles, turns = some_numbers()
    numbers[2, 0, 0] = np.inf
    out = summarise(numbers, roles, turns)
    nothing = {"mean": "inf", "low": None, "high": None}
    assert out["per_episode"]["kl_ab"] == nothing and out["per_token"]["kl_ab"] == nothing
    assert out["by_position"]["kl_ab"]["mean"][:2] == ["inf", pytest.approx(numbers[roles[:, 1] == AGENT, 1, 0].mean())]
    assert out["by_turn"]["kl_ab"]["mean"][0] == "inf" and np.isfinite(out["per_episode"]["kl_ba"]["mean"])


def test_without_a_token_of_the_agent_nothing_is_known():
    out = summarise(np.zeros((3, 2, 4)), np.full((3, 2), STUDENT), np.zeros((3, 2), int))
    assert out["per_token"]["kl_ab"]["mean"] is None and out["by_turn"]["kl_ab"]["mean"] == []


@pytest.mark.parametrize("kind, name", [("head", "mixture"), ("full", "ema")])
def test_what_is_read_along_a_transcript_is_what_the_sampler_read(tiny_folder, tmp_path, kind, name):
    """A mixture's posterior and a reference with a cache of its own, both without the sampler."""
    config = configs.default()
    model = weights.load(str(tiny_folder))
    changes = {"model.path": str(tiny_folder), "policy.kind": kind, "policy.hidden": 4, "env.length": 10,
               "env.openings": "fixed", "env.opening": "<|start|>A: hi\n", "rl.episodes": 3, "reference.name": name}
    if name == "mixture":
        other = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), model.params)
        weights.save(tmp_path / "other", families.llama_settings(model.config), other)
        (tmp_path / "other/tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
        changes["reference.paths"] = (str(tiny_folder), str(tmp_path / "other"))
    built = build(configs.split(configs.override(config, changes))[0], model)
    params = built.agent.policy.init(jax.random.key(2), model.params)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), params)
    models = [weights.load(path).params for path in changes.get("reference.paths", ())]
    frozen = Frozen(model.params, jax.tree.map(lambda *x: jnp.stack(x), *models) if models else ())
    memory = jax.tree.map(lambda x: 0.9 * x, built.agent.reference.init(params))
    caps, lift = Caps(*map(jnp.float32, NONE)), partial(jax.tree.map, lambda x: x[None])
    keys = rollout.member_keys(jnp.array([0]), jnp.array([0]))
    episodes = jax.jit(partial(rollout.rollout, built))(lift(params), lift(memory), frozen, lift(caps), keys,
                                                        jnp.array([0]))
    episodes = jax.tree.map(lambda x: x[0], episodes._replace(allowed=None))
    width = episodes.transcript.tokens.shape[1] - 10
    writer = Writer(AgentState(params, memory, caps), frozen)
    features, seen = jax.jit(lambda *x: divergence.inputs(built, *x, width))(writer, episodes.transcript)
    mask = np.asarray(episodes.mask)
    for whole, recorded in zip(jax.tree.leaves((features, seen)),
                               jax.tree.leaves((episodes.features, episodes.reference)), strict=True):
        position = np.where(mask, np.asarray(episodes.slot) - width, 0)
        along = np.take_along_axis(np.asarray(whole), position.reshape(*mask.shape, *[1] * (whole.ndim - 2)), axis=1)
        np.testing.assert_allclose(along[mask], np.asarray(recorded)[mask], rtol=1e-3, atol=1e-4)
    assert mask.sum() > 6 and jax.tree.leaves(seen)
