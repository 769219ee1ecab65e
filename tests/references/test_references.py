"""Contracts of every kind of reference, of the ways to spend a budget, and of truncated sampling: one batch of each is
sampled and looked at. Oracles: the scorer, models run without a cache, and float64 numpy.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax, logsumexp

from kl_reg import config as configs
from kl_reg.kl import budget
from kl_reg.kl.spends import SPENDS
from kl_reg.models import decoder
from kl_reg.policies.actor import Situation
from kl_reg.pretrained import families, weights
from kl_reg.program import Program
from kl_reg.references.kinds import REFERENCES
from kl_reg.sampling import rollout
from kl_reg.training import member_groups, scoring
from kl_reg.training.compile import Compiled
from kl_reg.types import AGENT, PAD, Episodes, Frozen, Hyper, Sampling

MEMBERS, EPISODES, LENGTH = 2, 4, 14


class Case(NamedTuple):
    """A program with its parameters moved away from the start, and what was sampled with them [m, b, ...]."""

    program: Program
    run: Compiled
    frozen: Frozen
    hyper: Hyper
    state: object
    params: dict
    episodes: Episodes

    def sample(self, params, hyper=None):
        keys = rollout.member_keys(jnp.arange(MEMBERS), jnp.zeros(MEMBERS, jnp.int32))
        return self.run.sample(params, self.state.reference, hyper or self.hyper, self.frozen, keys,
                               jnp.zeros(MEMBERS, jnp.int32))

    def score(self):
        score = jax.jit(jax.vmap(functools.partial(scoring.score, self.program), in_axes=(0, 0, None, 0, 0)))
        return score(self.params, self.state.reference, self.frozen, self.episodes, scoring.caps_of(self.hyper))


@pytest.fixture(scope="module")
def imitators(tmp_path_factory, tiny_folder):
    """Three model folders of two layers with the tiny tokenizer; the first is the base."""
    folders = []
    model = weights.load(str(tiny_folder))
    shapes = dataclasses.replace(model.config, layers=2)
    for i in range(3):
        folder = tmp_path_factory.mktemp(f"imitator{i}")
        params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, decoder.init(shapes, jax.random.key(i)))
        weights.save(folder, families.llama_settings(shapes), params)
        (folder / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def case(imitators):
    """A function of settings -> Case, sampled once each."""

    @functools.cache
    def build(**settings):
        config = configs.default()
        config.model.path, config.policy.hidden, config.policy.layers = imitators[0], 8, 2
        config.env.opening, config.env.length, config.rl.episodes = "<|start|>A: hi\n", LENGTH, EPISODES
        config.policy.spend_init, config.env.end = 0.3, " "
        paths = {"checkpoint": 1, "mixture": 3, "pessimistic": 3}
        if settings.get("reference__name") in paths:
            config.reference.paths = tuple(imitators[-paths[settings["reference__name"]]:])
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
        (group,) = member_groups.plan(config, weights.load(imitators[0]))
        hyper = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (MEMBERS,)), group.hyper)
        state = group.run.init(group.frozen.base, jnp.arange(MEMBERS), hyper)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.float32(x + rng.normal(0, 0.3, x.shape)), jax.device_get(state.params))
        new = Case(group.program, group.run, group.frozen, hyper, state, params, None)
        return new._replace(episodes=new.sample(params))

    return build


KINDS = [{"reference__name": name, "policy__kind": "head"} for name in REFERENCES.names()] + [
    {"reference__name": name, "policy__kind": "lora" if name in ("sync", "mixture") else "full"}
    for name in REFERENCES.names()]
WAYS = [{"kl__budget": 2.0, "kl__spend": way} for way in SPENDS.names()]
OTHERS = [{"kl__turn_budget": 0.5, "kl__token_budget": 0.05},
          {"kl__token_budget": 0.1, "kl__carry": True, "kl__turn_budget": 0.6},
          {"sampling__top_p": 0.8, "sampling__temperature": 0.7}, {"sampling__top_k": 5, "kl__budget": 1.0},
          {"sampling__min_p": 0.05, "policy__kind": "full"}, {"kl__direction": "forward"},
          {"reference__name": "pessimistic", "kl__budget": 40.0, "kl__spend": "sampled"},
          {"reference__name": "mixture", "kl__budget": 2.0, "sampling__top_p": 0.9}]


def name_of(settings):
    return ",".join(f"{key.split('__')[-1]}={value}" for key, value in settings.items())


@pytest.mark.parametrize("settings", KINDS + WAYS + OTHERS, ids=name_of)
def test_scorer_agrees_with_the_sampler(case, settings):
    one = case(**settings)
    scores, episodes = one.score(), one.episodes
    assert episodes.mask.sum() > 10 and np.abs(episodes.kl).max() > 1e-3
    for name, values in (*scores.terms._asdict().items(), ("value", scores.value)):
        np.testing.assert_allclose(values, getattr(episodes, name), rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("settings", KINDS, ids=name_of)
def test_an_untrained_policy_is_at_the_reference_where_it_can_be(case, settings):
    """At the base and at its own average, and a head on whatever it moves: KL is the floor, the ratio 1."""
    one = case(**settings)
    if settings["policy__kind"] != "head" and settings["reference__name"] not in ("base", "ema", "sync"):
        assert one.sample(one.state.params).kl.max() > 0.01
        return
    episodes = one.sample(one.state.params)
    np.testing.assert_allclose(episodes.kl, episodes.floor, atol=1e-6)
    np.testing.assert_allclose(episodes.log_ratio, episodes.floor, atol=1e-5)
    assert one.program.agent.reference.proper == (not np.asarray(episodes.floor).any())


@pytest.mark.parametrize("settings", WAYS + OTHERS[:2] + OTHERS[3:4] + OTHERS[6:], ids=name_of)
def test_no_path_spends_more_than_any_cap(case, settings):
    episodes, hyper = case(**settings).episodes, case(**settings).hyper
    turns = np.take_along_axis(np.asarray(episodes.transcript.turns), np.asarray(episodes.slot), axis=-1)
    for m, b in np.ndindex(MEMBERS, EPISODES):
        mask = np.asarray(episodes.mask[m, b])
        kl, turn = np.float64(episodes.kl[m, b])[mask], turns[m, b][mask]
        assert kl.sum() <= float(hyper.kl_budget[m]) * (1 + 1e-5)
        assert (np.asarray(episodes.spent_before[m, b])[mask] <= float(hyper.kl_budget[m]) * (1 + 1e-5)).all()
        token = float(hyper.kl_token_budget[m])
        if settings.get("kl__carry"):
            assert (np.cumsum(kl) <= token * np.arange(1, len(kl) + 1) * (1 + 1e-5) + 1e-9).all()
        assert settings.get("kl__carry") or (kl <= token * (1 + 1e-5)).all()
        for count, number in enumerate(dict.fromkeys(turn), 1):
            allowed = float(hyper.kl_turn_budget[m]) * (count if settings.get("kl__carry") else 1)
            spent = kl[turn <= number].sum() if settings.get("kl__carry") else kl[turn == number].sum()
            assert spent <= allowed * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("way", SPENDS.names())
def test_ways_to_spend(case, way):
    """The part of what is left that each token may cost, and what is charged."""
    one = case(kl__budget=2.0, kl__spend=way)
    mask = np.asarray(one.episodes.mask)
    part = np.asarray(one.episodes.fraction)[mask]
    if way == "greedy":
        assert (part == 1).all()
    if way == "uniform":
        width = one.episodes.transcript.tokens.shape[-1] - LENGTH
        np.testing.assert_allclose(part, 1 / (LENGTH - (np.asarray(one.episodes.slot)[mask] - width)), rtol=1e-6)
    if way == "neuron":
        assert len(np.unique(part)) > 20 and (part > 0).all() and (part < 1).all()
    if way == "sampled":
        np.testing.assert_allclose(part * 16, np.round(part * 16), atol=1e-5)
        assert len(np.unique(part)) > 3
    spent = np.asarray(one.episodes.spent_before)
    charged = np.diff(spent, axis=-1)[np.asarray(one.episodes.mask[..., 1:])]
    exact = np.asarray(one.episodes.kl)[..., :-1][np.asarray(one.episodes.mask[..., 1:])]
    if way == "sampled":
        assert (charged >= exact - 1e-6).all() and (charged > exact + 1e-3).any()       # in full
    else:
        np.testing.assert_allclose(charged, exact, atol=1e-5)


# Imitators

def models_log_probs(paths, tokens):
    """log nu(token | before) of each model, [n, b, s - 1, v], without a cache."""
    rows = []
    for path in paths:
        model = weights.load(path)
        hidden = decoder.forward(model.config, model.params, tokens, jnp.zeros(len(tokens), jnp.int32)).last
        rows.append(log_softmax(np.float64(hidden @ decoder.unembedding(model.params).T), axis=-1)[:, :-1])
    return np.stack(rows)


def posterior_by_hand(models, tokens):
    """Log-weights [n, b, s - 1] before each token but the first."""
    said = np.take_along_axis(models, np.asarray(tokens)[None, :, 1:, None], axis=-1)[..., 0]
    before = np.concatenate([np.zeros((*said.shape[:2], 1)), np.cumsum(said, axis=-1)[..., :-1]], axis=-1)
    return log_softmax(before, axis=0)


@pytest.mark.parametrize("name", ["mixture", "pessimistic", "checkpoint"])
def test_imitators_and_their_posterior_without_a_cache(case, imitators, name):
    """The reference's log-probability of every agent token, recomputed in float64 along the whole transcript."""
    one, paths = case(reference__name=name, policy__kind="head"), imitators[-1:] if name == "checkpoint" else imitators
    for m in range(MEMBERS):
        tokens = one.episodes.transcript.tokens[m]
        models = models_log_probs(paths, tokens)
        log_weights = posterior_by_hand(models, tokens)
        rows = logsumexp(models + log_weights[..., None], axis=0)
        if name == "pessimistic":
            top = log_weights >= np.log(0.1) + log_weights.max(0)
            rows = np.where(top[..., None], models, np.inf).min(0)
        mask, slot = np.asarray(one.episodes.mask[m]), np.asarray(one.episodes.slot[m])
        at = np.arange(EPISODES)[:, None], slot - 1
        expected = rows[(*at, np.asarray(one.episodes.action[m]))][mask]
        got = np.asarray(one.episodes.log_prob[m] - one.episodes.log_ratio[m])[mask]
        np.testing.assert_allclose(got, expected, atol=2e-3)
        np.testing.assert_allclose(np.asarray(one.episodes.floor[m])[mask], -logsumexp(rows, axis=-1)[at][mask],
                                   atol=1e-3)
    assert name == "checkpoint" or np.exp(log_weights).max() > 0.6                 # the transcript has told something


