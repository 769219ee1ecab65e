"""A trained policy as tables: what it says at every history of an enumerable language model."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from kl_reg.analysis.optimum.enumeration import LIMIT, tokens_of
from kl_reg.policies.actor import Situation
from kl_reg.program import Program
from kl_reg.types import Transcript

_ROWS = 1024        # histories that the model reads at once


def policy_tables(program: Program, params, base: dict, vocab: int) -> tuple[np.ndarray, ...]:
    """log pi(a | h) behind the environment's opening, at the sampling temperature, as `enumeration.evaluate` reads it.

    Of any kind of policy, and not from samples. What stands at the student's tokens is what the agent would say there.

    Args:
        program: a `kl_reg.program.Program`.
        params: of one member.
        base: parameters of the base model.

    Returns:
        H of [v**t, v], nats, float64; histories are numbered as in `kl_reg.analysis.optimum.enumeration`.

    Raises:
        ValueError: there are several openings or too many sequences, or what is drawn is not the policy's own
            distribution: it has a hard budget or a truncation, or is a change of another reference than the base.
    """
    openings, horizon, sampling = program.task.env.openings, program.task.env.length, program.agent.sampling
    if len(openings.start) != 1 or vocab**horizon > LIMIT:
        raise ValueError(f"{len(openings.start)} openings and {vocab}**{horizon} sequences: tables are of one opening "
                         f"and at most {LIMIT} sequences")
    agent = program.agent
    if agent.constrained or sampling.truncates or (agent.policy.relative and not agent.reference.is_base):
        raise ValueError("tables are of policies without a hard budget or truncation, and of policy.kind='head', which "
                         "changes the reference, only with reference.name='base'")
    histories = jnp.asarray(tokens_of(np.arange(vocab ** (horizon - 1)), vocab, horizon - 1), jnp.int32)
    opening = tuple(openings.tokens[0, openings.start[0]:].tolist())
    read = np.asarray(_logits(program.agent.policy, opening, params, base, histories), np.float64)
    return tuple(log_softmax(read[::vocab ** (horizon - 1 - t), t] / sampling.temperature, axis=-1)
                 for t in range(horizon))


@partial(jax.jit, static_argnums=(0, 1))
def _logits(policy, opening, params, base, histories):
    """Behind each prefix of each history [n, h, v]."""
    horizon = histories.shape[1] + 1
    slot = len(opening) + jnp.arange(horizon)[None]
    free = Situation(jnp.full((1, horizon), jnp.inf), jnp.ones((1, horizon)), jnp.arange(horizon)[None] / horizon)

    def read(history):
        tokens = jnp.concatenate([jnp.array(opening), history])[None]
        transcript = Transcript(tokens, tokens, tokens, jnp.zeros(1, jnp.int32))    # its roles and turns are not read
        reading = policy.read(params, base, policy.reread(params, base, transcript, slot), free)
        return (reading.base_logits + reading.gap)[0]

    return jax.lax.map(read, histories, batch_size=_ROWS)
