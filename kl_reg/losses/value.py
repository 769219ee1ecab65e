"""The value head's loss."""
from __future__ import annotations

from jaxtyping import Array, Float


def squared_error(value: Float[Array, " k"], returns: Float[Array, " k"]) -> Float[Array, " k"]:
    """(V - G)^2 / 2 per token, reward units squared."""
    return 0.5 * (value - returns) ** 2