def test_an_episode_asks_for_help_when_the_floor_is_above_what_is_left(case):
    """It ends there: nobody writes any more, and what was spent is within the budget."""
    one = case(reference__name="pessimistic", kl__budget=40.0, kl__spend="sampled")
    tight = one.sample(one.params, one.hyper._replace(kl_budget=jnp.array([0.0, 2.0])))
    asked, roles = np.asarray(tight.asked), np.asarray(tight.transcript.roles)
    assert asked[0].all() and not np.asarray(tight.mask[0]).any()
    assert (np.float64(tight.kl).sum(-1)[1] <= 2.0 * (1 + 1e-5)).all() and asked[1].any()
    for b in np.flatnonzero(asked[1]):
        end = np.flatnonzero(roles[1, b] != PAD)[-1]
        assert end < roles.shape[-1] - 1 and (roles[1, b, end + 1:] == PAD).all()
        assert (np.asarray(tight.transcript.turns)[1, b, end + 1:] == -1).all()


def test_the_average_follows_the_policy(case):
    """One update by hand, and a sync on its iteration only."""
    memory, params = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    follower = case(reference__name="ema", policy__kind="head").program.agent.reference
    average = follower.update(memory, params, jnp.int32(0))
    np.testing.assert_allclose(average["w"], 0.99 * np.array([1.0, 2.0]) + 0.01 * np.array([3.0, -2.0]), rtol=1e-6)
    synced = case(reference__name="sync", policy__kind="head").program.agent.reference
    for iteration, expected in ((0, memory), (8, memory), (9, params), (10, memory), (19, params)):
        np.testing.assert_array_equal(synced.update(memory, params, jnp.int32(iteration))["w"], expected["w"])


