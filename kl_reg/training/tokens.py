r"""Recorded agent tokens at given points of the budget's ledger, all at once, and how they change with points and
parameters. Here is the work that is as large as the vocabulary; `ledger` decides where the points are.

There are two ways (`reader`). `_factored`: where logits are products of hidden states and a table that is not trained,
and the reference is the base, the derivatives of a token's terms by its hidden state and by its allowance are formed
while the logits are there (`kl.chunked.with_derivatives`). All else is a function of hidden states and of scalars, so
that slopes and gradients need the vocabulary no more. `_general`: any policy and reference. Slopes by forward
differentiation, and the gradient reads the tokens again.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from kl_reg.kl.chunked import over_blocks, over_parts, with_derivatives
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.models.decoder import unembedding
from kl_reg.policies.actor import Situation
from kl_reg.program import Program
from kl_reg.references.interface import Measure
from kl_reg.sampling.agent_step import allow, between, choose, observe, settle
from kl_reg.sharding.constraints import EPISODES, constrain, spread
from kl_reg.training.chunks import Cost, Layout, Scores, layout
from kl_reg.types import Frozen


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


class Reader(NamedTuple):
    """A way to read all tokens.

    read(point, strength, slopes) -> (what they are there, as constants; with `slopes` their derivatives by the point's
        two numbers, a `Read` for each, else None; what `attach` needs). `strength`: where the search begins.
    attach(point, made, formed) -> `made`, what `read` gave, as the function of parameters and features that it is.
    """

    read: Callable
    attach: Callable


def reader(program: Program, params, memory, frozen: Frozen, features, token: Token, mask, cost: Cost) -> Reader:
    """The faster way that the program allows. Differentiable: `params`, `features`."""
    factored = program.agent.policy.factored
    vocabulary = vocabulary_of(program, params, memory, frozen, features, token)
    # A quarter of the entries that a program may form: several arrays exist.
    cut = layout(program, mask, vocabulary, cost.members, max(1, program.execution.chunk // 4))
    if program.agent.reference.is_base and factored is not None and not factored.trained:
        return _factored(program, params, frozen, features, token, cut)
    return _general(program, copies_of(params, len(mask)), memory, frozen, features, token, cut)


def vocabulary_of(program: Program, params, memory, frozen, features, token: Token) -> int:
    """How many tokens the reference's distribution has; nothing is computed."""
    rows = jnp.zeros(len(token.action))
    features, seen = jax.tree.map(lambda x: x[:, 0], (features, token.seen))
    look = partial(observe, program, frozen, params, memory)
    return jax.eval_shape(look, Situation(rows, rows, rows), features, seen)[1].log_probs.shape[-1]


class Formed(NamedTuple):
    """Terms of tokens, and their derivatives by the policy's hidden states and by the allowance, where these are given;
    `by_states` and `by_allowance`: a dictionary of names of terms. All constants."""

    terms: TokenTerms
    strength: Float[Array, "b k"]
    by_states: dict[str, Float[Array, "b k d"]]
    by_allowance: dict[str, Float[Array, "b k"]]
    states: Float[Array, "b k d"]
    allowance: Float[Array, "b k"]


