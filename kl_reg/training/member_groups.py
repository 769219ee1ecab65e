"""From a configuration to programs: members with the same static settings share one compiled program."""
from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg.pretrained import folders, weights
from kl_reg.program import Program
from kl_reg.runs import directory as run_directory
from kl_reg.runs.fingerprint import digest_of
from kl_reg.sharding import mesh as meshes
from kl_reg.training.build import build, own_parts
from kl_reg.training.compile import Compiled, check_mesh, compile_program
from kl_reg.types import Frozen, Hyper


class Group(NamedTuple):
    """The members of one program. `members` are their numbers in the sweep; `hyper` and `seeds` have a member axis;
    `digests` are of the reference's own weights, `functions` of pieces that are not the library's; all arrays lie on
    `mesh` (None: on one device)."""

    members: list[int]
    program: Program
    run: Compiled
    hyper: Hyper
    seeds: jax.Array
    frozen: Frozen
    digests: tuple[str, ...]
    functions: tuple[str, ...]
    mesh: Mesh | None = None


def plan(config: ConfigDict, model: weights.Model, loss: Callable | None = None, mesh: Mesh | None = None,
         first: int = 0) -> list[Group]:
    """The programs of a sweep; raises as `build.build` does. Base model, student and references are shared by all.

    Args:
        loss: instead of the one that `rl.loss` names.
        mesh: on which the model lies; None: on one device.
        first: the number of the first iteration.

    Raises:
        ValueError: the members or episodes of a program cannot be divided over the mesh.
    """
    load, student = functools.cache(partial(load_reference, mesh=mesh)), _student(config, mesh)
    groups = [_group(members, model, student, load, loss, mesh, first) for members in run_directory.groups(config)]
    for group in groups if mesh is not None else ():
        check_mesh(group.program, config.parallel.mode, len(group.members), model.config.experts, mesh)
    return groups


def base_group(groups: list[Group], config: ConfigDict, model: weights.Model) -> Group:
    """A program whose untrained policy is the base model: one of the sweep's, or one that is built for it."""
    for group in groups:
        if group.program.agent.reference.is_base:
            return group
    nothing = {"reference.name": "base", "reference.paths": (), **dict.fromkeys(configs.BUDGETS), "kl.spend": "neuron",
               "kl.carry": False}
    own = configs.override(configs.override(config, configs.members(config)[0]), nothing)
    loss = groups[0].program.algorithm.loss
    return _group([(0, own)], model, groups[0].frozen.student, load_reference, loss, groups[0].mesh)


def _group(members, model, student, load, loss, mesh, first=0):
    statics, hypers, seeds = zip(*(configs.split(own) for _, own in members), strict=True)
    settings = statics[0].config()
    frozen, start, digests = load(tuple(settings.reference.paths))
    built = build(statics[0], model, start, loss, first=first)
    hyper = jax.tree.map(lambda *x: np.stack(x), *hypers)
    hyper, seeds = meshes.put_members((hyper, np.array(seeds, np.int32)), mesh)
    return Group([number for number, _ in members], built,
                 compile_program(built, mesh, settings.parallel.mode), hyper, seeds,
                 Frozen(model.params, frozen, student), digests,
                 tuple(digest_of(part) for part in own_parts(statics[0], loss)), mesh)


def _student(config, mesh):
    """The parameters of another model than the base that plays the student."""
    path, name = config.env.student_model, "env.student_model"
    return weights.load(path, config.model.dtype, meshes.sharding_of(mesh), name).params if path else ()


def load_reference(paths: tuple[str, ...], mesh: Mesh | None = None) -> tuple:
    """A reference's own frozen parameters, or where it starts from; and digests of what was read."""
    if not paths:
        return (), None, ()
    address = run_directory.parse(paths[0])
    if address:
        member = run_directory.load(address.workdir, address.iteration)[address.member]
        return (), jax.tree.map(jnp.asarray, member.params), (member.digest,)
    models = [weights.load(path, sharding=meshes.sharding_of(mesh), setting="reference.paths") for path in paths]
    frozen = jax.tree.map(lambda *x: jnp.stack(x), *(model.params for model in models))
    if mesh is not None:
        frozen = jax.device_put(frozen, meshes.model_shardings(frozen, mesh))
    return frozen, None, tuple(folders.digest(model.folder) for model in models)


def hyper_of(config: ConfigDict) -> list[dict]:
    """What identifies each member in summaries, flat dotted keys: coefficient, budget, seed and all that is swept."""
    rows = [configs.flat(configs.override(config, member)) for member in configs.members(config)]
    keys = ["kl.coef", "kl.budget", "seed"] + [key for member in configs.members(config) for key in member]
    return [{key: row[key] for key in dict.fromkeys(keys)} for row in rows]
