"""Models on disk: folders in the Hugging Face layout, read into parameters and written from them."""
from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from kl_reg.models import decoder
from kl_reg.models.decoder import DecoderConfig
from kl_reg.pretrained import families, folders, hf_config, tokenizer, weight_map
from kl_reg.pretrained.weight_files import open_source

_SHARD = 5 * 10**9      # bytes of a file, as transformers writes them


class Model(NamedTuple):
    """A base model: `config` is static, `params` a frozen pytree, `folder` where the tokenizer lies."""

    config: DecoderConfig
    params: dict
    folder: pathlib.Path


def load_config(path: str, dtype: str = "float32", setting: str = "model.path") -> DecoderConfig:
    """Shapes of the model in `path` (anything that `folders.find` knows), without its weights; messages call it
    `setting`."""
    return _read(folders.find(path, setting), dtype)[0]


def _read(folder, dtype):
    settings = folders.settings(folder)
    with hf_config.errors_of(folder):
        config, family = families.read(settings)
    return dataclasses.replace(config, dtype=dtype), family


def load(path: str, dtype: str = "float32", sharding: Callable | None = None, setting: str = "model.path") -> Model:
    """Reads a model; parameters come in `dtype`.

    Args:
        path: anything that `folders.find` knows.
        sharding: (parameter's path, shape) -> a Sharding; each tensor is put straight into its shards.
        setting: what messages call the path.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown family, unreadable file, missing, extra or misshapen weights (all listed), or two
            different tensors for what config.json says is one.
    """
    folder = folders.find(path, setting)
    config, family = _read(folder, dtype)
    shapes = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    source = open_source(folder)
    _check_tied(config, family, source)
    params = weight_map.read(family.rules(config), shapes, source, dtype, family.optional, family.renames, sharding)
    return Model(config, params, folder)


def _check_tied(config, family, source):
    """transformers unties a stored unembedding that is not the embeddings, whatever config.json says."""
    names = {weight_map.rename(key, family.renames): key for key in source.shapes}
    keys = {path: names[rule.theirs] for rule in family.rules(config) for path in rule.ours if rule.theirs in names}
    if config.tied and {"embed", "unembed"} <= set(keys) and not np.array_equal(
            *(source.read(keys[path]) for path in ("embed", "unembed"))):
        raise ValueError(f"{source.path} does not fit its config.json: {keys['unembed']} is not {keys['embed']}, which "
                         "a model with tied embeddings has in its place; set tie_word_embeddings to false")


def vocabulary(path: str, setting: str = "model.path") -> tuple[dict[str, int], int]:
    """Tokens with their numbers, and how many logits the model has: equal for models that KL can compare; messages call
    it `setting`."""
    words = tokenizer.load(folders.find(path, setting)).get_vocab(with_added_tokens=True)
    return words, load_config(path, setting=setting).vocab


def save_tensors(tensors: dict, file: pathlib.Path) -> None:
    """Writes a safetensors file that PyTorch's libraries load. Its mode follows the umask, as that of other files does;
    safetensors would let its owner alone read it."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def save(folder: pathlib.Path, settings: dict, params: dict, dtype: str = "bfloat16") -> None:
    """Writes config.json and safetensors (in files of at most 5 GB) that `transformers` loads.

    Args:
        settings: of config.json, as `families.read` takes them.
        params: of that model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, family = families.read(settings)
    tensors = ((key, jnp.asarray(value, dtype)) for key, value in weight_map.write(family.rules(config), params))
    keys, total = [], 0
    for count, part in enumerate(_parts(tensors), start=1):
        save_tensors(part, folder / f"part-{count}.safetensors")
        keys.append(list(part))
        total += sum(value.nbytes for value in part.values())
    names = [f"model-{i:05}-of-{len(keys):05}.safetensors" for i in range(1, len(keys) + 1)]
    names = names if len(keys) > 1 else ["model.safetensors"]
    for old in folder.glob("model*.safetensors*"):      # of an earlier model here, which would be read instead
        old.unlink()
    for count, name in enumerate(names, start=1):
        (folder / f"part-{count}.safetensors").rename(folder / name)
    if len(keys) > 1:
        index = {"metadata": {"total_size": total},
                 "weight_map": {key: name for name, part in zip(names, keys, strict=True) for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _parts(tensors: Iterator) -> Iterator[dict]:
    """Tensors in dictionaries of at most _SHARD bytes."""
    part, size = {}, 0
    for key, value in tensors:
        if part and size + value.nbytes > _SHARD:
            yield part
            part, size = {}, 0
        part[key] = value
        size += value.nbytes
    yield part
