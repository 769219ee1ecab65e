"""A small program with everything whose sums run over episodes, its recorded episodes, and three updates from them. It
is also what the processes of test_hosts.py run."""
from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_reg import config as configs
from kl_reg.models import decoder
from kl_reg.pretrained import weights
from kl_reg.program import Program
from kl_reg.sampling import rollout
from kl_reg.sharding import mesh as meshes
from kl_reg.training.build import build
from kl_reg.training.compile import compile_program
from kl_reg.types import Episodes, Frozen, Hyper
from tests.programs import descending

EPISODES, LENGTH, UPDATES = 16, 8, 3

SGD = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params),
                                   lambda grads, state, params: (grads, grads))
"""Moves along the gradient, and keeps it as its state."""


KINDS = {"full": dict(kind="full", rl__minibatches=2), "mixture": dict(kind="full", experts=4),
         "budget": dict(kind="head", rl__algorithm="ppo", rl__minibatches=2, rl__epochs=2, kl__budget=0.5,
                        kl__placement="reward", kl__estimator="k1", kl__controller="fixed", rl__group=1)}
KINDS["linear"] = KINDS["budget"] | dict(policy__actor="linear", kl__operation="mixture", kl__ledger="log_ratio")


class Case(NamedTuple):
    """A program, its base model, settings and seeds of its members, and parameters away from the start."""

    program: Program
    base: dict
    hyper: Hyper
    seeds: np.ndarray
    params: dict


class Update(NamedTuple):
    """What an update gave, all members: `rest` are the most extreme token and the controller."""

    metrics: dict
    gradient: dict
    params: dict
    rest: tuple


def case(folder: str, prompts: str, kind: str = "full", members: int = 1, experts: int = 0, **changes) -> Case:
    """One layer, prompts of several lengths, two episodes each, advantages of whole groups normalised, a controller;
    `changes` are settings with __ for the dot."""
    config = configs.default()
    config.model.path, config.policy.kind, config.policy.hidden, config.policy.layers = folder, kind, 8, 1
    config.env.name, config.env.openings, config.env.end, config.env.length = "completion", prompts, "e", LENGTH
    config.rl.algorithm, config.rl.group, config.rl.normalise, config.rl.episodes = "grpo", 2, True, EPISODES
    config.rl.value_coef, config.rl.entropy_coef, config.rl.epochs, config.optim.max_grad_norm = 0.5, 0.01, 1, 1e9
    config.kl.coef, config.kl.controller, config.kl.rate, config.kl.placement = 0.3, "pi", 0.5, "loss"
    config.optim.warmup, config.optim.learning_rate = 1, 0.01
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    static, hyper, _ = configs.split(config)
    model = weights.load(folder)
    shapes = dataclasses.replace(model.config, layers=1, experts=experts)
    base = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, decoder.init(shapes, jax.random.key(1)))
    program = descending(build(static, model._replace(config=shapes, params=base)), SGD)
    hyper = jax.tree.map(lambda x: np.full(members, x), hyper)._replace(
        kl_coef=np.linspace(0.3, 1.0, members, dtype=np.float32))
    seeds, rng = np.arange(members, dtype=np.int32), np.random.default_rng(0)
    state = compile_program(program).init(base, seeds, hyper)
    params = jax.tree.map(lambda x: np.float32(x + 0.02 * rng.standard_normal(x.shape)), jax.device_get(state.params))
    return Case(program, jax.device_get(base), hyper, seeds, params)


def mesh_of(**sizes):
    """Of the first devices, as many as the sizes make."""
    settings = configs.default().parallel
    settings.update(sizes)
    return meshes.mesh_of(settings, jax.devices()[:math.prod(sizes.values())])


_compiled = {}


def placed(own: Case, mesh, mode):
    """The compiled program, its state and what its functions take beside it, on the mesh (None: one device)."""
    key = id(own.program), mesh, mode
    if key not in _compiled:        # with the program, so that no other gets its id
        _compiled[key] = own.program, compile_program(own.program, mesh, mode)
    run = _compiled[key][1]
    frozen, (hyper, seeds) = Frozen(own.base), meshes.put_members((own.hyper, own.seeds), mesh)
    if mesh is not None:
        frozen = Frozen(meshes.put(own.base, meshes.model_shardings(own.base, mesh)))
    state = run.init(frozen.base, seeds, hyper)
    params = own.params if mesh is None else meshes.put(own.params, jax.tree.map(lambda x: x.sharding, state.params))
    return run, state._replace(params=params), hyper, frozen


