"""What an algorithm is: names of its parts, and the defaults that go with them."""
from __future__ import annotations

from typing import NamedTuple


class Algorithm(NamedTuple):
    """Defaults of `config.rl` under one name; any of them can be set to something else."""

    loss: str
    advantage: str
    reduction: str
    normalise: bool = False
    group: int = 1                     # episodes with the same opening
    clip: float = 0.2                  # with a loss that does not clip: only of what is logged as clipped
    clip_high: float | None = None     # None: as `clip`
    value_coef: float = 0.0
