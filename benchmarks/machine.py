"""What the benchmarks share: machine, versions and limits of the hardware, measured on the spot; tables and files."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

import jax
import jax.numpy as jnp


def about() -> dict:
    """Processor, cores, and the default device."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "system": platform.platform()}


def versions(*packages: str) -> dict[str, str]:
    """Of these packages, JAX, kl_reg and Python."""
    return {name: metadata.version(name) for name in ("kl_reg", "jax", *packages)} | {
        "python": platform.python_version()}


def listed(versions: dict[str, str]) -> str:
    """Packages and versions as part of a sentence."""
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def where(machine: dict) -> str:
    """What `about` tells, as part of a sentence."""
    device = "" if machine["device"] == "cpu" else f", {machine['devices']} x {machine['device']}"
    return f"{machine['processor']}, {machine['cores']} cores{device}"


def ran(result: dict) -> str:
    """Versions and machine of a result as part of a sentence."""
    return f"{listed(result['versions'])}; {where(result['machine'])}"


class Watch:
    """Which part of the cores' time processes beside this one and its children took since the watch began.

    Children count once they have ended and been waited for. What a benchmark says while others work says little.
    """

    def __init__(self):
        self._began, self._before = time.monotonic(), _busy()

    def others(self) -> float | None:
        """None: the system does not tell (it is told on Linux)."""
        now = _busy()
        if now is None:
            return None
        return max(now - self._before, 0.0) / (time.monotonic() - self._began) / os.cpu_count()


def _busy():
    """Seconds that all cores have worked for other processes, those of a virtual machine's host included."""
    stat = pathlib.Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text(encoding="utf-8").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def disturbed(others: float | None) -> str:
    """A sentence about `Watch.others`; nothing where it is not known."""
    return "" if others is None else f"Other processes took {others:.0%} of the cores' time meanwhile."


def matmul_peak(width: int | None = None, repeats: int = 5, dtype=jnp.float32) -> float:
    """FLOPs per second of the best of several matrix products on the default device, at JAX's default precision.

    Args:
        width: of the square right factor; None: 2048 on a CPU, 8192 elsewhere.
    """
    width = width or (2048 if jax.default_backend() == "cpu" else 8192)
    product, table = jax.jit(jnp.matmul), jnp.ones((width, width), dtype)
    best = 0.0
    for rows in (64, width // 8, width // 2, width):
        x = jnp.ones((rows, width), dtype)
        best = max(best, 2 * rows * width**2 / _fastest(lambda x=x: product(x, table), repeats))
    return best


def bandwidth(size: int | None = None, repeats: int = 5) -> float:
    """Bytes per second that the default device's memory gives: the best of reading an array once, in a product with a
    vector, and of copying one, which counts twice.

    Args:
        size: bytes of the array, to be far beyond the caches; None: 2**28 on a CPU, 2**31 elsewhere.
    """
    rows = (size or (2**28 if jax.default_backend() == "cpu" else 2**31)) // 4 // 1024
    read, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1.0)
    table, vector = jnp.ones((rows, 1024)), jnp.ones(1024)
    return max(table.nbytes / _fastest(lambda: read(table, vector), repeats),
               2 * table.nbytes / _fastest(lambda: copy(table), repeats))


def _fastest(call: Callable, repeats: int) -> float:
    """Seconds of the fastest of several calls, behind one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def benchmark(doc: str) -> argparse.ArgumentParser:
    """The parser of a benchmark with this docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=place, help="write the numbers there as well")
    return parser


def place(text: str) -> pathlib.Path:
    """A path of the command line, ~ expanded."""
    return pathlib.Path(text).expanduser()


def tell(result: dict, said: str, file: pathlib.Path | None) -> None:
    """Prints the report, and writes the result where a file is wanted."""
    print(said)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
