"""A trainer in a process of its own, told to step: a line "step" goes in, a line of JSON comes out.

Its first line is {"versions": {...}}. Each later one says what a step took and did, as `Step` has it. Needs nothing but
the standard library, because every peer's environment imports it.
"""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import NamedTuple

_ROOT = pathlib.Path(__file__).parents[2]     # `benchmarks` is not installed
PHASES = ("rollout", "reward", "update")
TORCH = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_MAX_": "0",
         "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Environment of a peer on PyTorch, whose tuning guide advises another allocator than glibc's: that one gives large
arrays back to the system whenever they are freed. Told to keep them, a step of TRL's with "tiny" takes 9 s for 15."""


class Step(NamedTuple):
    """Seconds of each phase; tokens of all sequences, prompts included; largest change of the weights that are looked
    at, None where none is to change."""

    seconds: dict[str, float]
    tokens: int
    moved: float | None


class Clock:
    """Seconds between marks."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def mark(self, phase: str) -> None:
        """`phase` ends now."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


class Told:
    """The trainer's end. Standard output is for answers: what libraries print goes to standard error."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.clock = None

    def _say(self, answer: dict) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)

    def ready(self, *packages: str, **more: object) -> None:
        """The first answer: versions of the packages, and what else belongs to them."""
        self._say({"versions": {name: metadata.version(name) for name in packages}
                   | {name: str(value) for name, value in more.items()}})

    def wait(self) -> bool:
        """Until a step is wanted, whose clock starts then; False: no more."""
        line = sys.stdin.readline()
        self.clock = Clock()
        return bool(line)

    def done(self, tokens: int, moved: float | None) -> None:
        """The step's answer."""
        self._say(Step(self.clock.seconds, int(tokens), None if moved is None else float(moved))._asdict())


class Trainer(NamedTuple):
    """The teller's end."""

    name: str
    versions: dict[str, str]
    process: subprocess.Popen
    errors: object


def share_device() -> None:
    """Lets several processes use one accelerator: none takes most of its memory at once, and only one is seen."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


@contextmanager
def running(name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Trainer]:
    """Starts a trainer, waits until it is ready, and ends it behind the block.

    Args:
        env: variables in addition to this process's.

    Raises:
        RuntimeError: it ended, or gave another answer than JSON; with the end of its standard error.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   cwd=_ROOT, env={**os.environ, **(env or {})})
        trainer = Trainer(name, {}, process, errors)
        try:
            yield trainer._replace(versions=_answer(trainer)["versions"])
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()       # it asks for no more
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
            process.stdout.close()


def step(trainer: Trainer) -> Step:
    """Has it do one step; raises as `running` does."""
    with suppress(BrokenPipeError):     # it has ended, which its answer says
        trainer.process.stdin.write("step\n")
        trainer.process.stdin.flush()
    return Step(**_answer(trainer))


def take_turns(trainers: Mapping[str, Callable[[], Step]], tokens: int, warmup: int, steps: int
               ) -> dict[str, list[dict]]:
    """Seconds of every trainer's counted steps, each to be of so many tokens.

    Raises:
        RuntimeError: a step did not do the work, or a peer ended.
    """
    seconds = {name: [] for name in trainers}
    for number in range(warmup + steps):
        for name, step in trainers.items():
            done = step()
            if done.tokens != tokens or done.moved is not None and not done.moved > 0:
                raise RuntimeError(f"{name}: a step had {done.tokens} tokens of {tokens}, and changed its weights by "
                                   f"{done.moved}; such a step is not the same work")
            if number >= warmup:
                seconds[name].append(done.seconds)
    return seconds


def _answer(trainer):
    line = trainer.process.stdout.readline()
    try:
        return json.loads(line)
    except ValueError:
        what = f"answered {line!r}" if line else f"ended with status {trainer.process.wait()}"
    trainer.errors.seek(0)
    said = "\n".join(trainer.errors.read().strip().splitlines()[-15:])
    raise RuntimeError(f"{trainer.name} {what}; the end of its standard error:\n{said}")
