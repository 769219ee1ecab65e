"""Chats in the forms that data has them in, read as messages {"role": str, "content": str, ...}."""
from __future__ import annotations

from collections.abc import Mapping

SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
            "tool": "tool"}
"""Roles of the speakers in ShareGPT's turns, {"from": speaker, "value": text}."""


def read(prompt: list) -> list[dict] | None:
    """The messages of a chat, or None if `prompt` is no chat.

    Accepted: messages; messages whose content is a list of text parts, [{"type": "text", "text": str}, ...], which are
    joined; and ShareGPT's turns.

    Raises:
        ValueError: it is a chat in one of these forms and says something that is no text, or its speaker is unknown.
    """
    if not all(isinstance(turn, Mapping) for turn in prompt):
        return None
    if all({"role", "content"} <= turn.keys() for turn in prompt):
        read = [dict(turn) | {"content": _content(number, turn["content"])} for number, turn in enumerate(prompt, 1)]
    elif all({"from", "value"} <= turn.keys() for turn in prompt):
        read = [_turn(number, **turn) for number, turn in enumerate(prompt, 1)]
    else:
        return None
    whole = all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in read)
    return read if whole else None


def _content(number, content):
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message {number} has a part that is no text ({str(kind)[:40]!r}); accepted are "
                             'parts {"type": "text", "text": ...}')
    return "".join(part["text"] for part in content)


def _turn(number, value, **turn):
    speaker = turn.pop("from")
    if speaker not in SPEAKERS:
        raise ValueError(f"turn {number} is from {str(speaker)[:40]!r}; known are {', '.join(SPEAKERS)}; convert the "
                         'chat to messages {"role": ..., "content": ...}')
    return {"role": SPEAKERS[speaker], "content": value} | turn
