"""A virtual environment for each peer, made at first use: no peer has to fit what kl_reg needs, or another peer."""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

_HERE = pathlib.Path(__file__).parent
PEERS = tuple(sorted(file.stem for file in _HERE.glob("*.txt")))

_ALONE = "--no-deps "
"""Begins the line of a package that is installed without what it asks for."""

_JAX = {"cpu": "jax[cpu]", "gpu": "jax[cuda12]", "tpu": "jax[tpu]"}


def place(peer: str, backend: str) -> pathlib.Path:
    """Where a peer's environment for this backend of JAX lies."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "kl_reg" / "benchmarks" / (peer if backend == "cpu" else f"{peer}-{backend}")


HERE = "KL_REG_PEERS_HERE"
"""An environment variable: where it is set, peers are in this Python's environment, whatever their versions."""


def python(peer: str, backend: str = "cpu") -> pathlib.Path:
    """The Python of a peer's environment, which has what `<peer>.txt` asks for; an unfinished environment, or one of
    other versions, is made anew. Or this Python (`HERE`).

    Raises:
        ValueError: there is no such peer.
        OSError: it cannot be made.
    """
    if peer not in PEERS:
        raise ValueError(f"there is no peer {peer!r}; choose of {', '.join(PEERS)}")
    if os.environ.get(HERE):
        return pathlib.Path(sys.executable)
    folder = place(peer, backend)
    wanted = (_HERE / f"{peer}.txt").read_text(encoding="utf-8").replace(_JAX["cpu"], _JAX[backend])
    made = folder / "requirements.txt"      # written last
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not made.is_file() or made.read_text(encoding="utf-8") != wanted:
        print(f"{peer}: making its environment in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _run(peer, [sys.executable, "-m", "venv", str(folder)])
        install = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        packages = [line for line in wanted.splitlines() if not line.startswith("#")]
        _run(peer, [*install, *(line for line in packages if not line.startswith(_ALONE))])
        for alone in (line.removeprefix(_ALONE) for line in packages if line.startswith(_ALONE)):
            _run(peer, [*install, "--no-deps", alone])
        made.write_text(wanted, encoding="utf-8")
    return found


def _run(peer, command):
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(f"{peer}: `{' '.join(command)}` failed: {said[-1]}")
