"""Whether a completion has what a regular expression finds."""
from __future__ import annotations

import re
from collections.abc import Callable

from kl_reg.rewards.chat import texts


def regex(pattern: str) -> Callable[..., list[float]]:
    """A reward function: 1 where `re.search` finds `pattern` in the completion's text, else 0.

    Raises:
        ValueError: `pattern` is empty or no regular expression.
    """
    if not pattern:
        raise ValueError("reward.pattern='' finds itself in every text; give a regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"reward.pattern={pattern!r} is no regular expression: {error}") from None

    def found(completions: list, **columns) -> list[float]:
        return [float(re.search(pattern, text) is not None) for text in texts(completions)]

    return found
