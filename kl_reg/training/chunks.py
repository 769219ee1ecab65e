"""Agent tokens that depend on nothing but the transcript, many at a time and a chunk of the vocabulary's products after
the other (`kl.chunked`)."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kl_reg.kl.chunked import chunked_loss, chunked_terms
from kl_reg.kl.exact import TokenTerms
from kl_reg.models.decoder import unembedding
from kl_reg.policies.actor import Situation
from kl_reg.policies.interface import States
from kl_reg.program import Program
from kl_reg.sharding.batching import largest
from kl_reg.sharding.constraints import spread
from kl_reg.types import Episodes, Frozen


class Scores(NamedTuple):
    """The recorded agent tokens under given parameters, all [b, k]; zero where there is no token."""

    terms: TokenTerms
    value: Float[Array, "b k"]
    miss: Float[Array, "b k"] | None = None         # (D - allowance)^2, nats^2; None: there is no budget
    passes: Float[Array, "b k"] | None = None       # how often it was read until the budget's ledger stood still


class Cost(NamedTuple):
    """What a batch is like, so that less is computed; no number depends on it. Static.

    `group` episodes in a row have the same opening; so many `members` are vmapped.
    """

    group: int = 1
    members: int = 1


PLAIN = Cost()


class Layout(NamedTuple):
    """How the tokens of [b, k] streams are cut into `parts` parts of `size`, of which `used` have tokens; `block` of a
    part are worked on at a time (None: all).

    With `order`, tokens that exist come first, so that no work is done for those that do not. Without, a part has some
    positions of all rows: rows that lie on several devices stay there.
    """

    order: Int[Array, " n"] | None
    shape: tuple[int, int]
    parts: int
    size: int
    used: Int[Array, ""]
    block: int | None

    def arrange(self, x):
        """[b, k, ...] -> [p, r, ...]; zeros behind the last token."""
        rows, count = self.shape
        if self.order is None:
            positions = self.size // rows
            x = jnp.pad(x, [(0, 0), (0, self.parts * positions - count)] + [(0, 0)] * (x.ndim - 2))
            x = jnp.moveaxis(x.reshape(rows, self.parts, positions, *x.shape[2:]), 1, 0)
        else:
            x = x.reshape(-1, *x.shape[2:])[self.order]
            x = jnp.pad(x, [(0, self.parts * self.size - rows * count)] + [(0, 0)] * (x.ndim - 1))
            x = x.reshape(self.parts, self.size, *x.shape[1:])
        return x.reshape(self.parts, self.size, *x.shape[2 + (self.order is None):])

    def back(self, x):
        """[p, r, ...] -> [b, k, ...]."""
        rows, count = self.shape
        if self.order is None:
            x = jnp.moveaxis(x.reshape(self.parts, rows, -1, *x.shape[2:]), 0, 1)
            return x.reshape(rows, -1, *x.shape[3:])[:, :count]
        x = x.reshape(-1, *x.shape[2:])[:rows * count]
        return x[jnp.argsort(self.order)].reshape(rows, count, *x.shape[1:])


def layout(program: Program, mask: Bool[Array, "b k"], vocabulary: int, members: int, entries: int | None = None
           ) -> Layout:
    """Parts whose logits are formed at once, and blocks that a processor's cache holds.

    Args:
        mask: the tokens that exist.
        members: so many are vmapped.
        entries: of tokens x vocabulary, of all members, that a part has at most; None: as the program says.
    """
    rows, count = mask.shape
    row = vocabulary * members
    block = None if program.execution.block is None else max(1, program.execution.block // row)
    most = max(1, (entries or program.execution.chunk) // row)
    if spread() == 1:
        parts = -(-rows * count // most)
        size = -(-rows * count // parts)
        size = size if block is None or size <= block else -(-size // block) * block
        order = jnp.argsort(~mask.ravel(), stable=True)
        return Layout(order, mask.shape, parts, size, -(-largest(mask.sum()) // size), block)
    most = min(count, max(1, most // rows))
    positions = min(range(most // 2 + 1, most + 1), key=lambda own: (-(-count // own) * own, -own))     # least padding
    used = -(-largest(mask.sum(-1).max()) // positions)
    return Layout(None, mask.shape, -(-count // positions), rows * positions, used, block)


def states(program: Program, params, frozen: Frozen, episodes: Episodes) -> States:
    """The hidden states of all agent tokens [b, k], where there is no budget."""
    infinite, zero = jnp.full(episodes.mask.shape, jnp.inf), jnp.zeros(episodes.mask.shape)
    time = (episodes.slot - episodes.transcript.tokens.shape[1] + program.task.env.length) / program.task.env.length
    return program.agent.policy.factored.states(params, frozen.base, episodes.features, Situation(infinite, zero, time))


def tables(program: Program, params, frozen: Frozen):
    """Unembeddings of policy and base."""
    return program.agent.policy.factored.table(params, frozen.base), unembedding(frozen.base)


def read_at_once(program: Program, params, frozen: Frozen, episodes: Episodes, cost: Cost) -> Scores:
    """Scores tokens that depend on nothing but what stands before them, many positions at a time, straight from hidden
    states (`kl.chunked`)."""
    own, (table, base_table) = states(program, params, frozen, episodes), tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask, len(base_table), cost.members), program.agent.policy.factored
    # `chunked_terms` has in part i every p-th row from i on.
    rows = lambda x: cut.arrange(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    terms = chunked_terms(
        rows(own.policy), table, rows(own.base), base_table, rows(episodes.action),
        relative=program.agent.policy.relative, chunk=cut.size, train_table=factored.trained,
        differentiate=program.algorithm.kl.differentiated, scale=1 / program.agent.sampling.temperature,
        cap=factored.cap, used=cut.used, block=cut.block)
    terms = jax.tree.map(lambda x: cut.back(x.reshape(-1, cut.parts).T), terms)
    return jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), Scores(terms, own.value))


def loss_at_once(program: Program, params, frozen: Frozen, episodes: Episodes, loss: Callable, given, shared,
                 cost: Cost) -> tuple[Float[Array, ""], Scores]:
    """The sum over the agent tokens of loss(their terms, their entries of `given` [b, k], `shared`), differentiable in
    `params`; and what they are, of which only the value is."""
    features = program.agent.policy.refresh(params, frozen.base, episodes, cost.group)
    own = states(program, params, frozen, episodes._replace(features=features))
    table, base_table = tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask, len(base_table), cost.members), program.agent.policy.factored
    total, terms = chunked_loss(
        loss, cut.arrange(own.policy), table, cut.arrange(own.base), base_table, cut.arrange(episodes.action),
        jax.tree.map(cut.arrange, given), shared, relative=program.agent.policy.relative, train_table=factored.trained,
        forward=program.algorithm.kl.config.direction == "forward", scale=1 / program.agent.sampling.temperature,
        cap=factored.cap, used=cut.used, block=cut.block)
    scores = Scores(jax.lax.stop_gradient(jax.tree.map(cut.back, terms)), own.value)
    return total, jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), scores)
