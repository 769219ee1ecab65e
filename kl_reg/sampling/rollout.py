"""Sampling of episodes with a KV cache: the only place where tokens are drawn.

All members' episodes go through the trunk as one flat batch with one shared position; actors, ledgers and environments
are vmapped. A key is folded with member seed, iteration, episode and position, so what an episode says depends on
neither batch size nor neighbours, up to the rounding of matrix products of another shape.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.exact import TokenTerms
from kl_reg.models import decoder
from kl_reg.policies.actor import Situation
from kl_reg.sampling import action as actions
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.constraints import constrain
from kl_reg.sharding.mesh import EPISODES
from kl_reg.types import AGENT, FORCED, OPENING, PAD, Episodes, Frozen, Openings, Transcript

_BLOCK = 64


def inverse_cdf(log_probs: Float[Array, " v"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """Draws from one row with one uniform in [0, 1): the first token whose cumulative probability exceeds it.

    Two levels, blocks and then tokens within one, because a cumulative sum over the vocabulary costs more than the
    softmax. A token of probability zero is never drawn.

    Args:
        log_probs: up to a constant, but near enough to 0 that no exponential overflows.
    """
    vocab, log_probs = log_probs.shape[0], constrain(log_probs, None)      # XLA cannot cut a divided one into blocks
    rows = jnp.pad(log_probs, (0, -vocab % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
    blocks = jnp.cumsum(jnp.exp(rows).sum(1))
    target = uniform * blocks[-1]
    block = _first_above(blocks, target)
    inner = jnp.cumsum(jnp.exp(rows[block]))
    return block * _BLOCK + _first_above(inner, target - jnp.where(block > 0, blocks[block - 1], 0.0))


def _first_above(cumulative, target):
    """First index whose cumulative value exceeds the target; where rounding leaves none, the last that adds to it."""
    return jnp.minimum((cumulative <= target).sum(), (cumulative < cumulative[-1]).sum())


class Step(NamedTuple):
    """What one position of the loop records, [m, b] each."""

    role: Array
    turn: Array
    token: Array
    part: Array
    kept: Array | None
    terms: TokenTerms
    floor: Array
    value: Array
    spent_before: Array
    features: object
    seen: object


def member_keys(seed: Int[Array, " m"], iteration: Int[Array, " m"]) -> Array:
    """One key a member, from its own seed and iteration alone."""
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed, iteration)


def evaluation_keys(evaluation: Int[Array, " m"], seed: Int[Array, " m"]) -> Array:
    """One key a member, from `evaluation.seed` and the member's seed alone: members with one seed share it. It is none
    of `member_keys`, also where the evaluation's seed is a member's."""
    return jax.vmap(jax.random.fold_in, (0, None))(member_keys(evaluation, seed), 2**31 - 2)


class Fixed(NamedTuple):
    """What stays as it is along the episodes: policies and their references' memory [m, ...], and of every episode
    [m, b] its hard limits, its key and the first slot that is no padding."""

    params: object
    memory: object
    frozen: Frozen
    caps: Caps
    keys: Array
    start: Array


class Carry(NamedTuple):
    """The episodes between two positions [m, b, ...]: the last `token`, which no model has read yet, whether it is all
    `over`, because the agent `asked` for help or the environment ended it, the budget ledger, and the states of
    environment, policy, reference and student."""

    token: Array
    over: Array
    asked: Array
    ledger: budget.Ledger
    env: object
    policy: object
    reference: object
    student: object


def rollout(program, params, memory, frozen: Frozen, caps: Caps, keys: Array, first: Int[Array, " m"], group: int = 1
            ) -> Episodes:
    """Samples `program.episodes` episodes for each member, until the last one is over.

    Args:
        program: static.
        params, memory: of the policy and of the reference, a leading member axis.
        caps: of each member [m]; only looked at when the program is constrained.
        keys: one a member (`member_keys`).
        first: index of each member's first episode: parts of a larger batch are sampled as the whole would be.
        group: this many episodes in a row have the same opening, which is read once for them.

    Returns:
        Episodes [m, b, ...]; the agent stream has room for every token of the episode. Of a program that is `deferred`
        they lack what `scoring.complete` adds.
    """
    own, leaders = (constrain(episode_keys(keys, first, program.episodes, size), "member", EPISODES)
                    for size in (1, group))
    chosen = choose_openings(program.env.openings, leaders)
    fixed, openings, carry = begin(program, params, memory, frozen, caps, own, chosen, program.sharing(group))
    carry, steps = _until_over(program, _apart(program, fixed) if program.copies else fixed, carry)
    return _collect(program, chosen, openings, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), steps), carry.asked)


def _apart(program, fixed):
    """With a copy of the weights that are read for each token, layer by layer."""
    memory, reference = program.reference.apart(fixed.memory, fixed.frozen.reference)
    frozen = Frozen(decoder.apart(fixed.frozen.base), reference, program.student.apart(fixed.frozen.student))
    return fixed._replace(params=program.policy.apart(fixed.params), memory=memory, frozen=frozen)


def _until_over(program, fixed, carry):
    """All steps [t, m, b, ...]. Those behind the end of the last episode are not run: they have no role and no turn,
    and are zero otherwise."""
    _, shapes = jax.eval_shape(partial(step, program, fixed), carry, jnp.int32(0))
    steps = jax.tree.map(lambda x: jnp.zeros((program.env.length, *x.shape), x.dtype), shapes)
    steps = constrain(steps, None, "member", EPISODES)
    steps = steps._replace(role=steps.role + PAD, turn=steps.turn - 1)

    # Carried without dimensions of size 1: a KV cache that the loop has with them and attention without is copied.
    bare, whole = partial(jax.tree.map, jnp.squeeze), partial(jax.tree.map, lambda x, y: y.reshape(x.shape), carry)

    def unfinished(state):
        position, carry, _ = state
        carry = whole(carry)
        role, _ = _twice(program.env.turn)(carry.env)
        return (position < program.env.length) & ~(carry.over | (role == PAD)).all()

    def write(state):
        position, carry, steps = state
        carry, new = step(program, fixed, whole(carry), position)
        return position + 1, bare(carry), jax.tree.map(lambda x, y: x.at[position].set(y), steps, new)

    _, carry, steps = jax.lax.while_loop(unfinished, write, (jnp.int32(0), bare(carry), steps))
    return whole(carry), steps


def episode_keys(keys: Array, first: Int[Array, " m"], count: int, group: int = 1) -> Array:
    """The keys [m, count] of each member's episodes from `first` on, or of the first one of each one's group."""
    def one(key, i):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, (i + jnp.arange(count)) // group * group)

    return jax.vmap(one)(keys, first)


def choose_openings(openings: Openings, keys: Array) -> Int[Array, "m b"]:
    """Which opening each key draws."""
    if len(openings.start) == 1:
        return jnp.zeros(keys.shape, jnp.int32)
    count = len(openings.start)
    return _twice(lambda key: jax.random.randint(jax.random.fold_in(key, 2**31 - 1), (), 0, count))(keys)


def begin(program, params, memory, frozen: Frozen, caps: Caps, keys: Array, chosen: Int[Array, "m b"], group: int = 1
          ) -> tuple[Fixed, Openings, Carry]:
    """Episodes with these keys [m, b] behind the `chosen` openings, nothing drawn yet; `caps` are of each member [m],
    and `group` episodes in a row have the same opening."""
    policy, env, reference = program.writer, program.env, program.reference
    tokens, start = jax.tree.map(jnp.asarray, env.openings)
    openings, read = Openings(tokens[chosen], start[chosen]), chosen[:, ::group]
    slots = tokens.shape[1] + env.length - 1
    caps = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], keys.shape), caps)
    env_state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*keys.shape, *x.shape)), env.reset())
    state = policy.prefill(params, frozen.base, tokens[:, :-1], start, read, slots, group)
    ref_state = reference.prefill(memory, frozen, tokens, start, read, slots, group)
    student = program.student.prefill(frozen.student, tokens[:, :-1], start, read, slots, group)
    nothing = jnp.zeros(keys.shape, bool)
    carry = Carry(openings.tokens[..., -1], nothing, nothing, budget.open_ledger(keys.shape), env_state, state,
                  ref_state, student)
    return Fixed(params, memory, frozen, caps, keys, openings.start), openings, carry


def step(program, fixed: Fixed, carry: Carry, position: Int[Array, ""], said: Int[Array, "m b"] | None = None
         ) -> tuple[Carry, Step]:
    """One token of every episode.

    Args:
        position: tokens of the episode before this one; the same for all.
        said: tokens that somebody else writes instead, -1: none. They are the student's where it is the student's turn;
            else they are nobody's action (role FORCED) and cost nothing.
    """
    policy, env, reference, frozen = program.policy, program.env, program.reference, fixed.frozen
    at = fixed.start, program.env.openings.tokens.shape[-1] - 1 + position
    place = lambda x: constrain(x, "member", EPISODES)  # noqa: E731 - behind the flat batch of a trunk
    features, state = program.writer.decode(fixed.params, frozen.base, carry.token, *at, carry.policy)
    features = place(features)
    if program.deferred:
        return _step_alone(program, fixed, carry, position, features, state)
    seen, ref_state = reference.decode(fixed.memory, frozen, carry.token, *at, carry.reference)
    hidden, student = program.student.decode(frozen.student, carry.token, *at, carry.student)
    seen, hidden = place((seen, hidden))
    role, forced = _twice(env.turn)(carry.env)
    if said is not None:
        role = jnp.where((said >= 0) & (role == AGENT), FORCED, role)
        forced = jnp.where(said >= 0, said, forced)
    over, asked = carry.over | (role == PAD), carry.asked
    agent = (role == AGENT) & ~over
    ledger = budget.enter(carry.ledger, jnp.where(agent, carry.env.turn, carry.ledger.turn))
    left = budget.left(fixed.caps, ledger, program.carry)
    situation = Situation(left, budget.part_left(fixed.caps, ledger, left),
                          jnp.full(left.shape, position / env.length))
    reading = over_members(policy.read, (0, None, 0, 0))(fixed.params, frozen.base, features, situation)
    read = over_members(reference.read, (0, None, 0, 0, 0, 0))
    measure = read(fixed.memory, frozen, features, seen, situation, reading)
    if program.constrained and not reference.proper:
        asks = agent & (left < measure.floor)
        over, asked = over | asks, asked | asks
    role = jnp.where(over, PAD, role)
    token, part, kept, terms, cost = _twice(partial(_draw, program, position))(
        reading, program.student.logits(frozen.student, hidden, reading), measure._replace(models=None), left, role,
        fixed.keys)
    given = role == FORCED if said is None else (role == FORCED) | (said >= 0)
    token = jnp.where(given, forced, jnp.where(over, 0, token))
    out = Step(role, jnp.where(over, -1, carry.env.turn), token, part, kept, terms, measure.floor, reading.value,
               ledger.spent, features, seen)
    ledger = budget.charge(ledger, cost, role == AGENT)
    ref_state = reference.observe(ref_state, measure, token)
    env_state = _twice(env.observe)(carry.env, token)
    return Carry(token, over, asked, ledger, env_state, state, ref_state, student), out


def _step_alone(program, fixed, carry, position, features, state):
    """`step` of a program that is deferred: of a token nothing but the policy's features is recorded."""
    role, forced = _twice(program.env.turn)(carry.env)
    over = carry.over | (role == PAD)
    role, zero = jnp.where(over, PAD, role), jnp.zeros(over.shape)
    situation = Situation(zero + jnp.inf, zero, jnp.full(over.shape, position / program.env.length))
    logits = over_members(program.policy.alone.logits, (0, None, 0, 0, 0))(
        fixed.params, fixed.frozen.base, features, situation, role == AGENT) / program.sampling.temperature

    def draw(logits, key):
        return inverse_cdf(logits - logits.max(), jax.random.uniform(jax.random.fold_in(key, position)))

    token = jnp.where(role == FORCED, forced, jnp.where(over, 0, _twice(draw)(logits, fixed.keys)))
    out = Step(role, jnp.where(over, -1, carry.env.turn), token, zero, None,
               TokenTerms(*[zero] * len(TokenTerms._fields)), zero, zero, zero, features, ())
    env_state = _twice(program.env.observe)(carry.env, token)
    return carry._replace(token=token, over=over, env=env_state, policy=state), out


