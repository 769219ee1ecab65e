"""One policy by itself, a member of a run or a model: what `python -m launch.sample` reads and talks to."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import rewards
from kl_reg.analysis.compare import compare
from kl_reg.analysis.compare import policies as compared
from kl_reg.analysis.compare.policies import Side, Team
from kl_reg.envs.environment import Environment
from kl_reg.pretrained import folders, tokenizer, weights
from kl_reg.program import replace
from kl_reg.rewards import replies
from kl_reg.runs import directory as run_directory
from kl_reg.training.compile import compile_program
from kl_reg.types import Episodes

SHOWN = {"kl": ("exact KL to the reference", lambda terms: terms.kl),
         "surprisal": ("-log of the reference's probability", lambda terms: terms.log_ratio - terms.log_prob)}
"""What is shown of an agent token: its title, and nats of its `TokenTerms`."""


class Solo(NamedTuple):
    """`title` says which policy this is and what its KL is measured to; `team` has it alone; `config` is its run's, or
    the default one."""

    title: str
    team: Team
    model: weights.Model
    config: ConfigDict
    is_run: bool


def open_policy(name: str, openings: str, batch: int, changes: Mapping[str, str],
                length: int | None = None) -> Solo:
    """A policy with its parameters, in its environment.

    Args:
        name: RUN[:MEMBER][@ITERATION], or a model as in `model.path`.
        openings: "run": the run's own; "held_out": of held-out conversations.
        batch: episodes that are sampled at a time.
        changes: settings of `env` for a model, whose transcripts begin with its start of text or an end marker.
        length: of a model's episodes, tokens behind the opening; None: the default.

    Raises:
        ValueError: `name` is neither, or a run with several members; or a setting is wrong.
        FileNotFoundError: there is no such checkpoint.
    """
    address = run_directory.parse(name)
    if not address:
        words, env = tokenizer.load(_folder(name)), configs.default().env
        start = compared.special_tokens(words, env.opening)        # the default one, where this model has it as a token
        opening = start if tokenizer.opening(words, start) else env.end
        settings = {"opening": opening, "length": env.length if length is None else length} | changes
        side = compared.open_side(name, openings, batch, settings)
        return Solo(name, _alone(side, 0), side.model, side.config, False)
    if changes:
        raise ValueError(f"{', '.join(f'env.{key}' for key in changes)}: {name} is a run and has its own")
    side = compared.open_side(name, openings, batch, {})
    if len(side.numbers) > 1:
        choices = "; ".join(f"{setting.label}: {', '.join(str(row['member']) for row in setting.members)}"
                            for setting in compare.settings_of(address.workdir))
        raise ValueError(f"{name} has several members: choose one, as {address.workdir}:{side.numbers[0]} ({choices})")
    side = compared.load(side, address.iteration)
    return Solo(_title(side), _alone(side, side.numbers[0]), side.model, side.config, True)


def _folder(name):
    """Where a model is."""
    try:
        return folders.find(name)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{name!r} is no run as RUN[:MEMBER][@ITERATION] (there is no config.json of a run), and no "
                         f"model: {error}") from None


def _alone(side: Side, number: int) -> Team:
    place, i = side.place(number)
    team = side.teams[place]
    hyper, params, memory = jax.tree.map(lambda x: x[i:i + 1], (team.hyper, team.params, team.memory))
    return team._replace(numbers=[number], seeds=[team.seeds[i]], hyper=hyper, params=params, memory=memory)


def _title(side):
    number = side.numbers[0]
    setting, hyper = compare.setting_of(side.address.workdir, number)
    return (f"{side.address.workdir}:{number}@{side.iteration} · {setting.label}, seed {hyper['seed']} · "
            f"reference: {setting.measured}")


def in_env(team: Team, env: Environment) -> Team:
    """The team in another environment."""
    program = replace(team.program, task=team.program.task._replace(env=env))
    return team._replace(program=program, sample=compile_program(program).sample)


def sample(team: Team, count: int, seed: int) -> Episodes:
    """`count` episodes [count, ...] of a team of one (`policies.sample`)."""
    return jax.tree.map(lambda x: x[0], compared.sample(team, count, seed))


def at_slots(episodes: Episodes, nats: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b s"]:
    """Values of the agent stream at their tokens' slots of the transcript; 0 in other slots."""
    row, column = np.nonzero(episodes.mask)
    out = np.zeros(episodes.transcript.tokens.shape)
    out[row, episodes.slot[row, column]] = nats[row, column]
    return out


def returns(solo: Solo, episodes: Episodes) -> Float[np.ndarray, " b"]:
    """The return of each episode, by the reward of the run; NaN where the reward cannot judge it.

    Raises:
        ValueError, FileNotFoundError: the reward function cannot be had.
    """
    turns = solo.team.program.task.env.read(episodes.transcript)
    scores = rewards.score(rewards.build(solo.config.reward), turns)
    return replies.credit(turns, scores, episodes.slot, episodes.mask).returns