def _factored(program: Program, params, frozen: Frozen, features, token: Token, cut: Layout) -> Reader:
    """Reads tokens whose logits are products with a table that is not trained, and whose reference is the base."""
    agent, policy = program.agent, program.agent.policy
    table, base_table = jax.lax.stop_gradient(policy.factored.table(params, frozen.base)), unembedding(frozen.base)
    over_tokens = lambda function: jax.vmap(jax.vmap(function))  # noqa: E731
    names = ("log_prob", "kl", "entropy") + ("forward_kl",) * (program.algorithm.kl.config.direction == "forward")

    def states(params, features, point):
        """Hidden states, value and neuron, and what the token may cost."""
        own = policy.factored.states(params, frozen.base, features, Situation(
            *point, token.position / program.task.env.length))
        return own, over_tokens(partial(allow, program))(jnp.zeros_like(point.remaining), point.remaining, own.spend,
                                                         token.fraction, token.position)[1]

    def row(product, base_product, given):
        """One token from its rows [v] of the products."""
        token, allowance = given
        shape = lambda z: z if policy.factored.cap is None else policy.factored.cap * jnp.tanh(  # noqa: E731
            z / policy.factored.cap)
        base_logits = shape(base_product)
        log_base = jax.nn.log_softmax(base_logits / agent.sampling.temperature)

        def terms_of(product, allowance):
            gap = product if policy.relative else shape(product) - base_logits
            measure = Measure(log_base, gap / agent.sampling.temperature, jnp.zeros(()), None)
            logits, log_ref, strength = between(program, measure, token.allowed, allowance, token.strength)
            terms = token_terms(logits, log_ref, token.action, "forward_kl" in names)
            return [getattr(terms, name) for name in names], (terms, strength)

        _, back, out = jax.vjp(terms_of, product, allowance, has_aux=True)
        by = {name: back([jnp.float32(name == other) for other in names]) for name in names}
        return (*out, {name: x[1] for name, x in by.items()}), {name: x[0] for name, x in by.items()}

    def near(formed: Formed, params, features, point) -> Read:
        """What tokens that were formed elsewhere are, to first order."""
        own, allowance = states(params, features, point)
        moved, more = own.policy.astype(jnp.float32) - formed.states, allowance - formed.allowance
        change = {name: (formed.by_states[name] * moved).sum(-1) + formed.by_allowance[name] * jnp.where(
            jnp.isfinite(allowance), more, 0.0) for name in names}
        chance = over_tokens(agent.spend.log_prob)(own.spend, token.fraction)
        terms = formed.terms._replace(**{name: getattr(formed.terms, name) + x for name, x in change.items()})
        terms = terms._replace(log_prob=terms.log_prob + chance, log_ratio=terms.log_ratio + change["log_prob"])
        miss = (terms.kl - allowance)**2 if agent.constrained else None
        charge = over_tokens(agent.spend.charge)(terms, allowance, point.remaining)
        return Read(Scores(terms, own.value, miss), charge, formed.strength)

    constants = jax.lax.stop_gradient((params, features))

    def read(point, strength, slopes):
        own, allowance = states(*constants, point)
        given = token._replace(strength=strength, seen=None), allowance
        (terms, strength, by_allowance), by_states = jax.tree.map(cut.back, with_derivatives(
            row, cut.arrange(own.policy), table, cut.arrange(own.base), base_table, jax.tree.map(cut.arrange, given),
            used=cut.used, block=cut.block))
        formed = Formed(terms, strength, by_states, by_allowance, own.policy.astype(jnp.float32), allowance)
        at = partial(near, formed, *constants)
        if not slopes:
            return at(point), None, formed
        one, zero = jnp.ones_like(point.remaining), jnp.zeros_like(point.remaining)
        along = Point(jnp.stack([one, zero]), jnp.stack([zero, one]))
        made, by = jax.vmap(lambda along: jax.jvp(at, (point,), (along,)), out_axes=(None, 0))(along)
        return made, Point(*(jax.tree.map(lambda x, i=i: x[i], by) for i in range(2))), formed

    return Reader(read, lambda point, made, formed: near(formed, params, features, point))


class Known(NamedTuple):
    """What the tokens are functions of beside the policy's parameters and features: all constants."""

    memory: object
    frozen: Frozen
    token: Token
    point: Point


def _general(program: Program, copies, memory, frozen: Frozen, features, token: Token, cut: Layout) -> Reader:
    """Reads tokens of any policy and reference."""
    def known(point, strength):
        return Known(memory, frozen, token._replace(strength=strength), point)

    def read(point, strength, slopes):
        return *_read(program, cut, *jax.lax.stop_gradient((copies, features)), known(point, strength), slopes), ()

    def attach(point, made, formed):
        del formed
        return _attached(program, copies, features, known(point, made.strength), cut, made)

    return Reader(read, attach)


def copies_of(params, rows: int):
    """The parameters; of rows on several devices a copy for each, whose gradients are added up over all tokens first
    and over the devices then: once, and not for every part of the tokens."""
    parts = devices_of(rows)
    if parts == 1:
        return params
    return constrain(jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), params), EPISODES)


def devices_of(rows):
    """Over how many devices the rows are divided, evenly."""
    return spread() if rows % spread() == 0 else 1


def said_of(program: Program, copies, features, given: Known, parts: int):
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


def row_of(program: Program, own, log_base, token: Token, remaining) -> Read:
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
    parts, row = devices_of(cut.shape[0]), partial(row_of, program)
    here, streams = _split(cut, given)

    def part(features, token, point):
        at = lambda point: said_of(program, copies, features, here(token, point), parts)  # noqa: E731
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(program: Program, copies, features, given: Known, cut: Layout, made: Read) -> Read:
    """`made`, what `_read` gave, as the function of parameters and features that it is."""
    del program, copies, features, given, cut
    return made


def _forward(program, copies, features, given, cut, made):
    return made, (copies, features, given, cut)


def _backward(program, residuals, weights):
    copies, features, given, cut = residuals
    parts = devices_of(cut.shape[0])
    here, streams = _split(cut, given)
    features, weights = jax.tree.map(cut.arrange, (features, weights))

    def by_said(said, log_base, token, remaining, weights):
        rows = lambda said: jax.vmap(partial(row_of, program))(said, log_base, token, remaining)  # noqa: E731
        return jax.vjp(rows, said)[1](weights)[0]

    def read(total, features, weights, token, point):
        own = lambda copies, features: said_of(program, copies, features, here(token, point), parts)  # noqa: E731
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
