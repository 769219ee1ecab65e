"""Openings from a file of prompts, a dataset, or a function that makes them. On the host.

A row has a prompt, as the data has it, and other columns, which the reward function is told.
"""
from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from kl_reg import storage
from kl_reg.envs import messages
from kl_reg.pretrained import tokenizer as text
from kl_reg.registry import Registry
from kl_reg.types import Openings

TEXT, CHAT, TURNS = "a text", "a chat", "a list of turns"
_HUB = re.compile(r"(?P<path>\w[\w.-]*/\w[\w.-]*)(:(?P<name>[\w.-]+))?(@(?P<revision>[^@\s]+))?")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json"}      # files for `datasets`, and its name of each kind
_ACCEPTED = ("'fixed' (env.opening), 'held_out' (of env.name='teacher_student'), a .txt, .jsonl, .json, .csv or "
             ".parquet file, a folder of a dataset, ORG/NAME[:SUBSET][@REVISION] of the Hugging Face hub, or the "
             "dotted path of a function")
_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""What every reward function is told."""

_DATED = datetime.date | datetime.time | datetime.timedelta


class Rows(NamedTuple):
    """`kind` of all prompts: TEXT, str; CHAT, messages {"role": str, "content": str, ...}; TURNS, list[str]. `columns`
    are the other ones by name, the same names in each row. `places` say where each row is."""

    kind: str
    prompts: list
    columns: list[dict]
    places: list[str]

    def digest(self) -> str:
        """SHA-256 of prompts and columns.

        Raises:
            ValueError: names a column that holds something else than numbers, texts, dates and lists of them.
        """
        try:
            written = _json([self.prompts, self.columns])
        except (TypeError, ValueError, RecursionError):
            raise ValueError(self._unwritten()) from None
        return hashlib.sha256(written.encode()).hexdigest()

    def _unwritten(self):
        """Says which column holds what JSON cannot hold."""
        for place, row in zip(self.places, self.columns, strict=True):
            for name, value in row.items():
                try:
                    _json(value)
                except (TypeError, ValueError, RecursionError) as error:
                    return (f"env.openings: the column {name!r} holds {_named(type(value))} in {place}, of which no "
                            f"fingerprint can be made ({error}); remove the column, or make it numbers or texts")
        return "env.openings: the run's fingerprint cannot be made of the prompts"


def plain(kind: str, prompts: list) -> Rows:
    """Rows without other columns."""
    return Rows(kind, prompts, [{}] * len(prompts), [f"row {number}" for number in range(1, len(prompts) + 1)])


def read(config: ConfigDict) -> Rows:
    """The rows of `env.openings`, which is no built-in name, with their `env.column` as prompt.

    Accepted: a .txt file, one prompt a line; a .jsonl file; a .json, .csv or .parquet file; a folder that `datasets`
    saved, or one of data files; a dataset of the Hugging Face hub, ORG/NAME[:SUBSET][@REVISION]; the dotted path of a
    function without arguments that returns the rows, a list of dictionaries. Blank lines are no rows; a column that a
    row lacks is None there. Chats become messages (`messages.read`).

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: it is none of these, cannot be read, imported or called, is empty, lacks the column or the split, or
            has prompts of no kind or of several.
        ImportError: a dataset, and `datasets` is not installed.
    """
    try:
        path = storage.path(config.openings)
    except (ImportError, ValueError) as error:
        raise type(error)(f"env.openings={config.openings!r}: {error}; choose {_ACCEPTED}") from None
    if path.suffix in (".txt", ".jsonl") and not path.is_dir():
        rows = [(f"line {number}", {config.column: line} if path.suffix == ".txt" else _object(config, number, line))
                for number, line in _lines(config, path) if line.strip()]
    elif path.is_dir() or path.is_file() and path.suffix in _TABLES or _is_hub(config, path):
        rows = [(f"row {number}", row) for number, row in enumerate(_dataset(config, path), start=1)]
    elif _DOTTED.fullmatch(config.openings) and path.suffix not in _TABLES and not path.exists():
        rows = [(f"row {number}", row) for number, row in enumerate(_made(config), start=1)]
    else:
        named = path.suffix in _TABLES or path.name != config.openings
        kind = FileNotFoundError if named and not path.exists() else ValueError
        raise kind(f"env.openings={config.openings!r}: {'not accepted' if kind is ValueError else 'missing'}; choose "
                   f"{_ACCEPTED}")
    if not rows:
        raise ValueError(f"env.openings={config.openings!r} is empty")
    return _columns(config, rows)


def _is_hub(config, path):
    """Whether it is the name of a dataset of the hub: a file's name that has no file is none."""
    return _HUB.fullmatch(config.openings) and path.suffix not in _TABLES and not path.exists()


def _lines(config, path):
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"env.openings={config.openings!r}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"env.openings={config.openings!r} is not UTF-8: {error}") from None
    lines = content.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return enumerate(lines, start=1)        # `splitlines` also splits at what JSON has inside a string


def _object(config, number, line):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"env.openings={config.openings!r}, line {number} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"env.openings={config.openings!r}, line {number} is no JSON object but {line.strip()[:40]}")
    return row


