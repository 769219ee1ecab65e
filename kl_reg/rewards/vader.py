"""Sentiment of a text by a lexicon, on the host."""
from __future__ import annotations

import functools

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from kl_reg.rewards.chat import texts


@functools.cache
def _analyzer():
    return SentimentIntensityAnalyzer()


@functools.lru_cache(maxsize=65536)     # a trained policy hears the same replies again and again
def sentiment(text: str) -> float:
    """(compound + 1) / 2 in [0, 1]; 0.5 for a neutral or empty text. Source: Hutto and Gilbert (2014), VADER."""
    return (_analyzer().polarity_scores(text)["compound"] + 1) / 2


def vader(completions: list, **columns) -> list[float]:
    """The sentiment of each completion."""
    return [sentiment(text) for text in texts(completions)]
