"""Contracts of every kind of policy, over the registry: a new kind is tested by being there."""
import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from kl_reg import config as configs
from kl_reg.kl.spends import SPENDS
from kl_reg.policies.actor import Situation
from kl_reg.policies.interface import POLICY, VALUE
from kl_reg.policies.kinds import POLICIES
from kl_reg.pretrained import weights
from kl_reg.sampling import rollout
from kl_reg.training import scoring
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.types import Frozen, Transcript
from tests.programs import changed

MEMBERS = 2


class Setup:
    """A compiled program of one kind, its first state, and sampling and scoring with any parameters."""

    def __init__(self, folder, kind, budget):
        config = configs.default()
        config.model.path, config.policy.kind, config.kl.budget = str(folder), kind, budget
        config.env.opening, config.env.length, config.rl.episodes = "<|start|>A: hi\n", 12, 4
        static, hyper, _ = configs.split(config)
        self.model = weights.load(config.model.path)
        self.program = build(static, self.model)
        self.compiled = compile_program(self.program)
        self.hyper = jax.tree.map(lambda x: jnp.broadcast_to(x, (MEMBERS,)), hyper)
        self.frozen = Frozen(self.model.params)
        self.params = self.compiled.init(self.model.params, jnp.arange(MEMBERS), self.hyper).params
        self._score = jax.jit(jax.vmap(partial(scoring.score, self.program), in_axes=(0, None, None, 0, 0)))

    def moved(self):
        """Parameters as training might leave them: all of them, zeros included, moved at random."""
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(x.dtype), self.params)

    def sample(self, params):
        keys = rollout.member_keys(jnp.arange(MEMBERS), jnp.zeros(MEMBERS, jnp.int32))
        return self.compiled.sample(params, (), self.hyper, self.frozen, keys, jnp.zeros(MEMBERS, jnp.int32))

    def score(self, params, episodes):
        return self._score(params, (), self.frozen, episodes, scoring.caps_of(self.hyper))


@pytest.fixture(scope="module")
def setups(tiny_folder):
    """(kind, budget) -> its setup, compiled once."""
    return functools.cache(partial(Setup, tiny_folder))


@pytest.fixture(params=[(kind, budget) for kind in POLICIES.names() for budget in (None, 2.0)],
                ids=lambda x: f"{x[0]}-{x[1]}")
def setup(request, setups):
    return setups(*request.param)


def test_the_first_policy_is_the_base(setup):
    episodes = setup.sample(setup.params)
    assert episodes.mask.sum() > MEMBERS
    assert np.abs(episodes.kl).max() < 1e-10
    assert np.abs(episodes.log_ratio).max() < 1e-5
    assert np.all(np.asarray(episodes.log_prob)[episodes.mask] < -0.1)      # it is not all zero


def test_the_first_ratio_is_one(setup):
    episodes = setup.sample(setup.params)
    ratio = np.exp(setup.score(setup.params, episodes).terms.log_prob - episodes.log_prob)
    np.testing.assert_allclose(ratio, 1.0, atol=1e-5)


def test_the_sampler_and_the_scorer_agree_on_a_moved_policy(setup):
    params = setup.moved()
    episodes = setup.sample(params)
    scores = setup.score(params, episodes)
    assert episodes.kl.sum() > 0.1                                          # it is no longer the base
    np.testing.assert_allclose(np.exp(scores.terms.log_prob - episodes.log_prob), 1.0, atol=1e-4)
    for name, new in (("kl", scores.terms.kl), ("entropy", scores.terms.entropy), ("value", scores.value)):
        recorded = getattr(episodes, name)
        np.testing.assert_allclose(new, recorded, atol=1e-4, err_msg=name)
        assert np.asarray(recorded[0])[episodes.mask[0]].std() > 1e-3               # and it depends on what was said


def test_the_first_value_is_zero_and_the_first_spend_is_as_configured(setup):
    episodes = setup.sample(setup.params)
    assert not episodes.value.any()
    one = jax.tree.map(lambda x: x[0], (setup.params, episodes.features))
    nats = jnp.full(episodes.mask.shape[1:], 3.0)
    reading = setup.program.agent.policy.read(one[0], setup.model.params, one[1], Situation(nats, nats / 6, nats / 6))
    np.testing.assert_allclose(reading.spend, 0.05, rtol=1e-5)


def test_members_start_from_seeds_of_their_own(setup):
    first, second = (jax.tree.map(lambda x, i=i: x[i], setup.params["scalars"]) for i in range(MEMBERS))
    assert not np.array_equal(first["value_hidden"]["kernel"], second["value_hidden"]["kernel"])
    episodes = setup.sample(setup.params)
    assert not np.array_equal(episodes.transcript.tokens[0], episodes.transcript.tokens[1])


