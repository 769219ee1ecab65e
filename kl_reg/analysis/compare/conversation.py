"""Conversations with one policy: the rollout's own step, one token at a time, in which a person writes what is the
student's.

The cache has as many slots as the episode has tokens, so nothing is compiled again while a conversation grows; and the
same key and the same words of the student give the tokens that the rollout gives.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from kl_reg.analysis.compare.policies import Team, keys_of
from kl_reg.envs.environment import Environment
from kl_reg.pretrained import embeddings, tokenizer
from kl_reg.program import Program, replace
from kl_reg.sampling import rollout
from kl_reg.training import scoring
from kl_reg.types import AGENT, FORCED, PAD, Openings


class Spoken(NamedTuple):
    """One token. `role` PAD: nobody's, the agent asked for help. `nats`: what is shown of the agent's, 0 of others'."""

    token: int
    role: int
    nats: float


class Moment(NamedTuple):
    """Between two tokens. `position` counts those behind the opening; `role` writes the next one; `spent` nats of the
    hard budget. Adding a token gives up its caches (`State.kept` copies them)."""

    fixed: rollout.Fixed
    carry: rollout.Carry
    position: int
    role: int
    spent: float


class Policy(NamedTuple):
    """The compiled functions of one policy.

    begin(seed) -> (moment, ids of the opening); compiles what is needed.
    add(moment, said) -> (moment, spoken): the next token, `said` or, where that is -1, what its writer draws.
    again(moment, seed, attempt) -> the moment with other draws to come; attempt 0 has those that it had.
    rows: of the model's embeddings.
    """

    begin: Callable[[int], tuple[Moment, list[int]]]
    add: Callable[[Moment, int], tuple[Moment, Spoken]]
    again: Callable[[Moment, int, int], Moment]
    rows: int


def compile_policy(team: Team, shown: Callable) -> Policy:
    """A team of one, in its program's environment.

    Args:
        shown: from the `TokenTerms` of a token of the agent to the nats that are shown of it.
    """
    agent = team.program.agent
    policy = agent.policy._replace(alone=None)          # what is shown of a token is wanted at once
    program = replace(team.program, agent=agent._replace(policy=policy))
    frozen = team.frozen._replace(base=_apart(team.frozen.base))
    start = jax.jit(partial(_start, program))
    following = jax.jit(partial(_following, program, shown), donate_argnums=1)

    def keys(seed, attempt):
        return rollout.episode_keys(keys_of(team, seed), jnp.array([attempt]), 1)

    def begin(seed):
        fixed, openings, carry = start(team.params, team.memory, frozen, scoring.caps_of(team.hyper), keys(seed, 0))
        fixed = fixed._replace(params=team.params, memory=team.memory, frozen=frozen)
        following(fixed, jax.tree.map(jnp.copy, carry), jnp.int32(0), jnp.full((1, 1), -1))
        role, _ = program.task.env.turn(program.task.env.reset())
        return Moment(fixed, carry, 0, int(role), 0.0), openings.tokens[0, 0, int(openings.start[0, 0]):].tolist()

    def add(moment, said=-1):
        carry, numbers = following(moment.fixed, moment.carry, jnp.int32(moment.position), jnp.full((1, 1), said))
        spoken, role, spent = jax.tree.map(lambda x: x.item(), jax.device_get(numbers))
        return moment._replace(carry=carry, position=moment.position + 1, role=role, spent=spent), spoken

    def again(moment, seed, attempt):
        return moment._replace(fixed=moment.fixed._replace(keys=keys(seed, attempt)))

    return Policy(begin, add, again, len(team.frozen.base["embed"]))


def _apart(base):
    """Each layer's weights by themselves: outside of a loop a slice of stacked ones is a copy of them."""
    count = len(jax.tree.leaves(base["layers"])[0])
    return base | {"layers": [jax.tree.map(lambda x, i=i: x[i], base["layers"]) for i in range(count)]}


def _together(frozen):
    """As the decoder wants them; the compiler takes a slice of a stack for what was stacked."""
    layers = jax.tree.map(lambda *x: jnp.stack(x), *frozen.base["layers"])
    return frozen._replace(base=frozen.base | {"layers": layers})


def _start(program: Program, params, memory, frozen, caps, keys):
    """The beginning, without what is large and was given."""
    chosen = rollout.choose_openings(program.task.env.openings, keys)
    fixed, openings, carry = rollout.begin(program, params, memory, _together(frozen), caps, keys, chosen)
    return fixed._replace(params=(), memory=(), frozen=()), openings, carry


def _following(program: Program, shown, fixed, carry, position, said):
    """One step: the token, who is next, and what has been spent."""
    fixed = fixed._replace(frozen=_together(fixed.frozen))
    carry, new = rollout.step(program, fixed, carry, position, said)
    role, _ = jax.vmap(jax.vmap(program.task.env.turn))(carry.env)
    spoken = Spoken(new.token, new.role, jnp.where(new.role == AGENT, shown(new.terms), 0.0))
    return carry, (spoken, jnp.where(carry.over, PAD, role), carry.ledger.spent)


