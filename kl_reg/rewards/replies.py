"""From a reward function to rewards on the agent stream. On the host."""
from __future__ import annotations

import hashlib
import numbers
import types
from collections.abc import Callable, Sequence

import numpy as np

from kl_reg.envs.teacher_student import Reply
from kl_reg.types import STUDENT

_LARGEST = float(np.finfo(np.float32).max)


def score_replies(reward_fn: Callable, replies: Sequence[Reply]) -> np.ndarray:
    """The reward of each reply [n], float32: of the student's finished ones what `reward_fn` says (None: 0), else 0.

    Raises:
        ValueError: `reward_fn` raised, or returned the wrong number of rewards or one that is no finite number; names
            the function and the sample.
    """
    rewards = np.zeros(len(replies), np.float32)
    scored = [i for i, reply in enumerate(replies) if reply.role == STUDENT and reply.finished]
    if not scored:
        return rewards
    chosen = [replies[i] for i in scored]
    name = f"reward function {name_of(reward_fn).rpartition('.')[2]!r}"
    try:
        values = list(reward_fn(prompts=[r.prompt for r in chosen], completions=[r.text for r in chosen],
                                completion_ids=[r.ids for r in chosen]))
    except Exception as error:
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if len(values) != len(chosen):
        raise ValueError(f"{name} returned {len(values)} rewards for {len(chosen)} completions")
    for i, value, reply in zip(scored, values, chosen, strict=True):
        number = value is None or isinstance(value, numbers.Real) and abs(value) <= _LARGEST      # no NaN either
        if not number:
            raise ValueError(f"{name} returned {value!r} for the completion {reply.text!r}")
        rewards[i] = 0.0 if value is None else value
    return rewards


def name_of(reward_fn: Callable) -> str:
    """Where a reward function is from; of a callable object, its type."""
    kind = reward_fn if isinstance(reward_fn, types.FunctionType) else type(reward_fn)
    return f"{kind.__module__}.{kind.__qualname__}"


def digest(reward_fn: Callable) -> str:
    """SHA-256 of a function's code, so that an edited one, or another lambda, is another experiment."""
    parts = [name_of(reward_fn)]
    if isinstance(reward_fn, types.FunctionType):
        code = reward_fn.__code__
        constants = [x for x in code.co_consts if not isinstance(x, types.CodeType)]
        parts += [code.co_code.hex(), repr(constants), repr(code.co_names)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
