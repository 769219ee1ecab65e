"""What a batch of recorded episodes is worth: its rewards on the agent stream, and its metrics. On the host."""
from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from kl_reg import rewards
from kl_reg.analysis.groups import kl_by_group
from kl_reg.analysis.recorded import summarise
from kl_reg.envs.environment import Reply
from kl_reg.rewards import Reward, replies
from kl_reg.types import Episodes


class Judges(NamedTuple):
    """`reward` is trained on; `gold`, where there is one, is measured beside it."""

    reward: Reward
    gold: Reward | None


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
    turns = program.env.read(episodes.transcript)
    with jax.transfer_guard("allow"):       # a user's function may use the device as it likes
        scores = rewards.score(judges.reward, turns)
        gold = rewards.score(judges.gold, turns) if judges.gold else None
    stream, returns = replies.credit(turns, scores.total, episodes.slot, episodes.mask)
    row = {}
    if len(scores.parts) > 1:
        row |= {f"reward/{name}": _mean(values) for name, values in scores.parts.items()}
    if gold:
        row["gold/return"] = float(replies.credit(turns, gold.total, episodes.slot, episodes.mask)[1].mean())
    return Judgement(turns, stream, returns, row)


def describe(program, judged: Judgement, episodes: Episodes) -> dict:
    """The metrics of a batch [b, ...] with its record."""
    return {**summarise(episodes, judged.turns, judged.returns), **kl_by_group(episodes, program.groups), **judged.row}


def _mean(values):
    """Of those that the function has scored."""
    said = values[~np.isnan(values)]
    return float(said.mean()) if len(said) else None
