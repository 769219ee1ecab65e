"""Models on disk: a folder in the Hugging Face layout (config.json, model.safetensors, tokenizer.json)."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from kl_reg.models import tokenizer
from kl_reg.models.decoder import DecoderConfig
from kl_reg.models.families import FAMILIES, LLAMA, hf_config

EMBEDDED = pathlib.Path(__file__).parent.parent / "assets"


class Model(NamedTuple):
    """A base model: `config` is static, `params` a frozen pytree, `folder` where the tokenizer lies."""

    config: DecoderConfig
    params: dict
    folder: pathlib.Path


def model_folder(path: str) -> pathlib.Path:
    """The folder of a model: `path`, or the embedded one for "embedded".

    Raises:
        FileNotFoundError: the folder or one of its three files is missing.
    """
    folder = EMBEDDED if path == "embedded" else pathlib.Path(path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            hint = "; `python -m launch.pretrain --config=configs/pretrain_chitchat.py` makes it"
            raise FileNotFoundError(f"model.path={path!r}: {folder / name} is missing{hint * (path == 'embedded')}")
    return folder


def load_config(path: str, dtype: str = "float32") -> DecoderConfig:
    """Shapes of the model in `path`, without its weights."""
    file = model_folder(path) / "config.json"
    try:
        hf = json.loads(file.read_text())
        family = hf["model_type"]
        if family not in FAMILIES:
            raise ValueError(f"{file}: model_type {family!r} is not supported; known: {sorted(FAMILIES)}")
        return dataclasses.replace(FAMILIES[family].config(hf), dtype=dtype)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from None


def load(path: str, dtype: str = "float32") -> Model:
    """Reads a model folder; parameters come in `dtype`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown family, unreadable file, or missing, extra or misshapen weights (all listed).
    """
    folder, config = model_folder(path), load_config(path, dtype)
    file = folder / "model.safetensors"
    try:
        with safe_open(file, framework="flax") as tensors:
            have = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
            _check_keys(file, have, _expected(config))
            flat = {ours: _read(tensors, keys, transpose, dtype) for ours, keys, transpose in _rules(config)}
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
    return Model(config, unflatten_dict(flat, sep="/"), folder)


def vocabulary(path: str) -> tuple[dict[str, int], int]:
    """Tokens with their numbers, and how many logits the model has: equal for models that KL can compare."""
    return tokenizer.load(model_folder(path)).get_vocab(with_added_tokens=True), load_config(path).vocab


def digest(folder: pathlib.Path) -> str:
    """SHA-256 of a model's weights and tokenizer."""
    parts = []
    for name in ("model.safetensors", "tokenizer.json"):
        with open(folder / name, "rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "-".join(parts)


def save(folder: pathlib.Path, config: DecoderConfig, params: dict) -> None:
    """Writes config.json and model.safetensors (bfloat16), loadable by `transformers`."""
    folder.mkdir(parents=True, exist_ok=True)
    flat, tensors = flatten_dict(params, sep="/"), {}
    for ours, keys, transpose in _rules(config):
        layers = [flat[ours][i] for i in range(config.layers)] if ours.startswith("layers/") else [flat[ours]]
        for key, value in zip(keys, layers, strict=True):
            tensors[key] = jnp.asarray(value.T if transpose else value, jnp.bfloat16)
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rules(config):
    """(our path, its HF keys, transpose) of every weight that a model with this config has."""
    for ours, theirs, transpose in LLAMA.weights:
        if ours == "unembed" and config.tied:
            continue
        count = config.layers if "{i}" in theirs else 1
        yield ours, [theirs.format(i=i) for i in range(count)], transpose


def _expected(config):
    c = config
    heads, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    shapes = {"embed": (c.vocab, c.width), "unembed": (c.vocab, c.width), "query": (heads, c.width),
              "key": (kv, c.width), "value": (kv, c.width), "out": (c.width, heads), "gate": (c.mlp_width, c.width),
              "up": (c.mlp_width, c.width), "down": (c.width, c.mlp_width)}
    return {key: shapes.get(ours.removeprefix("layers/").split("/")[0], (c.width,))
            for ours, keys, _ in _rules(c) for key in keys}


def _check_keys(file, have, expected):
    problems = [f"missing {key}" for key in expected if key not in have]
    # Some checkpoints store the tied unembedding a second time.
    problems += [f"extra {key}" for key in have if key not in expected and key != "lm_head.weight"]
    problems += [f"{key} is {have[key]}, expected {shape}" for key, shape in expected.items()
                 if key in have and have[key] != shape]
    if problems:
        raise ValueError(f"{file} does not fit its config.json: " + "; ".join(problems))


def _read(tensors, keys, transpose, dtype):
    layers = [np.asarray(tensors.get_tensor(key).astype(dtype)) for key in keys]
    layers = [x.T if transpose else x for x in layers]
    return jnp.asarray(np.stack(layers) if "layers" in keys[0] else layers[0])
