"""What a program is made of: the pieces and settings that the static part of a configuration names.

Members with the same static settings share one program and one compilation. `kl_reg.training.build` makes it; sampling,
training and analysis take it as a static argument.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optax

from kl_reg.envs.environment import Environment
from kl_reg.episodes.token_groups import TokenGroups
from kl_reg.kl.controllers import Controller
from kl_reg.kl.estimators import KL
from kl_reg.kl.spends import Spend
from kl_reg.policies.interface import Alone, Policy
from kl_reg.policies.student import Student
from kl_reg.references.interface import Reference
from kl_reg.types import Sampling


class Agent(NamedTuple):
    """Who writes, what KL is measured to, and how the budget limits a token.

    `constrained`: the agent has a hard budget. `operation`: how it moves a proposal (`kl.operations`). `spend`: which
    part of it the next token may cost. `carry`: what a turn or a token leaves of its cap is added to the later ones'.
    `rerun`: what the ledger is charged depends on the parameters, so that updates run it again; else it is what was
    recorded.
    `target_floor`: nats that every token may cost.
    """

    policy: Policy
    reference: Reference
    student: Student
    sampling: Sampling
    constrained: bool
    operation: Callable
    spend: Spend
    carry: bool
    rerun: bool
    target_floor: float


class Task(NamedTuple):
    """What the agent does, and the groups of tokens that its metrics tell apart. `empty_tokens`: turns of at most so
    many count as short."""

    env: Environment
    groups: TokenGroups
    empty_tokens: int


class Algorithm(NamedTuple):
    """What an update descends. `per_token`: the loss of a token depends on that token alone. `group`: so many episodes
    in a row have the same prompt. `normalise`: advantages have mean 0 and deviation 1 over the batch.
    `learning_rate`: the factor of all learning rates at an iteration."""

    loss: Callable
    per_token: bool
    advantage: Callable
    reduction: Callable
    kl: KL
    controller: Controller
    group: int
    normalise: bool
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformationExtraArgs


class Schedule(NamedTuple):
    """How often: iterations of a run, episodes of an iteration, epochs over them, minibatches of an epoch, and parts
    that a minibatch's gradient is added up from. `first`: the number of the first iteration, of a run that starts from
    another's final state."""

    iterations: int
    episodes: int
    epochs: int
    minibatches: int
    accumulate: int
    first: int = 0

    @property
    def end(self) -> int:
        """The number behind the last iteration."""
        return self.first + self.iterations

    @property
    def rows(self) -> int:
        """Episodes of which a gradient is formed at a time."""
        return self.episodes // self.minibatches // self.accumulate


WITH_REFERENCE, ALONE = "with_reference", "alone"
"""How tokens are sampled: policy and reference read each token side by side; or the policy draws all tokens by itself,
and is compared with the base afterwards."""

AS_SAMPLED, AT_ONCE, FUSED = "as_sampled", "at_once", "fused"
"""How tokens are scored: each as the sampler has it, with the ledger that runs through them; straight from hidden
states, where a token depends on the transcript alone; or so, with the derivative of each token's loss, where the loss
is per token."""


class Execution(NamedTuple):
    """How a program is computed. No number of a result depends on it, up to rounding.

    `sampler` and `scorer` are choices of the names above. `update_records`: the one minibatch of an update is read
    under the policy that drew it, so that this reading is the record of what was sampled. `chunk`: entries of tokens x
    vocabulary that are formed at a time; `block`: those that are worked on at a time (None: all of them). `copies`: the
    sampler reads a copy of the weights, layer by layer. `axis`: that of the devices of which each runs this program on
    episodes of its own; None: there is one.
    """

    sampler: str
    scorer: str
    update_records: bool
    chunk: int
    block: int | None
    copies: bool
    axis: str | None = None


class Program(NamedTuple):
    """Everything that is static: hashable, and the same for all members that share a compilation."""

    agent: Agent
    task: Task
    algorithm: Algorithm
    schedule: Schedule
    execution: Execution

    @property
    def writer(self) -> Policy | Alone:
        """What draws the agent's tokens."""
        return self.agent.policy.alone if self.execution.sampler == ALONE else self.agent.policy


def fastest(agent: Agent, task: Task, algorithm: Algorithm, schedule: Schedule, entries: int, copies: bool, cpu: bool
            ) -> Execution:
    """The fastest way in which such a program can be computed.

    Args:
        entries: of tokens x vocabulary, formed at a time at most.
        cpu: whether it runs on one. There longer products are no faster, and what lies between them is worked on in
            blocks that a cache holds.
    """
    return Execution(*_choices(agent, task, algorithm, schedule), min(entries, 2**25) if cpu else entries,
                     2**19 if cpu else None, copies)


def replace(program: Program, **parts) -> Program:
    """The program with other parts, computed in the fastest way that they allow."""
    program = program._replace(**parts)
    sampler, scorer, update_records = _choices(*program[:4])
    return program._replace(execution=program.execution._replace(
        sampler=sampler, scorer=scorer, update_records=update_records))


def _choices(agent, task, algorithm, schedule):
    policy, kl = agent.policy, algorithm.kl.config
    if not (agent.reference.is_base and policy.factored) or agent.constrained or agent.sampling.truncates:
        return WITH_REFERENCE, AS_SAMPLED, False          # a token depends on more than what stands before it
    scorer = FUSED if algorithm.per_token and kl.reduction == "token" else AT_ONCE
    if policy.alone is None or task.env.students and not (policy.alone.speaks and agent.student.is_base):
        return WITH_REFERENCE, scorer, False
    return ALONE, scorer, schedule.epochs * schedule.minibatches == 1 and kl.placement == "loss"
