"""Settings under which an update changes nothing, or next to nothing: some are refused, of others a run is warned."""
from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from kl_reg.config import BUDGETS

_CLIP_RATIOS = ("ppo_clip", "dual_clip", "gspo")
"""Losses that take the gradient from tokens whose ratio is clipped."""

_NEXT_TO_NOTHING = 1e-12
"""Nats below which a hard budget leaves a token on its reference (`kl.budget`)."""


def refuse(config: ConfigDict) -> None:
    """Refuses what trains nothing and is of no use as a control either.

    Args:
        config: of one member, with the algorithm's settings (`algorithms.resolve`).

    Raises:
        ValueError: names the setting, why it trains nothing, and what is accepted.
    """
    rl, sampling = config.rl, config.sampling
    if rl.loss in _CLIP_RATIOS and rl.clip == rl.clip_high == 0:
        raise ValueError(f"rl.clip={rl.clip!r} with rl.clip_high={rl.clip_high!r} and rl.loss={rl.loss!r}: every ratio "
                         "but 1 is clipped, which leaves nothing to train; one of them must be above 0")
    for name, accepted in (("top_k", "0 (all) or at least 2"), ("min_p", "a number below 1")):
        if sampling[name] == 1:
            raise ValueError(f"sampling.{name}={sampling[name]!r} leaves the reference's most probable token alone, "
                             f"whatever the policy says, so nothing is trained; choose {accepted}")


def cautions(members: Sequence[ConfigDict]) -> list[str]:
    """Sentences about what trains nothing although it is accepted.

    A member that cannot change is a good control beside others that can; so a run is only warned where all are like it.

    Args:
        members: their configurations, with the algorithms' settings.
    """
    reasons = [_unchanged(config) for config in members]
    out = [f"{reason}: the policy stays as it is, in every member of this run" for reason in reasons if all(reasons)]
    for config in members:
        iterations, warmup, final = config.rl.iterations, config.optim.warmup, config.optim.final
        if warmup > 2 * iterations:
            out.append(f"optim.warmup={warmup} with rl.iterations={iterations}: the run ends at "
                       f"{iterations / warmup:.2g} of optim.learning_rate")
        if final == 0 and warmup < iterations <= 2:
            out.append(f"optim.final={final!r} with rl.iterations={iterations}: one of these iterations has the "
                       "learning rate 0")
    return list(dict.fromkeys(out))


def _unchanged(config):
    """Why the policy of that member cannot change; None: it can."""
    if config.optim.learning_rate == 0:
        return f"optim.learning_rate={config.optim.learning_rate!r}"
    budgets = {key: config.kl[key.removeprefix("kl.")] for key in BUDGETS}
    for key, nats in budgets.items():
        if nats is not None and nats <= _NEXT_TO_NOTHING:
            return f"{key}={nats!r}"
    weights, free = tuple(config.reward.weights), config.kl.coef == 0 and config.kl.controller == "fixed"
    if weights and not any(weights) and free and config.rl.entropy_coef == 0:
        return f"reward.weights={weights!r}, without a KL coefficient or an entropy bonus"
    return None
