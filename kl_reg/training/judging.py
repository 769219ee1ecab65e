"""What a batch of recorded episodes is worth: its rewards on the agent stream, and its metrics. On the host; of several
processes each asks the reward functions about its own episodes."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from kl_reg import hosts, rewards
from kl_reg.analysis.groups import kl_by_group
from kl_reg.analysis.recorded import summarise
from kl_reg.envs.environment import Reply
from kl_reg.rewards import Reward, replies
from kl_reg.types import Episodes


class Judges(NamedTuple):
    """`reward` is trained on; `gold`, where there is one, is measured beside it."""

    reward: Reward
    gold: Reward | None


class Answers(NamedTuple):
    """What the reward functions say of some of a batch's replies: those with these numbers."""

    numbers: list[int]
    reward: rewards.Scores
    gold: rewards.Scores | None


class Judgement(NamedTuple):
    """Of one policy's batch: its turns, rewards of the agent stream [b, k] and returns [b], in reward units, and the
    means of what else was asked."""

    turns: list[Reply]
    stream: np.ndarray
    returns: np.ndarray
    row: dict


def judge(program, judges: Judges, episodes: Episodes) -> Judgement:
    """Reads the turns of a batch [b, ...], asks the reward functions and credits what they say. It looks at what was
    said, not at the record.

    Raises:
        ValueError: a reward function raised, or gave something else than finite numbers.
    """
    return credit(program, episodes, hosts.everywhere(lambda: ask(program, judges, episodes)))


def ask(program, judges: Judges, episodes: Episodes) -> Answers:
    """Asks about the replies in this process's part of the episodes; groups stay together. Raises as `judge`."""
    count = len(episodes.mask) // program.group if len(episodes.mask) % program.group == 0 else len(episodes.mask)
    size, mine = len(episodes.mask) // count, hosts.share(count)
    turns = program.env.read(episodes.transcript)
    numbers = [i for i, turn in enumerate(turns) if turn.episode // size in mine]
    turns = [turns[i] for i in numbers]
    with jax.transfer_guard("allow"):       # a user's function may use the device as it likes
        return Answers(numbers, rewards.score(judges.reward, turns),
                       rewards.score(judges.gold, turns) if judges.gold else None)


def credit(program, episodes: Episodes, answers: Sequence[Answers]) -> Judgement:
    """The judgement of a batch, with the answers of all processes."""
    turns, order = program.env.read(episodes.transcript), np.argsort(np.concatenate([own.numbers for own in answers]))
    join = lambda *parts: np.concatenate(parts)[order]  # noqa: E731
    scores = jax.tree.map(join, *(own.reward for own in answers))
    stream, returns = replies.credit(turns, scores.total, episodes.slot, episodes.mask)
    row = {}
    if len(scores.parts) > 1:
        row |= {f"reward/{name}": _mean(values) for name, values in scores.parts.items()}
    if answers[0].gold:
        gold = jax.tree.map(join, *(own.gold for own in answers))
        row["gold/return"] = float(replies.credit(turns, gold.total, episodes.slot, episodes.mask)[1].mean())
    return Judgement(turns, stream, returns, row)


def describe(program, judged: Judgement, episodes: Episodes) -> dict:
    """The metrics of a batch [b, ...] with its record."""
    return {**summarise(episodes, judged.turns, judged.returns), **kl_by_group(episodes, program.groups), **judged.row}


def _mean(values):
    """Of those that the function has scored."""
    said = values[~np.isnan(values)]
    return float(said.mean()) if len(said) else None
