"""Who plays the student: the base model, or another of the same vocabulary."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kl_reg.models import decoder
from kl_reg.models.policy import Reading


class Student(NamedTuple):
    """Pure functions over [m, b] episodes; `params` are its own, () for the base model.

    prefill(params, tokens [m, b, t], start [m, b], slots) -> state: the cache.
    decode(params, token [m, b], start, index, state) -> (hidden states, state).
    logits(params, hidden, reading) -> [m, b, v]; `reading` is what the policy's forward pass says.
    """

    prefill: Callable
    decode: Callable
    logits: Callable


def base() -> Student:
    """The policy's own forward pass says what the base model says."""
    def logits(params, hidden, reading: Reading):
        return reading.base_logits

    return Student(lambda *args: (), lambda *args: ((), ()), logits)


def other(config: decoder.DecoderConfig) -> Student:
    """Another model, with a forward pass of its own."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

    def prefill(params, tokens, start, slots):
        return decoder.prefill(config, params, flat(tokens), flat(start), slots)[1]

    def decode(params, token, start, index, cache):
        hidden, cache = decoder.decode(config, params, flat(token), flat(start), index, cache)
        return hidden.last.reshape(*token.shape, -1), cache

    def logits(params, hidden, reading: Reading):
        return decoder.logits(config, params, hidden)

    return Student(prefill, decode, logits)
