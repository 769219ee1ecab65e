"""How near a completion is to a wanted length."""
from __future__ import annotations

from collections.abc import Callable


def length(target: int) -> Callable[..., list[float]]:
    """A reward function: -|n - target| / target of a completion of n tokens; 0 at best, -1 of an empty one.

    The length term of LCPO-Exact with alpha = 1 / target. Source: Aggarwal and Welleck (2025), "L1: Controlling how
    long a reasoning model thinks with reinforcement learning".

    Raises:
        ValueError: `target` is less than 1.
    """
    if target < 1:
        raise ValueError(f"reward.target={target!r} must be at least 1 token")

    def nearness(completion_ids: list[list[int]], **columns) -> list[float]:
        return [-abs(len(ids) - target) / target for ids in completion_ids]

    return nearness