def _twice(function: Callable) -> Callable:
    """Over members and episodes."""
    return over_members(jax.vmap(function))


def _draw(program, position, reading, student, measure, left, role, key):
    """The next token of one row, by the agent or by the student with these logits; how the agent's was limited and what
    it costs."""
    agent, key = role == AGENT, jax.random.fold_in(key, position)
    # Gathered over the vocabulary once, and not summed over devices at every step of a tilt.
    measure = measure._replace(log_probs=constrain(measure.log_probs, None), gap=constrain(measure.gap, None))
    part = actions.part_of(program, reading.spend, actions.draw_part(program, reading.spend, key), position)
    kept = actions.pack(program, measure.log_probs)
    # Nobody else's tokens are constrained: without a limit their tilt takes no steps.
    free = measure._replace(floor=jnp.where(agent, measure.floor, 0.0))
    chosen = actions.constrain(program, free, kept, jnp.where(agent, left, jnp.inf), jnp.where(agent, part, 1.0))
    log_probs = jnp.where(agent, jax.nn.log_softmax(chosen.logits), actions.student_log_probs(program, student))
    token = inverse_cdf(log_probs, jax.random.uniform(key))
    terms, cost = actions.terms_of(program, chosen, token)
    terms = terms._replace(log_prob=terms.log_prob + actions.part_log_prob(program, reading.spend, part))
    return token, part, kept, terms, cost


