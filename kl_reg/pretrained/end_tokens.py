"""The tokens with which a model says that its text has ended."""
from __future__ import annotations

import pathlib
from collections.abc import Mapping

from tokenizers import Tokenizer

from kl_reg.pretrained import folders


def named(folder: pathlib.Path, words: Tokenizer) -> dict[int, list[str]]:
    """The end tokens of a model, each with the files that name it.

    It is the union of `eos_token_id` in config.json, in its text_config and in generation_config.json, and of
    `eos_token` in tokenizer_config.json and special_tokens_map.json, where `words`, the model's tokenizer, has such a
    token. These files disagree in many published models.

    Raises:
        ValueError: a file is no JSON object, or has something else there.
    """
    found = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for number in _numbers(folder / name, folders.settings(folder, name), words):
                found.setdefault(number, []).append(name)
    return found


def describe(found: Mapping[int, list[str]], words: Tokenizer) -> str:
    """What `named` found, in a line: "2 '</s>' (config.json, tokenizer_config.json)"."""
    return ", ".join(f"{number} {words.id_to_token(number)!r} ({', '.join(files)})" for number, files in found.items())


def _numbers(file, settings, words):
    """The end tokens that one file names, each once."""
    if not file.name.endswith("config.json") or file.name == "tokenizer_config.json":
        said = settings.get("eos_token")
        text = said.get("content") if isinstance(said, dict) else said
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{file}: eos_token={said!r} must be a text, or an object with its content")
        return [] if text is None or words.token_to_id(text) is None else [words.token_to_id(text)]
    numbers = []
    for part in (settings, settings.get("text_config") or {}):
        said = part.get("eos_token_id")
        listed = said if isinstance(said, list) else [] if said is None else [said]
        if not all(type(number) is int for number in listed):
            raise ValueError(f"{file}: eos_token_id={said!r} must be a number or a list of numbers")
        numbers += listed
    return list(dict.fromkeys(numbers))
