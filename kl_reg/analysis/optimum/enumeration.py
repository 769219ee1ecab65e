r"""A language model so small that all its sequences can be listed, and what a policy on it earns and costs, exactly.

A history of t tokens has the number whose digits in base v they are, the first token the most significant one; so the
continuations of history i have the numbers i v + a. Everything is float64 on the host.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax

from kl_reg.models.decoder import DecoderConfig, forward, logits

AGENT, STUDENT = "AS"
LIMIT = 2**24       # sequences

_ROWS = 1024        # histories that the model reads at once


class Tree(NamedTuple):
    """All sequences of H tokens of a base model, with their reward."""

    log_base: tuple[np.ndarray, ...]    # H of [v**t, v]: normalised log-probabilities; -inf where impossible
    reward: np.ndarray                  # [v**H], of whole sequences
    writers: str                        # H letters: "A" the agent, "S" the student, who is the base model


def tokens_of(numbers: Int[np.ndarray, " n"], vocab: int, length: int) -> Int[np.ndarray, "n {length}"]:
    """The tokens of the histories with these numbers."""
    return numbers[:, None] // vocab ** np.arange(length)[::-1] % vocab


def enumerate_model(config: DecoderConfig, params: dict, opening: Sequence[int], horizon: int, reward: np.ndarray,
                    writers: str = "", temperature: float = 1.0) -> Tree:
    """The tree of what a decoder says behind an opening: log softmax(logits / temperature) at every history.

    Args:
        opening: token ids, at least one, never padded.
        reward: of all sequences, of shape (vocab,) * horizon or flat.
        writers: a letter a token, "A" the agent or "S" the student; "": all the agent's.

    Raises:
        ValueError: more than `LIMIT` sequences, or an argument of the wrong shape or value.
    """
    vocab = config.vocab
    reward, writers = _checked(config, opening, horizon, reward, writers or AGENT * horizon, temperature)
    out = tuple(np.empty((vocab**t, vocab)) for t in range(horizon))
    longest = vocab ** (horizon - 1)
    rows = min(_ROWS, longest)
    for low in range(0, longest, rows):
        numbers = np.minimum(np.arange(low, low + rows), longest - 1)      # one shape: the last ones are repeated
        tokens = np.concatenate([np.tile(opening, (rows, 1)), tokens_of(numbers, vocab, horizon - 1)], 1)
        read = np.asarray(_next_logits(config, params, jnp.asarray(tokens, jnp.int32), horizon), np.float64)
        for t, table in enumerate(out):
            below = vocab ** (horizon - 1 - t)                             # longest histories behind each of t tokens
            first = np.flatnonzero(numbers % below == 0)
            table[numbers[first] // below] = log_softmax(read[first, t] / temperature, axis=-1)
    return Tree(out, reward, writers)


@partial(jax.jit, static_argnums=(0, 3))
def _next_logits(config, params, tokens, last):
    hidden = forward(config, params, tokens, jnp.zeros(len(tokens), jnp.int32)).last
    return logits(config, params, hidden[:, -last:])


def _checked(config, opening, horizon, reward, writers, temperature):
    vocab, reward = config.vocab, np.asarray(reward, np.float64)
    if horizon < 1 or vocab**horizon > LIMIT:
        raise ValueError(f"horizon={horizon}: must be at least 1, and the vocabulary's {vocab}**{horizon} sequences at "
                         f"most {LIMIT}")
    if reward.shape not in ((vocab,) * horizon, (vocab**horizon,)):
        raise ValueError(f"reward has shape {reward.shape}; it must be {(vocab,) * horizon}, or flat")
    if not np.isfinite(reward).all():
        raise ValueError(f"reward has {np.sum(~np.isfinite(reward))} values that are not finite numbers")
    if len(writers) != horizon or set(writers) - {AGENT, STUDENT}:
        raise ValueError(f"writers={writers!r} must be {horizon} letters, each 'A' (agent) or 'S' (student)")
    if not len(opening) or not all(0 <= token < vocab for token in opening):
        raise ValueError(f"opening={list(opening)} must be at least one token id from 0 to {vocab - 1}")
    if len(opening) + horizon - 1 > config.max_position:
        raise ValueError(f"opening of {len(opening)} tokens with horizon={horizon}: the model's context is "
                         f"{config.max_position}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    return reward.reshape(-1), writers


def reverse_kl(log_policy: Float[np.ndarray, "*n v"], log_base: Float[np.ndarray, "*n v"]) -> Float[np.ndarray, "*n"]:
    r"""D(pi || beta) = \sum_i pi_i (e^{-L_i} - 1 + L_i), L = log pi - log beta; nats per token, each term >= 0.

    The float64 twin of `kl_reg.kl.exact.reverse_kl`, whose docstring says why it has this form. Infinite where the
    policy does what the base cannot.
    """
    policy, possible = np.exp(log_policy), log_policy > -np.inf
    ratio = np.subtract(log_policy, log_base, out=np.zeros_like(log_policy), where=possible)
    near = possible & (np.abs(ratio) < 0.1)
    small = np.where(near, ratio, 0.0)
    usual = np.multiply(policy, ratio, out=np.zeros_like(policy), where=policy > 0) - policy + np.exp(log_base)
    return np.asarray(np.where(near, policy * (np.expm1(-small) + small), usual).sum(-1))


def mean(log_policy: Float[np.ndarray, "*n v"], values: Float[np.ndarray, "*n v"]) -> Float[np.ndarray, "*n"]:
    """The values' mean under the policy; what it never does counts nothing, infinite values included."""
    policy = np.exp(log_policy)
    return np.asarray(np.multiply(policy, values, out=np.zeros_like(policy), where=policy > 0).sum(-1))


