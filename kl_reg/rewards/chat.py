"""Completions of a chat are messages, those of other prompts are texts."""
from collections.abc import Mapping, Sequence


def texts(completions: Sequence[str | Sequence[Mapping[str, str]]]) -> list[str]:
    """What each completion says; its messages, where they are several, one below the other."""
    return [said if isinstance(said, str) else "\n".join(message["content"] for message in said)
            for said in completions]
