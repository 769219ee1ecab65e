"""Text to tokens and back, once, at the environment's edge."""
from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

START = "<|start|>"


def load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a model folder (tokenizer.json)."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` as it stands: no special tokens are added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; together the text. A character split over tokens comes with its last."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:end])
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}") if end < len(ids) else text
        texts.append(complete[len(done):])
        done = complete if len(complete) > len(done) else done
    return texts


def left_pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as one array [b, p], padding first, and where each row starts [b]."""
    width = max(map(len, rows))
    start = np.array([width - len(row) for row in rows], np.int32)
    return np.array([[0] * (width - len(row)) + list(row) for row in rows], np.int32), start


def train(texts: Iterable[str], vocab: int, markers: Sequence[str]) -> Tokenizer:
    """A byte-level BPE in which START and each marker is one token, and a newline never merges with anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 1 - len(markers), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([START])
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return tokenizer
