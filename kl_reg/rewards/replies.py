"""From the rewards of replies to rewards on the agent stream. On the host."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kl_reg.envs.environment import Reply


def credit(replies: Sequence[Reply], rewards: np.ndarray, slot: np.ndarray, mask: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
    """Puts each reply's reward on the last agent token before the reply's end.

    Args:
        slot, mask: of the agent stream [b, k].

    Returns:
        Rewards [b, k], float32, and returns [b]: the sum over replies, those before the first agent token included.
    """
    stream, returns = np.zeros(mask.shape, np.float32), np.zeros(len(mask), np.float32)
    for reply, reward in zip(replies, rewards, strict=True):
        returns[reply.episode] += reward
        before = int((mask[reply.episode] & (slot[reply.episode] <= reply.end)).sum())
        if before:
            stream[reply.episode, before - 1] += reward
    return stream, returns
