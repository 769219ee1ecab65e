"""A program: the compiled functions that all members with the same static settings share."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kl_reg import algorithms, envs
from kl_reg.algorithms import advantages, reductions
from kl_reg.config import Static
from kl_reg.envs.environment import Environment
from kl_reg.episodes.token_groups import TokenGroups, token_groups
from kl_reg.kl import controllers, estimators
from kl_reg.kl.spends import SPENDS
from kl_reg.policies import kinds as policies
from kl_reg.policies import student
from kl_reg.policies.interface import Alone, Policy
from kl_reg.pretrained import embeddings, end_tokens, tokenizer, weights
from kl_reg.references import kinds as references
from kl_reg.references.interface import Reference
from kl_reg.runs import directory as run_directory
from kl_reg.runs.fingerprint import is_library
from kl_reg.sampling import rollout
from kl_reg.sharding import constraints
from kl_reg.sharding import mesh as meshes
from kl_reg.sharding.batching import over_members
from kl_reg.training import scoring, step
from kl_reg.types import Episodes, Frozen, Hyper, Sampling, TrainState


class Program(NamedTuple):
    """The objects that the static settings name, and the settings that rollout and step read.

    `per_token`: whether the loss says so (`algorithms.LOSSES`). `cpu`: whether it is made for one. `axis` is that of
    the devices of which each runs this program on `episodes` of its own; None: there is one. `given`: pieces that a
    dotted path names, beside those of the loss.
    """

    policy: Policy
    reference: Reference
    student: student.Student
    env: Environment
    groups: TokenGroups
    sampling: Sampling
    kl: estimators.KL
    controller: controllers.Controller
    loss: Callable
    per_token: bool
    advantage: Callable
    reduction: Callable
    group: int
    optimizer: optax.GradientTransformation
    max_grad_norm: float | None
    constrained: bool
    spend: str
    levels: int
    carry: bool
    normalise: bool
    iterations: int
    episodes: int
    epochs: int
    minibatches: int
    accumulate: int
    entries: int
    copies: bool
    warmup: int
    final: float
    cpu: bool
    axis: str | None = None
    given: tuple = ()

    @property
    def parallel(self) -> bool:
        """Whether a token depends on nothing but what stands before it, so that many can be read at once."""
        plain = self.reference.is_base and not self.constrained and not self.sampling.truncates
        return self.policy.factored is not None and plain

    @property
    def deferred(self) -> bool:
        """Whether tokens are drawn at once, and compared with the base afterwards."""
        alone = self.policy.alone
        return self.parallel and alone is not None and (
            not self.env.students or alone.speaks and self.student.is_base)

    @property
    def once(self) -> bool:
        """Whether the one minibatch of an update is read under the policy that drew it, and needs no record of that."""
        return self.deferred and self.epochs * self.minibatches == 1 and self.kl.config.placement == "loss"

    @property
    def fused(self) -> bool:
        """Whether an update differentiates the loss of each token when it reads it."""
        return self.parallel and self.per_token and self.kl.config.reduction == "token"

    @property
    def writer(self) -> Policy | Alone:
        """What draws the agent's tokens."""
        return self.policy.alone if self.deferred else self.policy

    @property
    def formed(self) -> int:
        """Entries of tokens x vocabulary that are formed at a time. On a CPU longer products are no faster."""
        return min(self.entries, 2**25) if self.cpu else self.entries

    @property
    def cached(self) -> int | None:
        """Entries that are worked on at a time: on a CPU so many that its cache holds them. None: all of them."""
        return 2**19 if self.cpu else None

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The terms of a token that the loss may depend on; and in the forward direction its KL, which controllers and
        metrics read, and which is computed only if it is named."""
        exact = ("forward_kl",) if self.kl.config.direction == "forward" else ("kl",) * self.kl.exact_in_loss
        return "log_prob", "entropy", *exact

    def sharing(self, group: int) -> int:
        """How many episodes in a row of a member may read one opening together, in a batch where `group` in a row have
        the same: as many as have, where what they share can lie on the devices that they lie on."""
        if len(self.env.openings.start) == 1:
            return self.episodes
        return group if self.episodes // group % constraints.spread() == 0 else 1

    def cost(self, members: int) -> scoring.Cost:
        """Of an update: its minibatches' parts."""
        rows = self.episodes // self.minibatches // self.accumulate
        return self._cost(rows, rows if len(self.env.openings.start) == 1 else self.group, members)

    def cost_of_all(self, group: int, members: int) -> scoring.Cost:
        """Of a pass over a batch, in which `group` episodes in a row have the same opening."""
        return self._cost(self.episodes, self.sharing(group), members)

    def _cost(self, rows, group, members):
        # Over several devices the tokens of openings and of episodes would have to change places in every layer.
        return scoring.Cost(group if rows % group == 0 and constraints.spread() == 1 else 1, members)

    def own_parts(self) -> list:
        """What is not the library's: an edited one is another experiment."""
        return [*(part for part in (self.loss, self.advantage, self.reduction) if not is_library(part)), *self.given]


