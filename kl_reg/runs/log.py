"""What a run tells: a progress bar, JSON lines and TensorBoard scalars; and which functions it compiled."""
from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Iterator

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from kl_reg import storage

_WINDOW = 5      # iterations that the best iterate is a mean over


class Bar:
    """A progress bar with rate, time left and latest values; plain lines now and then where there is no terminal."""

    def __init__(self, progress: Progress, task, total: int, done: int):
        self.progress, self.task, self.total, self.done = progress, task, total, done
        self.times, self.told = collections.deque([time.monotonic()], maxlen=21), time.monotonic()

    def step(self, **values):
        """One step further; values are shown when the display is refreshed (and only then fetched from the device)."""
        self.done += 1
        now = time.monotonic()
        self.times.append(now)
        seconds = (now - self.times[0]) / (len(self.times) - 1)     # of late: the first step compiles
        live = self.progress.console.is_terminal
        due = now - self.told > (0.5 if live else 30) or self.done == self.total
        text = ""
        if due:
            self.told = now
            text = "  ".join(f"{k} {float(v):.3f}" for k, v in values.items()) + f"  {seconds:.2f} s/it"
            self.progress.update(self.task, values=text)
        self.progress.update(self.task, completed=self.done)
        if due and not live:
            self.log(f"{self.done}/{self.total}  {text}  {(self.total - self.done) * seconds:.0f} s left")

    def log(self, text: str):
        """A line above the bar."""
        console = self.progress.console
        console.print(writable(text, console.encoding), highlight=False, markup=False, soft_wrap=True)


def writable(text: str, encoding: str) -> str:
    """`text` with ? for the characters that `encoding` lacks, so that printing it cannot end a run."""
    return text.encode(encoding, "replace").decode(encoding)


@contextlib.contextmanager
def progress_bar(name: str, total: int, done: int = 0, shown: bool = True):
    """A bar over `total` steps, `done` of them behind us; one that is not `shown` prints nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[values]}"))
    console = Console(quiet=not shown)
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(name, total=total, completed=done, values=""), total, done)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that gets the name of every function that JAX compiles in the block, in any thread of this process; one
    that it finds in the persistent cache counts, too."""
    names = []

    def listen(event, seconds, fun_name="", **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def best(file: storage.Path) -> dict:
    """The iteration of a `metrics.jsonl` with the highest return minus coefficient times KL, each a mean over _WINDOW
    iterations up to it: the best of many noisy batches alone would be the luckiest. Iterations without a judged episode
    have no return and are left out; where all are, the last one is given, with None as its return."""
    lines = [json.loads(line) for line in storage.read_text(file).splitlines()]
    known = [line for line in lines if line["return"] is not None]
    if not known:
        return {"iteration": lines[-1]["iteration"], "return": None, **_means(lines[-1:], "kl/nats_per_episode")}
    net = [row["return"] - row["kl/coef"] * row["kl/nats_per_episode"] for row in known]
    window = np.ones(min(_WINDOW, len(known))) / min(_WINDOW, len(known))
    at = int(np.argmax(np.convolve(net, window, "valid")))
    here = known[at:at + len(window)]
    return {"iteration": here[-1]["iteration"], **_means(here, "return", "kl/nats_per_episode")}


def _means(rows, *names):
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


class MemberLog:
    """One member's `metrics.jsonl`, one object an iteration, and the same as TensorBoard scalars with its hparams.

    Opened at `iteration` of a resumed run, it drops the lines of iterations that will be run again.
    """

    def __init__(self, folder: storage.Path, hyper: dict, iteration: int, tensorboard: bool):
        self._lines, self._events = storage.Lines(folder / "metrics.jsonl", iteration), None
        if not tensorboard:
            return
        self._folder = storage.Folder(folder / "tensorboard")
        self._events = EventFileWriter(str(self._folder.here))
        if iteration:       # readers drop what an interrupted run wrote from here on
            self._events.add_event(Event(wall_time=time.time(), step=iteration,
                                         session_log=SessionLog(status=SessionLog.START)))
        else:
            shown = {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                     for key, value in hyper.items()}
            self._add(summary_v2.hparams_pb(shown), 0)

    def write(self, row: dict) -> None:
        """One iteration's metrics; None where a metric has no value."""
        if self._events:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if value is not None]
            self._add(Summary(value=values), row["iteration"])
        self._lines.write(json.dumps(row))

    def flush(self) -> None:
        """Brings both to where others read them: in a store, a checkpoint needs the lines before it."""
        self._lines.flush()
        if self._events:
            self._events.flush()
            self._folder.flush()

    def _add(self, summary, step):
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flushes both."""
        self._lines.close()
        if self._events:
            self._events.close()
            self._folder.close()
