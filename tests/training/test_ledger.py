"""The ledger in parallel against the same ledger token after token, as the sampler has it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kl_reg.kl import budget, operations
from kl_reg.kl.budget import Caps
from kl_reg.kl.operations import OPERATIONS
from kl_reg.kl.spends import SPENDS
from kl_reg.policies.interface import Factored, Policy, Reading, States
from kl_reg.references.interface import Measure
from kl_reg.sampling.agent_step import AgentState, At, choose, look, settle
from kl_reg.training import ledger, scoring
from kl_reg.types import AGENT, Episodes, Frozen, Transcript
from tests.programs import by_hand, changed

ROWS, TOKENS, VOCAB = 4, 12, 7
TABLE = jnp.eye(VOCAB) + jnp.float32(np.random.default_rng(0).normal(0, 0.3, (VOCAB, VOCAB)))
FROZEN = Frozen({"embed": 3 * jnp.eye(VOCAB, VOCAB + 1)})


def program(operation="tilt", carry=False, floor=0.0, spend="neuron", relative=True, cap=None, factored=False):
    """A policy that reads its features and where the budget stands; with `floor`, a reference that lacks mass; with
    `factored`, it says that its logits are products."""
    def states(params, base, features, situation):
        inputs = jnp.concatenate([features, situation.inputs()], axis=-1)
        own = jnp.tanh(inputs @ params["hidden"]) @ params["change"]
        return States(features, own if relative else own + features[..., :VOCAB], inputs @ params["value"],
                      jax.nn.sigmoid(inputs @ params["spend"] - 1.0))

    def read(params, base, features, situation):
        own, shape = states(params, base, features, situation), lambda z: z if cap is None else cap * jnp.tanh(z / cap)
        base_logits, product = shape(features @ base["embed"].T), own.policy @ TABLE.T
        gap = product if relative else shape(product) - base_logits
        return Reading(base_logits, gap, own.value, own.spend)

    policy = Policy(None, None, None, lambda params, base, episodes, group: episodes.features, None, read, relative,
                    True, Factored(states, lambda params, base: TABLE, False, cap) if factored else None)
    made = by_hand(policy, length=TOKENS, constrained=True, operation=OPERATIONS[operation], carry=carry,
                   spend=SPENDS[spend](4), rerun=spend != "sampled", chunk=4 * 5 * VOCAB, block=2 * VOCAB)
    if not floor:
        return made

    def lacking(memory, frozen, features, seen, situation, reading):
        floors = floor * jax.nn.sigmoid(features[..., 0])
        return Measure(jax.nn.log_softmax(reading.base_logits), reading.gap, floors, None)

    return changed(made, reference=made.agent.reference._replace(read=lacking, proper=False, is_base=False))


def case(seed, size):
    """Parameters, and episodes of unequal length in turns of some tokens, whose record is of another policy."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    width = VOCAB + 1
    params = {"hidden": size * normal(width + 3, 5), "change": size * normal(5, VOCAB), "value": normal(width + 3),
              "spend": normal(width + 3)}
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    mask = np.arange(TOKENS) < lengths[:, None]
    turns = np.cumsum(rng.random((ROWS, TOKENS)) < 0.3, axis=1).astype(np.int32)
    slot = np.where(mask, np.arange(TOKENS), 0).astype(np.int32)
    fields = dict.fromkeys(Episodes._fields, jnp.zeros(mask.shape)) | {
        "transcript": Transcript(jnp.zeros(mask.shape, jnp.int32), jnp.full(mask.shape, AGENT), jnp.asarray(turns),
                                 jnp.zeros(ROWS, jnp.int32)),
        "features": normal(ROWS, TOKENS, width), "reference": (), "allowed": None, "slot": jnp.asarray(slot),
        "action": jnp.asarray(rng.integers(0, VOCAB, mask.shape)), "mask": jnp.asarray(mask),
        "fraction": jnp.float32(rng.integers(0, 5, mask.shape) / 4),
        "kl": jnp.float32(rng.exponential(0.1, mask.shape)),
        "strength": jnp.float32(rng.random(mask.shape)), "asked": jnp.zeros(ROWS, bool), "judged": jnp.ones(ROWS, bool)}
    return params, Episodes(**fields), normal(7, ROWS, TOKENS)


def in_order(program, params, episodes, caps):
    """The scores of one token after the other; a ledger that an earlier one's cost has gone into stands before each."""
    agent = AgentState(params, (), jax.tree.map(lambda x: jnp.broadcast_to(x, (ROWS,)), caps))
    stream = episodes.features, episodes.slot, jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1), (
        episodes.mask), episodes.action, episodes.fraction

    def token(before, xs):
        features, slot, turn, mask, action, drawn = xs
        view = look(program, FROZEN, agent, At(slot, turn, mask), before, features, ())

        def row(measure, neuron, remaining, slot, action, drawn):
            choice = choose(program, measure, None, remaining, neuron, drawn, slot)
            terms, cost = settle(program, choice, action)
            return (*terms[:4], (terms.kl - choice.floor - choice.allowance) ** 2), cost

        said, cost = jax.vmap(row)(view.measure, view.reading.spend, view.remaining, slot, action, drawn)
        own = jnp.stack([*said, view.reading.value])
        return budget.charge(view.ledger, cost, mask), jnp.where(mask, own, 0.0)

    _, out = jax.lax.scan(token, budget.open_ledger((ROWS,)), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stream))
    return jnp.moveaxis(out, 0, -1)


