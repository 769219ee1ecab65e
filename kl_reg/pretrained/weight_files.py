"""Weights on disk under their Hugging Face names, read tensor by tensor: safetensors, whole or in shards, or GGUF."""
from __future__ import annotations

import json
import pathlib

import ml_dtypes  # noqa: F401    (teaches numpy bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from kl_reg.pretrained import gguf_file
from kl_reg.pretrained.source import Source

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def open_source(folder: pathlib.Path) -> Source:
    """The weights in `folder`; only headers are read yet.

    Raises:
        FileNotFoundError, ValueError: see `weight_files`.
        ValueError: a file is truncated, damaged or not what its name says, or a shard lacks weights that the index
            promises (all listed).
    """
    first, *shards = weight_files(folder)
    if first.suffix == ".gguf":
        return gguf_file.source(first)
    handles = {file: _open(file) for file in shards or [first]}
    have = {file: set(handle.keys()) for file, handle in handles.items()}
    places = {key: folder / shard for key, shard in _weight_map(first).items()} if shards else dict.fromkeys(
        handles[first].keys(), first)
    lacks = [f"{file.name} lacks {key}" for key, file in places.items() if key not in have[file]]
    if lacks:
        raise ValueError(f"{first} does not fit its shards: {'; '.join(lacks)}")

    def read(key: str) -> np.ndarray:
        try:
            return handles[places[key]].get_tensor(key)
        except (SafetensorError, AttributeError, TypeError) as error:      # numpy has no such dtype
            raise ValueError(f"{places[key]}: {key} cannot be read: {error}") from None

    return Source(first, {key: tuple(handles[file].get_slice(key).get_shape()) for key, file in places.items()}, read)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder's weights: [model.safetensors]; or the index, then its shards; or [the one GGUF file].

    Raises:
        FileNotFoundError: there are none, or shards are missing (all listed).
        ValueError: more than one GGUF file, only pickled weights, an index that cannot be read or that names files
            outside the folder.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        shards = sorted(set(_weight_map(folder / INDEX).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder / INDEX}: missing {', '.join(missing)}")
        return [folder / INDEX, *(folder / name for name in shards)]
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} GGUF files, and has to hold one: "
                         + ", ".join(file.name for file in found))
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled and not found:
        raise ValueError(f"{folder}: {pickled[0]} is pickled, and reading a pickle runs whatever code it holds. Where "
                         "you trust it, `AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)` "
                         f"of transformers makes {WHOLE} of it (AutoModelForCausalLM for a language model)")
    if not found:
        raise FileNotFoundError(f"{folder / WHOLE} is missing (accepted too: {INDEX} with its shards, one *.gguf file)")
    return found


def _open(file):
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None


def _weight_map(index):
    """Names of weights, and in which file of the folder each lies."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in names.values() if pathlib.PurePath(name).name != name or name == ".."]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights: {error!r}") from None
    if outside or not names:
        raise ValueError(f"{index}: no file of its folder: {', '.join(sorted(set(outside))) or 'weight_map is empty'}")
    return names
