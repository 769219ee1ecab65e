"""The price of a script: what it costs, in nats under a model, to say the same thing turn after turn."""
from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from kl_reg.analysis.report.stats import mean_and_error, t_interval
from kl_reg.envs import markers
from kl_reg.models import decoder
from kl_reg.pretrained import embeddings, tokenizer, weights
from kl_reg.runs.log import progress_bar
from kl_reg.sampling import rollout


class Dialogue(NamedTuple):
    """How a transcript is written: a turn is its speaker's marker, a space and the words where there are any, `end`."""

    teacher: str
    student: str
    end: str

    def transcript(self, turns: Sequence[str]) -> str:
        """Turns as text, the first spoken by the teacher."""
        return "".join(self[i % 2] + _words(turn) + self.end for i, turn in enumerate(turns))


class Price(NamedTuple):
    """What a script costs: -log beta of the teacher's turn with its end marker.

    `nats` [e, turns], of the episodes whose turns all fit; `cut` of `replies` of the student were cut; `tokens` of all
    transcripts, openings included.
    """

    script: str
    nats: np.ndarray
    cut: int
    replies: int
    tokens: list[list[int]]


def random_letters(count: int, seed: int) -> str:
    """A script that has to be paid for letter by letter."""
    return "".join(np.random.default_rng(seed).choice(list(string.ascii_lowercase), count))


class _Line(NamedTuple):
    """What is written between two replies: the end marker (only behind a reply that was cut), from `begin` on the
    teacher's marker, from `first` up to `last` the script, which is priced, and the student's marker."""

    tokens: jax.Array
    begin: jax.Array
    first: jax.Array
    last: jax.Array
    length: jax.Array


class _Row(NamedTuple):
    """One transcript: the place in its line (at the line's length the student speaks), turns priced and their nats,
    the student's tokens since then, what the finder of the end marker remembers, replies cut, and tokens written."""

    at: jax.Array
    turn: jax.Array
    nats: jax.Array
    spoken: jax.Array
    heard: jax.Array
    cut: jax.Array
    written: jax.Array


def price_of_script(model: weights.Model, openings: Sequence[str], scripts: Sequence[str], turns: int, episodes: int,
                    seed: int, dialogue: Dialogue, max_reply: int | None = None, batch: int = 32,
                    student_temperature: float = 1.0) -> list[Price]:
    """Prices each of `scripts`: the teacher says it in every turn, the student answers by sampling from the model.

    A policy that says it with certainty pays exactly this KL to the model, in nats per turn.

    Args:
        openings: transcripts up to the first scripted turn; each episode draws one.
        turns: how many turns of the teacher to price.
        episodes: how many transcripts of each script; those of all scripts share openings and random numbers.
        max_reply: tokens after which a reply is cut and the end marker written for the student. None: no reply is cut,
            an episode is as long as the model's context, and one whose turns do not fit there has no price.
        batch: transcripts that are sampled at a time.
        student_temperature: of the student's tokens alone (`sampling.student_temperature`); prices are at 1.

    Raises:
        ValueError: a setting out of range, a marker without tokens, a script of several turns, or more tokens than the
            model's context.
    """
    _check({"turns": turns, "episodes": episodes, "batch": batch, "max_reply": max_reply}, openings, scripts, dialogue)
    if not (math.isfinite(student_temperature) and student_temperature > 0):
        raise ValueError(f"student_temperature={student_temperature!r} must be a finite number above 0")
    tok = tokenizer.load(model.folder)
    teacher, student, end = (tokenizer.marker_ids(tok, name, text) for name, text in dialogue._asdict().items())
    own = [tokenizer.encode(tok, _words(script) + dialogue.end) for script in scripts]
    opened, start = tokenizer.left_pad([tokenizer.opening(tok, text + dialogue.teacher) for text in openings])
    for name, ids in (("the markers", teacher + student + end), ("a script", sum(own, [])),
                      ("an opening", np.unique(opened).tolist())):
        embeddings.check(ids, model.config.vocab, name, str(model.folder), tok)
    between = 0 if max_reply is None else len(student) + max_reply + len(end) + len(teacher)
    length = _room(model, opened.shape[1], turns * max(map(len, own)) + (turns - 1) * between, max_reply)
    lines, finder = _lines(end, teacher, own, student), markers.finder(tok, dialogue.end)
    which = np.random.default_rng(seed).integers(len(openings), size=episodes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(episodes))
    sample = jax.jit(partial(_sample, model.config, turns, length, max_reply, student_temperature))
    parts, groups = [], _groups(len(scripts) * episodes, batch)
    with progress_bar("price", len(groups)) as bar:
        for group in groups:
            script, episode = np.divmod(group, episodes)
            lines_here = jax.tree.map(lambda x, script=script: x[script], lines)
            parts.append(jax.device_get(sample(finder, model.params, opened[which[episode]], start[which[episode]],
                                               lines_here, keys[episode])))
            bar.step()
    said, rows = jax.tree.map(lambda *x: np.concatenate(x)[:len(scripts) * episodes], *parts)
    ids = [opened[i, start[i]:].tolist() + row[:count].tolist()
           for i, row, count in zip(np.tile(which, len(scripts)), said, rows.written, strict=True)]
    prices = []
    for i, script in enumerate(scripts):
        mine = slice(i * episodes, (i + 1) * episodes)
        whole = rows.turn[mine] >= turns
        prices.append(Price(script, rows.nats[mine][whole].astype(np.float64), int(rows.cut[mine].sum()),
                            episodes * (turns - 1), ids[mine]))
    return prices


