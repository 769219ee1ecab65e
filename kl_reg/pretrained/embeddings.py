"""Whether a model has an embedding for every token that it reads. JAX would read the last row of the table for a token
beyond it. Tokens that a tokenizer has and nothing uses may lie beyond the table."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Words(Protocol):
    """A tokenizer, of which nothing but this is asked here."""

    def id_to_token(self, number: int) -> str | None:
        """The text of a token."""


def check(ids: Iterable[int], rows: int, source: str, model: str, words: Words) -> None:
    """Refuses tokens without an embedding.

    Args:
        ids: token ids that the model will read.
        rows: rows of its table.
        source, model: what messages call the origin of the tokens, and the model.
        words: the tokenizer that `ids` are of.

    Raises:
        ValueError: an id lies beyond the table; names the smallest one.
    """
    beyond = [number for number in ids if not 0 <= number < rows]
    if beyond:
        number = min(beyond)
        text = words.id_to_token(number) if number >= 0 else None
        raise ValueError(f"{source}: token {number} ({text!r}) has no embedding in {model}, whose "
                         f"table has {rows} rows; resize the table (`resize_token_embeddings` of transformers), or do "
                         "without the token")