def sample(own: Case, mesh=None, mode="jit") -> Episodes:
    """Episodes of the iteration 0, drawn on the mesh."""
    run, state, hyper, frozen = placed(own, mesh, mode)
    first = np.zeros(len(own.seeds), np.int32)
    first = meshes.put_members(first, mesh)
    keys = rollout.member_keys(state.seed, state.iteration)
    return run.draw(state.params, state.reference, hyper, frozen, keys, first, own.program.algorithm.group)


def rewards_of(episodes: Episodes) -> np.ndarray:
    """The mean of a completion's token ids, at its last token, [m, b, k]."""
    action, mask = np.asarray(episodes.action), np.asarray(episodes.mask)
    last = np.arange(mask.shape[-1]) == mask.sum(-1, keepdims=True) - 1
    mean = (action * mask).sum(-1) / np.maximum(mask.sum(-1), 1) / 100
    return np.float32(np.where(last & mask, mean[..., None], 0))


def judged_of(episodes: Episodes) -> np.ndarray:
    """Of 16 episodes all but 5: one of a group, a whole group, and both of a device's (of 8), [m, b]."""
    return np.broadcast_to(~np.isin(np.arange(EPISODES), (1, 6, 7, 12, 13)), episodes.mask.shape[:2])


def updates(own: Case, episodes: Episodes, mesh=None, mode="jit"):
    """Three updates from the same host episodes, not all of which are judged: metrics, gradient and parameters behind
    each, on the host."""
    episodes = episodes._replace(judged=judged_of(episodes))
    run, state, hyper, frozen = placed(own, mesh, mode)
    given = meshes.put_episodes((episodes, rewards_of(episodes)), mesh)
    out = []
    for _ in range(UPDATES):
        state, metrics, extreme, _ = run.update(state, hyper, frozen, *given)
        out.append(meshes.fetch(Update(metrics, state.opt_state, state.params, (extreme, state.controller))))
    return out, state


def assert_same_updates(got, expected, tolerance=1e-5):
    """To `tolerance` times an array's largest entry; metrics, some of which are differences, to 1e-5."""
    for one, other in zip(got, expected, strict=True):
        for name, value in other.metrics.items():
            if name == "kl/ledger_passes":      # a device stops when its own episodes' ledgers stand still
                continue
            np.testing.assert_allclose(one.metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        for part in ("gradient", "params"):
            pairs = zip(jax.tree_util.tree_leaves_with_path(getattr(other, part)),
                        jax.tree.leaves(getattr(one, part)), strict=True)
            for (path, value), own in pairs:
                np.testing.assert_allclose(own, value, rtol=0, atol=tolerance * np.abs(value).max(),
                                           err_msg=f"{part}{jax.tree_util.keystr(path)}")
        for own, value in zip(jax.tree.leaves(one.rest), jax.tree.leaves(other.rest), strict=True):
            np.testing.assert_allclose(own, value, rtol=1e-4, atol=1e-5)


def experiment(folder: str, prompts: str):
    """A short run of two members."""
    config = configs.default()
    config.model.path, config.policy.kind, config.policy.hidden, config.policy.layers = folder, "head", 8, 1
    config.env.name, config.env.openings, config.env.end, config.env.length = "completion", prompts, "e", LENGTH
    config.rl.algorithm, config.rl.group, config.rl.episodes, config.rl.iterations = "grpo", 2, 8, 3
    config.kl.coef, config.optim.learning_rate, config.evaluation.episodes = 0.3, 0.01, 8
    config.checkpoint.every, config.log.tensorboard = 1, False
    config.sweep = [{"seed": (0, 1)}]
    return config


ASKED = []
"""Of how many completions `reward` was asked at a time, in this process."""


def reward(completion_ids):
    """The mean of a completion's token ids."""
    ASKED.append(len(completion_ids))
    return [sum(ids) / max(len(ids), 1) / 100 for ids in completion_ids]
