r"""Recorded agent tokens as the sampler has them, all at once, and the ledger of a hard budget that runs through them.

What a token may spend depends on what the earlier ones cost under the *new* parameters, and a gradient that leaves this
out sees the benefit of spending and not its price. Let x_t be where the budget stands at token t (nats that it may
cost, and the part of the budget that is left), y_t(theta, x_t) its terms and c_t(theta, x_t) its charge. Everything
else of the ledger is a scan of scalars, x = scan(c). So

1. `_solve` finds the x at which x = scan(c(theta, x)) by Newton: y, c and their slopes by x for all tokens at once,
   then the scan with c_t + c_t' (x_t - x_t^0), and again. It begins where the sampler's ledger stood, which before the
   first update is the answer; since the first token's x is known, and each pass makes one more token exact, it ends.
2. The scan is run once more, differentiably, on y + y' (x - x^0): its transpose is the adjoint of the ledger, and gives
   each token the weights of its terms and of its charge. With them the derivative by theta at fixed x is that of tokens
   that know nothing of each other, all at once again (`_attached`).

On a CPU and with a small vocabulary one position after the other is faster than these passes, and is what is done
(`_in_order`). Where the charge depends on recorded actions alone (`kl.spend="sampled"`), or is taken as recorded
(`kl.ledger="log_ratio"`), and without a budget, x is known and one pass is all.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.chunked import over_blocks, over_parts
from kl_reg.kl.exact import TokenTerms
from kl_reg.policies.actor import Situation
from kl_reg.program import Program
from kl_reg.sampling.agent_step import choose, observe, settle
from kl_reg.sharding.batching import largest
from kl_reg.sharding.constraints import EPISODES, constrain, spread
from kl_reg.training.chunks import Cost, Layout, Scores, layout
from kl_reg.training.targets import recorded
from kl_reg.types import Episodes, Frozen

_CLOSE = 1e-4       # of the budget: how far the ledger may stand from where its tokens were read
_SMALL = 2**14      # a vocabulary so small that on a CPU one position after the other is faster


class Point(NamedTuple):
    """Where the budget stands at each agent token [b, k]: `budget.left`, nats, and `budget.part_left`."""

    remaining: Float[Array, "b k"]
    part: Float[Array, "b k"]


class Token(NamedTuple):
    """What is recorded of each agent token [b, k, ...], beside what the policy reads."""

    seen: object
    allowed: UInt8[Array, "b k w"] | None
    position: Int[Array, "b k"]
    action: Int[Array, "b k"]
    fraction: Float[Array, "b k"]
    strength: Float[Array, "b k"]           # where the operation's search begins


class Read(NamedTuple):
    """What an agent token is at a point, [b, k]; `cost`: what the ledger is charged for it, nats; `strength`: how far
    the budget lets the proposal be followed, a constant."""

    scores: Scores
    cost: Float[Array, "b k"]
    strength: Float[Array, "b k"]


class Known(NamedTuple):
    """What the tokens are functions of beside the policy's parameters and features: all constants."""

    memory: object
    frozen: Frozen
    token: Token
    point: Point


def read_as_sampled(program: Program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, cost: Cost
                    ) -> Scores:
    """The scores of the recorded tokens of any program, differentiable in `params` and the episodes' features."""
    mask, rerun = episodes.mask, program.agent.constrained and program.agent.rerun
    width = episodes.transcript.tokens.shape[1] - program.task.env.length
    token = Token(episodes.reference, episodes.allowed, episodes.slot - width, episodes.action, episodes.fraction,
                  episodes.strength)
    vocabulary = _vocabulary(program, params, memory, frozen, episodes.features, token)
    turn = jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1)
    copies, features = _copies(params, _devices(len(mask))), episodes.features
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, mask.shape[:1]), caps)
    if rerun and vocabulary < _SMALL and program.execution.block is not None:
        return _in_order(program, copies, memory, frozen, features, token, rows, turn, mask)
    cut = layout(program, mask, vocabulary, cost.members, _entries(program))
    run = partial(_run, program, rows, turn, mask)
    record = jax.lax.stop_gradient((recorded(episodes), episodes.fraction, episodes.floor))
    given = Known(memory, frozen, token, run(partial(_charged, program), record)[0])
    read = partial(_read, program, cut, *jax.lax.stop_gradient((copies, features)))
    if not rerun:
        made, _ = read(given, slopes=False)
        scores = _attached(program, copies, features, _again(given, made), cut, made).scores
        return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores)

    point, (made, slopes), passes = _solve(read, run, given, caps, mask)
    made = _attached(program, copies, features, _again(given._replace(point=point), made), cut, made)

    def charged(here, own):
        moved = _moved(here, *own)
        return moved.cost, moved.scores

    _, scores = run(charged, (point, made, slopes))
    scores = scores._replace(passes=jnp.broadcast_to(passes.astype(jnp.float32), mask.shape))
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


