"""Directions by name beside optax's own optimizers."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kl_reg import config as configs
from kl_reg import validation
from kl_reg.algorithms import optimizers
from kl_reg.config import default

PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([[0.5], [4.0]])}


def steps(transformation, rate=None):
    """Parameters behind three steps along gradients of one's own; with `rate` the updates are directions."""
    params, state = PARAMS, transformation.init(PARAMS)
    for k in range(3):
        gradients = jax.tree.map(lambda x, k=k: jnp.sin(x + k), params)
        updates, state = transformation.update(gradients, state, params)
        params = jax.tree.map(lambda x, u: x + (u if rate is None else -rate * u), params, updates)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def direction(**settings):
    config = default()
    for name, value in settings.items():
        config.optim[name] = value
    return optimizers.direction(config.optim)


@pytest.mark.parametrize("settings, peer", [
    ({}, optax.adam(0.1)), ({"beta1": 0.5, "beta2": 0.9, "eps": 1e-3}, optax.adam(0.1, 0.5, 0.9, 1e-3)),
    ({"name": "adamw", "weight_decay": 0.3}, optax.adamw(0.1, weight_decay=0.3)),
    ({"name": "optax.scale_by_lion", "options": {"b1": 0.8}}, optax.lion(0.1, b1=0.8, weight_decay=0.0)),
    ({"name": "optax.lion", "options": {"b1": 0.8, "weight_decay": 0.2}}, optax.lion(0.1, b1=0.8, weight_decay=0.2)),
    ({"name": "optax.sgd", "options": {"momentum": 0.9}}, optax.sgd(0.1, momentum=0.9))])
def test_steps_are_those_of_optax(settings, peer):
    np.testing.assert_allclose(steps(direction(**settings), rate=0.1), steps(peer), rtol=1e-5)


@pytest.mark.parametrize("changes, says", [
    ({"optim.name": "adamm"}, "optim.name='adamm' is unknown; .*did you mean 'adam'"),
    ({"optim.name": "optax.lion", "optim.options": {"b9": 1.0}}, "optim.options={'b9': 1.0}: optax.lion does not take"),
    ({"optim.name": "builtins.dict"}, "gives {}, no optax.GradientTransformation"),
    ({"optim.weight_decay": 0.1}, "optim.weight_decay=0.1 has no effect with optim.name='adam'"),
    ({"optim.options": {"b1": 0.9}}, "optim.options={'b1': 0.9} has no effect with optim.name='adam'"),
    ({"optim.beta2": 1.0}, "optim.beta2=1.0 must be a number of at least 0 and below 1"),
    ({"rl.loss_options": {"a": 1}}, "rl.loss_options={'a': 1} has no effect with rl.loss='ppo_clip'"),
    ({"reward.options": {"a": 1}}, "reward.options={'a': 1} has no effect with reward.name='vader'"),
    ({"kl.controller_options": {"a": 1}}, "has no effect with kl.controller='fixed'"),
    ({"env.options": {"a": 1}}, "has no effect with env.name='teacher_student'")])
def test_what_is_wrong_is_said_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        validation.validate(configs.override(default(), changes))
