"""How little a completion repeats itself."""
from __future__ import annotations

from collections.abc import Callable

from kl_reg.rewards.chat import texts


def distinct(ngram: int) -> Callable[..., list[float]]:
    """A reward function: distinct-n, the part of a completion's n-grams of words that are different, in [0, 1].

    Words are what white space separates. A completion of fewer than n words has no n-gram and is worth 0, so that
    saying nothing is no way to repeat nothing. Source: Li, Galley, Brockett, Gao and Dolan (2016), "A
    diversity-promoting objective function for neural conversation models", who divide by the number of words instead.

    Raises:
        ValueError: `ngram` is less than 1.
    """
    if ngram < 1:
        raise ValueError(f"reward.ngram={ngram!r} must be at least 1 word")

    def variety(completions: list, **columns) -> list[float]:
        return [_distinct(text.split(), ngram) for text in texts(completions)]

    return variety


def _distinct(words, n):
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