# Sampling

def test_temperature_scales_both(case, imitators):
    """log pi and log beta of every agent token at temperature 0.5, a finetuned copy, from logits without a cache."""
    one = case(policy__kind="full", sampling__temperature=0.5)
    tokens, slot = one.episodes.transcript.tokens[0], np.asarray(one.episodes.slot[0])
    mask, action = np.asarray(one.episodes.mask[0]), np.asarray(one.episodes.action[0])
    at = np.arange(EPISODES)[:, None], slot - 1, action
    own = jax.tree.map(lambda x: x[0], one.params["trunk"])
    shapes = weights.load_config(imitators[0])
    rows = []
    for params in (own, one.frozen.base):
        hidden = decoder.forward(shapes, params, tokens, jnp.zeros(EPISODES, jnp.int32)).last
        rows.append(log_softmax(np.float64(hidden @ decoder.unembedding(params).T) / 0.5, axis=-1)[at])
    np.testing.assert_allclose(np.asarray(one.episodes.log_prob[0])[mask], rows[0][mask], atol=2e-3)
    np.testing.assert_allclose(np.asarray(one.episodes.log_ratio[0])[mask], (rows[0] - rows[1])[mask], atol=2e-3)


def test_nobody_draws_what_the_reference_cuts(case, imitators):
    """Every token drawn, by the agent or the base, is among the five most probable of the base."""
    one = case(sampling__top_k=5, kl__budget=1.0)
    for m in range(MEMBERS):
        tokens, roles = one.episodes.transcript.tokens[m], np.asarray(one.episodes.transcript.roles[m])
        log_probs = models_log_probs(imitators[:1], tokens)[0]
        rank = (log_probs > np.take_along_axis(log_probs, np.asarray(tokens)[:, 1:, None], axis=-1) + 1e-4).sum(-1)
        written = (roles[:, 1:] == AGENT) | (roles[:, 1:] == 4)
        assert written.sum() > 20 and (rank[written] < 5).all()