def _words(text):
    return " " * bool(text) + text


def _check(counts, openings, scripts, dialogue):
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    for name, texts in (("openings", openings), ("scripts", scripts)):
        if not texts:
            raise ValueError(f"{name} is empty: at least one")
    for script in scripts:
        if dialogue.end and dialogue.end in script:
            raise ValueError(f"script={script!r} holds the end of a turn, {dialogue.end!r}: a script is one turn")


def _room(model, opened, needed, max_reply):
    """Tokens of an episode behind its opening."""
    room = model.config.max_position - opened
    if max_reply is None and room > 0:
        return room
    if needed > room:
        raise ValueError(f"an opening of {opened} tokens and up to {needed} behind it do not fit the model's context "
                         f"of {model.config.max_position}: choose a smaller max_reply or turns, or a shorter opening")
    return needed


def _lines(end, teacher, own, student):
    """A `_Line` [scripts, ...], padded to the longest."""
    rows = [[*end, *teacher, *ids, *student] for ids in own]
    width, first = max(map(len, rows)), np.full(len(rows), len(end) + len(teacher), np.int32)
    return _Line(np.array([row + [0] * (width - len(row)) for row in rows], np.int32),
                 np.full(len(rows), len(end), np.int32), first, first + np.array(list(map(len, own)), np.int32),
                 np.array(list(map(len, rows)), np.int32))


def _groups(count, size):
    """Indices of `count` rows in as few groups of at most `size` as there can be, all of one shape; the last row fills
    up."""
    parts = -(-count // size)
    return np.minimum(np.arange(parts * -(-count // parts)), count - 1).reshape(parts, -1)


def _sample(config, turns, length, max_reply, temperature, finder, params, tokens, start, lines, keys):
    """Transcripts behind the openings [b, length] and their `_Row` [b, ...]; stops when all turns are priced."""
    b, width = tokens.shape
    hidden, cache = decoder.prefill(config, params, tokens, start, width + length)
    zero = jnp.zeros(b, jnp.int32)
    rows = _Row(lines.first, zero, jnp.zeros((b, turns)), zero, zero, zero, zero)
    step = jax.vmap(partial(_step, finder, turns, max_reply, temperature))

    def unfinished(carry):
        position, _, _, _, rows = carry
        return (position < length) & (rows.turn < turns).any()

    def write(carry):
        position, hidden, cache, said, rows = carry
        draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(keys)
        token, rows = step(lines, rows, decoder.logits(config, params, hidden), draws)
        hidden, cache = decoder.decode(config, params, token, start, width + position, cache)
        return position + 1, hidden.last, cache, said.at[:, position].set(token), rows

    carry = jnp.int32(0), hidden.last[:, -1], cache, jnp.zeros((b, length), jnp.int32), rows
    _, _, _, said, rows = jax.lax.while_loop(unfinished, write, carry)
    return said, rows


def _step(finder, turns, max_reply, temperature, line, row, logits, uniform):
    """The next token of one transcript, of its line or drawn, and where that leaves it."""
    log_probs = jax.nn.log_softmax(logits)
    speaks, done = row.at >= line.length, row.turn >= turns
    token = jnp.where(speaks, rollout.inverse_cdf(jax.nn.log_softmax(logits / temperature), uniform),
                      line.tokens[jnp.minimum(row.at, len(line.tokens) - 1)])
    priced = (row.at >= line.first) & (row.at < line.last)
    nats = row.nats.at[row.turn].add(jnp.where(priced, -log_probs[token], 0.0), mode="drop")
    spoken = jnp.where(speaks, row.spoken + 1, 0)
    heard, hit = finder.step(row.heard, token)
    ends = speaks & hit
    cut = speaks & ~hit & (spoken == max_reply) if max_reply else jnp.bool_(False)
    at = jnp.where(ends, line.begin, jnp.where(cut, 0, row.at + ~speaks))
    return token, _Row(at, row.turn + (row.at == line.last - 1), nats, spoken, jnp.where(speaks, heard, 0),
                       row.cut + (cut & ~done), row.written + ~done)


def report(prices: Sequence[Price], tok: Tokenizer) -> list[dict]:
    """What price.json and the figure hold of each script.

    Returns:
        For each script: nats `per_turn` and their sums `cumulative`, each with lists [turns] `mean`, `error` (standard,
        over `episodes`) and the 95% interval `low`, `high` (Student's), None where not known; how many `replies` were
        cut; and the text of the first `transcript`.
    """
    return [{"script": price.script, "episodes": len(price.nats), "replies": price.replies, "cut_replies": price.cut,
             "per_turn": _curve(price.nats), "cumulative": _curve(price.nats.cumsum(1)),
             "transcript": tokenizer.decode(tok, price.tokens[0])} for price in prices]


def _curve(values):
    (mean, error), (low, high) = mean_and_error(values), t_interval(values)
    return {name: [float(x) if np.isfinite(x) else None for x in column]
            for name, column in (("mean", mean), ("error", error), ("low", low), ("high", high))}
