"""What an environment is: three pure functions of one episode, its openings, and a reader of what was written."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from kl_reg.types import Openings, Transcript


class Reply(NamedTuple):
    """A turn in a recorded batch.

    `end` is its last slot; `ids` are the tokens that begin before its terminator, `text` what it says before it (the
    environment decides whether stripped);
    `finished`: whether it reached it. `scored`: whether the reward function is asked. `prompt` is what the reward
    function is told of what came before, a text or, for a chat, messages; `columns` what else it is told.
    """

    episode: int
    turn: int
    role: int
    end: int
    ids: list[int]
    text: str
    prompt: str | list[dict]
    finished: bool
    scored: bool
    columns: Mapping[str, object] = {}


class Environment(NamedTuple):
    """Built from `config.env` by name.

    reset() -> state of one episode, a pytree with the number of the present `turn`.
    turn(state) -> (role, token): who writes the next token, AGENT, STUDENT, FORCED (the environment: that token) or PAD
        (nobody: the episode is over).
    observe(state, token) -> state.
    read(transcript) -> the turns of a batch, in order; on the host, numpy in.
    students: whether anybody but the agent draws tokens.
    `length`: tokens of an episode behind its opening, at most. `digest`: of what the settings only name, as a file of
    prompts; "": nothing. `ends`: the tokens that end an episode or a turn by themselves; `markers`: the tokens of the
    texts that it writes or looks for. Every model that reads its episodes needs embeddings for them.
    """

    reset: Callable
    turn: Callable
    observe: Callable
    openings: Openings
    length: int
    read: Callable[[Transcript], list[Reply]]
    digest: str = ""
    students: bool = True
    ends: frozenset[int] = frozenset()
    markers: frozenset[int] = frozenset()
