"""Text to tokens and back, once, at the environment's edge.

A transcript is the bytes of its tokens, one after the other, so `decode(a + b)` is `decode(a) + decode(b)` wherever no
character is cut, and a speaker marker can be looked for in any tokens (markers.py). Tokenizers of sentencepiece's kind
put a space in front of every text; it belongs to the beginning of a transcript (`opening`) and nowhere else (`encode`).
"""
from __future__ import annotations

import codecs
import functools
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

START = "<|start|>"
ASSISTANT = ("assistant", "model")
"""Roles whose messages the model itself writes."""


def load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or what transformers makes of the older files. It remembers the
    folder, as `folder`: `chat` finds the template there.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: they cannot be read or converted.
    """
    if (folder / "tokenizer.json").is_file():
        try:
            loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:      # that library raises nothing more specific
            raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from None
    else:
        loaded = _converted(folder)
    loaded.no_truncation()              # some files ask for it, and would cut text without a word
    loaded.no_padding()
    loaded.folder = folder
    return loaded


def _converted(folder):
    plain = any(all((folder / name).is_file() for name in names) for names in (("vocab.json", "merges.txt"),
                                                                               ("vocab.txt",)))
    if not plain and not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json, vocab.json with merges.txt, vocab.txt, or "
                                "tokenizer.model")
    if not plain and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(f"{folder / 'tokenizer.model'} can only be converted with sentencepiece: "
                         "`pip install sentencepiece protobuf`, or put the model's tokenizer.json beside it")
    try:
        return _hugging_face(folder).backend_tokenizer
    except (AttributeError, ImportError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: transformers makes no tokenizer of its files: {error}") from None


@functools.lru_cache(maxsize=2)
def _hugging_face(folder):
    from transformers import AutoTokenizer  # takes seconds

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def opening(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` at the beginning of a transcript: with what the tokenizer puts in front of every text (BOS,
    in many families), once, also where `text` begins with it already; with nothing that it puts behind.

    Raises:
        ValueError: as `check_unicode`.
    """
    check_unicode(text)
    probe = tokenizer.encode("a")
    before = list(itertools.compress(probe.ids, itertools.takewhile(bool, probe.special_tokens_mask)))
    text = text.removeprefix("".join(map(tokenizer.id_to_token, before)))
    return before + tokenizer.encode(text, add_special_tokens=False).ids


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` as it continues a transcript: no special tokens and no space are put in front.

    Raises:
        ValueError: as `check_unicode`.
    """
    check_unicode(text)
    return _continuing(tokenizer, tokenizer.get_vocab_size()).encode(text, add_special_tokens=False).ids


def check_unicode(text: str) -> None:
    """Raises a ValueError where `text` holds half of a surrogate pair, which is no character: JSON can write one, and
    Python reads one from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        here = text[max(0, error.start - 10):error.start + 10]
        raise ValueError(f"half of a surrogate pair, {text[error.start]!r}, is no character (in {here!r}); write the "
                         "whole pair, or remove it") from None


def marker_ids(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    """`encode` of a text that an environment writes between turns.

    Raises:
        ValueError: it has no tokens, or the tokenizer cannot write it; `name` says which text it is.
    """
    try:
        ids = encode(tokenizer, text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from None
    if not ids:
        raise ValueError(f"{name}={text!r} gives no tokens; it must be a non-empty string")
    if decode(tokenizer, ids) != text:
        raise ValueError(f"{name}={text!r} comes back from the model's tokenizer as {decode(tokenizer, ids)!r}; choose "
                         "a text that it can write")
    return ids


@functools.lru_cache(maxsize=8)
def _continuing(tokenizer, size):
    """The same tokenizer without the space that it puts in front of every text; `size` tells when tokens were added."""
    normalizer, splitting = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    plain = [part for part in normalizer if part["type"] != "Prepend"]
    # Where words are split at white space first, each gets its own space that way, the first as well as the others.
    by_words = "WhitespaceSplit" in [part["type"] for part in splitting]
    changes = {} if by_words else {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    changed = [part | changes[part["type"]] if part["type"] in changes else part for part in splitting]
    if (plain, changed) == (normalizer, splitting):
        return tokenizer
    other = Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "decoder": None, "normalizer": {"type": "Sequence", "normalizers": plain},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed},
        "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    other.model = tokenizer.model
    other.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    return other


def _parts(component) -> list[dict]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if component is None:
        return []
    steps = json.loads(component.__getstate__())
    inner = [steps[key] for key in ("normalizers", "pretokenizers", "decoders") if key in steps]
    return inner[0] if inner else [steps]


def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """The UTF-8 bytes that each token adds to a text, by number; added and special tokens as they are written.

    Raises:
        ValueError: tokens have no bytes of their own, as in WordPiece.
    """
    return _token_bytes(tokenizer, tokenizer.get_vocab_size())


@functools.lru_cache(maxsize=8)
def _token_bytes(tokenizer, size):
    to_bytes, vocab = _reader(_parts(tokenizer.decoder)), tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    for token, number in vocab.items():
        table[number] = to_bytes(token)
    for number, token in tokenizer.get_added_tokens_decoder().items():
        table[number] = token.content.encode()
    return tuple(table)


def _reader(steps):
    """The function from a token as the vocabulary writes it to its bytes, for a decoder of these steps."""
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        alphabet = _byte_alphabet()
        return lambda token: bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
    if not kinds or kinds - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise ValueError(f"this tokenizer's decoder is {' + '.join(sorted(kinds)) or None}: its tokens have no bytes "
                         "of their own; byte-level tokenizers and those of sentencepiece's kind have")
    fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}
    texts = {step["replacement"]: " " for step in steps if step["type"] == "Metaspace"}
    texts |= {step["pattern"]["String"]: step["content"] for step in steps if step["type"] == "Replace"}

    def to_bytes(token):
        if token in fallback:
            return fallback[token]
        for written, meant in texts.items():
            token = token.replace(written, meant)
        return token.encode()

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed stand for themselves, the others follow from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens included."""
    return b"".join(bytes_of(tokenizer, ids)).decode(errors="replace")


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; together the text. A character split over tokens comes with its last."""
    decoder, last = codecs.getincrementaldecoder("utf-8")(errors="replace"), len(ids) - 1
    return [decoder.decode(part, final=i == last) for i, part in enumerate(bytes_of(tokenizer, ids))]


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """What each token adds to the text, in UTF-8; numbers that are no tokens add nothing."""
    table = token_bytes(tokenizer)
    return [table[number] if number < len(table) else b"" for number in ids]


def chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation as the model's chat template writes it, which brings the BOS where there is one.

    The beginning of the assistant's answer follows. If the last message is the assistant's, its text is that beginning:
    its turn stays open.

    Args:
        tokenizer: from `load`.
        messages: [{"role": "user", "content": "hello"}, ...].

    Raises:
        ValueError: the tokenizer is of no folder, that has no chat template, the template refuses the messages, or it
            does not write the text of the message that is to be continued.
    """
    import jinja2

    try:
        folder = tokenizer.folder
    except AttributeError:
        raise ValueError("this tokenizer was not loaded from a model folder, so it has no chat template") from None
    template = _hugging_face(folder)
    if template.chat_template is None:
        raise ValueError(f"{folder} has no chat template (chat_template.jinja, or in tokenizer_config.json): this is a "
                         "base model")
    begun = messages[-1]["role"] in ASSISTANT
    if begun and not messages[-1]["content"].strip():
        raise ValueError("the chat ends with an empty message of the assistant, which begins no answer; remove it")
    try:
        text = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=not begun,
                                            continue_final_message=begun)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {folder} refuses the messages: {error}") from None
    except ValueError as error:
        raise ValueError(f"the chat template of {folder} leaves the assistant's last message no text that could be "
                         f"continued: {' '.join(str(error).split())[:200]}") from None
    check_unicode(text)
    return tokenizer.encode(text, add_special_tokens=False).ids


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
