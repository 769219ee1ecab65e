"""What recorded episodes say: returns, KL and where it sits, empty turns. On the host, numpy in and floats out."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kl_reg.envs.environment import Reply
from kl_reg.types import AGENT, OPENING, STUDENT, Episodes

_COUNTS = ("tokens", "val/num_eos_tokens", "episodes")


def means(columns: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Means over episodes and, as `<name>_se`, their standard errors s / sqrt(b), s over b - 1; None of one episode.
    Without an episode the means, too, are None.

    A value that is not finite is part of the mean: the training loop stops at it.

    Args:
        columns: [b] of each name.
    """
    values = np.stack([np.asarray(column, np.float64) for column in columns.values()])
    some = np.full(len(values), values.shape[1] > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = values.sum(1) / max(values.shape[1], 1)
        return _row(columns, mean, _error(values - mean[:, None]), some)


def rates(columns: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    """Totals of events over totals of trials and, as `<name>_se`, their standard errors over episodes, whose trials are
    not independent: that of the mean of (events - rate * trials), over the mean of trials. None without trials.

    Source: Cochran (1977), "Sampling Techniques", chapter 6 (the ratio estimator).

    Args:
        columns: (events, trials) [b] of each name.
    """
    events, trials = (np.stack([np.asarray(pair[i], np.float64) for pair in columns.values()]) for i in range(2))
    count = trials.mean(1)
    some = count > 0
    with np.errstate(invalid="ignore", over="ignore"):
        rate = events.mean(1) / np.where(some, count, 1.0)
        error = _error(events - rate[:, None] * trials) / np.where(some, count, 1.0)
    return _row(columns, rate, error, some)


def _error(centred):
    """The standard error of the mean of each row [n, b] that is zero in the mean."""
    b = centred.shape[1]
    return np.sqrt((centred**2).sum(1) / b / (b - 1)) if b > 1 else np.full(len(centred), np.nan)


def _row(names, values, errors, known):
    out = {}
    for name, value, error, here in zip(names, values.tolist(), errors.tolist(), known.tolist(), strict=True):
        out[name] = value if here else None
        out[f"{name}_se"] = error if here and np.isfinite(error) else None
    return out


def pooled(rows: Sequence[Mapping]) -> dict[str, float | None]:
    """Metrics of one policy over several independent batches of one size, from those of each batch.

    A metric is the mean over the batches that have it; its standard error, the root of the sum of the batches' squared
    errors over their number, is one over all episodes. Counts are added up.
    """
    out = {}
    for name in dict.fromkeys(name for row in rows for name in row):        # what a reward logs need not be in all
        known = [row[name] for row in rows if name in row and row[name] is not None]
        if name in _COUNTS:
            out[name] = sum(known)
        elif name.endswith("_se"):
            there = sum(row[name.removesuffix("_se")] is not None for row in rows if name in row)
            out[name] = sum(error**2 for error in known) ** 0.5 / there if 0 < there == len(known) else None
        else:
            out[name] = sum(known) / len(known) if known else None
    return out


def top1_share(kl: np.ndarray) -> float | None:
    """The share of all KL, in [0, 1], that sits on the 1 % of the tokens where it is highest: n // 100 of n tokens, at
    least one. None without KL.

    Args:
        kl: [n], of the agent tokens of a batch.
    """
    total = kl.sum(dtype=np.float64)
    if not 0 < total < np.inf:
        return None
    count = max(1, len(kl) // 100)
    return min(1.0, float(np.partition(kl, -count)[-count:].sum(dtype=np.float64) / total))


def summarise(episodes: Episodes, replies: Sequence[Reply], returns: np.ndarray, short: int = 4) -> dict:
    """Metrics of one member's batch [b, ...], which docs/metrics.md describes; `_se` are standard errors over episodes.

    Args:
        replies: the turns of the batch.
        returns: [b], reward units; NaN of an episode that was not judged, which is no part of their mean.
        short: turns of the agent of at most so many tokens, markers that it writes included, are short.
    """
    mask, tokens = episodes.mask, episodes.mask.sum(-1)
    total = lambda x: np.where(mask, x, 0.0).sum(-1, dtype=np.float64)  # noqa: E731
    kl, (finished, silent) = total(episodes.kl), _turns(replies, len(returns))
    return {
        **means({"return": returns[~np.isnan(returns)]}),
        **means({"kl/nats_per_episode": kl,
                 "kl/sampled/nats_per_episode": total(episodes.log_ratio),
                 "kl/estimate/nats_per_episode": total(episodes.estimate),
                 "surprisal/nats_per_episode": total(-episodes.log_prob),
                 "replies": finished[STUDENT], "help/asked_rate": episodes.asked}),
        **rates({"kl/nats_per_token": (kl, tokens), "entropy/nats_per_token": (total(episodes.entropy), tokens),
                 "help/rate_per_token": (total(-np.expm1(-episodes.floor)), tokens),
                 "teacher/silent_rate": (silent[AGENT], finished[AGENT]),
                 "teacher/short_rate": (_short(episodes.transcript, replies, short), finished[AGENT]),
                 "student/silent_rate": (silent[STUDENT], finished[STUDENT])}),
        "kl/top1_share": top1_share(episodes.kl[mask]), "val/num_eos_tokens": int(finished[AGENT].sum()),
        "tokens": int((episodes.transcript.roles > OPENING).sum())}


def _turns(replies, count):
    """Finished turns and, of these, empty ones: [2, role, b]."""
    out = np.zeros((2, STUDENT + 1, count))
    ended = [reply for reply in replies if reply.finished]
    for row, chosen in zip(out, (ended, [reply for reply in ended if not reply.text]), strict=True):
        np.add.at(row, ([reply.role for reply in chosen], [reply.episode for reply in chosen]), 1)
    return out


def _short(transcript, replies, most):
    """Finished turns of the agent of at most so many tokens, [b]: the paper's authors' count of empty turns."""
    out = np.zeros(len(transcript.tokens))
    for reply in replies:
        if reply.finished and reply.role == AGENT:
            own = (transcript.turns[reply.episode] == reply.turn) & (transcript.roles[reply.episode] == AGENT)
            out[reply.episode] += own.sum() <= most
    return out


def objective(row: dict) -> dict:
    """The names of TRL's PPO trainer, with their meaning there; docs/metrics.md says where they differ.

    Means over the batch's episodes: summed sampled log-ratio and summed -log pi of the tokens, nats; -coefficient times
    the estimated KL, the return, and their sum, reward units. None where no episode was judged.
    """
    penalty = -row["kl/coef"] * row["kl/estimate/nats_per_episode"]
    return {"objective/kl": row["kl/sampled/nats_per_episode"], "objective/entropy": row["surprisal/nats_per_episode"],
            "objective/non_score_reward": penalty, "objective/scores": row["return"],
            "objective/rlhf_reward": None if row["return"] is None else row["return"] + penalty}


def ledger(episodes: Episodes) -> dict[str, np.ndarray]:
    """What was recorded of each agent token, nats, at its slot of the transcript [b, s]; 0 in other slots. "kl" has the
    reference's "floor" in it; "spent_before" was charged for the agent tokens before this one."""
    columns = {"kl": episodes.kl, "log_ratio": episodes.log_ratio, "spent_before": episodes.spent_before,
               "floor": episodes.floor}
    row, column = np.nonzero(episodes.mask)
    out = np.zeros((len(columns), *episodes.transcript.tokens.shape), np.float32)
    out[:, row, episodes.slot[row, column]] = [values[row, column] for values in columns.values()]
    return dict(zip(columns, out, strict=True))
