"""Sentiment of a text by a lexicon, on the host."""
from __future__ import annotations

import functools
import math

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from kl_reg.rewards.chat import texts


@functools.cache
def _analyzer():
    return SentimentIntensityAnalyzer()


SCALES = ("compound", "signed_confidence")
"""What becomes of the compound score c in [-1, 1]: (c + 1) / 2; or (s (1 + |c|) / 2 + 1) / 2 with its sign s, 1 for
c = 0. The latter is the form that the paper's authors give to a classifier: nothing is worth between 0.25 and 0.75, and
a neutral text 0.75."""


@functools.lru_cache(maxsize=65536)     # a trained policy hears the same replies again and again
def sentiment(text: str) -> float:
    """(compound + 1) / 2 in [0, 1]; 0.5 for a neutral or empty text. Source: Hutto and Gilbert (2014), VADER."""
    return (_analyzer().polarity_scores(text)["compound"] + 1) / 2


def vader(completions: list, **columns) -> list[float]:
    """The sentiment of each completion."""
    return [sentiment(text) for text in texts(completions)]


def signed_vader(completions: list, **columns) -> list[float]:
    """The sign of each completion's sentiment with its confidence, in [0, 0.25] or [0.75, 1]."""
    compounds = [2 * sentiment(text) - 1 for text in texts(completions)]
    return [(math.copysign(1, c or 1) * (1 + abs(c)) / 2 + 1) / 2 for c in compounds]


def scaled(scale: str = ""):
    """The reward on one of SCALES; "": the first.

    Raises:
        ValueError: it is none of them.
    """
    if scale not in ("", *SCALES):
        raise ValueError(f"reward.scale={scale!r} with reward.name='vader': choose of {', '.join(SCALES)}")
    return signed_vader if scale == "signed_confidence" else vader
