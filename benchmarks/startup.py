"""How long a training command takes to its first and second update, with a cold and with a warm compilation cache.

    python -m benchmarks.startup [--config configs/quickstart.py] [--config.SETTING=VALUE ...] [--repeats 3]
                                 [--json FILE]

Every run is a process of its own, `python -m launch.train` with two iterations of 4 episodes and an evaluation of 4;
the clock starts with the process. Each repeat begins with an empty cache ("cold"); the next process has what that one
has left ("warm"). "end" is the end of the command, behind the evaluation and the report.
"""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from benchmarks import machine

_ROOT = pathlib.Path(__file__).parents[1]
MARKS = {"first update": "first update after", "second update": "2/2"}
"""What the command prints behind each."""

_SIZES = ("--config.rl.iterations=2", "--config.rl.episodes=4", "--config.evaluation.episodes=4")


def run(command: Sequence[str], cache: pathlib.Path) -> dict[str, float]:
    """Seconds from the start of a process to each of MARKS, and to its end.

    Raises:
        RuntimeError: it failed, or printed no such lines; with the end of its standard error.
    """
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    began, seconds = time.perf_counter(), {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_ROOT, env=env) as process:
        for line in process.stdout:
            for name, mark in MARKS.items():
                if line.startswith(mark):
                    seconds.setdefault(name, time.perf_counter() - began)
        code = process.wait()
        seconds["end"] = time.perf_counter() - began
        errors.seek(0)
        said = "\n".join(errors.read().strip().splitlines()[-15:])
    if code or seconds.keys() != {*MARKS, "end"}:
        raise RuntimeError(f"`{' '.join(command)}` ended with status {code} and printed lines for "
                           f"{', '.join(seconds)}; the end of its standard error:\n{said}")
    return seconds


def measure(settings: Sequence[str], repeats: int) -> dict:
    """Cold and warm processes in turn: what goes to JSON."""
    watch, seconds = machine.Watch(), {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind, rows in seconds.items():
                command = [sys.executable, "-m", "launch.train", *settings, f"--workdir={folder}/{kind}"]
                rows.append(run(command, pathlib.Path(folder) / "cache"))
    return {"settings": list(settings), "machine": machine.about(), "others": watch.others(),
            "versions": machine.versions(), "seconds": seconds}


def report(result: dict) -> str:
    """A table in Markdown between two sentences."""
    columns = (*MARKS, "end")
    rows = [[kind, *(f"{np.median([row[name] for row in times]):.1f}" for name in columns)]
            for kind, times in result["seconds"].items()]
    return "\n".join([
        f"`python -m launch.train {' '.join(result['settings'])}`; {machine.ran(result)}. Seconds "
        f"from the start of the process, median of {len(result['seconds']['cold'])}.", "",
        machine.table(("compilation cache", *columns), rows), "", machine.disturbed(result["others"])])


def main(argv=None) -> None:
    parser = machine.benchmark(__doc__)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--repeats", type=int, default=3)
    options, settings = parser.parse_known_args(argv)
    wrong = [word for word in settings if not word.startswith("--config.")]
    if wrong:
        parser.error(f"unknown arguments {' '.join(wrong)}; settings are --config.SETTING=VALUE")
    result = measure([f"--config={options.config}", *_SIZES, *settings], options.repeats)
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
