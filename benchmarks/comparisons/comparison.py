"""What a comparison with a function of another library is, and random numbers that several of them draw.

Numbers are drawn in float64. Half of the cases are then rounded to float32, for both sides alike.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from kl_reg.types import Hyper

SHAPES = ((1, 1), (5, 4), (8, 33))
"""Episodes and tokens. They are few because each is compiled once."""

Arrays = dict[str, np.ndarray]


class Tolerance(NamedTuple):
    """The largest difference that counts as none, in float64 and in float32, relative to the larger of a scale (1
    where none is given) and the peer's value."""

    float64: float = 1e-10
    float32: float = 2e-5


class Comparison(NamedTuple):
    """One function of a peer beside what kl_reg has for it.

    draw(rng) gives a case's arrays and the settings that both sides are called with; evaluate(arrays, **settings) gives
    kl_reg's values by the peer's names and the scales that differences of some of them are relative to. It is compiled.
    """

    kind: str
    peer: str                                   # whose environment
    theirs: str
    ours: str
    mapping: str                                # what has to be said of conventions that differ
    function: str                               # its name in the peer's module
    draw: Callable[[np.random.Generator], tuple[Arrays, dict]]
    evaluate: Callable[..., tuple[Mapping, Mapping]]
    given: Mapping[str, object] = {}            # settings that only the peer's side is called with
    tolerance: Tolerance = Tolerance()
    precisions: tuple[str, ...] = ("float64", "float32")


def hyper(**given) -> Hyper:
    """Hyperparameters that are zero where they are not given."""
    return Hyper(*[0.0] * len(Hyper._fields))._replace(**given)


def shape(rng: np.random.Generator) -> tuple[int, int]:
    """A number of episodes and of tokens."""
    return SHAPES[rng.integers(len(SHAPES))]


def mask(rng: np.random.Generator, rows: int, tokens: int, holes: bool = True) -> np.ndarray:
    """Which tokens count: all, those before each episode's end, or with holes; in every row at least one."""
    kind = rng.integers(3 if holes else 2)
    if kind == 0:
        return np.ones((rows, tokens), bool)
    if kind == 1:
        return np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))
    found = rng.random((rows, tokens)) < 0.6
    found[np.arange(rows), rng.integers(tokens, size=rows)] = True
    return found


def log_probs(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float
              ) -> tuple[np.ndarray, np.ndarray]:
    """Two log-probabilities of each token, at most 0, whose log-ratio lies between `low` and `high`: zero everywhere,
    small, moderate, or at the ends of that range."""
    spread = rng.choice([0.0, 0.02, 0.5, 3.0, max(-low, high)])
    ratio = np.clip(spread * rng.normal(size=shape), low, high)
    first = -rng.exponential(2.0, shape) + np.minimum(ratio, 0)
    return first, first - ratio


def logits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Unnormalised logits, from nearly even to nearly certain, some far from 0."""
    return rng.choice([0.1, 1.0, 5.0]) * rng.normal(size=shape) + rng.choice([0.0, 30.0])


def near(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Logits that differ from these by little or by much."""
    return x + rng.choice([1e-3, 0.1, 1.0, 4.0]) * rng.normal(size=x.shape)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Normalised log-probabilities along the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
