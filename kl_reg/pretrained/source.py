"""What weights on disk are to those who read them, whatever the files' format is."""
from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """The weights in `path`: their `shapes` by Hugging Face name, and `read`, which gives one of them whole, in the
    dtype in which it is stored (of a GGUF file: float32)."""

    path: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
