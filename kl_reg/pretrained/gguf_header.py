"""What a GGUF file holds: its settings, and where each tensor lies. Nothing but headers is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import math
import pathlib
import struct
from typing import NamedTuple

import gguf
import numpy as np

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class Stored(NamedTuple):
    """A tensor as it lies in the file: `data` are its bytes (memory-mapped), a row of quantised blocks each."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


class Header(NamedTuple):
    """`settings` by their GGUF names ("llama.block_count"), `tensors` by theirs ("blk.0.attn_q.weight")."""

    settings: dict[str, object]
    tensors: dict[str, Stored]


def read(file: pathlib.Path) -> Header:
    """The header of `file`. (gguf.GGUFReader takes ten times as long, and endless memory where a length is damaged.)

    Raises:
        ValueError: the file is truncated, damaged, or no GGUF file of version 2 or 3.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
        settings, places, start = _parse(_Bytes(memoryview(data)))
        return Header(settings, {name: _stored(data[start:], *place) for name, place in places.items()})
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}") from None


class _Bytes:
    """A buffer that is read from its start to its end."""

    def __init__(self, buffer):
        self.buffer, self.at = buffer, 0

    def take(self, size):
        if size > len(self.buffer) - self.at:
            raise ValueError(f"it ends within its header, at byte {len(self.buffer)}")
        self.at += size
        return self.buffer[self.at - size:self.at]

    def unpack(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self):
        return str(self.take(*self.unpack("<Q")), "utf-8")

    def numbers(self, kind, count):
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()

    def value(self, kind):
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.unpack("<IQ")
        return [self.text() for _ in range(count)] if kind == _STRING else self.numbers(kind, count)


def _parse(content):
    magic, version = content.unpack("<4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}, not b'GGUF' and version 2 or 3")
    tensors, count = content.unpack("<QQ")
    settings, places = {}, {}
    for _ in range(count):
        name = content.text()
        settings[name] = content.value(*content.unpack("<I"))
    for _ in range(tensors):
        name, (axes,) = content.text(), content.unpack("<I")
        shape = tuple(reversed(content.unpack(f"<{axes}Q")))       # GGUF's fastest axis is its first
        places[name] = shape, *content.unpack("<IQ")
    alignment = settings.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    return settings, places, -(-content.at // alignment) * alignment


def _stored(data, shape, kind, offset):
    kind = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"a tensor of shape {shape} cannot be stored in blocks of {block}")
    in_bytes = (*shape[:-1], shape[-1] // block * size)
    end = offset + math.prod(in_bytes)
    if end > len(data):
        raise ValueError(f"a tensor ends {end - len(data)} bytes after the file")
    return Stored(shape, kind, data[offset:end].reshape(in_bytes))
