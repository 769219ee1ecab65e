"""Replies to rewards: asks the functions, and checks what they say. On the host; any thread may call it, and the
functions that are not asynchronous are called in it."""
from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import numbers
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32

from kl_reg.envs.environment import Reply
from kl_reg.rewards.reward import Reward
from kl_reg.rewards.signature import wanted
from kl_reg.rewards.trainer import Trainer

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


def score(reward: Reward, replies: Sequence[Reply], trainer: Trainer | None = None) -> Scores:
    """What a reward says of each reply; only those with `scored` are shown to its functions.

    Args:
        trainer: what the functions see of it, and where they log; None: as after a training, and nothing is kept.

    Raises:
        ValueError: a function requires what there is not, raised, or returned the wrong number of rewards or one that
            is no finite number; names the function and the sample. Or the columns of the replies differ.
    """
    silent = np.array([reply.scored and reward.empty is not None and not reply.text.strip() for reply in replies], bool)
    chosen = {i: reply for i, reply in enumerate(replies) if reply.scored and not silent[i]}
    said = np.full((len(reward.functions), len(replies)), np.nan)
    if chosen:
        said[:, list(chosen)] = _ask(reward, chosen, trainer or Trainer())
    total = np.nansum(np.array(reward.weights)[:, None] * said, axis=0)
    large = np.flatnonzero(np.abs(total) > _LARGEST)
    if len(large):
        raise ValueError(f"reward functions {', '.join(reward.names)}: their weighted sum is {total[large[0]]} for "
                         f"{_sample(large[0], replies[large[0]])}; it must be a finite number in float32")
    total = np.where(silent, reward.empty, total) if silent.any() else total
    asked = np.isin(np.arange(len(replies)), list(chosen)) | silent
    return Scores(np.float32(total), dict(zip(reward.names, np.float32(said), strict=True)), asked,
                  ~np.isnan(said).all(0) | silent)


def _ask(reward, chosen, trainer):
    """What each function says of the chosen replies [functions, chosen]; NaN: None."""
    (lists, columns), told, answers = _arguments(chosen), trainer.arguments(), []
    given = lists | told
    for name, function in zip(reward.names, reward.functions, strict=True):
        names = wanted(f"reward function {name!r}", function, list(given), columns)
        with _naming(name, chosen):
            said = function(**{key: list(lists[key]) if key in lists else told[key] for key in names})
            answers.append(_begin(said, len(chosen)))
    return [_numbers(name, answer, chosen, reward.skip_nan) for name, answer in zip(reward.names, answers, strict=True)]


def _arguments(chosen):
    """Every list that a function may be given, by name, one entry a reply (a chat's completion is a message), and which
    of them are columns of the prompts."""
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
    return given | {column: [reply.columns[column] for reply in replies] for column in sorted(columns)}, sorted(columns)


@contextlib.contextmanager
def _naming(name, chosen):
    """Says which function raised."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"reward function {name!r} raised {type(error).__name__}: {error}; it was asked of "
                         f"{_batch(chosen)}") from error


def _begin(said, count):
    """What a function returned; of an asynchronous one the future of it, under way from here on."""
    if inspect.isawaitable(said):
        return asyncio.run_coroutine_threadsafe(_awaited(said), _loop())
    return _listed(said, count)


def _listed(said, count):
    """A list of what a generator or another iterator gives, of one entry too many where it gives too many: it may never
    end."""
    return list(itertools.islice(said, count + 1)) if isinstance(said, Iterator) else said


async def _awaited(said):
    return await said


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all asynchronous functions, in a thread of its own: so it does not matter whether the caller is
    in one (a notebook is), and a client that a function keeps finds the same loop at the next batch."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


def _numbers(name, answer, chosen, skip_nan):
    """The rewards that a function returned, as floats; NaN: None."""
    with _naming(name, chosen):
        said = _listed(answer.result(), len(chosen)) if isinstance(answer, concurrent.futures.Future) else answer
        said = jax.device_get(said)         # it may be an array of a device, or a list of them
    if not isinstance(said, (list, tuple)) and not (isinstance(said, np.ndarray) and said.ndim):
        raise ValueError(f"reward function {name!r} returned {_cut(said)}, which is no list, tuple or array of rewards")
    if len(said) != len(chosen):
        raise ValueError(f"reward function {name!r} returned {len(said)} rewards for {_batch(chosen)}")
    return [_number(name, value, i, reply, skip_nan) for value, (i, reply) in zip(said, chosen.items(), strict=True)]


def _number(name, value, i, reply, skip_nan):
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return np.nan
    if isinstance(value, numbers.Real) and abs(value) <= _LARGEST:     # no NaN either
        return float(value)
    missing = isinstance(value, numbers.Real) and value != value        # NaN; an integer may be too large for a float
    if missing and skip_nan:
        return np.nan
    raise ValueError(f"reward function {name!r} returned {_cut(value)} for {_sample(i, reply)}; a reward is a finite "
                     "number or None" + ", or NaN with reward.nan='skip', which then means None" * missing)


def _batch(chosen):
    return f"{len(chosen)} completions, the first is {_sample(*next(iter(chosen.items())))}"


def _sample(i, reply):
    return f"the completion {_cut(reply.text)} (reply {i} of its batch)"


def _cut(value):
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
