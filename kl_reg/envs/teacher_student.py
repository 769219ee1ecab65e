r"""The paper's environment: the agent plays the teacher, the base model the student, in one transcript.

A turn ends when its writer has written the turn's terminator. With `markers="forced"` that is the end marker, alone or
inside a longer token, and the environment then writes the other speaker's prefix, which is nobody's action. With
`markers="written"` the terminator is the end marker and the other's prefix, all written by whoever has the turn, as in
the paper, in the tokens that the tokenizer gives them on their own.

The student's replies are rewarded one by one; a reply that the end of the episode cuts is worth 0, and the return is
the sum. Source: Cohen, Hutter, Bengio and Russell (2024), "RL, but don't do anything I wouldn't do".
"""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg.models import tokenizer as text
from kl_reg.models.weights import EMBEDDED
from kl_reg.types import AGENT, FORCED, STUDENT, Openings, Transcript


class EnvState(NamedTuple):
    """Of one episode. `speaker` 0 is the agent; `queue` counts prefix tokens still to be forced; `recent` is the end of
    the transcript; `length` counts the writer's tokens in this turn."""

    speaker: Int[Array, ""]
    queue: Int[Array, ""]
    turn: Int[Array, ""]
    length: Int[Array, ""]
    recent: Int[Array, " w"]


class Reply(NamedTuple):
    """A turn in a recorded batch. `end` is its last slot; `finished` whether it reached its terminator."""

    episode: int
    turn: int
    role: int
    end: int
    ids: list[int]
    text: str
    prompt: str
    finished: bool


class Environment(NamedTuple):
    """Three pure functions of one episode, its openings, and a reader of recorded transcripts (on the host).

    reset() -> state; turn(state) -> (role, forced token), who writes the next token; observe(state, token) -> state.
    """

    reset: Callable
    turn: Callable
    observe: Callable
    openings: Openings
    length: int
    read: Callable[[Transcript], list[Reply]]


def teacher_student(config: ConfigDict, tokenizer: Tokenizer) -> Environment:
    """Builds the environment from `config.env`.

    Raises:
        ValueError: a marker or an opening that gives no tokens, or unknown `markers` or `openings`.
    """
    end, teacher, student = (_ids(tokenizer, config, name) for name in ("end", "teacher", "student"))
    if config.markers not in ("forced", "written"):
        raise ValueError(f"env.markers={config.markers!r}: choose 'forced' or 'written'")
    forced = config.markers == "forced"
    terminators = (end, end) if forced else (end + student, end + teacher)     # of the agent's and the student's turn
    prefixes = (student, teacher) if forced else ([], [])                      # forced behind them
    window = max(map(len, terminators))
    ends = [jnp.array([-1] * (window - len(ids)) + ids) for ids in terminators]
    closing = _closing(tokenizer, config.end) if forced else np.zeros(tokenizer.get_vocab_size(), bool)
    queues = [jnp.array(ids or [0]) for ids in prefixes]

    def reset():
        zero = jnp.int32(0)
        return EnvState(zero, zero, zero, zero, jnp.full(window, -1, jnp.int32))

    def turn(state):
        agent = state.speaker == 0
        token = lambda queue: queue[jnp.maximum(len(queue) - state.queue, 0)]  # noqa: E731
        forced_token = jnp.where(agent, token(queues[1]), token(queues[0]))
        role = jnp.where(state.queue > 0, FORCED, jnp.where(agent, AGENT, STUDENT))
        return role, forced_token

    def observe(state, token):
        was_forced = state.queue > 0
        length = jnp.where(was_forced, 0, state.length + 1)
        recent = jnp.append(state.recent[1:], token.astype(jnp.int32))
        matches = [jnp.all((marker < 0) | (marker == recent)) & (length >= len(ids))
                   for marker, ids in zip(ends, terminators, strict=True)]
        closes = jnp.asarray(closing).at[token].get(mode="fill", fill_value=False) & (state.queue == 0)
        over = closes | jnp.where(state.speaker == 0, *matches)
        queue = jnp.where(over, jnp.where(state.speaker == 0, *map(len, prefixes)), jnp.maximum(state.queue - 1, 0))
        return EnvState(jnp.where(over, 1 - state.speaker, state.speaker), queue, state.turn + over,
                        jnp.where(over, 0, length), recent)

    def read(transcript):
        return _read(tokenizer, terminators, closing, config.end, transcript)

    return Environment(reset, turn, observe, _openings(config, tokenizer, teacher), config.length, read)


def _ids(tokenizer, config, name):
    ids = text.encode(tokenizer, config[name])
    if not ids:
        raise ValueError(f"env.{name}={config[name]!r} gives no tokens; it must be a non-empty string")
    return ids


def _openings(config, tokenizer, teacher):
    """Every opening ends with the teacher's prefix: the agent writes first."""
    if config.openings == "fixed":
        texts = [config.opening]
    elif config.openings == "held_out":
        if config.opening_turns % 2:
            raise ValueError(f"env.opening_turns={config.opening_turns} must be even: the agent writes after "
                             "the student")
        texts = [config.opening + "".join(_lines(config, json.loads(line)["turns"]))
                 for line in (EMBEDDED / "held_out.jsonl").read_text().splitlines()]
    else:
        raise ValueError(f"env.openings={config.openings!r}: choose 'fixed' (env.opening) or 'held_out'")
    rows = [text.encode(tokenizer, opening) for opening in texts]
    if config.openings == "held_out":
        rows = [row for row in rows if len(row) <= config.opening_tokens]
    if not rows or not min(map(len, rows)):
        raise ValueError(f"env.opening={config.opening!r}, env.openings={config.openings!r}: no opening has tokens "
                         "and fits env.opening_tokens")
    return Openings(*text.left_pad([row + teacher for row in rows]))


def _lines(config, turns):
    count = min(config.opening_turns, len(turns)) // 2 * 2       # the student has the last word, then the agent begins
    for i, turn in enumerate(turns[:count]):
        yield (config.teacher, config.student)[i % 2] + (" " + turn if turn else "") + config.end


def _closing(tokenizer, end):
    """Which tokens [v] contain the end marker: in many vocabularies "!\\n" is one token, and it ends a turn too."""
    count = tokenizer.get_vocab_size()
    return np.array([end in tokenizer.decode([token], skip_special_tokens=False) for token in range(count)])


def _read(tokenizer, terminators, closing, end, transcript):
    """All turns of a batch [b, s] of numpy arrays, in order; their text without the terminator."""
    replies = []
    for e, (tokens, roles, turns) in enumerate(zip(transcript.tokens, transcript.roles, transcript.turns, strict=True)):
        first = int(transcript.start[e])
        for number in range(turns.max() + 1):
            slots = np.flatnonzero((turns == number) & ((roles == AGENT) | (roles == STUDENT)))
            if not len(slots):
                continue
            role = int(roles[slots[0]])
            terminator = terminators[0 if role == AGENT else 1]
            ids = tokens[slots].tolist()
            said, finished = text.decode(tokenizer, ids), True
            if ids[-len(terminator):] == terminator:
                ids = ids[:-len(terminator)]
                said = text.decode(tokenizer, ids)
            elif ids[-1] < len(closing) and closing[ids[-1]]:
                said = said[:said.rindex(end)]
            else:
                finished = False
            replies.append(Reply(e, number, role, int(slots[-1]), ids, said.strip(),
                                 text.decode(tokenizer, tokens[first:slots[0]].tolist()), finished))
    return replies