@pytest.mark.parametrize("sampling, kept", [
    (Sampling(), [1, 1, 1, 1, 1]), (Sampling(top_k=2), [1, 1, 0, 0, 0]), (Sampling(top_p=0.7), [1, 1, 0, 0, 0]),
    (Sampling(top_p=0.71), [1, 1, 1, 0, 0]), (Sampling(min_p=0.3), [1, 1, 1, 0, 0]),
    (Sampling(top_p=0.01), [1, 0, 0, 0, 0]), (Sampling(top_k=4, min_p=0.5), [1, 1, 0, 0, 0])])
def test_kept_tokens_by_hand(sampling, kept):
    log_probs = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    np.testing.assert_array_equal(sampling.keep(log_probs), np.array(kept, bool))
    assert sampling.truncates == (not all(kept))


@pytest.mark.parametrize("logit", [-110.0, -20.0, 0.0, 17.0, 60.0])
def test_a_saturated_neuron_has_finite_gradients(case, logit):
    """The drawn part's log-probability, at every number of levels."""
    spend = case(kl__budget=2.0, kl__spend="sampled").program.agent.spend
    for count in (0, 3, 16):
        of = lambda z, count=count: spend.log_prob(jax.nn.sigmoid(z), jnp.float32(count / 16))  # noqa: E731
        value, slope = jax.value_and_grad(of)(jnp.float32(logit))
        assert jnp.isfinite(value) and jnp.isfinite(slope)
        if abs(logit) < 1:
            np.testing.assert_allclose(value, scipy.stats.binom.logpmf(count, 16, 0.5), rtol=1e-4)


def test_what_the_policy_knows_of_its_budget_is_bounded():
    """By hand: of an episode's budget the part that is left, whatever the other caps; else of the smallest cap."""
    caps = lambda *x: budget.Caps(*map(jnp.float32, x))  # noqa: E731
    ledger = budget.open_ledger(())._replace(spent=jnp.float32(5.0))
    inf = np.inf
    for given, nats, expected in ((caps(20, inf, 0.5), 0.5, 0.75), (caps(0, inf, inf), 0.0, 0.0),
                                  (caps(inf, 2, 1), 0.25, 0.25), (caps(inf, 2, inf), 19.0, 1.0),
                                  (caps(inf, inf, inf), inf, 0.0), (caps(4, inf, inf), 0.0, 0.0)):
        part = budget.part_left(given, ledger, jnp.float32(nats))
        np.testing.assert_allclose(part, expected, rtol=1e-6)
        inputs = Situation(jnp.float32(nats), part, jnp.float32(0.5)).inputs()
        assert ((inputs >= 0) & (inputs <= 1)).all()
