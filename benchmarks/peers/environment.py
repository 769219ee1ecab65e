"""A virtual environment for each peer, made at first use: no peer has to fit what kl_reg needs, or another peer."""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

_HERE = pathlib.Path(__file__).parent
PEERS = tuple(sorted(file.stem for file in _HERE.glob("*.txt")))


def place(peer: str) -> pathlib.Path:
    """Where a peer's environment lies."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kl_reg" / "benchmarks" / peer


def python(peer: str) -> pathlib.Path:
    """The Python of a peer's environment, which has what `<peer>.txt` asks for; an unfinished environment, or one of
    other versions, is made anew.

    Raises:
        ValueError: there is no such peer.
        OSError: it cannot be made.
    """
    if peer not in PEERS:
        raise ValueError(f"there is no peer {peer!r}; choose of {', '.join(PEERS)}")
    wanted, folder = _HERE / f"{peer}.txt", place(peer)
    made = folder / "requirements.txt"      # written last
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not made.is_file() or made.read_text() != wanted.read_text():
        print(f"{peer}: making its environment in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _run(peer, [sys.executable, "-m", "venv", str(folder)])
        _run(peer, [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)])
        shutil.copyfile(wanted, made)
    return found


def _run(peer, command):
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(f"{peer}: `{' '.join(command)}` failed: {said[-1]}")
