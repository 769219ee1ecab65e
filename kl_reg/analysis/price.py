"""The price of a script: what it costs, in nats under the base, to say the same thing turn after turn."""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_reg import chitchat, rollout
from kl_reg import config as configs
from kl_reg.analysis.stats import mean_and_error
from kl_reg.envs.teacher_student import Environment
from kl_reg.models import decoder, tokenizer, weights
from kl_reg.training import program
from kl_reg.types import FORCED, STUDENT, Frozen, Openings


class _Scripted(NamedTuple):
    queue: jax.Array
    turn: jax.Array


def price_of_script(model: weights.Model, openings: list[list[str]], script: str, turns: int, episodes: int,
                    seed: int) -> tuple[np.ndarray, int]:
    """-log beta of A's turn `script` (its end marker included), turn after turn, nats per turn.

    A says `script` in every turn and B answers by sampling from the model. A policy that says it with certainty pays
    exactly this KL to the base.

    Args:
        openings: lists of turns before the script, an even number of them; each episode draws one.
        turns: how many turns of A to price.
        episodes: how many transcripts, each as long as the model's context.

    Returns:
        [turns] means over the episodes in which all those turns fit the context, so that every turn is priced in the
        same episodes (NaN without one), and how many those are.
    """
    tok = tokenizer.load(model.folder)
    line = tokenizer.encode(tok, chitchat.transcript([script]))
    rows = [tokenizer.encode(tok, tokenizer.START + chitchat.transcript(opening)) for opening in openings]
    tokens, start = tokenizer.left_pad(rows)
    forced = line + tokenizer.encode(tok, chitchat.SPEAKERS[1])
    env = _scripted_environment(tok, forced, Openings(tokens, start), model.config.max_position - tokens.shape[1])
    transcript = _sample(model, env, episodes, seed)
    cost = _surprisal(model, transcript)
    own = np.asarray(transcript.roles) == FORCED
    # Of the forced tokens of a turn, the first are A's prefix and those behind `line` are B's: neither is priced.
    prefix = len(tokenizer.encode(tok, chitchat.SPEAKERS[0]))
    rank = np.cumsum(own, 1) - 1
    priced = own & (rank % len(forced) >= prefix) & (rank % len(forced) < len(line))
    prices = np.stack([np.where(priced & (rank // len(forced) == turn), cost, 0.0).sum(1) for turn in range(turns)], 1)
    whole = (priced & (rank // len(forced) < turns)).sum(1) == turns * (len(line) - prefix)
    return mean_and_error(prices[whole])[0], int(whole.sum())


def _scripted_environment(tok, forced, openings, length):
    """B writes until its end marker; then `forced` is written for A."""
    (end,) = tokenizer.encode(tok, chitchat.END)
    script = jnp.array(forced)

    def turn(state):
        return jnp.where(state.queue > 0, FORCED, STUDENT), script[jnp.maximum(len(forced) - state.queue, 0)]

    def observe(state, token):
        over = (state.queue == 0) & (token == end)
        return _Scripted(jnp.where(over, len(forced), jnp.maximum(state.queue - 1, 0)), state.turn + over)

    def reset():
        return _Scripted(jnp.int32(len(forced)), jnp.int32(0))

    return Environment(reset, turn, observe, openings, length, read=None)


def _sample(model, env, episodes, seed):
    """The base policy in that environment: transcripts [episodes, s], numpy."""
    config = configs.default()
    config.policy.layers, config.policy.hidden, config.env.length = 1, 1, 1
    static, hyper, _ = configs.split(config)
    run = program.compile_program(program.build(static, model)._replace(env=env, episodes=episodes))
    hyper, zero = jax.tree.map(lambda x: x[None], hyper), jnp.zeros(1, jnp.int32)
    state = run.init(model.params, zero, hyper)
    keys = rollout.member_keys(jnp.full(1, seed), zero)
    sampled = run.sample(state.params, state.reference, hyper, Frozen(model.params), keys, zero)
    return jax.device_get(jax.tree.map(lambda x: x[0], sampled.transcript))


def _row_surprisal(config, params, tokens, start):
    hidden = decoder.forward(config, params, tokens[None], start[None]).last[0, :-1]
    logits = jnp.einsum("td,vd->tv", hidden, decoder.unembedding(params), preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=1)[:, 0]
    return -jnp.append(jnp.zeros(1), chosen)


def _surprisal(model, transcript):
    """-log beta of every token given what is before it, [b, s] nats; row by row, so that no [b, s, v] array exists."""
    run = jax.jit(lambda params, tokens, start: jax.lax.map(
        lambda row: _row_surprisal(model.config, params, *row), (tokens, start)))
    return np.asarray(run(model.params, jnp.asarray(transcript.tokens), jnp.asarray(transcript.start)))
