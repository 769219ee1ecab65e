"""Human conversations of the chitchat-dataset package (BYU PCC lab, MIT) as transcripts, split into train and held-out.

A conversation is a list of turns that alternate between two speakers, the first of them A. As text a turn is one line:
"A: hello there\\n"; an empty turn is "A:\\n".
"""
from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

SPEAKERS = ("A:", "B:")
END = "\n"
HELD_OUT = 0.05


class Conversation(NamedTuple):
    """`turns` alternate between the speakers; `ident` is the dataset's own."""

    ident: str
    turns: list[str]


def load() -> tuple[list[Conversation], list[Conversation], dict]:
    """All conversations as (train, held-out, counts); needs the `data` extra.

    Counts are over the whole data: conversations, messages, and messages that are empty. Conversations with fewer than
    two turns are in neither part.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        import chitchat_dataset
    except ImportError:
        raise ImportError("chitchat-dataset is not installed: pip install 'kl_reg[data]'") from None
    data = chitchat_dataset.Dataset()
    split = ([], [])
    messages = empty = 0
    for ident, raw in data.items():
        texts = [(part["sender"], clean(part["text"])) for message in raw["messages"] for part in message]
        messages += len(texts)
        empty += sum(not text for _, text in texts)
        turns = join_speakers(texts)
        if len(turns) > 1:
            split[held_out(ident)].append(Conversation(ident, turns))
    counts = {"conversations": len(data), "messages": messages, "empty_messages": empty}
    return *split, counts


def held_out(ident: str) -> bool:
    """Whether a conversation is held out: decided by a hash of its identifier alone, so no rerun mixes the parts."""
    return int(hashlib.sha256(ident.encode()).hexdigest()[:8], 16) / 16**8 < HELD_OUT


def clean(text: str) -> str:
    """One line; a speaker prefix inside a message is broken up, so that it cannot pass for a turn."""
    return re.sub(r"([AB]):", r"\1 :", " ".join(text.split()))


def join_speakers(texts: list[tuple[str, str]]) -> list[str]:
    """Consecutive messages of one sender become one turn."""
    turns, last = [], None
    for sender, text in texts:
        if sender == last:
            turns[-1] = f"{turns[-1]} {text}".strip()
        else:
            turns.append(text)
        last = sender
    return turns


def transcript(turns: list[str]) -> str:
    """Turns as text, the first spoken by A."""
    return "".join(f"{SPEAKERS[i % 2]}{' ' if turn else ''}{turn}{END}" for i, turn in enumerate(turns))