def _collect(program, chosen, openings, steps, asked):
    """Transcript and agent stream from the steps [m, b, t]."""
    written = jax.vmap(jax.vmap(lambda start: jnp.arange(openings.tokens.shape[-1]) >= start))(openings.start)
    roles = jnp.concatenate([jnp.where(written, OPENING, PAD), steps.role], axis=-1)
    turns = jnp.concatenate([jnp.full_like(openings.tokens, -1), steps.turn], axis=-1)
    tokens = jnp.concatenate([openings.tokens, steps.token], axis=-1)
    agent = steps.role == AGENT
    order = jnp.argsort(~agent, axis=-1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)  # noqa: E731
    mask = take(agent)
    zero = lambda x: jnp.where(mask, take(x), 0.0)  # noqa: E731
    terms, floor = jax.tree.map(zero, (steps.terms, steps.floor))
    return Episodes(
        transcript=Transcript(tokens, roles, turns, openings.start, chosen),
        features=jax.tree.map(take, steps.features), reference=jax.tree.map(take, steps.seen),
        kept=jax.tree.map(take, steps.kept),
        slot=jnp.where(mask, order + openings.tokens.shape[-1], 0), action=jnp.where(mask, take(steps.token), 0),
        part=zero(steps.part), mask=mask, log_prob=terms.log_prob, log_ratio=terms.log_ratio, kl=terms.kl,
        estimate=jnp.where(mask, program.kl.value(terms, -jnp.expm1(-floor)), 0.0), forward_kl=terms.forward_kl,
        entropy=terms.entropy, floor=floor, value=zero(steps.value), spent_before=zero(steps.spent_before), asked=asked,
        judged=jnp.ones_like(asked))
