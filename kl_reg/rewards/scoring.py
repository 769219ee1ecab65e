"""Replies to rewards: asks the functions, and checks what they say. On the host; any thread may call it."""
from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import numbers
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32

from kl_reg.envs.environment import Reply
from kl_reg.rewards.reward import Reward

_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 200        # characters of a text in a message


class Scores(NamedTuple):
    """Of n replies: `total`, the weighted sum, 0 where no function was asked or all said None; `parts`, what each
    function said, unweighted, NaN where it was not asked or said None; `asked` and `judged`: whether the functions were
    asked, and whether one of them gave a number."""

    total: Float32[np.ndarray, " n"]
    parts: dict[str, Float32[np.ndarray, " n"]]
    asked: Bool[np.ndarray, " n"]
    judged: Bool[np.ndarray, " n"]


def score(reward: Reward, replies: Sequence[Reply]) -> Scores:
    """What a reward says of each reply; only those with `scored` are shown to its functions.

    Raises:
        ValueError: a function requires what there is not, raised, or returned the wrong number of rewards or one that
            is no finite number; names the function and the sample. Or the columns of the replies differ.
    """
    chosen = {i: reply for i, reply in enumerate(replies) if reply.scored}
    said = np.full((len(reward.functions), len(replies)), np.nan)
    if chosen:
        said[:, list(chosen)] = _ask(reward, chosen)
    total = np.nansum(np.array(reward.weights)[:, None] * said, axis=0)
    large = np.flatnonzero(np.abs(total) > _LARGEST)
    if len(large):
        raise ValueError(f"reward functions {', '.join(reward.names)}: their weighted sum is {total[large[0]]} for "
                         f"{_sample(large[0], replies[large[0]])}; it must be a finite number in float32")
    asked = np.isin(np.arange(len(replies)), list(chosen))
    return Scores(np.float32(total), dict(zip(reward.names, np.float32(said), strict=True)), asked,
                  ~np.isnan(said).all(0))


def _ask(reward, chosen):
    """What each function says of the chosen replies [functions, chosen]; NaN: None."""
    given, answers = _arguments(chosen), []
    for name, function in zip(reward.names, reward.functions, strict=True):
        wanted = _wanted(name, function, given)
        with _naming(name, chosen):
            answers.append(_begin(function(**{key: list(given[key]) for key in wanted})))
    return [_numbers(name, answer, chosen) for name, answer in zip(reward.names, answers, strict=True)]


def _arguments(chosen):
    """Everything that a function may be given, by name, one entry a reply; a chat's completion is a message."""
    first, columns = next((i, set(reply.columns)) for i, reply in chosen.items())
    for i, reply in chosen.items():
        differing = columns ^ set(reply.columns)
        if differing:
            raise ValueError(f"rewards: column {min(differing)!r} is there for only one of replies {first} and {i}; "
                             "all prompts of a batch must have the same columns")
    replies = list(chosen.values())
    given = {"prompts": [reply.prompt for reply in replies],
             "completions": [reply.text if isinstance(reply.prompt, str) else
                             [{"role": "assistant", "content": reply.text}] for reply in replies],
             "completion_ids": [reply.ids for reply in replies]}
    return given | {column: [reply.columns[column] for reply in replies] for column in sorted(columns)}


def _wanted(name: str, function: Callable, given: Mapping[str, list]) -> list[str]:
    """Those names of `given` that a function takes: all, with **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward function {name!r} has no signature: {error}") from None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [parameter for parameter in required if parameter not in given or parameter not in named]
    if missing:
        columns = ", ".join(list(given)[3:]) or "none"
        raise ValueError(f"reward function {name!r} requires {', '.join(map(repr, missing))}; given by name are "
                         f"prompts, completions, completion_ids and the columns of the prompts (here: {columns})")
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [key for key in given if anything or key in named]


@contextlib.contextmanager
def _naming(name, chosen):
    """Says which function raised."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"reward function {name!r} raised {type(error).__name__}: {error}; it was asked of "
                         f"{_batch(chosen)}") from error


def _begin(said):
    """What a function returned; of an asynchronous one the future of it, under way from here on."""
    return asyncio.run_coroutine_threadsafe(_awaited(said), _loop()) if inspect.isawaitable(said) else said


async def _awaited(said):
    return await said


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all asynchronous functions, in a thread of its own: so it does not matter whether the caller is
    in one (a notebook is), and a client that a function keeps finds the same loop at the next batch."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


def _numbers(name, answer, chosen):
    """The rewards that a function returned, as floats; NaN: None."""
    with _naming(name, chosen):
        said = answer.result() if isinstance(answer, concurrent.futures.Future) else answer
        said = jax.device_get(said)         # it may be an array of a device, or a list of them
    if not isinstance(said, (list, tuple)) and not (isinstance(said, np.ndarray) and said.ndim):
        raise ValueError(f"reward function {name!r} returned {_cut(said)}, which is no list, tuple or array of rewards")
    if len(said) != len(chosen):
        raise ValueError(f"reward function {name!r} returned {len(said)} rewards for {_batch(chosen)}")
    return [_number(name, value, i, reply) for value, (i, reply) in zip(said, chosen.items(), strict=True)]


def _number(name, value, i, reply):
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return np.nan
    if isinstance(value, numbers.Real) and abs(value) <= _LARGEST:     # no NaN either
        return float(value)
    raise ValueError(f"reward function {name!r} returned {_cut(value)} for {_sample(i, reply)}; a reward is a finite "
                     "number or None")


def _batch(chosen):
    return f"{len(chosen)} completions, the first is {_sample(*next(iter(chosen.items())))}"


def _sample(i, reply):
    return f"the completion {_cut(reply.text)} (reply {i} of its batch)"


def _cut(value):
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