def build(static: Static, model: weights.Model, start=None, loss: Callable | None = None) -> Program:
    """Looks every name up.

    Args:
        start: parameters of a run's member, where that is the reference.
        loss: instead of the one that `rl.loss` names.

    Raises:
        ValueError: an episode with its opening is longer than the model's context, a model has no embedding for a
            token of an opening, a marker or an end token, or `model.attention` cannot be had here.
    """
    config = static.config()
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"model.attention='cudnn': needs an NVIDIA GPU; JAX runs on {jax.default_backend()!r} here. "
                         "Choose '', or 'xla', its equal")
    rl, kl, drawn = config.rl, config.kl, Sampling(**config.sampling)
    words = tokenizer.load(model.folder)
    env = envs.ENVIRONMENTS[config.env.name](config.env, words, frozenset(end_tokens.named(model.folder, words)))
    slots = env.openings.tokens.shape[1] + env.length
    if slots > model.config.max_position:
        raise ValueError(f"env.length={env.length} and an opening of {slots - env.length} tokens make {slots}; the "
                         f"model's context is {model.config.max_position}")
    other = config.env.student_model
    if other and slots > weights.load_config(other).max_position:
        raise ValueError(f"env.length={env.length} and an opening of {slots - env.length} tokens make {slots}; the "
                         f"context of env.student_model={other!r} is {weights.load_config(other).max_position}")
    _check_embeddings(config, env, words, model)
    shapes = dataclasses.replace(model.config, cache=config.model.cache, remat=config.model.remat,
                                 attention=config.model.attention)
    named = ((envs.ENVIRONMENTS, config.env.name), (estimators.ESTIMATORS, estimators.canonical(kl.estimator)),
             (SPENDS, kl.spend), (controllers.CONTROLLERS, kl.controller),
             (references.REFERENCES, config.reference.name), (policies.POLICIES, config.policy.kind))
    agent = policies.build(config.policy.kind, shapes, config.policy)
    measured = references.build(config.reference, agent, drawn, start)
    if not measured.proper:
        estimators.check_semi(static.kl())
    return Program(
        policy=agent, reference=measured, env=env,
        student=student.other(weights.load_config(other, config.model.dtype)) if other else student.base(),
        groups=token_groups(words, config.env.end, config.log.groups.to_dict()),
        sampling=drawn, kl=estimators.build(static.kl()), loss=loss or algorithms.LOSSES[rl.loss],
        per_token=loss is None and algorithms.LOSSES.facts(rl.loss)["per_token"],
        controller=controllers.CONTROLLERS[kl.controller](rl.iterations, rl.episodes),
        advantage=advantages.ADVANTAGES[rl.advantage], reduction=reductions.REDUCTIONS[rl.reduction], group=rl.group,
        optimizer=optax.scale_by_adam(), max_grad_norm=config.optim.max_grad_norm,
        constrained=static.constrained, spend=kl.spend, levels=config.policy.spend_levels, carry=kl.carry,
        normalise=rl.normalise, iterations=rl.iterations, episodes=rl.episodes, epochs=rl.epochs,
        minibatches=rl.minibatches, accumulate=rl.accumulate, entries=rl.entries, copies=config.model.copies,
        warmup=config.optim.warmup, final=config.optim.final, cpu=jax.default_backend() == "cpu",
        given=tuple(registry[name] for registry, name in named if "." in name))


def _check_embeddings(config, env, words, model):
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


