"""From the static settings of a configuration to a program: every name is looked up here."""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import algorithms, envs
from kl_reg.algorithms import advantages, optimizers, reductions
from kl_reg.config import Static
from kl_reg.envs.environment import Environment
from kl_reg.episodes.token_groups import token_groups
from kl_reg.kl import controllers, estimators
from kl_reg.kl.operations import OPERATIONS
from kl_reg.kl.spends import SPENDS, sampled_log_ratio
from kl_reg.policies import kinds as policies
from kl_reg.policies import student
from kl_reg.pretrained import embeddings, end_tokens, tokenizer, weights
from kl_reg.program import Agent, Algorithm, Program, Schedule, Task, fastest
from kl_reg.references import kinds as references
from kl_reg.runs import directory as run_directory
from kl_reg.runs.fingerprint import is_library
from kl_reg.training import optimizer
from kl_reg.types import Sampling


def build(static: Static, model: weights.Model, start=None, loss: Callable | None = None, cpu: bool | None = None,
          first: int = 0) -> Program:
    """The program of these settings, and how it is computed.

    Args:
        start: parameters of a run's member, where that is the reference.
        loss: instead of the one that `rl.loss` names.
        cpu: whether it is for a CPU; None: as JAX's backend says.
        first: the number of its first iteration.

    Raises:
        ValueError: an episode with its opening is longer than the model's context, a model has no embedding for a
            token of an opening, a marker or an end token, or `model.attention` cannot be had here.
    """
    config = static.config()
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"model.attention='cudnn': needs an NVIDIA GPU; JAX runs on {jax.default_backend()!r} here. "
                         "Choose '', or 'xla', its equal")
    rl, task = config.rl, _task(config, model)
    schedule = Schedule(rl.iterations, rl.episodes, rl.epochs, rl.minibatches, rl.accumulate, first)
    agent = _agent(config, model, start, static.constrained)
    if not agent.reference.proper:
        estimators.check_semi(static.kl())
    algorithm = _algorithm(config, static.kl(), loss, agent, first)
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return Program(agent, task, algorithm, schedule,
                   fastest(agent, task, algorithm, schedule, rl.entries, config.model.copies, cpu))


def own_parts(static: Static, loss: Callable | None = None) -> list:
    """The pieces of a program that are not the library's: with an edited one it is another experiment.

    Args:
        loss: instead of the one that `rl.loss` names.
    """
    config = static.config()
    rl, kl = config.rl, config.kl
    update = (loss or algorithms.LOSSES[rl.loss], advantages.ADVANTAGES[rl.advantage],
              reductions.REDUCTIONS[rl.reduction])
    named = ((envs.ENVIRONMENTS, config.env.name), (estimators.ESTIMATORS, estimators.canonical(kl.estimator)),
             (SPENDS, kl.spend), (OPERATIONS, kl.operation), (controllers.CONTROLLERS, kl.controller),
             (references.REFERENCES, config.reference.name), (policies.POLICIES, config.policy.kind),
             (optimizers.OPTIMIZERS, config.optim.name))
    return [*(part for part in update if not is_library(part)),
            *(registry[name] for registry, name in named if "." in name)]


def _task(config: ConfigDict, model) -> Task:
    words, other = tokenizer.load(model.folder), config.env.student_model
    env = envs.ENVIRONMENTS[config.env.name](config.env, words, frozenset(end_tokens.named(model.folder, words)))
    slots = env.openings.tokens.shape[1] + env.length
    if slots > model.config.max_position:
        raise ValueError(f"env.length={env.length} and an opening of {slots - env.length} tokens make {slots}; the "
                         f"model's context is {model.config.max_position}")
    if other and slots > weights.load_config(other).max_position:
        raise ValueError(f"env.length={env.length} and an opening of {slots - env.length} tokens make {slots}; the "
                         f"context of env.student_model={other!r} is {weights.load_config(other).max_position}")
    _check_embeddings(config, env, words, model)
    return Task(env, token_groups(words, config.env.end, config.log.groups.to_dict()),
                config.env.empty_tokens)


def _agent(config: ConfigDict, model, start, constrained) -> Agent:
    drawn, kl, other = Sampling(**config.sampling), config.kl, config.env.student_model
    shapes = dataclasses.replace(model.config, cache=config.model.cache, remat=config.model.remat,
                                 attention=config.model.attention)
    policy = policies.build(config.policy.kind, shapes, config.policy)
    writes = student.other(weights.load_config(other, config.model.dtype)) if other else student.base()
    spend, hard = SPENDS[kl.spend](config.policy.spend_levels), kl.ledger == "exact"
    spend = spend if hard else spend._replace(charge=sampled_log_ratio)
    rerun = hard and not SPENDS.facts(kl.spend)["drawn"]
    return Agent(policy, references.build(config.reference, policy, drawn, start), writes, drawn, constrained,
                 OPERATIONS[kl.operation], spend, kl.carry, rerun, kl.target_floor)


def _algorithm(config: ConfigDict, kl: estimators.KLConfig, loss, agent, first) -> Algorithm:
    rl, optim = config.rl, config.optim
    factor = optimizer.schedule(optim.warmup, optim.final, rl.iterations, first)
    controller = controllers.CONTROLLERS[config.kl.controller]
    return Algorithm(
        loss=loss or _with_options(algorithms.LOSSES[rl.loss], rl.loss_options),
        per_token=loss is None and algorithms.LOSSES.facts(rl.loss)["per_token"],
        advantage=advantages.ADVANTAGES[rl.advantage], reduction=reductions.REDUCTIONS[rl.reduction],
        kl=estimators.build(kl), controller=_with_options(controller, config.kl.controller_options)(
            rl.iterations, rl.episodes),
        group=rl.group, normalise=rl.normalise, learning_rate=factor,
        optimizer=optimizer.chain(optim.max_grad_norm, factor, agent.policy.labels, optimizers.direction(optim),
                                  optim.policy_grad_norm))


def _with_options(function: Callable, options) -> Callable:
    """The function with these arguments by name; itself where there are none."""
    return functools.partial(function, **options) if options else function


def _check_embeddings(config: ConfigDict, env: Environment, words, model):
    """Raises where a model that reads the episodes lacks a row for a token of an opening, a marker or an end token."""
    others = [("env.student_model", config.env.student_model)] * bool(config.env.student_model)
    others += [("reference.paths", path) for path in config.reference.paths if not run_directory.parse(path)]
    tables = [(f"model.path={config.model.path!r}", model.config.vocab),
              *((f"{setting}={path!r}", weights.load_config(path).vocab) for setting, path in others)]
    tokens = np.asarray(env.openings.tokens)
    for name, rows in tables:
        for row in np.flatnonzero((tokens >= rows).any(axis=1))[:1]:
            embeddings.check(tokens[row].tolist(), rows, f"opening {row + 1} of {len(tokens)}", name, words)
        embeddings.check(env.markers, rows, "env.end, env.teacher or env.student", name, words)
        embeddings.check(env.ends, rows, "the end tokens of the model", name, words)
