"""Where runs lie: in a local directory, or in a store of objects such as Google Cloud Storage (gs://bucket/folder).

Objects of a store are whole or not there, are not appended to, and have no locks. What differs from local files is
here.
"""
from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping

import fsspec
import numpy as np
from etils import epath

Path = pathlib.Path | epath.Path
"""A path from `path`; functions that get one take local ones of pathlib as well."""

_ADDRESS = re.compile(r"([A-Za-z][\w.+-]*):(//?)")
_EXTRAS = {"gs": "kl_reg[gcs]", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
_EVERY = 30.0        # seconds between two writes of the same object


def path(text: str | os.PathLike) -> epath.Path:
    """A local path, in which ~ is the home directory, or an address of a store: gs://, s3://, az:// or hf://.

    Raises:
        ValueError: it is the address of another store, or one that pathlib.Path has spoiled.
        ImportError: the package for that store is not installed.
    """
    text = os.fspath(text)
    found = _ADDRESS.match(text)
    if found is None or found[2] == "/" and found[1] not in _EXTRAS:
        return epath.Path(text).expanduser()
    if found[1] not in _EXTRAS:
        raise ValueError(f"{text}: {found[1]}:// is not known; give a local path, or an address that begins with "
                         f"{', '.join(f'{scheme}://' for scheme in _EXTRAS)}")
    if found[2] == "/":
        raise ValueError(f"{text}: pathlib.Path has taken a / from this address; give it as a string")
    _open_store(found[1])
    return epath.Path(text)


def _open_store(scheme):
    """Checks that there is a client for the store; it is to look anew each time, because others write there, too."""
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    if importlib.util.find_spec("tensorflow"):      # which etils then uses
        return
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs another package: pip install '{_EXTRAS[scheme]}' ({error})") from None


def local(text: str | os.PathLike, name: str) -> pathlib.Path:
    """A local path, ~ expanded, for what libraries read or write by themselves.

    Raises:
        ValueError: it is the address of a store; `name` says what for.
    """
    text = os.fspath(text)
    if is_local(text):
        return pathlib.Path(text).expanduser()
    raise ValueError(f"{name}={text}: this must be a local path; copy the files")


def is_local(place: str | os.PathLike) -> bool:
    """Whether a path is local, not the address of a store."""
    found = _ADDRESS.match(os.fspath(place))
    return found is None or found[2] == "/" and found[1] not in _EXTRAS


def absolute(place: Path) -> epath.Path:
    """The same from any working directory."""
    return epath.Path(place).absolute() if is_local(place) else epath.Path(place)


def holds_something(folder: Path) -> bool:
    """Whether there is a folder with anything in it."""
    return folder.is_dir() and any(True for _ in folder.iterdir())


def read_text(file: Path) -> str:
    """The text of a file, in UTF-8: `read_text` of one in a store takes the locale's encoding."""
    return file.read_bytes().decode()


def read_json(file: Path):
    """What the file says."""
    return json.loads(read_text(file))


def write_text(file: Path, text: str) -> None:
    """Writes a file, whole or not at all, for readers that look meanwhile; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(file):
        file.write_bytes(text.encode())
        return
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_bytes(text.encode())
    os.replace(new, file)


def write_json(file: Path, value, allow_nan: bool = True) -> None:
    """Writes a value as indented JSON, whole or not at all, as `write_text` does."""
    write_text(file, json.dumps(value, indent=2, allow_nan=allow_nan) + "\n")


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz; makes its folder."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_bytes(file, data.getvalue())


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """What such a file holds."""
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def tail(file: Path, size: int) -> bytes:
    """The last bytes of a file, `size` at most."""
    with file.open("rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - size))
        return handle.read()


def age(file: Path) -> float | None:
    """Seconds since a file was written; None where the store does not say."""
    if is_local(file):
        return time.time() - os.stat(file).st_mtime
    written = file.stat().mtime
    return time.time() - written if written else None


def copy_tree(source: Path, target: Path) -> None:
    """Copies a folder with everything in it."""
    for entry in source.iterdir():
        if entry.is_dir():
            copy_tree(entry, target / entry.name)
        else:
            write_bytes(target / entry.name, entry.read_bytes())


@contextlib.contextmanager
def appended(file: Path) -> Iterator[pathlib.Path]:
    """A local file; what is appended to it within the block is appended to `file`: of a store, at the end."""
    if is_local(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(file)
        return
    with tempfile.TemporaryDirectory(prefix="kl_reg-") as scratch:
        here = pathlib.Path(scratch, file.name)
        here.touch()
        try:
            yield here
        finally:
            if here.stat().st_size:
                write_bytes(file, (file.read_bytes() if file.exists() else b"") + here.read_bytes())


class Lines:
    """A text file that grows line by line. In a store it is written anew, at most every half minute, and by `flush`.

    Args:
        kept: lines that are left of an earlier file.
    """

    def __init__(self, file: Path, kept: int):
        lines = read_text(file).splitlines(keepends=True)[:kept] if file.exists() else []
        write_text(file, "".join(lines))
        self._file, self._held, self._written = file, lines, time.monotonic()
        self._handle = open(file, "a", encoding="utf-8") if is_local(file) else None  # noqa: SIM115 - see close()

    def write(self, line: str) -> None:
        """Appends a line."""
        if self._handle:
            self._handle.write(line + "\n")
            self._handle.flush()
            return
        self._held.append(line + "\n")
        if time.monotonic() - self._written > _EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes what is not in the store yet."""
        if not self._handle:
            write_text(self._file, "".join(self._held))
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes and closes."""
        self.flush()
        if self._handle:
            self._handle.close()


class Folder:
    """A local folder, `here`, for a library that writes files by itself; `flush` copies them to `target`, if that is
    in a store. Close it."""

    def __init__(self, target: Path):
        self._target = None if is_local(target) else target
        self._scratch = self._target and tempfile.TemporaryDirectory(prefix="kl_reg-")
        self.here = pathlib.Path(self._scratch.name if self._scratch else target)

    def flush(self) -> None:
        """Copies the files."""
        if self._target is not None:
            copy_tree(self.here, self._target)

    def close(self) -> None:
        """Copies the files, and removes the local ones of a store."""
        self.flush()
        if self._scratch:
            self._scratch.cleanup()
