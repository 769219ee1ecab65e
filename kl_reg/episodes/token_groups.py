"""KL by kind of token: what the agent's nats are spent on. On the host, numpy in and floats out.

Every agent token is in one built-in group, the first of these that holds: `first`, the agent's first token of a turn;
`end`, a token whose text contains the end marker; `punctuation`, a token whose text is only punctuation and whitespace;
`other`. A user's group is every agent token whose text a regular expression is found in; these may overlap.
"""
from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from kl_reg.episodes.metrics import means, rates
from kl_reg.pretrained.tokenizer import token_bytes
from kl_reg.types import Episodes

BUILT_IN = ("first", "end", "punctuation", "other")
_FIRST, _END, _PUNCTUATION, _OTHER = range(4)


class TokenGroups(NamedTuple):
    """The groups of a vocabulary's tokens; the last column stands for ids that the tokenizer does not have."""

    names: tuple[str, ...]                  # BUILT_IN, then the user's
    kind: Int[np.ndarray, " v"]             # built-in group of a token that is not the first of a turn
    found: Bool[np.ndarray, "g v"]          # in which of the user's groups


def compile_expressions(expressions: Mapping) -> dict[str, re.Pattern]:
    """The regular expressions of `config.log.groups` by name.

    Raises:
        ValueError: names the first entry that is wrong: a name that is built in or no word, or a bad expression.
    """
    out = {}
    for name, expression in expressions.items():
        if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)) or name in BUILT_IN:
            raise ValueError(f"log.groups: the name {name!r} must consist of letters, digits, - and _, and be none of "
                             f"{', '.join(BUILT_IN)}")
        if not isinstance(expression, str):
            raise ValueError(f"log.groups[{name!r}]={expression!r} must be a regular expression, as a string")
        try:
            out[name] = re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"log.groups[{name!r}]={expression!r} is no regular expression: {error}") from None
    return out


def token_groups(tokenizer: Tokenizer, end: str, expressions: Mapping[str, str]) -> TokenGroups:
    """Decides once for each token of the vocabulary, by its text as it decodes on its own.

    Args:
        end: the environment's end marker; one that takes several tokens is in none of them. "": there is none.
        expressions: of the user's groups, by name.

    Raises:
        ValueError: as `compile_expressions`.
    """
    patterns = compile_expressions(expressions)
    texts = [content.decode(errors="replace") for content in token_bytes(tokenizer)]
    kind = [_END if end and end in text else _PUNCTUATION if _is_punctuation(text) else _OTHER for text in texts]
    found = np.zeros((len(patterns), len(texts) + 1), bool)
    for row, pattern in zip(found, patterns.values(), strict=True):
        row[:-1] = [pattern.search(text) is not None for text in texts]
    return TokenGroups((*BUILT_IN, *patterns), np.array([*kind, _OTHER], np.int8), found)


def _is_punctuation(text):
    """ASCII punctuation, which Unicode counts in part as symbols, Unicode's category P, and whitespace."""
    return text != "" and all(c.isspace() or c in string.punctuation or unicodedata.category(c)[0] == "P" for c in text)


def kl_by_group(episodes: Episodes, groups: TokenGroups) -> dict[str, float | None]:
    """Where the exact D(pi || ref) of one member's batch [b, k] sits, its floor included.

    Returns:
        Of each group "kl/group/<name>/nats_per_episode", a mean over episodes; "nats_per_token", over the group's
        tokens, None without one; "share" of all KL, None without KL; and, as `_se`, standard errors over episodes.
        The built-in groups' nats per episode and shares add up to the whole.
    """
    token = np.minimum(episodes.action, groups.kind.size - 1)
    turn = np.take_along_axis(episodes.transcript.turns, episodes.slot, axis=-1)
    first = np.diff(turn, axis=-1, prepend=-1) != 0
    kind = np.where(first, _FIRST, groups.kind[token])
    member = np.concatenate([kind == np.arange(len(BUILT_IN))[:, None, None], groups.found[:, token]]) & episodes.mask
    nats = np.where(member, episodes.kl, 0.0).sum(-1, dtype=np.float64)
    total = np.where(episodes.mask, episodes.kl, 0.0).sum(-1, dtype=np.float64)
    each = list(zip(groups.names, nats, member.sum(-1), strict=True))
    return {
        **means({f"kl/group/{name}/nats_per_episode": spent for name, spent, _ in each}),
        **rates({f"kl/group/{name}/nats_per_token": (spent, tokens) for name, spent, tokens in each}),
        **rates({f"kl/group/{name}/share": (spent, total) for name, spent, _ in each})}
