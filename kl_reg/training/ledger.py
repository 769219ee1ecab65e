r"""Recorded agent tokens as the sampler has them, all at once, and the ledger of a hard budget that runs through them.

What a token may spend depends on what the earlier ones cost under the *new* parameters, and a gradient that leaves this
out sees the benefit of spending and not its price. Let x_t be where the budget stands at token t (nats that it may
cost, and the part of the budget that is left), y_t(theta, x_t) its terms and c_t(theta, x_t) its charge. Everything
else of the ledger is a scan of scalars, x = scan(c). So

1. `_solve` finds the x at which x = scan(c(theta, x)) by Newton: y, c and their slopes by x for all tokens at once
   (`tokens`), then the scan with c_t + c_t' (x_t - x_t^0), and again. It begins where the sampler's ledger stood, which
   before the first update is the answer; since the first token's x is known, and each pass makes one more token exact,
   it ends.
2. The scan is run once more, differentiably, on y + y' (x - x^0): its transpose is the adjoint of the ledger, and gives
   each token the weights of its terms and of its charge. With them the derivative by theta at fixed x is that of tokens
   that know nothing of each other.

On a CPU and with a small vocabulary one position after the other is faster than these passes, and is what is done
(`_in_order`). Where the charge depends on recorded actions alone (`kl.spend="sampled"`), or is taken as recorded
(`kl.ledger="log_ratio"`), and without a budget, x is known and one pass is all.
"""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.exact import TokenTerms
from kl_reg.program import Program
from kl_reg.sharding.batching import largest
from kl_reg.training import tokens
from kl_reg.training.chunks import Cost, Scores
from kl_reg.training.targets import recorded
from kl_reg.training.tokens import Known, Point, Read, Reader, Token
from kl_reg.types import Episodes, Frozen

_CLOSE = 1e-3       # how far the ledger may stand from where its tokens were read, as `_apart` has it
_SMALL = 2**14      # a vocabulary so small that on a CPU one position after the other is faster


def read_as_sampled(program: Program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, cost: Cost
                    ) -> Scores:
    """The scores of the recorded tokens of any program, differentiable in `params` and the episodes' features."""
    mask, rerun, features = episodes.mask, program.agent.constrained and program.agent.rerun, episodes.features
    width = episodes.transcript.tokens.shape[1] - program.task.env.length
    token = Token(episodes.reference, episodes.allowed, episodes.slot - width, episodes.action, episodes.fraction,
                  episodes.strength)
    turn = jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, mask.shape[:1]), caps)
    if (rerun and program.execution.block is not None
            and tokens.vocabulary_of(program, params, memory, frozen, features, token) < _SMALL):
        copies = tokens.copies_of(params, len(mask))
        return _in_order(program, copies, memory, frozen, features, token, rows, turn, mask)
    run = partial(_run, program, rows, turn, mask)
    reader = tokens.reader(program, params, memory, frozen, features, token, mask, cost)
    record = jax.lax.stop_gradient((recorded(episodes), episodes.fraction, episodes.floor))
    start, _ = run(partial(_charged, program), record)
    if not rerun:
        made, _, formed = reader.read(start, episodes.strength, slopes=False)
        return _where(mask, reader.attach(start, made, formed).scores)
    point, (made, slopes, formed), passes = _solve(reader, run, start, episodes.strength, caps, mask)

    def charged(here, own):
        moved = _moved(here, *own)
        return moved.cost, moved.scores

    _, scores = run(charged, (point, reader.attach(point, made, formed), slopes))
    return _where(mask, scores._replace(passes=jnp.broadcast_to(passes.astype(jnp.float32), mask.shape)))


def _where(mask, scores: Scores) -> Scores:
    return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores)


def _run(program: Program, caps, turn, mask, cost_of, given) -> tuple[Point, object]:
    """The ledger along the tokens: where it stands at each, and what else
    cost_of(point [b], entries of `given` [b]) -> (charge, other) says of it."""
    def token(ledger, xs):
        turn, mask, own = xs
        ledger = budget.enter(ledger, jnp.where(mask, turn, ledger.turn))
        remaining = budget.left(caps, ledger, program.agent.carry)
        here = Point(remaining, budget.part_left(caps, ledger, remaining))
        charge, other = cost_of(here, own)
        return budget.charge(ledger, charge, mask), (here, other)

    streams = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (turn, mask, given))
    _, out = jax.lax.scan(token, budget.open_ledger(mask.shape[:1]), streams)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)


