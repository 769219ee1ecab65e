"""How far two policies are from each other: exact, full-vocabulary divergences at every agent token of transcripts.

Each side reads the transcript with its own ledger: what a budgeted policy would do depends on what it has spent. Summed
over an episode, D(A || B) on episodes that A sampled is the KL of whole episodes, by the chain rule; any other sum is
one at the states that somebody else visits.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kl_reg.analysis.report.stats import t_interval
from kl_reg.kl import budget
from kl_reg.kl.divergences import DIVERGENCES
from kl_reg.policies.actor import Situation
from kl_reg.program import Program
from kl_reg.sampling.action import pack
from kl_reg.sampling.agent_step import AgentState, At, choose, look, settle
from kl_reg.types import AGENT, Frozen, Transcript

QUANTITIES = {"kl_ab": ("kl", "D(A‖B)", "nats"), "kl_ba": ("forward_kl", "D(B‖A)", "nats"),
              "jensen_shannon": ("jensen_shannon", "Jensen–Shannon", "nats"),
              "total_variation": ("total_variation", "total variation", "")}
"""What is measured: the name of its function of (A, B) in `DIVERGENCES`, its title, and its unit a token."""


class Writer(NamedTuple):
    """One policy: what its next token depends on, beside its program and the transcript."""

    agent: AgentState              # its hard limits without an axis of episodes
    frozen: Frozen


class Token(NamedTuple):
    """One agent token of each episode, all [b]."""

    at: At
    action: Array
    key: Array


def measure(programs: tuple, writers: tuple[Writer, Writer], transcript: Transcript, keys: Array
            ) -> Float[Array, "b t n"]:
    """The quantities between the two policies' next-token distributions at each position behind the opening.

    Vocabulary-sized arrays exist for one agent token of each episode at a time.

    Args:
        programs: of the two sides, static, in the environment that the transcripts are of.
        transcript: openings of one width, then `env.length` slots.
        keys: of the episodes [b], as the sampler has them: with kl.spend="sampled" they draw the amounts.

    Returns:
        In the order of `QUANTITIES`, nats per token but for the total variation; zero where no agent token is.
    """
    functions = [DIVERGENCES[name] for name, _, _ in QUANTITIES.values()]

    def divergences(token, first, second):
        return jax.vmap(lambda p, q: jnp.stack([function(p, q) for function in functions]))(first, second)

    return _along(programs, writers, transcript, keys, divergences)


def log_prob(program: Program, writer: Writer, transcript: Transcript, keys: Array) -> Float[Array, " b"]:
    """log-probability of all that the agent wrote in these episodes, had this policy been the agent; nats.

    Args:
        program, transcript, keys: see `measure`.
    """
    def said(token, log_probs):
        return jnp.take_along_axis(log_probs, token.action[:, None], axis=1)

    return _along((program,), (writer,), transcript, keys, said)[..., 0].sum(1)


def _along(programs, writers, transcript, keys, numbers_of: Callable) -> Float[Array, "b t n"]:
    """numbers_of(token, log-probabilities [b, v] of each policy) -> [b, n], at each agent token behind the opening."""
    width = transcript.tokens.shape[1] - programs[0].task.env.length
    agent = transcript.roles[:, width:] == AGENT
    order = jnp.argsort(~agent, axis=1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    stream = Token(At(order, take(transcript.turns[:, width:]), take(agent)), take(transcript.tokens[:, width:]),
                   jax.vmap(lambda key, row: jax.vmap(jax.random.fold_in, (None, 0))(key, row))(keys, order))
    read_from = [jax.tree.map(take, inputs(program, writer, transcript, width))
                 for program, writer in zip(programs, writers, strict=True)]

    def read(ledgers, token, read_from):
        new = [_next(*side, token) for side in zip(programs, writers, ledgers, read_from, strict=True)]
        log_probs, ledgers = zip(*new, strict=True)
        return ledgers, jnp.where(token.at.agent[:, None], numbers_of(token, *log_probs), 0.0)

    def position(ledgers, xs):
        index, token, read_from = xs
        shape = jax.eval_shape(read, ledgers, token, read_from)[1]
        nothing = lambda ledgers, *_: (ledgers, jnp.zeros(shape.shape, shape.dtype))  # noqa: E731
        return jax.lax.cond(index < agent.sum(1).max(), read, nothing, ledgers, token, read_from)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (stream, read_from))
    ledgers = (budget.open_ledger((len(keys),)),) * len(programs)
    _, numbers = jax.lax.scan(position, ledgers, (jnp.arange(agent.shape[1]), *xs))
    return jnp.take_along_axis(jnp.moveaxis(numbers, 0, 1), jnp.argsort(order, axis=1)[..., None], axis=1)


def _next(program: Program, writer, ledger, read_from, token):
    """Log-probabilities [b, v] of what one side would write, and its ledger behind what that costs."""
    at, agent = token.at, writer.agent
    agent = agent._replace(caps=jax.tree.map(lambda x: jnp.broadcast_to(x, at.agent.shape), agent.caps))
    view = look(program, writer.frozen, agent, at, ledger, *read_from)

    def row(measure, neuron, remaining, position, action, key):
        allowed, drawn = pack(program.agent.sampling, measure.log_probs), program.agent.spend.draw(neuron, key)
        choice = choose(program, measure, allowed, remaining, neuron, drawn, position)
        return jax.nn.log_softmax(choice.logits), settle(program, choice, action)[1]

    log_probs, cost = jax.vmap(row)(view.measure._replace(models=None), view.reading.spend, view.remaining, at.position,
                                    token.action, token.key)
    return log_probs, budget.charge(view.ledger, cost, at.agent)


def inputs(program: Program, writer, transcript, width):
    """What policy and reference read at every position of the episode, [b, t, ...] each.

    References have no function for a whole transcript, so theirs goes through it as it does when it is sampled; where
    it remembers nothing of the transcript, nothing of this is left after compilation.
    """
    policy, reference, length = program.agent.policy, program.agent.reference, program.task.env.length
    rows, start = transcript.start.shape[0], transcript.start[None]
    slots = jnp.broadcast_to(width + jnp.arange(length), (rows, length))
    features = policy.reread(writer.agent.params, writer.frozen.base, transcript, slots)
    lift = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    memory, situation = lift(writer.agent.memory), Situation(*[jnp.zeros(rows)] * 3)

    def position(state, xs):
        index, token, following, features = xs
        seen, state = reference.decode(memory, writer.frozen, token[None], start, index, state)
        own = jax.tree.map(lambda x: x[0], seen)
        reading = policy.read(writer.agent.params, writer.frozen.base, features, situation)
        now = reference.read(writer.agent.memory, writer.frozen, features, own, situation, reading)
        return reference.observe(state, lift(now), following[None]), own

    state = reference.prefill(memory, writer.frozen, transcript.tokens[:, :width], transcript.start,
                              jnp.arange(rows)[None], width + length - 1)
    xs = (width - 1 + jnp.arange(length), transcript.tokens[:, width - 1:-1].T, transcript.tokens[:, width:].T,
          jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), features))
    _, seen = jax.lax.scan(position, state, xs)
    return features, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)


def summarise(numbers: np.ndarray, roles: np.ndarray, turns: np.ndarray) -> dict:
    """Means and 95 % intervals over episodes.

    Args:
        numbers: [e, t, n] of `measure`.
        roles, turns: [e, t] behind the opening.

    Returns:
        "per_episode": sums over the agent's tokens; "per_token": their ratio to its tokens, its interval linearised;
        "by_position": per token, at each position, of the episodes in which the agent writes there; "by_turn": summed
        over the agent's n-th turn, 0 for episodes without it. Of each quantity "mean", "low" and "high"; null where too
        few episodes say anything, and the mean is "inf" where one side excludes what the other may write.
    """
    agent = roles == AGENT
    count = agent.sum(1)
    here = np.where(agent[..., None], numbers, 0.0).astype(np.float64)
    parts = [np.where((turns == turn)[..., None], here, 0.0).sum(1) for turn in np.unique(turns[agent])]
    by_turn = np.stack(parts, 1) if parts else here[:, :0]
    whole = here.sum(1)
    with np.errstate(invalid="ignore"):        # of infinite sums, and of no tokens at all
        rate = whole.sum(0) / count.sum()
        linear = rate + (whole - rate * count[:, None]) / count.mean()
    at = np.where(agent[..., None], numbers, np.nan)
    tables = {"per_episode": _estimate(whole, whole), "per_token": _estimate(linear, whole),
              "by_position": _estimate(at, at), "by_turn": _estimate(by_turn, by_turn)}
    out = {name: {key: {field: _plain(value[..., i]) for field, value in table.items()}
                  for i, key in enumerate(QUANTITIES)} for name, table in tables.items()}
    out["by_position"]["agent_tokens"] = agent.sum(0).tolist()
    return {"agent_tokens_per_episode": float(count.mean()), **out}


def _estimate(x, source):
    """Mean over episodes and its interval; infinite where something in `source` is."""
    infinite = np.isposinf(source).any(0)
    known = np.isfinite(x).any(0)
    mean = np.where(infinite, np.inf, np.where(known, np.nansum(np.where(np.isfinite(x), x, 0.0), 0), np.nan)
                    / np.maximum(np.isfinite(x).sum(0), 1))
    low, high = (np.where(infinite, np.nan, end) for end in t_interval(x))
    return {"mean": mean, "low": low, "high": high}


def _plain(x):
    """As JSON has it: NaN is null, infinity "inf"."""
    if np.ndim(x):
        return [_plain(value) for value in x]
    return None if np.isnan(x) else "inf" if np.isinf(x) else float(x)


def meanings(on: str, drawn: bool) -> dict:
    """Title and unit of each quantity, and what its sum over an episode's agent tokens is.

    Args:
        on: whose transcripts: "A", "B" or "held_out".
        drawn: whether a side draws how much it spends: then its distributions are those given what it drew.
    """
    out = {}
    for key, (_, title, unit) in QUANTITIES.items():
        whole = (key, on) in (("kl_ab", "A"), ("kl_ba", "B"))
        visitor = "humans visit" if on == "held_out" else f"{on} visits"
        says = f"the KL of whole episodes, {title}" if whole else f"a sum at the states that {visitor}"
        says = f"an upper bound of {says}: that of episodes and drawn amounts" if whole and drawn else says
        out[key] = {"title": title, "unit": unit, "per_episode": says, "whole_episodes": whole}
    return out
