"""What a reward is: named functions and their weights; where they are from, and what they depend on."""
from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kl_reg.identity import digest_of, name_of


class Reward(NamedTuple):
    """The weighted sum of what these functions say (scoring.py calls them). `names` are short and unique."""

    names: tuple[str, ...]
    functions: tuple[Callable, ...]
    weights: tuple[float, ...]


def of(reward_fn: Callable | Sequence, weights: Sequence = ()) -> Reward:
    """One function, or several with their weights, as a reward.

    Args:
        reward_fn: a function, sync or async, or an object that is called like one; or a list of them.
        weights: one for each function; (): 1 each.

    Raises:
        ValueError: something is no function, or there is a wrong number of weights or one that is not finite.
    """
    functions = (reward_fn,) if callable(reward_fn) else tuple(reward_fn)
    for function in functions:
        if not callable(function) or isinstance(function, type):
            raise ValueError(f"reward_fn: {function!r} is no function, nor an object that is called like one")
    return assemble([name_of(function).rpartition(".")[2].strip("<>") for function in functions], functions, weights)


def assemble(names: Sequence[str], functions: Sequence[Callable], weights: Sequence) -> Reward:
    """A reward of functions and how they are called; a name that is there already gets a number.

    Raises:
        ValueError: as `weights_of`.
    """
    unique = []
    for name in names:
        free, number = name, 1
        while free in unique:
            free, number = f"{name}_{number + 1}", number + 1
        unique.append(free)
    return Reward(tuple(unique), tuple(functions), weights_of(unique, weights))


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
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
