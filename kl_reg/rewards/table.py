"""A reward for every sequence of tokens, as tabular problems have it."""
from __future__ import annotations

import dataclasses
import hashlib
import io

import numpy as np

from kl_reg import storage


@dataclasses.dataclass(frozen=True, eq=False)
class TableReward:
    """Reads a completion's reward at its tokens; a reward function. `values` is [v, v, ...] with an axis a token, or
    [v**h] in the same (row-major) order."""

    values: np.ndarray
    path: str

    def __call__(self, completion_ids: list[list[int]], **columns) -> list[float]:
        """The reward of each completion.

        Raises:
            ValueError: one has another number of tokens than the table has axes, or a token that it does not have.
        """
        return [float(self.values.flat[self._index(ids)]) for ids in completion_ids]

    def _index(self, ids):
        size, axes = self.values.size, self.values.ndim
        vocab = round(size**(1 / len(ids))) if ids else 0
        if not ids or axes not in (1, len(ids)) or vocab**len(ids) != size:
            raise ValueError(f"reward.path={self.path!r} is a table of shape {self.values.shape}, which has no reward "
                             f"for the {len(ids)} tokens {ids}")
        if not all(0 <= token < vocab for token in ids):
            raise ValueError(f"reward.path={self.path!r} is a table of {vocab} tokens an axis, which has no reward for "
                             f"the tokens {ids}")
        return np.ravel_multi_index(ids, (vocab,) * len(ids))

    def digest(self) -> str:
        """SHA-256 of the table."""
        return hashlib.sha256(f"{self.values.shape} {self.values.dtype}".encode() + self.values.tobytes()).hexdigest()


def table(path: str) -> TableReward:
    """The table in a .npy file as a reward function.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no array of finite numbers, or its axes differ in length.
    """
    file = storage.path(path)
    if not file.is_file():
        raise FileNotFoundError(f"reward.path={path!r}: there is no such file; give the .npy file of a table")
    try:
        values = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"reward.path={path!r} is no .npy file: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise ValueError(f"reward.path={path!r} must hold one array of finite numbers")
    if not values.size or len(set(values.shape)) != 1:
        raise ValueError(f"reward.path={path!r} has the shape {values.shape}; a table of h tokens has h axes of the "
                         "vocabulary's length, or is that array flattened")
    return TableReward(values, path)
