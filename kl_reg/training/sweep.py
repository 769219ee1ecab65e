"""From a configuration to programs: members with the same static settings share one compiled program."""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg.models import weights
from kl_reg.training import program
from kl_reg.types import Hyper


class Group(NamedTuple):
    """The members of one program. `members` are their numbers in the sweep; `hyper` and `seeds` have a member axis."""

    members: list[int]
    program: program.Program
    run: program.Compiled
    hyper: Hyper
    seeds: jax.Array


def plan(config: ConfigDict, model: weights.Model) -> list[Group]:
    """The programs of a sweep; raises as `program.build` does. The base model is shared by all."""
    by_static = {}
    for number, member in enumerate(configs.members(config)):
        static, hyper, seed = configs.split(configs.override(config, member))
        by_static.setdefault(static, []).append((number, hyper, seed))
    groups = []
    for static, rows in by_static.items():
        numbers, hypers, seeds = zip(*rows, strict=True)
        built = program.build(static, model)
        groups.append(Group(list(numbers), built, program.compile_program(built),
                            jax.tree.map(lambda *x: jnp.stack(x), *hypers), jnp.array(seeds)))
    return groups


def hyper_of(config: ConfigDict) -> list[dict]:
    """What identifies each member in summaries, flat dotted keys: coefficient, budget, seed and all that is swept."""
    rows = [configs.flat(configs.override(config, member)) for member in configs.members(config)]
    keys = ["kl.coef", "kl.budget", "seed"] + [key for member in configs.members(config) for key in member]
    return [{key: row[key] for key in dict.fromkeys(keys)} for row in rows]
