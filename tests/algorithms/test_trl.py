"""Losses, advantages and reductions against TRL's, on the batch that record_trl.py gave to it."""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.algorithms import ALGORITHMS, LOSSES
from kl_reg.algorithms.advantages import ADVANTAGES, GROUPS
from kl_reg.algorithms.reductions import REDUCTIONS
from kl_reg.config import default, split

TRL = json.loads(pathlib.Path(__file__).with_name("trl.json").read_text())
LENGTHS, SLOT = np.array(TRL["lengths"])[:, None], np.arange(np.shape(TRL["old"])[1])
MASK = jnp.array(SLOT < LENGTHS)
OLD = jnp.where(MASK, jnp.array(TRL["old"]), 0.0)
REWARDS = jnp.where(SLOT == LENGTHS - 1, jnp.array(TRL["rewards"])[:, None], 0.0)      # at the last token


@functools.cache
def advantages_of(name):
    """[6, 4], of the groups one after the other."""
    one = jnp.float32(1.0)
    groups = [x.reshape(-1, TRL["group"], OLD.shape[1]) for x in (REWARDS, jnp.zeros_like(REWARDS), MASK)]
    over_groups = jax.vmap(ADVANTAGES[name], (0, 0, 0, None, None), axis_name=GROUPS)
    advantages, _, _ = jax.jit(over_groups)(*groups, one, one)
    return advantages.reshape(OLD.shape)


def clips_of(case):
    """Our names for TRL's settings."""
    if case["loss_type"] == "cispo":        # TRL: ratio at most epsilon_high, no lower bound
        return {"clip": 1.0, "clip_high": case["epsilon_high"] - 1}
    clips = {"clip": case["epsilon_low"], "clip_high": case["epsilon_high"]}
    return clips | ({"dual_clip": case["delta"]} if case["delta"] else {})


VARIANTS = {"two_sided": {"loss": "dual_clip"}, "batch": {"advantage": "group_batch"}}
"""Cases that are GRPO with another part."""


@pytest.mark.parametrize("name", TRL["cases"])
def test_the_algorithm_is_trls(name):
    case = TRL["cases"][name]
    algorithm = ALGORITHMS["grpo"]._replace(**VARIANTS[name]) if name in VARIANTS else ALGORITHMS[name]
    hyper = split(default())[1]._replace(**{key: jnp.float32(value) for key, value in clips_of(case).items()})
    advantages = advantages_of(algorithm.advantage)
    np.testing.assert_allclose(advantages, np.where(MASK, np.array(case["advantages"])[:, None], 0), rtol=1e-5)

    def loss(new):
        new = jnp.where(MASK, new, 0.0)
        x = jax.vmap(LOSSES[algorithm.loss], (0, 0, 0, 0, None))(new, OLD, advantages, MASK, hyper)
        return REDUCTIONS[algorithm.reduction](x, MASK, TRL["length"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(TRL["new"]))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, np.where(MASK, case["gradient"], 0), rtol=1e-4, atol=1e-7)


def test_leave_one_out_is_trls():
    expected = np.where(MASK, np.array(TRL["leave_one_out"])[:, None], 0)
    np.testing.assert_allclose(advantages_of(ALGORITHMS["rloo"].advantage), expected, rtol=1e-5)