class State(NamedTuple):
    """A conversation so far: all its ids, the turns that are over as text, the agent's tokens of its present turn (None
    before its first and in the person's), and the nats shown."""

    moment: Moment
    ids: tuple[int, ...]
    turns: tuple[str, ...]
    said: tuple[int, ...] | None
    nats: float

    def kept(self) -> State:
        """A copy to come back to."""
        return self._replace(moment=self.moment._replace(carry=jax.tree.map(jnp.copy, self.moment.carry)))


class Manners(NamedTuple):
    """How turns are told apart.

    say(ids so far, turns so far, text) -> (how many of the ids stay, the ids behind them) for the person's turn; raises
    a ValueError that says what is wrong with the text.
    """

    env: Environment                # its length is that of the conversation
    agent: str                      # what is shown before the agent's turn, beside what its environment writes there
    person: str                     # and before the person's
    opens: bool                     # whether the person has the first turn
    ends: frozenset[int]            # the agent's tokens that end its turn, beside those that its environment knows
    closing: list[int]              # what ends a turn of the agent that it did not end itself
    say: Callable[[Sequence[int], Sequence[str], str], tuple[int, list[int]]]


def as_student(settings: ConfigDict, env: Environment, words: Tokenizer, ends: frozenset[int]) -> Manners:
    """The person is the student of this environment.

    Args:
        settings: `config.env`.
        ends: the model's own tokens for an end of text; none for a policy that was not trained to stop there.
    """
    written = settings.markers == "written"
    closing, back = (tokenizer.encode(words, settings.end) + (tokenizer.encode(words, prefix) if written else [])
                     for prefix in (settings.student, settings.teacher))

    def say(ids, turns, text):
        if settings.end in text:
            raise ValueError(f"a turn ends with {settings.end!r}, which cannot be inside it")
        said = f" {text}" if text else ""
        if written:
            return len(ids), tokenizer.encode(words, said) + back
        return len(ids), tokenizer.encode(words, said + settings.end)

    person = "> " if written else f"{settings.student} "       # written, the prefix is what the agent's turn ended with
    return Manners(env, "", person, False, ends, closing, say)


class _Silent(NamedTuple):
    """The state of an environment in which the agent writes all that nobody else says: its turn's number."""

    turn: jax.Array


def as_user(render: Callable[[list[dict]], list[int]], ends: frozenset[int]) -> Manners:
    """The person is the user of an instruct model, whose chat template says what stands between the turns.

    Args:
        render: messages -> ids, up to where the assistant's next turn begins.
        ends: the model's own tokens for an end of text.
    """
    def say(ids, turns, text):
        texts = [*turns, text]
        new = render([{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(texts)])
        same = [a == b for a, b in zip(ids, new[:-1], strict=False)]
        stay = same.index(False) if False in same else len(same)
        return stay, new[stay:]

    first = render([{"role": "user", "content": ""}])[0]
    # Behind one slot of padding: a prefill wants a token to read.
    openings = Openings(np.array([[0, first]], np.int32), np.array([1], np.int32))
    env = Environment(lambda: _Silent(jnp.int32(0)), lambda state: (jnp.int32(AGENT), jnp.int32(0)),
                      lambda state, token: state, openings, 0, None)
    return Manners(env, "assistant: ", "user: ", True, ends, [], say)


def agent_turn(policy: Policy, manners: Manners, state: State, stopped: Callable[[], bool]
               ) -> Iterator[tuple[State, Spoken]]:
    """The agent's turn, token by token, with what its environment writes before and behind it.

    Args:
        stopped: whether the turn is to end here, asked after each token.
    """
    closing, over, state = list(manners.closing), False, state._replace(said=())
    while state.moment.role in (AGENT, FORCED) and state.moment.position < manners.env.length:
        said = -1
        if over and state.moment.role == AGENT:
            if not closing:
                return
            said = closing.pop(0)
        moment, spoken = policy.add(state.moment, said)
        own = (spoken.token,) * (spoken.role == AGENT)
        state = state._replace(moment=moment, ids=(*state.ids, spoken.token), said=state.said + own,
                               nats=state.nats + spoken.nats)
        over = over or spoken.token in manners.ends or stopped()
        yield state, spoken


def person_turn(policy: Policy, manners: Manners, words: Tokenizer, state: State, text: str) -> State:
    """The person says `text`.

    Raises:
        ValueError: it cannot be a turn, or there is no room for it; says why. The state is as before.
    """
    turns = state.turns
    if state.said is not None:
        turns += (tokenizer.decode(words, [token for token in state.said if token not in manners.ends]),)
    stay, new = manners.say(state.ids, turns, text)
    embeddings.check((*state.ids, *new), policy.rows, "that turn", "the model", words)
    moment = _rewind(state.moment, len(state.ids) - stay, state.ids[stay - 1])
    room = manners.env.length - moment.position
    if len(new) > room:
        raise ValueError(f"that is {len(new)} tokens, and there is room for {room}")
    for token in new:
        moment, _ = policy.add(moment, token)
    return State(moment, state.ids[:stay] + tuple(new), (*turns, text), None, state.nats)


def _rewind(moment, count, token):
    """`count` tokens back, to behind `token`: what the cache holds from there on is never looked at. Only for an
    environment, a ledger and a reference that remember nothing of the transcript."""
    if not count:
        return moment
    carry = moment.carry._replace(token=jnp.full_like(moment.carry.token, token))
    return moment._replace(carry=carry, position=moment.position - count)