class Compiled(NamedTuple):
    """Jitted functions over a leading member axis.

    init(base, seeds, hyper) -> state.
    draw(params, memory, hyper, frozen, keys, first, group=1) -> episodes for `update`; `group` is static. Of a program
        that is deferred they lack their record.
    sample: the same, with their record.
    update(state, hyper, frozen, episodes, rewards) -> (state, metrics, extreme, episodes with their record and without
        what the models read), the state donated.
    """

    init: Callable
    draw: Callable
    sample: Callable
    update: Callable


def compile_program(program: Program, mesh: Mesh | None = None, mode: str = "jit") -> Compiled:
    """The program's functions; each compiles at its first call.

    Args:
        mesh: that arguments lie on as `kl_reg.sharding.mesh` says; None: one device.
        mode: "jit": the compiler divides the program over the mesh; "pmap": each device along "data" runs it on its own
            part of the episodes, and what is a sum over episodes is added up.
    """
    run = _functions(program)
    if mesh is not None:
        own = _divided(run, mesh)
        run = own if mode == "jit" else _by_device(program, mesh)._replace(init=own.init)
    return Compiled(jax.jit(run.init), jax.jit(run.draw, static_argnames="group"),
                    jax.jit(run.sample, static_argnames="group"), jax.jit(run.update, donate_argnums=0))


def _divided(run: Compiled, mesh: Mesh) -> Compiled:
    """The same functions, in which arrays lie on the mesh as `kl_reg.sharding.mesh` says."""
    def over(function):
        @wraps(function)            # its argument `group` is static by name
        def call(*args, **static):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **static)
        return call

    return Compiled(*map(over, run))


def _by_device(program: Program, mesh: Mesh) -> Compiled:
    """The same functions, each device with its part of the episodes and all parameters."""
    count, everywhere, divided = mesh.shape["data"], P(), P(None, "data")
    own = _functions(program._replace(episodes=program.episodes // count, axis="data"))

    def over(function, given, returned):
        return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=returned, check_vma=False)

    def drawing(function):
        @wraps(function)
        def call(params, memory, hyper, frozen, keys, first, group=1):
            def here(*args):
                return function(*args, first + jax.lax.axis_index("data") * (program.episodes // count), group)

            return over(here, (everywhere,) * 5, divided)(params, memory, hyper, frozen, keys)

        return call

    update = over(own.update, (everywhere,) * 3 + (divided,) * 2, (everywhere,) * 3 + (divided,))
    return Compiled(own.init, drawing(own.draw), drawing(own.sample), update)


def _functions(program: Program) -> Compiled:
    """As they are, not jitted."""
    def init(base, seeds, hyper: Hyper):
        def one(seed, hyper):
            params = program.policy.init(jax.random.fold_in(jax.random.key(seed), 2**31 - 1), base)
            return TrainState(params, program.optimizer.init(params), seed, jnp.int32(0),
                              program.controller.init(hyper), program.reference.init(params))

        return constraints.constrain_state(jax.vmap(one)(seeds, hyper))

    def draw(params, memory, hyper: Hyper, frozen: Frozen, keys, first, group=1) -> Episodes:
        episodes = rollout.rollout(program, params, memory, frozen, scoring.caps_of(hyper), keys, first, group)
        return constraints.constrain(episodes, "member", meshes.EPISODES)

    def complete(params, frozen, episodes, group, terms) -> Episodes:
        cost = program.cost_of_all(group, len(episodes.mask))
        return scoring.complete(program, params, frozen, episodes, cost, terms) if program.deferred else episodes

    def sample(params, memory, hyper: Hyper, frozen: Frozen, keys, first, group=1) -> Episodes:
        episodes = draw(params, memory, hyper, frozen, keys, first, group)
        return constraints.constrain(complete(params, frozen, episodes, group, terms=True), "member", meshes.EPISODES)

    def update(state: TrainState, hyper: Hyper, frozen: Frozen, episodes: Episodes, rewards):
        episodes = complete(state.params, frozen, episodes, program.group, not program.once)
        longest = episodes.mask.sum(-1).max()
        one = partial(step.update, program, members=len(state.seed))
        state, *said, episodes = over_members(one, (0, 0, None, 0, 0, None))(
            state, hyper, frozen, episodes, rewards, longest)
        return constraints.constrain_state(state), *said, episodes._replace(features=(), reference=(), kept=None)

    return Compiled(init, draw, sample, update)