@pytest.mark.parametrize(("kind", "own"), [("full", "trunk"), ("lora", "adapter")])
def test_the_value_does_not_move_the_finetuned_weights(setups, kind, own):
    setup = setups(kind, None)
    episodes = setup.sample(setup.params)
    params, episodes = jax.tree.map(lambda x: x[0], (setup.moved(), episodes))
    base, situation = setup.model.params, Situation(*[jnp.zeros(episodes.mask.shape)] * 3)

    @jax.jit
    @jax.jacrev
    def grads(params):
        features = setup.program.agent.policy.refresh(params, base, episodes)
        reading = setup.program.agent.policy.read(params, base, features, situation)
        return {"value": reading.value.sum(), "gap": (reading.gap**2).sum()}

    of = grads(params)
    assert not any(x.any() for x in jax.tree.leaves(of["value"][own]))
    assert of["value"]["scalars"]["value_hidden"]["kernel"].any()
    assert all(x.any() for x in jax.tree.leaves(of["gap"][own]))


def test_an_unknown_kind_lists_the_choices():
    with pytest.raises(ValueError, match="policy.kind='trunk'.*full, head, lora"):
        POLICIES["trunk"]


def test_a_full_policy_on_a_bfloat16_base_is_float32_and_begins_as_the_base(tiny_shapes, tiny_params):
    """Steps of 1e-4 would be lost on bfloat16 weights of 1; what is computed with them is rounded as the base's."""
    shapes = dataclasses.replace(tiny_shapes, dtype="bfloat16")
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    policy = POLICIES["full"](shapes, configs.default().policy)
    params = policy.init(jax.random.key(0), base)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda x: x + 1e-4, params["trunk"])
    assert all((old != new).any() for old, new in zip(*map(jax.tree.leaves, (params["trunk"], moved)), strict=True))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, shapes.vocab)
    transcript = Transcript(tokens, jnp.zeros_like(tokens), jnp.zeros_like(tokens), jnp.zeros(2, jnp.int32))
    features = policy.reread(params, base, transcript, jnp.tile(jnp.arange(1, 12), (2, 1)))
    assert features.policy.dtype == jnp.bfloat16
    reading = policy.read(params, base, features, Situation(*[jnp.zeros((2, 11))] * 3))
    assert reading.base_logits.any() and not reading.gap.any()


@pytest.mark.parametrize("spend", SPENDS.names())
@pytest.mark.parametrize("kind", POLICIES.names())
def test_the_value_loss_moves_the_value_head_alone(setups, kind, spend):
    """The remaining budget, which the value reads, is a function of actor and budget neuron; the trunk is read, too."""
    own = setups(kind, 2.0)
    params = jax.tree.map(lambda x: x[0], own.moved())
    episodes = jax.tree.map(lambda x: x[0], own.sample(own.moved()))
    caps = scoring.caps_of(jax.tree.map(lambda x: x[0], own.hyper))

    @jax.jit
    def gradient(params):
        def loss(params):
            program = changed(own.program, spend=SPENDS[spend](16))
            value = scoring.score(program, params, (), own.frozen, episodes, caps).value
            return jnp.where(episodes.mask, (value - 1.0) ** 2, 0.0).sum()

        return jax.grad(loss)(params)

    for path, grads in jax.tree_util.tree_leaves_with_path(gradient(params)):
        names = [key.key for key in path]
        is_value = names[0] == "scalars" and names[1].startswith("value")
        assert (np.abs(grads).max() > 1e-3) if is_value else not np.any(grads), names


def test_the_linear_actor_by_hand(tiny_shapes, tiny_params):
    """Logits base + W [last hidden states, situation, 1]; zero at first; the budget neuron sigmoid(w x + b), 1/17."""
    config = configs.default().policy
    config.actor, config.layers, config.critic_layers, config.spend_init = "linear", 2, 2, 1 / 17
    config.critic_activation = "tanh"
    policy = POLICIES["head"](tiny_shapes, config)
    params = policy.init(jax.random.key(0), tiny_params)
    rng = np.random.default_rng(0)
    features, nats = jnp.float32(rng.normal(size=(3, 32))), jnp.float32([1.0, 3.0, 0.5])
    situation = Situation(nats, nats / 4, nats / 8)
    reading = policy.read(params, tiny_params, features, situation)
    assert not reading.gap.any()
    np.testing.assert_allclose(reading.spend, 1 / 17, rtol=1e-5)
    moved = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    reading = policy.read(moved, tiny_params, features, situation)
    x, moved = np.concatenate([features, situation.inputs()], axis=1), jax.device_get(moved)
    np.testing.assert_allclose(reading.gap, np.append(x, np.ones((3, 1)), 1) @ moved["actor"]["table"].T, rtol=1e-4,
                               atol=1e-4)
    own = moved["scalars"]
    neuron = x @ own["spend"]["kernel"][:, 0] + own["spend"]["bias"][0]
    np.testing.assert_allclose(reading.spend, expit(neuron), rtol=1e-4)
    hidden = x
    for name in ("value_hidden", "value_hidden_1"):
        hidden = np.tanh(hidden @ own[name]["kernel"] + own[name]["bias"])
    value = hidden @ own["value"]["kernel"][:, 0] + own["value"]["bias"][0]
    np.testing.assert_allclose(reading.value, value, rtol=1e-4, atol=1e-4)
    labelled = policy.labels(params)
    assert labelled["scalars"]["value_hidden_1"]["kernel"] == VALUE and labelled["scalars"]["spend"]["bias"] == POLICY
    assert labelled["actor"]["table"] == POLICY
