"""What recorded agent tokens are under any parameters: all at once where they depend on nothing but the transcript, one
position after the other where a budget's ledger runs through them."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.chunked import chunked_loss, chunked_terms
from kl_reg.kl.exact import TokenTerms
from kl_reg.models.decoder import unembedding
from kl_reg.policies.actor import Situation
from kl_reg.policies.interface import States
from kl_reg.sampling import action as actions
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.constraints import EPISODES, constrain, spread
from kl_reg.types import Episodes, Frozen, Hyper


class Scores(NamedTuple):
    """Of the recorded agent tokens under given parameters, all [b, k]; zero where there is no token."""

    terms: TokenTerms
    value: Float[Array, "b k"]


def caps_of(hyper: Hyper) -> Caps:
    """The hard limits of a member."""
    return Caps(hyper.kl_budget, hyper.kl_turn_budget, hyper.kl_token_budget)


class Cost(NamedTuple):
    """What a batch is like, so that less is computed; no number depends on it. Static.

    `group` episodes in a row have the same opening; so many `members` are vmapped.
    """

    group: int = 1
    members: int = 1


PLAIN = Cost()


def score(program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, longest: Int[Array, ""],
          cost: Cost = PLAIN) -> Scores:
    """What the recorded agent tokens are under `params`, differentiable in them.

    Args:
        memory: of the reference.
        longest: agent tokens of the longest stream in the whole batch; positions behind it are skipped.
    """
    features = program.policy.refresh(params, frozen.base, episodes, cost.group)
    if program.parallel:
        return read_at_once(program, params, frozen, episodes._replace(features=features), longest, cost)
    return read_in_order(program, params, memory, frozen, episodes._replace(features=features), caps, longest)


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


def layout(program, shape: tuple[int, int], vocabulary: int, cost: Cost) -> Layout:
    """Parts whose logits are formed at once, and blocks that a processor's cache holds."""
    rows, count = shape
    row = vocabulary * cost.members
    most = min(count, max(1, program.formed // (rows * row)))
    positions = min(range(most // 2 + 1, most + 1), key=lambda own: (-(-count // own) * own, -own))     # least padding
    block = None if program.cached is None else max(1, program.cached // row)
    return Layout(rows, count, -(-count // positions), positions, block)


def states(program, params, frozen: Frozen, episodes: Episodes) -> States:
    """Of all agent tokens [b, k], where there is no budget."""
    infinite, zero = jnp.full(episodes.mask.shape, jnp.inf), jnp.zeros(episodes.mask.shape)
    time = (episodes.slot - episodes.transcript.tokens.shape[1] + program.env.length) / program.env.length
    return program.policy.factored.states(params, frozen.base, episodes.features, Situation(infinite, zero, time))


def tables(program, params, frozen: Frozen):
    """Unembeddings of policy and base."""
    return program.policy.factored.table(params, frozen.base), unembedding(frozen.base)


def read_at_once(program, params, frozen: Frozen, episodes: Episodes, longest: Int[Array, ""], cost: Cost) -> Scores:
    """Of a program whose tokens depend on nothing but what stands before them: many positions at a time, straight from
    hidden states (`kl.chunked`)."""
    own, (table, base_table) = states(program, params, frozen, episodes), tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask.shape, len(base_table), cost), program.policy.factored
    # `chunked_terms` has in part i every p-th row from i on.
    rows = lambda x: cut.arrange(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    terms = chunked_terms(
        rows(own.policy), table, rows(own.base), base_table, rows(episodes.action), relative=program.policy.relative,
        chunk=cut.rows * cut.positions, train_table=factored.trained, differentiate=program.differentiated,
        scale=1 / program.sampling.temperature, cap=factored.cap, used=cut.used(longest), block=cut.block)
    terms = jax.tree.map(lambda x: cut.back(x.reshape(-1, cut.parts).T), terms)
    return jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), Scores(terms, own.value))


def loss_at_once(program, params, frozen: Frozen, episodes: Episodes, loss: Callable, given, shared,
                 longest: Int[Array, ""], cost: Cost) -> tuple[Float[Array, ""], Scores]:
    """The sum over the agent tokens of loss(their terms, their entries of `given` [b, k], `shared`), differentiable in
    `params`; and what they are, of which only the value is."""
    own, (table, base_table) = states(program, params, frozen, episodes), tables(program, params, frozen)
    cut, factored = layout(program, episodes.mask.shape, len(base_table), cost), program.policy.factored
    total, terms = chunked_loss(
        loss, cut.arrange(own.policy), table, cut.arrange(own.base), base_table, cut.arrange(episodes.action),
        jax.tree.map(cut.arrange, given), shared, relative=program.policy.relative, train_table=factored.trained,
        forward=program.kl.config.direction == "forward", scale=1 / program.sampling.temperature, cap=factored.cap,
        used=cut.used(longest), block=cut.block)
    scores = Scores(jax.lax.stop_gradient(jax.tree.map(cut.back, terms)), own.value)
    return total, jax.tree.map(lambda x: jnp.where(episodes.mask, x, 0.0), scores)


def complete(program, params, frozen: Frozen, episodes: Episodes, cost: Cost, terms: bool) -> Episodes:
    """What a `deferred` program has sampled [m, b, ...], with the base's part of the features and the values; with
    `terms` also with what the tokens are that were drawn."""
    transcript, mask = episodes.transcript, episodes.mask
    features = program.policy.alone.complete(frozen.base, episodes.features, transcript, episodes.slot, cost.group)
    episodes = episodes._replace(features=features)
    if not terms:
        own = over_members(lambda params, episodes: states(program, params, frozen, episodes))(params, episodes)
        return episodes._replace(value=jnp.where(mask, own.value, 0.0))
    read = lambda params, episodes: read_at_once(  # noqa: E731
        program, params, frozen, episodes, mask.sum(-1).max(), cost)
    return with_scores(program, episodes, over_members(read)(params, episodes))


def with_scores(program, episodes: Episodes, scores: Scores) -> Episodes:
    """The record of what was sampled, where these are the scores under the policy that drew it."""
    said = scores.terms._asdict() | {"value": scores.value, "estimate": program.kl.value(scores.terms, 0.0),
                                     "spent_before": jnp.cumsum(scores.terms.kl, axis=-1) - scores.terms.kl}
    return episodes._replace(**{name: jnp.where(episodes.mask, x, 0.0) for name, x in said.items()})


def read_in_order(program, params, memory, frozen: Frozen, episodes: Episodes, caps: Caps, longest: Int[Array, ""]
                  ) -> Scores:
    """Of any program: one position of the stream after the other.

    The budget ledger is re-run with the new parameters and differentiated through: what a token may spend depends on
    what the earlier ones cost, and a gradient that leaves this out sees the benefit of spending and not its price.
    (Where the amount is itself a recorded action, it depends on no parameter.) Vocabulary-sized arrays exist for one
    position at a time and are recomputed in the backward pass.
    """
    width, rows = episodes.transcript.tokens.shape[1] - program.env.length, episodes.mask.shape[0]
    caps = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), caps)
    reading_of = _apart(program, params, frozen, rows)

    def read(ledger, features, seen, kept, slot, turn, action, part, mask):
        ledger = budget.enter(ledger, jnp.where(mask, turn, ledger.turn))
        left = budget.left(caps, ledger, program.carry)
        situation = Situation(left, budget.part_left(caps, ledger, left), (slot - width) / program.env.length)
        reading = reading_of(features, situation)
        measure = program.reference.read(memory, frozen, features, seen, situation, reading)
        # Gathered over the vocabulary, as in the rollout.
        measure = measure._replace(log_probs=constrain(measure.log_probs, EPISODES, None),
                                   gap=constrain(measure.gap, EPISODES, None))

        def row(measure, spend, value, kept, left, slot, action, drawn):
            part = actions.part_of(program, spend, drawn, slot - width)
            terms, cost = actions.terms_of(program, actions.constrain(program, measure, kept, left, part), action)
            log_prob = terms.log_prob + actions.part_log_prob(program, spend, drawn)
            return Scores(terms._replace(log_prob=log_prob), value), cost

        scores, cost = jax.vmap(row)(measure._replace(models=None), reading.spend, reading.value, kept, left, slot,
                                     action, part)
        return budget.charge(ledger, cost, mask), jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores)

    # Around the `cond`: inside it, all that `read` closes over, the unembedding too, would be kept for each position.
    @partial(jax.checkpoint, prevent_cse=False)
    def position(ledger, xs):
        index, *xs = xs
        zero = jnp.zeros(rows)
        nothing = lambda ledger, *xs: (ledger, Scores(TokenTerms(*[zero] * len(TokenTerms._fields)), zero))  # noqa: E731
        return jax.lax.cond(index < longest, read, nothing, ledger, *xs)

    turn = jnp.take_along_axis(episodes.transcript.turns, episodes.slot, axis=1)
    stream = (episodes.features, episodes.reference, episodes.kept, episodes.slot, turn, episodes.action, episodes.part,
              episodes.mask)
    stream = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), stream)
    _, scores = jax.lax.scan(position, budget.open_ledger((rows,)), (jnp.arange(episodes.mask.shape[1]), *stream))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), scores)


def _apart(program, params, frozen, rows):
    """`policy.read` of that many rows. Where they lie on several devices, each has a copy of the parameters, whose
    gradients are added up over all positions first and over the devices then: once, and not for every position."""
    parts = spread()
    if parts == 1 or rows % parts:
        return lambda features, situation: program.policy.read(params, frozen.base, features, situation)
    copies = constrain(jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), params), EPISODES)

    def read(*inputs):
        inputs = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), inputs)
        reading = jax.vmap(program.policy.read, (0, None, 0, 0))(copies, frozen.base, *inputs)
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), reading)

    return read