def _charged(program: Program, here: Point, record):
    """What the sampler's ledger was charged for a token."""
    terms, fraction, floor = record
    allowance = fraction * jnp.maximum(here.remaining - floor, 0.0) + program.agent.target_floor
    return jax.vmap(program.agent.spend.charge)(terms, allowance + floor, here.remaining), ()


def _moved(here: Point, there: Point, made: Read, slopes: Point) -> Read:
    """What was read `there`, to first order here."""
    by = [jnp.where(jnp.isfinite(x), x - x0, 0.0) for x, x0 in zip(here, there, strict=True)]
    return jax.tree.map(lambda x, *slopes: x + sum(map(jnp.multiply, slopes, by)), made, *slopes)


def _apart(one: Point, other: Point, whole: Float[Array, ""]) -> Float[Array, "b k"]:
    """How far two points are from each other: the larger difference of the parts, and of the square roots of what
    remains of the `whole`. The log-ratios of a token with D nats are of size sqrt(2 D)."""
    some = jnp.isfinite(whole) & (whole > 0)
    root, other_root = (jnp.sqrt(jnp.where(some, x.remaining, 0.0) / jnp.where(some, whole, 1.0)) for x in (one, other))
    return jnp.maximum(jnp.abs(root - other_root), jnp.abs(one.part - other.part))


def _solve(reader: Reader, run, start: Point, strength, caps: Caps, mask):
    """(the point at which the ledger of what is read stands where it was read, what is read there, how often it was
    read)."""
    whole = jnp.where(jnp.isfinite(caps.episode), caps.episode, jnp.minimum(caps.turn, caps.token))

    def again(state):
        here, _, (before, *_), _, count = state
        own = reader.read(here, before.strength, slopes=True)
        there, _ = run(lambda x, own: (jnp.maximum(_moved(x, *own).cost, 0.0), ()), (here, *own[:2]))
        return there, here, own, jnp.where(mask, _apart(there, here, whole), 0.0).max(), count + 1

    shapes = jax.eval_shape(partial(reader.read, slopes=True), start, strength)
    nothing, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    unfinished = lambda state: (state[3] > _CLOSE) & (state[4] <= mask.shape[1])  # noqa: E731
    state = start, start, (nothing._replace(strength=strength), *rest), jnp.float32(jnp.inf), jnp.int32(0)
    _, point, own, _, count = jax.lax.while_loop(unfinished, again, state)
    return point, own, count


def _in_order(program: Program, copies, memory, frozen, features, token: Token, caps, turn, mask) -> Scores:
    """The scores with one position of all streams after the other, and the ledger between them. What is as large as the
    vocabulary exists for one position at a time and is computed again in the backward pass."""
    parts, longest, zero = tokens.devices_of(len(mask)), largest(mask.sum(-1).max()), jnp.zeros(len(mask))

    def read(ledger, features, token, turn, mask):
        ledger = budget.enter(ledger, jnp.where(mask, turn, ledger.turn))
        remaining = budget.left(caps, ledger, program.agent.carry)
        here = Known(memory, frozen, token, Point(remaining, budget.part_left(caps, ledger, remaining)))
        said = tokens.said_of(program, copies, features, here, parts)
        made = jax.vmap(partial(tokens.row_of, program))(*said, token._replace(seen=None), remaining)
        scores = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), made.scores)
        return budget.charge(ledger, made.cost, mask), scores._replace(passes=jnp.where(mask, 1.0, 0.0))

    # Around the `cond`: inside it, all that `read` closes over, the unembedding too, would be kept for each position.
    @partial(jax.checkpoint, prevent_cse=False)
    def position(ledger, xs):
        index, *xs = xs
        none = Scores(TokenTerms(*[zero] * len(TokenTerms._fields)), zero, zero, zero)
        nothing = lambda ledger, *xs: (ledger, none)  # noqa: E731
        return jax.lax.cond(index < longest, read, nothing, ledger, *xs)

    streams = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (features, token, turn, mask))
    _, scores = jax.lax.scan(position, budget.open_ledger(zero.shape), (jnp.arange(mask.shape[1]), *streams))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), scores)