def backward(tree: Tree, choose: Callable) -> tuple[tuple[np.ndarray, ...], float, float]:
    """From the last token to the first: (log-policies, reward, nats per episode) of a policy that `choose` makes.

    Args:
        choose: (t, reward to go [n, v], KL to go [n, v]) -> log-policy [n, v] at the agent's t-th token.
    """
    reward, kl, policy = tree.reward, np.zeros_like(tree.reward), []
    for t in reversed(range(len(tree.writers))):
        log_base = tree.log_base[t]
        reward, kl = reward.reshape(log_base.shape), kl.reshape(log_base.shape)
        own = tree.writers[t] == AGENT
        chosen = choose(t, reward, kl) if own else log_base
        reward, kl = mean(chosen, reward), mean(chosen, kl) + (reverse_kl(chosen, log_base) if own else 0.0)
        policy.append(chosen)
    return tuple(policy[::-1]), float(reward[0]), float(kl[0])


def evaluate(tree: Tree, log_policy: Sequence[np.ndarray]) -> tuple[float, float]:
    """Expected reward, and KL in nats per episode of the agent's tokens, of a policy given as tables.

    Args:
        log_policy: H of [v**t, v], normalised log-probabilities; what stands at the student's tokens is not read.

    Raises:
        ValueError: a table is missing, has the wrong shape, or is not normalised.
    """
    if len(log_policy) != len(tree.writers):
        raise ValueError(f"log_policy has {len(log_policy)} tables; the tree has {len(tree.writers)} tokens")
    tables = [np.asarray(table, np.float64) for table in log_policy]
    for t, (table, log_base, writer) in enumerate(zip(tables, tree.log_base, tree.writers, strict=True)):
        if writer == AGENT and table.shape != log_base.shape:
            raise ValueError(f"log_policy[{t}] has shape {table.shape}; it must be {log_base.shape}")
        if writer == AGENT and not np.allclose(np.exp(table).sum(-1), 1, rtol=0, atol=1e-5):
            raise ValueError(f"log_policy[{t}] is not normalised: its rows must be log-probabilities that sum to 1")
    return backward(tree, lambda t, reward, kl: tables[t])[1:]
