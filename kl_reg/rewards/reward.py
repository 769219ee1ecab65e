"""What a reward is: named functions and their weights; where they are from, and what they depend on."""
from __future__ import annotations

import functools
import hashlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from kl_reg.runs.fingerprint import digest_of, name_of


class Reward(NamedTuple):
    """The weighted sum of what these functions say (scoring.py calls them). `names` are short and unique; `skip_nan`:
    a NaN means None, and is no error. `empty`: what a reply without text is worth, whatever they would say; None: they
    say it."""

    names: tuple[str, ...]
    functions: tuple[Callable, ...]
    weights: tuple[float, ...]
    skip_nan: bool = False
    empty: float | None = None


@runtime_checkable
class Named(Protocol):
    """What has a name of its own: functions, and objects that were given one."""

    __name__: str


NAN = ("refuse", "skip")
"""What a reward that is NaN does: it is an error, or it means None. The choices of `reward.nan`."""

_TAKEN = ("unjudged_rate", "extra")
"""Metrics of the reward that are called reward/..., as its functions are."""


def of(reward_fn: Callable | Sequence, weights: Sequence = (), nan: str = "refuse") -> Reward:
    """One function, or several with their weights, as a reward. Each is called what its `__name__` says, and an object
    without one what its type is called.

    Args:
        reward_fn: a function, sync or async, or an object that is called like one; or a list of them.
        weights: one for each function; (): 1 each.
        nan: one of NAN.

    Raises:
        ValueError: something is no function, or there is a wrong number of weights or one that is not finite.
    """
    functions = (reward_fn,) if callable(reward_fn) else tuple(reward_fn)
    for function in functions:
        if not callable(function) or isinstance(function, type):
            raise ValueError(f"reward_fn: {function!r} is no function, nor an object that is called like one")
    return assemble([_called(function) for function in functions], functions, weights, nan)


def _called(function):
    if isinstance(function, functools.partial) and not isinstance(function, Named):
        return _called(function.func)
    return str(function.__name__ if isinstance(function, Named) else type(function).__name__).strip("<>")


def assemble(names: Sequence[str], functions: Sequence[Callable], weights: Sequence, nan: str) -> Reward:
    """A reward of functions and how they are called; a name that is there already gets a number.

    Raises:
        ValueError: as `weights_of`, or `nan` is none of NAN.
    """
    if nan not in NAN:
        raise ValueError(f"reward.nan={nan!r}: choose of {', '.join(map(repr, NAN))}")
    unique = []
    for name in names:
        free, number = name, 1
        while free in (*_TAKEN, *unique):
            free, number = f"{name}_{number + 1}", number + 1
        unique.append(free)
    return Reward(tuple(unique), tuple(functions), weights_of(unique, weights), nan == "skip")


def weights_of(names: Sequence[str], weights: Sequence) -> tuple[float, ...]:
    """The weight of each name; of () 1.

    Raises:
        ValueError: another number of weights than names, no name at all, or a weight that is no finite number.
    """
    if not names:
        raise ValueError("reward: there is no function")
    if len(weights) not in (0, len(names)):
        raise ValueError(f"reward.weights={tuple(weights)!r} has {len(weights)} weights for the {len(names)} of "
                         f"{', '.join(names)}; give one each, or () for 1 each")
    for weight in weights:
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"reward.weights={tuple(weights)!r}: {weight!r} is no finite number")
    return tuple(float(weight) for weight in weights) or (1.0,) * len(names)


def names(reward: Reward) -> tuple[str, ...]:
    """Of its functions, in order: the keys of `Scores.parts`."""
    return reward.names


def sources(reward: Reward) -> str:
    """Where its functions are from, as `reward.name` names them; of a callable object, its type."""
    return ",".join(map(name_of, reward.functions))


def digest(reward: Reward) -> str:
    """SHA-256 of what the rewards depend on: weights and functions (see `digest_of`)."""
    said = [f"{weight!r} {digest_of(function)}"
            for weight, function in zip(reward.weights, reward.functions, strict=True)]
    said += [] if reward.empty is None else [f"empty {reward.empty!r}"]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
