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
from jaxtyping import Array, Int

from kl_reg.kl import budget
from kl_reg.kl.budget import Caps
from kl_reg.kl.exact import TokenTerms
from kl_reg.models import decoder
from kl_reg.policies.actor import Situation
from kl_reg.program import ALONE, Program
from kl_reg.sampling.action import inverse_cdf, pack, student_log_probs
from kl_reg.sampling.agent_step import AgentState, At, choose, look, settle
from kl_reg.sharding.batching import over_members
from kl_reg.sharding.constraints import constrain, spread
from kl_reg.sharding.mesh import EPISODES
from kl_reg.types import AGENT, FORCED, OPENING, PAD, Episodes, Frozen, Openings, Transcript


class Step(NamedTuple):
    """What one position of the loop records, [m, b] each."""

    role: Array
    turn: Array
    token: Array
    fraction: Array
    strength: Array
    allowed: Array | None
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


def rollout(program: Program, params, memory, frozen: Frozen, caps: Caps, keys: Array, first: Int[Array, " m"],
            group: int = 1) -> Episodes:
    """Samples `program.schedule.episodes` episodes for each member, until the last one is over.

    Args:
        program: static.
        params, memory: of the policy and of the reference, a leading member axis.
        caps: of each member [m]; only looked at when the program is constrained.
        keys: one a member (`member_keys`).
        first: index of each member's first episode: parts of a larger batch are sampled as the whole would be.
        group: this many episodes in a row have the same opening, which is read once for them.

    Returns:
        Episodes [m, b, ...]; the agent stream has room for every token of the episode. Where the policy draws alone
        they lack what `scoring.complete` adds.
    """
    own, leaders = (constrain(episode_keys(keys, first, program.schedule.episodes, size), "member", EPISODES)
                    for size in (1, group))
    chosen = choose_openings(program.task.env.openings, leaders)
    fixed, openings, carry = begin(program, params, memory, frozen, caps, own, chosen, shared_openings(program, group))
    carry, steps = _until_over(program, _apart(program, fixed) if program.execution.copies else fixed, carry)
    return _collect(program, chosen, openings, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), steps), carry.asked)


def shared_openings(program: Program, group: int) -> int:
    """How many episodes in a row of a member may read one opening together, in a batch where `group` in a row have the
    same: as many as have, where what they share can lie on the devices that they lie on."""
    episodes = program.schedule.episodes
    if len(program.task.env.openings.start) == 1:
        return episodes
    return group if episodes // group % spread() == 0 else 1


def _apart(program: Program, fixed):
    """With a copy of the weights that are read for each token, layer by layer."""
    memory, reference = program.agent.reference.apart(fixed.memory, fixed.frozen.reference)
    frozen = Frozen(decoder.apart(fixed.frozen.base), reference, program.agent.student.apart(fixed.frozen.student))
    return fixed._replace(params=program.agent.policy.apart(fixed.params), memory=memory, frozen=frozen)


def _until_over(program: Program, fixed, carry):
    """All steps [t, m, b, ...]. Those behind the end of the last episode are not run: they have no role and no turn,
    and are zero otherwise."""
    _, shapes = jax.eval_shape(partial(step, program, fixed), carry, jnp.int32(0))
    steps = jax.tree.map(lambda x: jnp.zeros((program.task.env.length, *x.shape), x.dtype), shapes)
    steps = constrain(steps, None, "member", EPISODES)
    steps = steps._replace(role=steps.role + PAD, turn=steps.turn - 1)

    # Carried without dimensions of size 1: a KV cache that the loop has with them and attention without is copied.
    bare, whole = partial(jax.tree.map, jnp.squeeze), partial(jax.tree.map, lambda x, y: y.reshape(x.shape), carry)

    def unfinished(state):
        position, carry, _ = state
        carry = whole(carry)
        role, _ = _twice(program.task.env.turn)(carry.env)
        return (position < program.task.env.length) & ~(carry.over | (role == PAD)).all()

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


def begin(program: Program, params, memory, frozen: Frozen, caps: Caps, keys: Array, chosen: Int[Array, "m b"],
          group: int = 1) -> tuple[Fixed, Openings, Carry]:
    """Episodes with these keys [m, b] behind the `chosen` openings, nothing drawn yet; `caps` are of each member [m],
    and `group` episodes in a row have the same opening."""
    policy, env, reference = program.writer, program.task.env, program.agent.reference
    tokens, start = jax.tree.map(jnp.asarray, env.openings)
    openings, read = Openings(tokens[chosen], start[chosen]), chosen[:, ::group]
    slots = tokens.shape[1] + env.length - 1
    caps = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], keys.shape), caps)
    env_state = jax.tree.map(lambda x: jnp.broadcast_to(x, (*keys.shape, *x.shape)), env.reset())
    state = policy.prefill(params, frozen.base, tokens[:, :-1], start, read, slots, group)
    ref_state = reference.prefill(memory, frozen, tokens, start, read, slots, group)
    student = program.agent.student.prefill(frozen.student, tokens[:, :-1], start, read, slots, group)
    nothing = jnp.zeros(keys.shape, bool)
    carry = Carry(openings.tokens[..., -1], nothing, nothing, budget.open_ledger(keys.shape), env_state, state,
                  ref_state, student)
    return Fixed(params, memory, frozen, caps, keys, openings.start), openings, carry