def _solve(read, run, given: Known, caps: Caps, mask):
    """(the point at which the ledger of what is read stands where it was read, what is read there with its slopes, how
    often it was read)."""
    whole = jnp.where(jnp.isfinite(caps.episode), caps.episode, jnp.minimum(caps.turn, caps.token))

    def again(state):
        here, _, (before, _), _, count = state
        own = read(_again(given._replace(point=here), before), slopes=True)
        there, _ = run(lambda x, own: (jnp.maximum(_moved(x, *own).cost, 0.0), ()), (here, *own))
        apart = [jnp.where(jnp.isfinite(new), jnp.abs(new - old), 0.0) for new, old in zip(there, here, strict=True)]
        off = jnp.where(mask, jnp.maximum(apart[0] / jnp.maximum(whole, 1e-30), apart[1]), 0.0).max()
        return there, here, own, off, count + 1

    shapes = jax.eval_shape(partial(read, slopes=True), given)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    unfinished = lambda state: (state[3] > _CLOSE) & (state[4] <= mask.shape[1])  # noqa: E731
    nothing = nothing[0]._replace(strength=given.token.strength), nothing[1]
    start = given.point, given.point, nothing, jnp.float32(jnp.inf), jnp.int32(0)
    _, point, own, _, count = jax.lax.while_loop(unfinished, again, start)
    return point, own, count


def _again(given: Known, made: Read) -> Known:
    """What to begin from where the same tokens are read once more."""
    return given._replace(token=given.token._replace(strength=made.strength))


def _entries(program: Program) -> int:
    """Tokens x vocabulary of a part, of which several arrays exist."""
    return max(1, program.execution.chunk // 4)


def _vocabulary(program: Program, params, memory, frozen, features, token: Token) -> int:
    """How many tokens the reference's distribution has; nothing is computed."""
    rows = jnp.zeros(len(token.action))
    features, seen = jax.tree.map(lambda x: x[:, 0], (features, token.seen))
    look = partial(observe, program, frozen, params, memory)
    return jax.eval_shape(look, Situation(rows, rows, rows), features, seen)[1].log_probs.shape[-1]


def _copies(params, parts):
    """The parameters; of rows on several devices a copy for each, whose gradients are added up over all tokens first
    and over the devices then: once, and not for every part of the tokens."""
    if parts == 1:
        return params
    return constrain(jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), params), EPISODES)


def _devices(rows):
    """Over how many devices the rows are divided, evenly."""
    return spread() if rows % spread() == 0 else 1


def _said(program: Program, copies, features, given: Known, parts: int):
    """What policy and reference say of tokens [n], which takes all the products with tables: what of it depends on
    parameters and point, and what does not (the base's log-probabilities)."""
    base, (token, point) = given.frozen.base, given[2:]

    def on_devices(features, situation):
        inputs = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (features, situation))
        reading = jax.vmap(program.agent.policy.read, (0, None, 0, 0))(copies, base, *inputs)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), reading)

    situation = Situation(point.remaining, point.part, token.position / program.task.env.length)
    reading, measure = observe(program, given.frozen, copies, given.memory, situation, features, token.seen,
                               on_devices if parts > 1 else None)
    fixed = program.agent.reference.is_base
    own = measure._replace(models=None, log_probs=None if fixed else measure.log_probs)
    return (own, reading.spend, reading.value), jax.lax.stop_gradient(measure.log_probs) if fixed else None


def _row(program: Program, own, log_base, token: Token, remaining) -> Read:
    """One token of which that is said."""
    measure, neuron, value = own
    measure = measure if log_base is None else measure._replace(log_probs=log_base)
    choice = choose(program, measure, token.allowed, remaining, neuron, token.fraction, token.position, token.strength)
    terms, cost = settle(program, choice, token.action)
    miss = (terms.kl - choice.floor - choice.allowance) ** 2 if program.agent.constrained else None
    return Read(Scores(terms, value, miss), cost, choice.strength)


def _split(cut: Layout, given: Known):
    """A function of [token, point] of one part, and these of all parts."""
    return lambda token, point: given._replace(token=token, point=point), jax.tree.map(cut.arrange, given[2:])


