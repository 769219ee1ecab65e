r"""The paper's environment: the agent plays the teacher, the base model the student, in one transcript.

A turn ends with the token that completes the turn's terminator, in whatever tokens its writer has written that text.
With `markers="forced"` the terminator is the end marker, and the environment then writes the other speaker's prefix,
which is nobody's action. With `markers="written"` it is the end marker and the other's prefix, all written by whoever
has the turn, as in the paper.

Only what a turn's own tokens say can end it, forced prefixes not among them; with "written" the text that the last
token of the turn before has behind its terminator (":\n" is one token in many vocabularies) belongs to the turn, too.

The student's replies are rewarded one by one; a reply that the end of the episode cuts is worth 0, and the return is
the sum. With `env.turns` the episode is over behind that many turns of both.

A turn is cut where `env.end_tokens` lets the model's own end tokens end it, and a student's reply behind
`env.reply_limit` tokens: the environment then writes the end marker and the other's prefix, and the turn counts as
finished. Source: Cohen, Hutter, Bengio and Russell
(2024), "RL, but don't do anything I wouldn't do".
"""
from __future__ import annotations

import json
from itertools import accumulate
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg.envs import prompts
from kl_reg.envs.environment import Environment, Reply
from kl_reg.envs.markers import finder
from kl_reg.pretrained import tokenizer as text
from kl_reg.pretrained.folders import EMBEDDED
from kl_reg.types import AGENT, FORCED, PAD, STUDENT


class EnvState(NamedTuple):
    """The state of one episode. `speaker` 0 is the agent; `queue` counts prefix tokens still to be forced; `found` is
    the state of the search for the turn's terminator; `written` counts the tokens of the present turn."""

    speaker: Int[Array, ""]
    queue: Int[Array, ""]
    turn: Int[Array, ""]
    found: Int[Array, ""]
    written: Int[Array, ""]


def teacher_student(config: ConfigDict, tokenizer: Tokenizer, eos: frozenset[int] = frozenset()) -> Environment:
    """Builds the environment from `config.env`; `eos` are the model's end tokens.

    Raises:
        ValueError: a marker or an opening that gives no tokens, a marker that the tokenizer cannot write, unknown
            `markers`, `end_tokens` of a model that has none, or openings that cannot be used.
        FileNotFoundError, ImportError: see `prompts.read`.
    """
    end, teacher, student = (text.marker_ids(tokenizer, f"env.{name}", config[name])
                             for name in ("end", "teacher", "student"))
    if config.markers not in ("forced", "written"):
        raise ValueError(f"env.markers={config.markers!r}: choose 'forced' or 'written'")
    forced = config.markers == "forced"
    terminators = [config.end] if forced else [config.end + config.student, config.end + config.teacher]
    if config.end_tokens and not eos:
        raise ValueError("env.end_tokens=True: neither the model's config.json nor its generation_config.json nor its "
                         "tokenizer_config.json names an end token")
    # Forced behind the agent's and the student's turn: the ends of these, as many tokens as are still missing.
    queues = [jnp.array(end + prefix) for prefix in (student, teacher)]
    missing = (len(student), len(teacher)) if forced else (0, 0)
    search, second = finder(tokenizer, *terminators), 0 if forced else len(terminators[0].encode())
    stops = jnp.array(sorted(eos) if config.end_tokens else [-1])

    def reset():
        return EnvState(*[jnp.int32(0)] * 5)

    def turn(state):
        agent = state.speaker == 0
        token = lambda queue: queue[jnp.clip(len(queue) - state.queue, 0, len(queue) - 1)]  # noqa: E731
        forced_token = jnp.where(agent, token(queues[1]), token(queues[0]))
        role = jnp.where(state.queue > 0, FORCED, jnp.where(agent, AGENT, STUDENT))
        over = config.turns > 0 and state.turn >= config.turns
        return jnp.where(over, PAD, role), forced_token

    def observe(state, token):
        was_forced, agent, written = state.queue > 0, state.speaker == 0, state.written + 1
        found, over = search.step(state.found, token)
        cut = (token == stops).any()
        if config.reply_limit:
            cut |= ~agent & (written >= config.reply_limit)
        over, cut = over & ~was_forced, cut & ~over & ~was_forced
        if forced:      # the search begins anew behind the prefix
            found = jnp.where(over, 0, found)
        found = jnp.where(was_forced, state.found, jnp.where(cut, jnp.where(agent, second, 0), found))
        queue = jnp.where(over, jnp.where(agent, *missing), jnp.where(
            cut, jnp.where(agent, *map(len, queues)), jnp.maximum(state.queue - 1, 0)))
        ends = over | cut
        return EnvState(jnp.where(ends, 1 - state.speaker, state.speaker), queue, state.turn + ends, found,
                        jnp.where(ends | was_forced, 0, written))

    rows, openings = _openings(config, tokenizer)

    def read(transcript):
        return _read(tokenizer, [marker.encode() for marker in terminators], rows, transcript,
                     eos if config.end_tokens else (), config.reply_limit)

    return Environment(reset, turn, observe, openings, config.length, read,
                       "" if config.openings in ("fixed", "held_out") else rows.digest(),
                       markers=frozenset(end + teacher + student), ends=eos if config.end_tokens else frozenset())