def step(program: Program, fixed: Fixed, carry: Carry, position: Int[Array, ""],
         said: Int[Array, "m b"] | None = None) -> tuple[Carry, Step]:
    """One token of every episode.

    Args:
        position: tokens of the episode before this one; the same for all.
        said: tokens that somebody else writes instead, -1: none. They are the student's where it is the student's turn;
            else they are nobody's action (role FORCED) and cost nothing.
    """
    env, reference, frozen = program.task.env, program.agent.reference, fixed.frozen
    at = fixed.start, program.task.env.openings.tokens.shape[-1] - 1 + position
    place = lambda x: constrain(x, "member", EPISODES)  # noqa: E731 - behind the flat batch of a trunk
    features, state = program.writer.decode(fixed.params, frozen.base, carry.token, *at, carry.policy)
    features = place(features)
    if program.execution.sampler == ALONE:
        return _step_alone(program, fixed, carry, position, features, state)
    seen, ref_state = reference.decode(fixed.memory, frozen, carry.token, *at, carry.reference)
    hidden, student = program.agent.student.decode(frozen.student, carry.token, *at, carry.student)
    seen, hidden = place((seen, hidden))
    role, forced = _twice(env.turn)(carry.env)
    if said is not None:
        role = jnp.where((said >= 0) & (role == AGENT), FORCED, role)
        forced = jnp.where(said >= 0, said, forced)
    over, asked = carry.over | (role == PAD), carry.asked
    here = At(jnp.full(role.shape, position), carry.env.turn, (role == AGENT) & ~over)
    view = over_members(partial(look, program), (None, 0, 0, 0, 0, 0))(
        frozen, AgentState(fixed.params, fixed.memory, fixed.caps), here, carry.ledger, features, seen)
    if program.agent.constrained and not reference.proper:
        asks = here.agent & (view.remaining < view.measure.floor)
        over, asked = over | asks, asked | asks
    role = jnp.where(over, PAD, role)
    token, fraction, strength, allowed, terms, cost = _twice(partial(_draw, program, position))(
        view._replace(measure=view.measure._replace(models=None)),
        program.agent.student.logits(frozen.student, hidden, view.reading), role, fixed.keys)
    given = role == FORCED if said is None else (role == FORCED) | (said >= 0)
    token = jnp.where(given, forced, jnp.where(over, 0, token))
    out = Step(role, jnp.where(over, -1, carry.env.turn), token, fraction, strength, allowed, terms, view.measure.floor,
               view.reading.value, view.ledger.spent, features, seen)
    ledger = budget.charge(view.ledger, cost, role == AGENT)
    ref_state = reference.observe(ref_state, view.measure, token)
    env_state = _twice(env.observe)(carry.env, token)
    return Carry(token, over, asked, ledger, env_state, state, ref_state, student), out


def _step_alone(program: Program, fixed, carry, position, features, state):
    """`step` where the policy draws alone: only its features are recorded of a token."""
    role, forced = _twice(program.task.env.turn)(carry.env)
    over = carry.over | (role == PAD)
    role, zero = jnp.where(over, PAD, role), jnp.zeros(over.shape)
    situation = Situation(zero + jnp.inf, zero, jnp.full(over.shape, position / program.task.env.length))
    logits = over_members(program.agent.policy.alone.logits, (0, None, 0, 0, 0))(
        fixed.params, fixed.frozen.base, features, situation, role == AGENT)
    sampling = program.agent.sampling
    logits /= jnp.where(role == AGENT, sampling.temperature, sampling.of_student)[..., None]

    def draw(logits, key):
        return inverse_cdf(logits - logits.max(), jax.random.uniform(jax.random.fold_in(key, position)))

    token = jnp.where(role == FORCED, forced, jnp.where(over, 0, _twice(draw)(logits, fixed.keys)))
    out = Step(role, jnp.where(over, -1, carry.env.turn), token, zero, zero + 1, None,
               TokenTerms(*[zero] * len(TokenTerms._fields)), zero, zero, zero, features, ())
    env_state = _twice(program.task.env.observe)(carry.env, token)
    return carry._replace(token=token, over=over, env=env_state, policy=state), out


def _twice(function: Callable) -> Callable:
    """Over members and episodes."""
    return over_members(jax.vmap(function))


def _draw(program: Program, position, view, student, role, key):
    """The next token of one row, by the agent or by the student with these logits; how the agent's was limited, what it
    is to training and what it costs."""
    agent, key, measure, neuron = role == AGENT, jax.random.fold_in(key, position), view.measure, view.reading.spend
    drawn, allowed = program.agent.spend.draw(neuron, key), pack(program.agent.sampling, measure.log_probs)
    # Nobody else's tokens are constrained: without a limit their tilt takes no steps.
    measure = measure._replace(floor=jnp.where(agent, measure.floor, 0.0))
    remaining = jnp.where(agent, view.remaining, jnp.inf)
    neuron, drawn = jnp.where(agent, neuron, 1.0), jnp.where(agent, drawn, 1.0)
    choice = choose(program, measure, allowed, remaining, neuron, drawn, position)
    log_probs = jnp.where(agent, jax.nn.log_softmax(choice.logits), student_log_probs(program.agent.sampling, student))
    token = inverse_cdf(log_probs, jax.random.uniform(key))
    return token, choice.fraction, choice.strength, allowed, *settle(program, choice, token)


def _collect(program: Program, chosen, openings, steps, asked):
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
    estimate = program.algorithm.kl.value(terms, -jnp.expm1(-floor))
    return Episodes(
        transcript=Transcript(tokens, roles, turns, openings.start, chosen),
        features=jax.tree.map(take, steps.features), reference=jax.tree.map(take, steps.seen),
        allowed=jax.tree.map(take, steps.allowed),
        slot=jnp.where(mask, order + openings.tokens.shape[-1], 0), action=jnp.where(mask, take(steps.token), 0),
        fraction=zero(steps.fraction), mask=mask, **terms._asdict(), estimate=jnp.where(mask, estimate, 0.0),
        floor=floor, value=zero(steps.value), spent_before=zero(steps.spent_before), strength=zero(steps.strength),
        asked=asked,
        judged=jnp.ones_like(asked))
