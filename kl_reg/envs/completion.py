"""A prompt and one completion by the agent.

The completion ends with one of the model's end tokens, or with the token that completes `env.end`, where that is not
"", in whatever tokens it is written. Its text is rewarded, also where the length cut it.
"""
from __future__ import annotations

import warnings
from itertools import accumulate
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg.envs import prompts
from kl_reg.envs.environment import Environment, Reply
from kl_reg.envs.markers import finder
from kl_reg.pretrained import tokenizer as text
from kl_reg.types import AGENT, OPENING, PAD


class EnvState(NamedTuple):
    """The state of one episode. `found` is the state of the search for the end marker."""

    turn: Int[Array, ""]
    found: Int[Array, ""]
    over: Bool[Array, ""]


def completion(config: ConfigDict, tokenizer: Tokenizer, eos: frozenset[int]) -> Environment:
    """Builds the environment from `config.env`.

    Args:
        eos: the model's end tokens; where there are none and `env.end` is "", all completions have `env.length`
            tokens, and a warning says so.

    Raises:
        ValueError: an end marker that the tokenizer cannot write, or prompts that cannot be used.
        FileNotFoundError, ImportError: see `prompts.read`.
    """
    if config.prefill not in ("", "continue"):
        raise ValueError(f"env.prefill={config.prefill!r}: choose '' or 'continue'")
    marker = text.marker_ids(tokenizer, "env.end", config.end) if config.end else []
    search = finder(tokenizer, config.end) if config.end else None
    ends, (rows, ids) = jnp.array(sorted(eos), jnp.int32), _rows(config, tokenizer)
    if not marker and not eos:
        warnings.warn("env.end='': config.json, generation_config.json and tokenizer_config.json of the model name no "
                      f"end token, so completions only end at their length, env.length={config.length}; set env.end to "
                      "the text that ends one", stacklevel=2)

    def reset():
        return EnvState(jnp.int32(0), jnp.int32(0), jnp.bool_(False))

    def turn(state):
        return jnp.where(state.over, PAD, AGENT), jnp.int32(0)

    def observe(state, token):
        found, over = search.step(state.found, token) if search else (state.found, False)
        return EnvState(state.turn, found, state.over | over | (token == ends).any())

    def read(transcript):
        return [_reply(tokenizer, eos, config.end.encode(), rows, transcript, e) for e in range(len(transcript.tokens))]

    return Environment(reset, turn, observe, prompts.padded(ids), config.length, read,
                       "" if config.openings == "fixed" else rows.digest(), students=False, ends=eos,
                       markers=frozenset(marker))


def _rows(config, tokenizer):
    """The prompts that fit, and the tokens of each."""
    if config.openings == "fixed":
        ids = text.opening(tokenizer, config.opening)
        if not ids:
            raise ValueError(f"env.opening={config.opening!r} has no tokens")
        return prompts.plain(prompts.TEXT, [config.opening]), [ids]
    if config.openings == "held_out":
        raise ValueError("env.openings='held_out' is of env.name='teacher_student'; choose 'fixed' (env.opening), a "
                         ".txt or .jsonl file, a dataset, or a function")
    rows = prompts.read(config)
    if rows.kind == prompts.TURNS:
        raise ValueError(f"env.openings={config.openings!r}: {config.column!r} is a list of turns, which "
                         "env.name='teacher_student' takes; choose a column of texts or chats")
    if config.prefill and rows.kind == prompts.TEXT:
        raise ValueError(f"env.prefill={config.prefill!r} with env.openings={config.openings!r}: {config.column!r} is "
                         "a text, which is continued as it is; leave env.prefill out")
    ids = [_tokens(config, tokenizer, rows.kind, *row) for row in zip(rows.places, rows.prompts, strict=True)]
    kept = prompts.fitting(config, rows, [len(own) for own in ids])
    return prompts.choose(rows, kept), [ids[i] for i in kept]


def _tokens(config, tokenizer, kind, place, prompt):
    if kind == prompts.TEXT:
        return text.opening(tokenizer, prompt)
    try:
        if prompt[-1]["role"] in text.ASSISTANT and not config.prefill:
            raise ValueError("the chat ends with a message of the assistant: remove it if it is an answer to compare "
                             "with; env.prefill='continue' has the agent continue it")
        return text.chat(tokenizer, prompt)
    except ValueError as error:
        raise ValueError(f"env.openings={config.openings!r}, {place}: {error}") from None


def _reply(tokenizer, eos, marker, rows, transcript, e):
    tokens, roles = transcript.tokens[e], transcript.roles[e]
    slots, behind = np.flatnonzero(roles == AGENT), int(np.flatnonzero(roles == OPENING)[-1]) + 1
    own, said, finished = _cut(tokenizer, eos, marker, tokens[slots].tolist())
    if transcript.opening is None:
        prompt, columns = text.decode(tokenizer, tokens[transcript.start[e]:behind].tolist()), {}
    else:
        prompt, columns = rows.prompts[transcript.opening[e]], rows.columns[transcript.opening[e]]
    end = int(slots[-1]) if len(slots) else behind - 1      # the agent may have asked for help at once
    return Reply(e, 0, AGENT, end, own, said.decode(errors="replace"), prompt, finished, True, columns)


def _cut(tokenizer, eos, marker, ids):
    """The tokens that begin before the end, what is said before it, and whether there is one."""
    parts = text.bytes_of(tokenizer, ids)
    said = b"".join(parts)
    at = said.find(marker) if marker else -1
    if at >= 0:
        begins = accumulate(map(len, parts), initial=0)
        return [token for token, begin in zip(ids, begins, strict=False) if begin < at], said[:at], True
    finished = bool(ids) and ids[-1] in eos
    own = ids[:-1] if finished else ids
    return own, b"".join(parts[:len(own)]), finished
