"""Programs that differ from one that the library has built, and programs of pieces made by hand."""
import optax
from ml_collections import ConfigDict

from kl_reg.algorithms import LOSSES
from kl_reg.algorithms.advantages import ADVANTAGES
from kl_reg.algorithms.reductions import REDUCTIONS
from kl_reg.envs.environment import Environment
from kl_reg.kl import estimators
from kl_reg.kl.controllers import CONTROLLERS
from kl_reg.kl.operations import OPERATIONS
from kl_reg.kl.spends import SPENDS
from kl_reg.policies import student
from kl_reg.policies.interface import Policy
from kl_reg.program import Agent, Algorithm, Program, Schedule, Task, fastest, replace
from kl_reg.references.kinds import REFERENCES
from kl_reg.training import optimizer
from kl_reg.types import Sampling


def changed(program: Program, **settings) -> Program:
    """The program with these fields of its parts changed, computed in the fastest way that they allow."""
    for name, value in settings.items():
        part = next(part for part in program._fields if name in getattr(program, part)._fields)
        program = program._replace(**{part: getattr(program, part)._replace(**{name: value})})
    return replace(program)


def descending(program: Program, direction=None, max_grad_norm=1e9, learning_rate=None) -> Program:
    """The program with plain gradient descent, or another direction, in its optimizer."""
    factor = program.algorithm.learning_rate if learning_rate is None else learning_rate
    direction = optax.identity() if direction is None else direction
    chain = optimizer.chain(max_grad_norm, factor, program.agent.policy.labels, direction)
    return changed(program, optimizer=chain, learning_rate=factor)


def by_hand(policy: Policy | None = None, length: int = 3, **settings) -> Program:
    """A program of this policy beside the base, REINFORCE in its update; `settings` are fields of its parts."""
    policy, sampling = Policy(*[None] * 8) if policy is None else policy, settings.get("sampling", Sampling())
    agent = Agent(policy, REFERENCES["base"](ConfigDict(), policy, sampling, None), student.base(), sampling, False,
                  OPERATIONS["tilt"], SPENDS["neuron"](1), False, True, 0.0)
    factor = optax.constant_schedule(1.0)
    algorithm = Algorithm(LOSSES["reinforce"], False, ADVANTAGES["monte_carlo"], REDUCTIONS["token_mean"],
                          estimators.build(estimators.KLConfig()), CONTROLLERS["fixed"](1, 1), 1, False, factor,
                          optimizer.chain(None, factor, lambda params: params))
    task = Task(Environment(None, None, None, None, length, None), None, 4)
    schedule = Schedule(1, 1, 1, 1, 1)
    execution = fastest(agent, task, algorithm, schedule, 2**20, False, True)
    return changed(Program(agent, task, algorithm, schedule, execution), **settings)
