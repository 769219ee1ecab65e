"""A policy of two tables over 3 symbols and 3 steps, one row a prefix: the proposal's logits and a budget neuron."""
from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from kl_reg import config as configs
from kl_reg.policies.interface import Policy, Reading
from kl_reg.types import AGENT, OPENING, Episodes, Transcript
from tests.programs import by_hand

SEQUENCES = np.array(list(itertools.product(range(3), repeat=3)))
ROWS = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)


def tables(seed):
    """Parameters, base logits, and the reward [27, 3] of each token, given it and those before; the policy is far off.
    """
    rng = np.random.default_rng(seed)
    params = {"logits": rng.normal(0, 2.5, (13, 3)), "neuron": rng.normal(0, 1, 13)}
    return params, rng.normal(0, 1, (13, 3)), rng.normal(0, 1, (13, 3))[ROWS, SEQUENCES]


def program(constrained, looks=0.0, **settings):
    """A program whose policy reads tables; the features of a token are the row of its prefix. The budget neuron adds
    `looks` times the part of the budget that is left."""

    def read(params, base, features, situation):
        logits, neuron = params["logits"][features], params["neuron"][features] + looks * situation.part
        return Reading(base[features], logits - base[features], jnp.zeros(features.shape), jax.nn.sigmoid(neuron))

    policy = Policy(None, None, None, lambda params, base, episodes, group: episodes.features, None, read, False, True)
    return by_hand(policy, constrained=constrained, **settings)


def hyper(budget, kl_coef=0.0):
    """Undiscounted, without a value function."""
    values = configs.split(configs.default())[1]._replace(kl_coef=kl_coef, kl_budget=budget, gae_lambda=1.0)
    return jax.tree.map(jnp.float32, values._replace(value_coef=0.0))


def all_episodes():
    """The 27 sequences, behind an opening of one token."""
    slot, nothing = np.broadcast_to(np.arange(1, 4), (27, 3)), np.zeros((27, 3), np.float32)
    transcript = Transcript(np.insert(SEQUENCES, 0, 0, axis=1), np.tile([OPENING] + [AGENT] * 3, (27, 1)),
                            np.tile([-1, 0, 0, 0], (27, 1)), np.zeros(27, int))
    fields = dict.fromkeys(Episodes._fields, nothing) | {
        "transcript": transcript, "features": ROWS, "reference": (), "allowed": None, "slot": slot, "action": SEQUENCES,
        "mask": np.ones((27, 3), bool), "asked": np.zeros(27, bool), "judged": np.ones(27, bool)}
    return jax.tree.map(jnp.asarray, Episodes(**fields))


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
