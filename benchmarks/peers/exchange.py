"""Cases that functions of a peer are evaluated on, and their answers, as files.

Needs nothing but numpy and the standard library, because every peer's environment imports it.
"""
from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One call: the name of a function, its settings, which JSON can hold, and its arrays."""

    function: str
    settings: dict
    arrays: dict[str, np.ndarray]


def write(file: pathlib.Path, records: Iterable[tuple[object, Mapping[str, np.ndarray]]]) -> None:
    """Writes records, each of something that JSON can hold and of arrays, to one file.

    All arrays are one stretch of bytes: thousands of members of an archive would take longer than the calls.
    """
    about, parts = [], [b""]
    for head, arrays in records:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        about.append([head, {name: [array.dtype.str, array.shape] for name, array in arrays.items()}])
        parts += [array.tobytes() for array in arrays.values()]
    np.savez(file, about=json.dumps(about), data=np.frombuffer(b"".join(parts), np.uint8))


def read(file: pathlib.Path) -> list[tuple[object, dict[str, np.ndarray]]]:
    """The records that `write` wrote."""
    with np.load(file) as stored:
        about, data = json.loads(str(stored["about"])), stored["data"].tobytes()
    records, start = [], 0
    for head, arrays in about:
        found = {}
        for name, (dtype, shape) in arrays.items():
            count = int(np.prod(shape))
            found[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
            start += count * np.dtype(dtype).itemsize
        records.append((head, found))
    return records


def answer(functions: Mapping[str, Callable], *packages: str) -> None:
    """Answers the cases of the file that the command line names first, in the file that it names second.

    Args:
        functions: by name; each takes a case's arrays and settings as keyword arguments and returns arrays by name.
        packages: whose versions come with the answers.
    """
    cases, answers = map(pathlib.Path, sys.argv[1:])
    versions = {name: metadata.version(name) for name in packages}
    done = [functions[function](**arrays, **settings) for (function, settings), arrays in read(cases)]
    write(answers, [(versions, {}), *((None, arrays) for arrays in done)])
