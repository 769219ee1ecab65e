"""What reward functions see of the trainer, by the names that TRL gives it: its state, and two ways to log."""
from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Scalar(Protocol):
    """An array of any library, which may hold one number."""

    ndim: int

    def item(self):
        """The number."""


class TrainerState(NamedTuple):
    """How far the training is, in the fields of `transformers.TrainerState` that mean something here: `global_step`
    iterations of `max_steps` are done. Outside of a training it is over."""

    global_step: int = 1
    max_steps: int = 1
    num_train_epochs: int = 1

    @property
    def epoch(self) -> float:
        """The part of the training that is done, in [0, 1]: there is one epoch."""
        return self.global_step / self.max_steps


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What a batch's reward functions are given beside the replies, and what they log: numbers by name."""

    state: TrainerState = TrainerState()
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def arguments(self) -> dict:
        """By name, as a reward function takes them."""
        return {"trainer_state": self.state, "log_metric": self.log_metric, "log_extra": self.log_extra}

    def log_metric(self, name: str, value) -> None:
        """Logs a number; the metric is the mean over all calls about a batch.

        Raises:
            ValueError: it is no finite number.
        """
        number = _finite(value)
        if number is None:
            raise ValueError(f"log_metric({name!r}, {value!r}): the value must be a finite number")
        self._add(name, [number])

    def log_extra(self, column: str, values: Sequence) -> None:
        """Logs one value for each completion. Of numbers the metric is the mean; metrics are numbers, so None, NaN,
        texts and whatever else is no finite number are left out of it."""
        self._add(column, [number for number in map(_finite, values) if number is not None])

    def _add(self, name, numbers):
        if numbers:
            self.logged.setdefault(str(name), []).extend(numbers)


def _finite(value):
    """A number of Python, NumPy, JAX or torch as a float; None: it is no finite number."""
    if isinstance(value, Scalar) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and abs(value) <= sys.float_info.max else None
