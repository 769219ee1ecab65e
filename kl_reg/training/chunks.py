"""Agent tokens that depend on nothing but the transcript, many at a time and a chunk of the vocabulary's products after
the other (`kl.chunked`)."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl.chunked import chunked_loss, chunked_terms
from kl_reg.kl.exact import TokenTerms
from kl_reg.models.decoder import unembedding
from kl_reg.policies.actor import Situation
from kl_reg.policies.interface import States
from kl_reg.program import Program
from kl_reg.types import Episodes, Frozen


class Scores(NamedTuple):
    """The recorded agent tokens under given parameters, all [b, k]; zero where there is no token."""

    terms: TokenTerms
    value: Float[Array, "b k"]
    miss: Float[Array, "b k"] | None = None         # (D - allowance)^2, nats^2; None: there is no budget


class Cost(NamedTuple):
    """What a batch is like, so that less is computed; no number depends on it. Static.

    `group` episodes in a row have the same opening; so many `members` are vmapped.
    """

    group: int = 1
    members: int = 1


PLAIN = Cost()


class Layout(NamedTuple):
    """How [b, k] streams are cut into parts [p, r] of `positions` positions of all rows; `block` of the r are worked on
    at a time (None: all)."""

    rows: int
    count: int
    parts: int
    positions: int
    block: int | None

    def arrange(self, x):
        """[b, k, ...] -> [p, r, ...]."""
        extra = self.parts * self.positions - self.count
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(self.rows, self.parts, self.positions, *x.shape[2:]), 1, 0)
        return x.reshape(self.parts, -1, *x.shape[3:])

    def back(self, x):
        """[p, r] -> [b, k]."""
        x = jnp.moveaxis(x.reshape(self.parts, self.rows, self.positions), 0, 1)
        return x.reshape(self.rows, -1)[:, :self.count]

    def used(self, longest):
        """Parts with tokens, where the longest stream has so many."""
        return -(-longest // self.positions)


def layout(program: Program, shape: tuple[int, int], vocabulary: int, cost: Cost) -> Layout:
    """Parts whose logits are formed at once, and blocks that a processor's cache holds."""
    rows, count = shape
    row = vocabulary * cost.members
    most = min(count, max(1, program.execution.chunk // (rows * row)))
    positions = min(range(most // 2 + 1, most + 1), key=lambda own: (-(-count // own) * own, -own))     # least padding
    block = None if program.execution.block is None else max(1, program.execution.block // row)
    return Layout(rows, count, -(-count // positions), positions, block)


def states(program: Program, params, frozen: Frozen, episodes: Episodes) -> States:
    """The hidden states of all agent tokens [b, k], where there is no budget."""
    infinite, zero = jnp.full(episodes.mask.shape, jnp.inf), jnp.zeros(episodes.mask.shape)
    time = (episodes.slot - episodes.transcript.tokens.shape[1] + program.task.env.length) / program.task.env.length
    return program.agent.policy.factored.states(params, frozen.base, episodes.features, Situation(infinite, zero, time))


def tables(program: Program, params, frozen: Frozen):
    """Unembeddings of policy and base."""
    return program.agent.policy.factored.table(params, frozen.base), unembedding(frozen.base)


def read_at_once(program: Program, params, frozen: Frozen, episodes: Episodes, longest: Int[Array, ""], cost: Cost
                 ) -> Scores:
    """Scores tokens that depend on nothing but what stands before them, many positions at a time, straight from hidden
    states (`kl.chunked`)."""
    own, (table, base_table) = states(program, params, frozen, episodes), tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask.shape, len(base_table), cost), program.agent.policy.factored
    # `chunked_terms` has in part i every p-th row from i on.
    rows = lambda x: cut.arrange(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    terms = chunked_terms(
        rows(own.policy), table, rows(own.base), base_table, rows(episodes.action),
        relative=program.agent.policy.relative, chunk=cut.rows * cut.positions, train_table=factored.trained,
        differentiate=program.algorithm.kl.differentiated, scale=1 / program.agent.sampling.temperature,
        cap=factored.cap, used=cut.used(longest), block=cut.block)
    terms = jax.tree.map(lambda x: cut.back(x.reshape(-1, cut.parts).T), terms)
    return jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), Scores(terms, own.value))


def loss_at_once(program: Program, params, frozen: Frozen, episodes: Episodes, loss: Callable, given, shared,
                 longest: Int[Array, ""], cost: Cost) -> tuple[Float[Array, ""], Scores]:
    """The sum over the agent tokens of loss(their terms, their entries of `given` [b, k], `shared`), differentiable in
    `params`; and what they are, of which only the value is."""
    features = program.agent.policy.refresh(params, frozen.base, episodes, cost.group)
    own = states(program, params, frozen, episodes._replace(features=features))
    table, base_table = tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask.shape, len(base_table), cost), program.agent.policy.factored
    total, terms = chunked_loss(
        loss, cut.arrange(own.policy), table, cut.arrange(own.base), base_table, cut.arrange(episodes.action),
        jax.tree.map(cut.arrange, given), shared, relative=program.agent.policy.relative, train_table=factored.trained,
        forward=program.algorithm.kl.config.direction == "forward", scale=1 / program.agent.sampling.temperature,
        cap=factored.cap, used=cut.used(longest), block=cut.block)
    scores = Scores(jax.lax.stop_gradient(jax.tree.map(cut.back, terms)), own.value)
    return total, jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), scores)
