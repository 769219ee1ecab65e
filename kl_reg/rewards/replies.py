"""From the rewards of replies to rewards on the agent stream. On the host."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from kl_reg.envs.environment import Reply
from kl_reg.rewards.calls import Scores


class Credit(NamedTuple):
    """Rewards of the agent stream, and the `returns` of the episodes: the sum over replies, those before the first
    agent token included; NaN where the episode is not `judged`, because no function could judge any reply of it that
    they were asked about."""

    stream: Float32[np.ndarray, "b k"]
    returns: Float32[np.ndarray, " b"]
    judged: Bool[np.ndarray, " b"]


def credit(replies: Sequence[Reply], scores: Scores, slot: np.ndarray, mask: np.ndarray) -> Credit:
    """Puts each reply's reward on the last agent token before the reply's end. A reply that no function could judge
    adds nothing.

    Args:
        slot, mask: of the agent stream [b, k].
    """
    stream, returns = np.zeros(mask.shape, np.float32), np.zeros(len(mask), np.float32)
    for reply, reward in zip(replies, scores.total, strict=True):
        returns[reply.episode] += reward
        before = int((mask[reply.episode] & (slot[reply.episode] <= reply.end)).sum())
        if before:
            stream[reply.episode, before - 1] += reward
    asked, judged = (by_episode(replies, count, len(mask)) for count in (scores.asked, scores.judged))
    known = (asked == 0) | (judged > 0)
    return Credit(stream, np.where(known, returns, np.float32(np.nan)), known)


def by_episode(replies: Sequence[Reply], chosen: np.ndarray, episodes: int) -> np.ndarray:
    """How many of the chosen replies [n] are in each episode, [episodes]."""
    return np.bincount([reply.episode for reply in replies], chosen, episodes) if replies else np.zeros(episodes)