def at_once(program, params, episodes, caps):
    scores = scoring.score(program, params, (), FROZEN, episodes, caps)
    return jnp.stack([*scores.terms[:4], scores.miss, scores.value]), scores.passes


MADE = {
    "tilt": {}, "mixture": {"operation": "mixture"}, "carry": {"carry": True}, "floor": {"floor": 0.02},
    "uniform": {"spend": "uniform"}, "sampled": {"spend": "sampled"}, "factored": {"factored": True},
    "factored mixture": {"factored": True, "operation": "mixture", "carry": True},
    "factored sampled": {"factored": True, "spend": "sampled"},
    "factored capped": {"factored": True, "relative": False, "cap": 2.0}}
PROGRAMS = {name: program(**made) for name, made in MADE.items()}


def weighted(read):
    """Values of a reading, and the gradient of their weighted sum."""
    def run(name, params, episodes, caps, weights):
        def total(params):
            made = read(PROGRAMS[name], params, episodes, caps)
            values, passes = made if isinstance(made, tuple) else (made, None)
            return (weights[:6] * values).sum(), (values, passes)

        (_, made), grads = jax.value_and_grad(total, has_aux=True)(params)
        return made, grads

    return jax.jit(run, static_argnums=0)


scan, parallel = weighted(in_order), weighted(at_once)


@pytest.fixture(autouse=True)
def exactly(monkeypatch):
    """A strength depends on where its search begins by less than what D may be below the allowance: here, by little. So
    does a gradient on where the ledger is taken to stand still."""
    monkeypatch.setattr(operations, "_CLOSE", 2e-6)
    monkeypatch.setattr(ledger, "_CLOSE", 1e-5)
    monkeypatch.setattr(ledger, "_SMALL", 0)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.4, 2.0]), st.sampled_from([0.1, 1.0, 5.0, np.inf]),
       st.sampled_from([0.05, 0.5, np.inf]), st.sampled_from([0.02, 0.3, np.inf]))
def test_values_and_gradients_are_those_of_the_scan(name, seed, size, whole, turn, token):
    """Whatever the record says, with tokens that the budget binds and others, and caps on turns and tokens. (Not with
    `greedy`: what is left behind a token that spends everything is rounding.)"""
    params, episodes, weights = case(seed, size)
    if np.isinf([whole, turn, token]).all():
        whole = 1.0
    caps = Caps(*(jnp.float32(x) for x in (whole, turn, token)))
    (expected, _), grads = scan(name, params, episodes, caps, weights)
    (got, passes), own = parallel(name, params, episodes, caps, weights)
    # Less than 2e-6 nats cannot be told from rounding, and a token's log-ratios are of the root of its nats.
    rounding = np.sqrt(expected[2] + 2e-6) - np.sqrt(expected[2])
    np.testing.assert_array_less(np.abs(got - expected), 2e-5 + 1e-4 * np.abs(expected) + 2 * rounding)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-4 * largest)
    assert "sampled" in name or passes.max() <= TOKENS + 1


@pytest.mark.parametrize("name", ["tilt", "mixture", "floor", "factored"])
def test_members_are_those_of_one_each(name):
    """One more pass for a member who needs it changes nothing of the others."""
    caps = Caps(jnp.float32([0.3, 2.0]), jnp.full(2, jnp.inf), jnp.full(2, jnp.inf))
    each = [case(seed, size) for seed, size in ((0, 0.01), (1, 2.0))]
    params, episodes, weights = jax.tree.map(lambda *x: jnp.stack(x), *each)
    run = jax.vmap(lambda *args: weighted(at_once)(name, *args))
    (values, passes), grads = run(params, episodes, caps, weights)
    assert len({float(x.max()) for x in passes}) == 2
    for i in range(2):
        (one, _), own = parallel(name, *each[i][:2], jax.tree.map(lambda x, i=i: x[i], caps), each[i][2])
        np.testing.assert_allclose(values[i], one, rtol=1e-5, atol=1e-6)
        for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(y[i], x, rtol=1e-4, atol=1e-5)


def test_with_a_small_vocabulary_it_is_the_scan_itself(monkeypatch):
    monkeypatch.setattr(ledger, "_SMALL", VOCAB + 1)
    params, episodes, weights = case(3, 0.4)
    caps = Caps(jnp.float32(1.0), jnp.float32(0.5), jnp.float32(np.inf))
    (expected, _), grads = scan("tilt", params, episodes, caps, weights)
    (got, passes), own = weighted(at_once)("tilt", params, episodes, caps, weights)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(passes, np.asarray(episodes.mask, np.float32))
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)
