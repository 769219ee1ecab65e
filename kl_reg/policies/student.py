"""Who plays the student: the base model, or another of the same vocabulary."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kl_reg.models import decoder
from kl_reg.policies.interface import Reading


class Student(NamedTuple):
    """Pure functions over [m, b] episodes; `params` are its own, () for the base model.

    prefill(params, tokens [n, t], start [n], chosen [m, g], slots, group) -> state: the cache of `group` episodes
        behind each of the chosen openings.
    decode(params, token [m, b], start, index, state) -> (hidden states, state).
    apart(params) -> params as `decode` reads them the fastest.
    is_base: whether it is the base model.
    logits(params, hidden, reading) -> [m, b, v]; `reading` is what the policy's forward pass says.
    """

    prefill: Callable
    decode: Callable
    apart: Callable
    logits: Callable
    is_base: bool


def base() -> Student:
    """The policy's own forward pass says what the base model says."""
    def logits(params, hidden, reading: Reading):
        return reading.base_logits

    return Student(lambda *args: (), lambda *args: ((), ()), lambda params: params, logits, True)


def other(config: decoder.DecoderConfig) -> Student:
    """Another model, with a forward pass of its own."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

    def prefill(params, tokens, start, chosen, slots, group=1):
        return decoder.prefill(config, params, tokens, start, slots, group=group, chosen=flat(chosen))[1]

    def decode(params, token, start, index, cache):
        hidden, cache = decoder.decode(config, params, flat(token), flat(start), index, cache)
        return hidden.last.reshape(*token.shape, -1), cache

    def logits(params, hidden, reading: Reading):
        return decoder.logits(config, params, hidden)

    return Student(prefill, decode, decoder.apart, logits, False)