def _read(program: Program, cut: Layout, copies, features, given: Known, slopes: bool) -> tuple[Read, Point | None]:
    """What all tokens are, [b, k], and the derivatives by their points: a `Read` for each of a point's two numbers."""
    parts, row = _devices(cut.shape[0]), partial(_row, program)
    here, streams = _split(cut, given)

    def part(features, token, point):
        at = lambda point: _said(program, copies, features, here(token, point), parts)  # noqa: E731
        own = token._replace(seen=None)
        if not slopes:
            return over_blocks(cut.block, jax.vmap(row), *at(point), own, point.remaining), None
        one, zero = jnp.ones_like(point.remaining), jnp.zeros_like(point.remaining)
        along = Point(jnp.stack([one, zero], 1), jnp.stack([zero, one], 1))
        said, by, log_base = jax.vmap(lambda along: jax.jvp(at, (point,), (along,), has_aux=True), 1, (None, 1, None))(
            along)

        def moving(said, by, log_base, own, remaining, along):
            """Rows [n] and their derivatives along both, [n, 2]."""
            rows = lambda said, remaining: jax.vmap(row)(said, log_base, own, remaining)  # noqa: E731
            return jax.vmap(lambda *along: jax.jvp(rows, (said, remaining), along), 1, (None, 1))(by, along)

        made, by = over_blocks(cut.block, moving, said, by, log_base, own, point.remaining, along.remaining)
        return made, Point(*(jax.tree.map(lambda x, i=i: x[:, i], by) for i in range(2)))

    out = over_parts(part, cut.used, jax.tree.map(cut.arrange, features), *streams)
    return jax.tree.map(cut.back, out)


def _in_order(program: Program, copies, memory, frozen, features, token: Token, caps, turn, mask) -> Scores:
    """The scores with one position of all streams after the other, and the ledger between them. What is as large as the
    vocabulary exists for one position at a time and is computed again in the backward pass."""
    parts, longest, zero = _devices(len(mask)), largest(mask.sum(-1).max()), jnp.zeros(len(mask))

    def read(ledger, features, token, turn, mask):
        ledger = budget.enter(ledger, jnp.where(mask, turn, ledger.turn))
        remaining = budget.left(caps, ledger, program.agent.carry)
        here = Known(memory, frozen, token, Point(remaining, budget.part_left(caps, ledger, remaining)))
        said = _said(program, copies, features, here, parts)
        made = jax.vmap(partial(_row, program))(*said, token._replace(seen=None), remaining)
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(program: Program, copies, features, given: Known, cut: Layout, made: Read) -> Read:
    """`made`, what `_read` gave, as the function of parameters and features that it is."""
    del program, copies, features, given, cut
    return made


def _forward(program, copies, features, given, cut, made):
    return made, (copies, features, given, cut)


def _backward(program, residuals, weights):
    copies, features, given, cut = residuals
    parts = _devices(cut.shape[0])
    here, streams = _split(cut, given)
    features, weights = jax.tree.map(cut.arrange, (features, weights))

    def by_said(said, log_base, token, remaining, weights):
        rows = lambda said: jax.vmap(partial(_row, program))(said, log_base, token, remaining)  # noqa: E731
        return jax.vjp(rows, said)[1](weights)[0]

    def read(total, features, weights, token, point):
        own = lambda copies, features: _said(program, copies, features, here(token, point), parts)  # noqa: E731
        said, back, log_base = jax.vjp(own, copies, features, has_aux=True)
        weights = over_blocks(cut.block, by_said, said, log_base, token._replace(seen=None), point.remaining, weights)
        by_copies, by_features = back(weights)
        return jax.tree.map(jnp.add, total, by_copies), _floats(by_features, features)

    def part(total, xs):
        index, features, *rest = xs
        nothing = lambda total, features, *_: (total, jax.tree.map(  # noqa: E731
            jnp.zeros_like, _floats(features, features)))
        return jax.lax.cond(index < cut.used, read, nothing, total, features, *rest)

    total, by_features = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, copies),
                                      (jnp.arange(cut.parts), features, weights, *streams))
    return total, jax.tree.map(cut.back, by_features), None, None, None


def _floats(tree, features):
    """The parts of the tree that belong to features with a derivative; None for the others."""
    return jax.tree.map(lambda x, own: x if jnp.issubdtype(own.dtype, jnp.inexact) else None, tree, features)


_attached.defvjp(_forward, _backward)
