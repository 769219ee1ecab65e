"""Several processes that run one program, usually one a host: how they find each other, and what one tells the others.

All of them call the same functions in the same order. Process 0 writes; checkpoints, which all write, need a directory
that all see. With one process nothing here does anything.
"""
from __future__ import annotations

import os
import pickle
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

CLUSTERS = {"auto": None, "slurm": "slurm", "tpu": "cloud_tpu", "kubernetes": "k8s", "mpi": "ompi"}
"""How the processes find each other, and what `jax.distributed.initialize` calls that; "auto": whichever is there."""


VARIABLE = "KL_REG_HOSTS"
"""The environment variable that counts where no argument says it."""


def join(hosts: str | None = None) -> None:
    """Makes this process one of several; before anything else of JAX is used.

    Args:
        hosts: one of CLUSTERS, or ADDRESS:PORT,COUNT,INDEX: where process 0 listens, how many there are, which is this.
            "": it is alone; None: as the variable KL_REG_HOSTS says.

    Raises:
        ValueError: it is none of these, or the cluster is not found.
    """
    hosts = os.environ.get(VARIABLE, "") if hosts is None else hosts
    if not hosts:
        return
    if hosts in CLUSTERS:
        try:
            jax.distributed.initialize(cluster_detection_method=CLUSTERS[hosts])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"hosts={hosts}: the other processes cannot be found: {error}") from None
        return
    address, *numbers = hosts.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or ":" not in address:
        raise ValueError(f"hosts={hosts!r}: give {', '.join(CLUSTERS)}, or ADDRESS:PORT,COUNT,INDEX, as "
                         "10.0.0.1:8476,4,0")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"hosts={hosts!r}: process {index} of {count}; the first is 0")
    jax.distributed.initialize(address, count, index)


def index() -> int:
    """Which of the processes this is."""
    return jax.process_index()


def writes() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def share(count: int) -> range:
    """Which of so many pieces of work are this process's: about as many as each other's, one behind the other."""
    processes, index = jax.process_count(), jax.process_index()
    return range(count * index // processes, count * (index + 1) // processes)


def everywhere(call: Callable) -> list:
    """What `call` gives on each process, in their order: on all of them, or on none.

    Raises:
        ValueError: it raised on another process. What it raised here is raised as it is.
    """
    if jax.process_count() == 1:
        return [call()]
    said, raised = None, None
    try:
        said = call()
    except Exception as error:
        raised = error
    answers = _exchange((said, raised and f"{type(raised).__name__}: {raised}"))
    if raised is not None:
        raise raised
    for index, (_, error) in enumerate(answers):
        if error is not None:
            raise ValueError(f"process {index}: {error}")
    return [own for own, _ in answers]


def first(call: Callable):
    """What `call` gives on process 0, which alone runs it; nobody goes on before it is done. Raises as `everywhere`."""
    return everywhere(lambda: call() if writes() else None)[0]


def _exchange(value) -> list:
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32([len(data)])).ravel()
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