def _dataset(config, path) -> Iterable[dict]:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"env.openings={config.openings!r} is a dataset: pip install 'kl_reg[data]', or use a .jsonl "
                          "file") from None
    try:
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(path)
            if config.split not in splits:
                raise ValueError(f"no such split; there are {', '.join(splits)}")
            return splits[config.split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(path)        # one table, which has no splits
        if path.is_file():
            return datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split=config.split)
        source = {"path": str(path)} if path.is_dir() else _HUB.fullmatch(config.openings).groupdict()
        return datasets.load_dataset(**source, split=config.split)
    except Exception as error:      # that library and the hub's client raise dozens of kinds
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error.__cause__ or error).split())
        raise kind(f"env.openings={config.openings!r}, env.split={config.split!r}: {reason}") from error


def _made(config) -> list[dict]:
    """What a function says."""
    source = f"env.openings={config.openings!r}"
    try:
        function = Registry("env.openings")[config.openings]
    except ValueError as error:
        raise ValueError(f"{error}; choose {_ACCEPTED}") from None
    try:
        rows = function()
    except Exception as error:      # whatever its author did
        raise ValueError(f"{source}, called without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and all(isinstance(name, str) for name in row)
                                             for row in rows):
        raise ValueError(f"{source} returned {str(rows)[:60]!r}; accepted is a list of dictionaries with the names of "
                         f"columns as keys, [{{{config.column!r}: ..., ...}}, ...]")
    return rows


def _columns(config, rows):
    """Prompts apart from the other columns."""
    source, column = f"env.openings={config.openings!r}", config.column
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    for place, row in rows:
        if column not in row:
            raise ValueError(f"{source}, {place} has no column {column!r} (env.column); there are "
                             f"{', '.join(row) or 'none'}")
    prompts, kinds = [], []
    for place, row in rows:
        try:
            kind, prompt = _prompt(row[column])
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {column!r}: {error}") from None
        if kind is None:
            raise ValueError(f"{source}, {place}: {column!r} is {str(prompt)[:60]!r}; accepted are a text, a chat "
                             '([{"role": ..., "content": ...}, ...], or [{"from": ..., "value": ...}, ...]) and a list '
                             "of turns ([text, ...])")
        prompts.append(prompt)
        kinds.append(kind)
        if kind != kinds[0]:
            raise ValueError(f"{source}: {column!r} is {kinds[0]} in {rows[0][0]} and {kind} in {place}; it must be "
                             "of one kind")
    others = [name for name in names if name != column]
    taken = [name for name in _RESERVED if name in others]
    if taken:
        raise ValueError(f"{source}: reward functions are told of a column by its name, and {', '.join(_RESERVED)} are "
                         f"taken; rename {', '.join(taken)}")
    filled = [dict.fromkeys(others) | {name: row[name] for name in row if name != column} for _, row in rows]
    return Rows(kinds[0], prompts, filled, [place for place, _ in rows])


def _prompt(prompt):
    """Its kind, None where it has none, and itself; a chat as messages."""
    turns, kind = prompt if isinstance(prompt, list) and prompt else [None], None
    if isinstance(prompt, str):
        kind = TEXT
    elif all(isinstance(turn, str) for turn in turns):
        kind = TURNS
    elif chat := messages.read(turns):
        kind, prompt = CHAT, chat
    text.check_unicode(json.dumps(prompt, ensure_ascii=False, skipkeys=True, default=str))
    return kind, prompt


def fitting(config: ConfigDict, rows: Rows, counts: Sequence[int]) -> list[int]:
    """The rows whose openings have at most `env.opening_tokens` tokens; warns of the others.

    Args:
        counts: tokens of each row's opening.

    Raises:
        ValueError: an opening without tokens, or none that fits.
    """
    source = f"env.openings={config.openings!r}"
    if 0 in counts:
        raise ValueError(f"{source}, {rows.places[list(counts).index(0)]}: the prompt has no tokens")
    kept = [i for i, count in enumerate(counts) if count <= config.opening_tokens]
    if not kept:
        raise ValueError(f"{source}: the shortest of {len(counts)} openings has {min(counts)} tokens, "
                         f"env.opening_tokens={config.opening_tokens} is the most that is taken")
    if len(kept) < len(counts):
        warnings.warn(f"{source}: {len(counts) - len(kept)} of {len(counts)} openings are left out, which have more "
                      f"than env.opening_tokens={config.opening_tokens} tokens", stacklevel=3)
    return kept


def choose(rows: Rows, kept: Sequence[int]) -> Rows:
    """These rows alone."""
    return Rows(rows.kind, *([values[i] for i in kept] for values in rows[1:]))


def padded(rows: Sequence[Sequence[int]]) -> Openings:
    """Openings of these token ids, one width, of at least 2 slots: the last one is read when the first token is drawn,
    and what is read before must not be nothing."""
    tokens, start = text.left_pad(rows)
    more = max(0, 2 - tokens.shape[1])
    return Openings(np.pad(tokens, ((0, 0), (more, 0))), start + np.int32(more))


def _json(value):
    """The value as a digest reads it."""
    return json.dumps(value, sort_keys=True, default=_written)


def _written(value):
    """What JSON cannot hold, for a digest."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes | decimal.Decimal | _DATED):
        return repr(value)
    raise TypeError(f"{_named(type(value))} is not JSON")


def _named(kind):
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
