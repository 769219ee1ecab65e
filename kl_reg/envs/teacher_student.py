r"""The paper's environment: the agent plays the teacher, the base model the student, in one transcript.

A turn ends with the token that completes the turn's terminator, in whatever tokens its writer has written that text.
With `markers="forced"` the terminator is the end marker, and the environment then writes the other speaker's prefix,
which is nobody's action. With `markers="written"` it is the end marker and the other's prefix, all written by whoever
has the turn, as in the paper.

Only what a turn's own tokens say can end it, forced prefixes not among them; with "written" the text that the last
token of the turn before has behind its terminator (":\n" is one token in many vocabularies) belongs to the turn, too.

The student's replies are rewarded one by one; a reply that the end of the episode cuts is worth 0, and the return is
the sum. Source: Cohen, Hutter, Bengio and Russell (2024), "RL, but don't do anything I wouldn't do".
"""
from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg.models import tokenizer as text
from kl_reg.models.folders import EMBEDDED
from kl_reg.models.markers import finder
from kl_reg.types import AGENT, FORCED, STUDENT, Openings, Transcript


class EnvState(NamedTuple):
    """Of one episode. `speaker` 0 is the agent; `queue` counts prefix tokens still to be forced; `found` is the state
    of the search for the turn's terminator."""

    speaker: Int[Array, ""]
    queue: Int[Array, ""]
    turn: Int[Array, ""]
    found: Int[Array, ""]


class Reply(NamedTuple):
    """A turn in a recorded batch. `end` is its last slot; `ids` are the tokens that begin before its terminator, `text`
    what it says before it, stripped; `finished` whether it reached it."""

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
        ValueError: a marker or an opening that gives no tokens, a marker that the tokenizer cannot write, or unknown
            `markers` or `openings`.
    """
    _, teacher, student = (text.marker_ids(tokenizer, f"env.{name}", config[name])
                           for name in ("end", "teacher", "student"))
    if config.markers not in ("forced", "written"):
        raise ValueError(f"env.markers={config.markers!r}: choose 'forced' or 'written'")
    forced = config.markers == "forced"
    terminators = [config.end] if forced else [config.end + config.student, config.end + config.teacher]
    prefixes = (student, teacher) if forced else ([], [])          # forced behind the agent's and the student's turn
    search, queues = finder(tokenizer, *terminators), [jnp.array(ids or [0]) for ids in prefixes]

    def reset():
        return EnvState(*[jnp.int32(0)] * 4)

    def turn(state):
        agent = state.speaker == 0
        token = lambda queue: queue[jnp.maximum(len(queue) - state.queue, 0)]  # noqa: E731
        forced_token = jnp.where(agent, token(queues[1]), token(queues[0]))
        role = jnp.where(state.queue > 0, FORCED, jnp.where(agent, AGENT, STUDENT))
        return role, forced_token

    def observe(state, token):
        was_forced = state.queue > 0
        found, over = search.step(state.found, token)
        over &= ~was_forced
        if forced:      # the search begins anew behind the prefix
            found = jnp.where(over | was_forced, 0, found)
        queue = jnp.where(over, jnp.where(state.speaker == 0, *map(len, prefixes)), jnp.maximum(state.queue - 1, 0))
        return EnvState(jnp.where(over, 1 - state.speaker, state.speaker), queue, state.turn + over, found)

    def read(transcript):
        return _read(tokenizer, [marker.encode() for marker in terminators], transcript)

    return Environment(reset, turn, observe, _openings(config, tokenizer), config.length, read)


def _openings(config, tokenizer):
    """Every opening ends with the teacher's prefix, in the tokens of one text: the agent writes first."""
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
    own = [len(text.opening(tokenizer, opening)) for opening in texts]
    most = config.opening_tokens if config.openings == "held_out" else own[0]
    rows = [text.opening(tokenizer, opening + config.teacher)
            for opening, count in zip(texts, own, strict=True) if 0 < count <= most]
    if not rows:
        raise ValueError(f"env.opening={config.opening!r}, env.openings={config.openings!r}: no opening has tokens "
                         "and fits env.opening_tokens")
    return Openings(*text.left_pad(rows))


def _lines(config, turns):
    count = min(config.opening_turns, len(turns)) // 2 * 2       # the student has the last word, then the agent begins
    for i, turn in enumerate(turns[:count]):
        yield (config.teacher, config.student)[i % 2] + (" " + turn if turn else "") + config.end


def _read(tokenizer, terminators, transcript):
    """All turns of a batch [b, s] of numpy arrays, in order."""
    replies = []
    for e, (tokens, roles, turns) in enumerate(zip(transcript.tokens, transcript.roles, transcript.turns, strict=True)):
        first, rest = int(transcript.start[e]), b""
        for number in range(turns.max() + 1):
            slots = np.flatnonzero((turns == number) & ((roles == AGENT) | (roles == STUDENT)))
            if not len(slots):
                continue
            role, ids = int(roles[slots[0]]), tokens[slots].tolist()
            parts, terminator = text.bytes_of(tokenizer, ids), terminators[0 if role == AGENT else -1]
            said, begins = rest + b"".join(parts), accumulate(map(len, parts), initial=len(rest))
            at = said.find(terminator, max(0, len(rest) + 1 - len(terminator)))     # completed by one of these tokens
            finished, at = at >= 0, at if at >= 0 else len(said)
            own = [token for token, begin in zip(ids, begins, strict=False) if begin < at]
            replies.append(Reply(e, number, role, int(slots[-1]), own, said[:at].decode(errors="replace").strip(),
                                 text.decode(tokenizer, tokens[first:slots[0]].tolist()), finished))
            rest = said[at + len(terminator):] if len(terminators) > 1 else b""
    return replies
