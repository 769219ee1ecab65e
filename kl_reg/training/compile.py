"""A program's functions, jitted over a leading member axis, and over a mesh of devices."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from kl_reg.program import ALONE, Program
from kl_reg.sampling import rollout
from kl_reg.sharding import constraints
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.mesh import EPISODES
from kl_reg.training import scoring, step
from kl_reg.types import Episodes, Frozen, Hyper, TrainState


class Compiled(NamedTuple):
    """Jitted functions over a leading member axis.

    init(base, seeds, hyper) -> state.
    draw(params, memory, hyper, frozen, keys, first, group=1) -> episodes for `update`; `group` is static. Where the
        policy draws alone they lack their record.
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


def check_mesh(program: Program, mode: str, members: int, experts: int, mesh: Mesh | AbstractMesh) -> None:
    """Whether a program's members and episodes can be divided over the mesh.

    Args:
        experts: of the base model; 0: it is no mixture.

    Raises:
        ValueError: names the setting.
    """
    schedule, group = program.schedule, program.algorithm.group
    if members % mesh.shape["member"]:
        raise ValueError(f"parallel.member={mesh.shape['member']} must divide the members of each program of a sweep; "
                         f"one has {members}")
    devices = math.prod(mesh.shape[axis] for axis in EPISODES)
    if schedule.rows % devices:
        raise ValueError(f"parallel.data * parallel.fsdp={devices} must divide the episodes that are read at a time: "
                         f"they are {schedule.rows}, rl.episodes={schedule.episodes} over "
                         f"rl.minibatches={schedule.minibatches} and rl.accumulate={schedule.accumulate}")
    if mode == "pmap" and schedule.episodes // devices % group:
        raise ValueError(f"parallel.data={devices} with parallel.mode='pmap': the {schedule.episodes // devices} "
                         f"episodes of a device must be a multiple of rl.group={group}")
    if experts % mesh.shape["expert"] or not experts and mesh.shape["expert"] > 1:
        raise ValueError(f"parallel.expert={mesh.shape['expert']} must divide the model's experts; it has "
                         f"{experts or 'none'}")


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
    own = _functions(_part_of(program, count))

    def over(function, given, returned):
        return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=returned, check_vma=False)

    def drawing(function):
        @wraps(function)
        def call(params, memory, hyper, frozen, keys, first, group=1):
            def here(*args):
                return function(*args, first + jax.lax.axis_index("data") * (program.schedule.episodes // count), group)

            return over(here, (everywhere,) * 5, divided)(params, memory, hyper, frozen, keys)

        return call

    update = over(own.update, (everywhere,) * 3 + (divided,) * 2, (everywhere,) * 3 + (divided,))
    return Compiled(own.init, drawing(own.draw), drawing(own.sample), update)


def _part_of(program: Program, count: int) -> Program:
    """The program of one of `count` devices, each with its part of the episodes."""
    schedule = program.schedule._replace(episodes=program.schedule.episodes // count)
    return program._replace(schedule=schedule, execution=program.execution._replace(axis="data"))


def _functions(program: Program) -> Compiled:
    """The program's functions, before `jit`."""
    alone = program.execution.sampler == ALONE

    def init(base, seeds, hyper: Hyper):
        def one(seed, hyper):
            params = program.agent.policy.init(jax.random.fold_in(jax.random.key(seed), 2**31 - 1), base)
            return TrainState(params, program.algorithm.optimizer.init(params), seed, jnp.int32(0),
                              program.algorithm.controller.init(hyper), program.agent.reference.init(params))

        return constraints.constrain_state(jax.vmap(one)(seeds, hyper))

    def draw(params, memory, hyper: Hyper, frozen: Frozen, keys, first, group=1) -> Episodes:
        episodes = rollout.rollout(program, params, memory, frozen, scoring.caps_of(hyper), keys, first, group)
        return constraints.constrain(episodes, "member", EPISODES)

    def complete(params, frozen, episodes, group, terms) -> Episodes:
        cost = scoring.cost_of_batch(program, group, len(episodes.mask))
        return scoring.complete(program, params, frozen, episodes, cost, terms) if alone else episodes

    def sample(params, memory, hyper: Hyper, frozen: Frozen, keys, first, group=1) -> Episodes:
        episodes = draw(params, memory, hyper, frozen, keys, first, group)
        return constraints.constrain(complete(params, frozen, episodes, group, terms=True), "member", EPISODES)

    def update(state: TrainState, hyper: Hyper, frozen: Frozen, episodes: Episodes, rewards):
        known = not program.execution.update_records
        episodes = complete(state.params, frozen, episodes, program.algorithm.group, known)
        one = partial(step.update, program, members=len(state.seed))
        state, *said, episodes = over_members(one, (0, 0, None, 0, 0))(
            state, hyper, frozen, episodes, rewards)
        return constraints.constrain_state(state), *said, episodes._replace(features=(), reference=(), allowed=None)

    return Compiled(init, draw, sample, update)