def _openings(config, tokenizer):
    """The rows that openings are of, and these. Each ends with the teacher's prefix, in the tokens of one text, unless
    it ends inside his turn: the agent writes first."""
    rows, texts = _texts(config)
    counts = [len(text.opening(tokenizer, opening)) for opening in texts]
    if config.openings in ("fixed", "held_out"):
        most = config.opening_tokens if config.openings == "held_out" else counts[0]
        kept = [i for i, count in enumerate(counts) if 0 < count <= most]
        if not kept:
            raise ValueError(f"env.opening={config.opening!r}, env.openings={config.openings!r}: no opening has tokens "
                             "and fits env.opening_tokens")
    else:
        kept = prompts.fitting(config, rows, counts)
    tokens = [text.opening(tokenizer, texts[i] + ("" if config.opening_unfinished else config.teacher)) for i in kept]
    return prompts.choose(rows, kept), prompts.padded(tokens)


def _texts(config):
    """The rows, and what each has in front of the teacher's prefix."""
    if config.openings == "fixed":
        return prompts.plain(prompts.TEXT, [config.opening]), [config.opening]
    if config.openings == "held_out":
        lines = (EMBEDDED / "held_out.jsonl").read_text("utf-8").splitlines()
        rows = prompts.plain(prompts.TURNS, [json.loads(line)["turns"] for line in lines])
    else:
        rows = prompts.read(config)
    if rows.kind == prompts.CHAT:
        raise ValueError(f"env.openings={config.openings!r}: {config.column!r} is a chat, which env.name='completion' "
                         "takes; choose a column of texts or of lists of turns")
    if rows.kind == prompts.TEXT:
        return rows, rows.prompts
    if config.opening_unfinished:
        raise ValueError(f"env.opening_unfinished=True with env.openings={config.openings!r}: lists of turns are "
                         "complete; it is for texts that end inside the agent's turn")
    if config.opening_turns % 2:
        raise ValueError(f"env.opening_turns={config.opening_turns} must be even: the agent writes after the student")
    return rows, [config.opening + "".join(_lines(config, turns)) for turns in rows.prompts]


def _lines(config, turns):
    count = min(config.opening_turns, len(turns)) // 2 * 2       # the student has the last word, then the agent begins
    for i, turn in enumerate(turns[:count]):
        yield (config.teacher, config.student)[i % 2] + (" " + turn if turn else "") + config.end


def _read(tokenizer, terminators, rows, transcript, stops, limit):
    """All turns of a batch [b, s] of numpy arrays, in order; those that one of `stops` or the limit cuts are finished.
    """
    replies = []
    for e, (tokens, roles, turns) in enumerate(zip(transcript.tokens, transcript.roles, transcript.turns, strict=True)):
        first, rest = int(transcript.start[e]), b""
        columns = {} if transcript.opening is None else rows.columns[transcript.opening[e]]
        for number in range(turns.max() + 1):
            slots = np.flatnonzero((turns == number) & ((roles == AGENT) | (roles == STUDENT)))
            if not len(slots):
                continue
            role, ids = int(roles[slots[0]]), tokens[slots].tolist()
            parts, terminator = text.bytes_of(tokenizer, ids), terminators[0 if role == AGENT else -1]
            stopped = ids[-1] in stops
            said, begins = rest + b"".join(parts[:len(parts) - stopped]), accumulate(map(len, parts), initial=len(rest))
            at = said.find(terminator, max(0, len(rest) + 1 - len(terminator)))     # completed by one of these tokens
            cut = stopped or role == STUDENT and len(ids) == limit
            finished, at = at >= 0 or cut, at if at >= 0 else len(said)
            own = [token for token, begin in zip(ids, begins, strict=False) if begin < at]
            replies.append(Reply(e, number, role, int(slots[-1]), own, said[:at].decode(errors="replace").strip(),
                                 text.decode(tokenizer, tokens[first:slots[0]].tolist()), finished,
                                 role == STUDENT and finished, columns))
            rest = said[at + len(terminator):] if len(terminators) > 1 and not cut else b""
    return replies
