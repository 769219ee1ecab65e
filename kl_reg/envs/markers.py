"""Finding texts, such as the speaker markers, in a stream of tokens, whatever tokens they come in.

A newline may be a token, part of ".\\n" or "\\n\\n", or the byte <0x0A>; and a marker of several tokens has many
tokenisations. So markers are looked for in the bytes, by the automaton of Knuth, Morris and Pratt (1977), "Fast pattern
matching in strings"; on the host it is run over the bytes of each token from each of its states, which leaves one table
over (state, token).
"""
from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8, UInt16
from tokenizers import Tokenizer

from kl_reg.pretrained.tokenizer import token_bytes


class Finder(NamedTuple):
    """Looks for one marker after the other, as `finder` has it. A state says which one is looked for and how much of it
    the text ends with; it is 0 at the beginning.

    `table` holds what follows a state and a token: the next state, plus the number of states if a marker was found.
    """

    table: UInt8[Array, "s v"] | UInt16[Array, "s v"]

    def step(self, state: Int[Array, ""], token: Int[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """The state behind a token, and whether a marker was completed in it. Numbers that are no tokens of the
        tokenizer (embeddings are often padded) have no text and change nothing."""
        states, vocab = self.table.shape
        code = self.table[state, jnp.minimum(token, vocab - 1)].astype(jnp.int32)
        code = jnp.where(token < vocab, code, state)
        return code % states, code >= states


def finder(tokenizer: Tokenizer, *markers: str) -> Finder:
    """Looks for the first marker; then for the second in the text behind it, the rest of its last token included; and
    so on, and behind the last marker for the first again. In one token at most one marker is found.

    Raises:
        ValueError: an empty marker, markers of more than 32,768 bytes in all, or tokens that have no bytes.
    """
    if not markers or not all(markers):
        raise ValueError(f"markers={markers!r}: each must be a non-empty string")
    delta = _byte_automaton([marker.encode() for marker in markers])
    states, tokens = len(delta) // 2, token_bytes(tokenizer)
    lengths = np.array([len(token) for token in tokens])
    order = np.argsort(-lengths, kind="stable")     # the longest first: those that have a byte i come before the others
    text = np.frombuffer(b"".join(tokens), np.uint8)
    first = (np.cumsum(lengths) - lengths)[order]
    codes = np.repeat(np.arange(states, dtype=delta.dtype)[:, None], len(tokens), 1)
    for i in range(lengths.max()):
        there = np.count_nonzero(lengths > i)
        codes[:, :there] = delta[codes[:, :there], text[first[:there] + i]]
    table = np.empty_like(codes)
    table[:, order] = codes
    return Finder(jnp.asarray(table))


def _byte_automaton(markers):
    """Transitions [2 s, 256] over bytes. Codes from s on are the same states once a marker was found in the token."""
    offsets = np.cumsum([0, *map(len, markers)])
    states = int(offsets[-1])
    if 2 * states > 2**16:
        raise ValueError(f"markers of {states} bytes in all: at most 32,768")
    delta = np.zeros((2 * states, 256), np.min_scalar_type(2 * states - 1))
    for marker, offset, following in zip(markers, offsets, [*offsets[1:-1], 0], strict=False):
        reached, border = np.zeros((len(marker) + 1, 256), int), 0
        for length, byte in enumerate(marker):
            reached[length] = reached[border]            # on a mismatch, as from the longest border
            border = int(reached[border, byte]) if length else 0
            reached[length, byte] = length + 1
        reached = reached[:-1]
        whole, rows = reached == len(marker), slice(offset, offset + len(marker))
        delta[rows] = np.where(whole, states + following, offset + reached)
        delta[states:][rows] = states + offset + np.where(whole, border, reached)
    return delta
