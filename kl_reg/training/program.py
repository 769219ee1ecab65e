"""A program: the compiled functions that all members with the same static settings share."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kl_reg import advantages, envs, losses, rollout
from kl_reg.config import Static
from kl_reg.envs.teacher_student import Environment
from kl_reg.kl import estimators
from kl_reg.models import policy, tokenizer, weights
from kl_reg.training import step
from kl_reg.types import Episodes, Hyper, TrainState


class Program(NamedTuple):
    """The objects that the static settings name, and the settings that the step reads."""

    policy: policy.Policy
    env: Environment
    loss: Callable
    advantage: Callable
    optimizer: optax.GradientTransformation
    constrained: bool
    kl: estimators.Placement
    normalise: bool
    iterations: int
    episodes: int
    epochs: int
    minibatches: int
    warmup: int
    final: float


def build(static: Static, model: weights.Model) -> Program:
    """Looks every name up.

    Raises:
        ValueError: an episode with its opening is longer than the model's context.
    """
    config = static.config()
    env = envs.ENVIRONMENTS[config.env.name](config.env, tokenizer.load(model.folder))
    slots = env.openings.tokens.shape[1] + env.length
    if slots > model.config.max_position:
        raise ValueError(f"env.length={env.length} and an opening of {slots - env.length} tokens make {slots}; the "
                         f"model's context is {model.config.max_position}")
    optimizer = optax.chain(optax.clip_by_global_norm(config.optim.max_grad_norm), optax.scale_by_adam())
    rl = config.rl
    placement = estimators.ESTIMATORS[config.kl.estimator].placements[config.kl.placement]
    return Program(policy.build(config.policy.kind, model.config, config.policy), env, losses.LOSSES[rl.loss],
                   advantages.ADVANTAGES[rl.advantage], optimizer, static.constrained, placement, rl.normalise,
                   rl.iterations, rl.episodes, rl.epochs, rl.minibatches, config.optim.warmup, config.optim.final)


class Compiled(NamedTuple):
    """Jitted functions over a leading member axis.

    init(base, seeds) -> state; sample(params, hyper, base, keys, first) -> episodes;
    update(state, hyper, base, episodes, rewards) -> (state, metrics), the state donated.
    """

    init: Callable
    sample: Callable
    update: Callable


def compile_program(program: Program) -> Compiled:
    """The program's functions; each compiles at its first call."""

    def init(base, seeds):
        def one(seed):
            params = program.policy.init(jax.random.fold_in(jax.random.key(seed), 2**31 - 1), base)
            return TrainState(params, program.optimizer.init(params), seed, jnp.int32(0))

        return jax.vmap(one)(seeds)

    def sample(params, hyper: Hyper, base, keys, first) -> Episodes:
        return rollout.rollout(program.policy, program.env, params, base, hyper.kl_budget, keys, first,
                               program.episodes, program.constrained)

    def update(state: TrainState, hyper: Hyper, base, episodes: Episodes, rewards):
        longest = episodes.mask.sum(-1).max()
        one = partial(step.update, program)
        return jax.vmap(one, in_axes=(0, 0, None, 0, 0, None))(state, hyper, base, episodes, rewards, longest)

    return Compiled(jax.jit(init), jax.jit(sample), jax.jit(update, donate_argnums=0))
