"""What recorded episodes say: returns, KL, empty turns. On the host, numpy in and floats out."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kl_reg.analysis.stats import mean_and_error
from kl_reg.envs.teacher_student import Reply
from kl_reg.types import AGENT, STUDENT, Episodes


def ratio_and_error(events: np.ndarray, trials: np.ndarray) -> tuple[float | None, float | None]:
    """Events per trial and its standard error over episodes, whose trials are not independent; None without trials.

    Args:
        events, trials: counts [b] of each episode.
    """
    total = trials.sum()
    if total == 0:
        return None, None
    rate = events.sum() / total
    return float(rate), float(np.sqrt(((events - rate * trials) ** 2).sum()) / total)


def summarise(episodes: Episodes, replies: Sequence[Reply], returns: np.ndarray) -> dict:
    """Metrics of one member's batch [b, ...]; `_se` is the standard error over episodes.

    Returns:
        "return" (reward units per episode), "kl/nats_per_episode", "kl/nats_per_token", "entropy/nats_per_token",
        "replies" (finished, per episode), "teacher/silent_rate", "student/silent_rate" (of finished turns, None without
        one).
    """
    count = len(returns)
    tokens = episodes.mask.sum(-1)
    kl = episodes.kl.sum(-1, dtype=np.float64)
    finished = {role: np.zeros(count) for role in (AGENT, STUDENT)}
    silent = {role: np.zeros(count) for role in (AGENT, STUDENT)}
    for reply in replies:
        finished[reply.role][reply.episode] += reply.finished
        silent[reply.role][reply.episode] += reply.finished and not reply.text
    pairs = {"return": mean_and_error(returns), "kl/nats_per_episode": mean_and_error(kl),
             "kl/nats_per_token": ratio_and_error(kl, tokens),
             "entropy/nats_per_token": ratio_and_error(episodes.entropy.sum(-1, dtype=np.float64), tokens),
             "replies": mean_and_error(finished[STUDENT]),
             "teacher/silent_rate": ratio_and_error(silent[AGENT], finished[AGENT]),
             "student/silent_rate": ratio_and_error(silent[STUDENT], finished[STUDENT])}
    out = {}
    for name, (value, error) in pairs.items():
        out[name] = None if value is None else float(value)
        out[f"{name}_se"] = None if error is None or not np.isfinite(error) else float(error)
    return out
