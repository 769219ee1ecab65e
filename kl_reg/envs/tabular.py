"""A language model that can be enumerated (`analysis/optimum/`): at most 16 tokens, episodes of at most 8.

Who writes which token is fixed beforehand, nothing ends an episode early, and the reward function is asked about all
that was written. So policies, returns and KL can be summed over all sequences.
"""
from __future__ import annotations

import pathlib
import string
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from kl_reg.envs import prompts
from kl_reg.envs.environment import Environment, Reply
from kl_reg.models import decoder
from kl_reg.models.layers import Rope
from kl_reg.pretrained import families, weights
from kl_reg.pretrained import tokenizer as text
from kl_reg.types import AGENT, OPENING, PAD, STUDENT

VOCABULARY, HORIZON = 16, 8     # at most
_WRITERS = {"A": AGENT, "S": STUDENT}


class EnvState(NamedTuple):
    """The state of one episode. `position`: tokens written; `turn` counts the changes of the writer."""

    position: Int[Array, ""]
    turn: Int[Array, ""]


def tabular(config: ConfigDict, tokenizer: Tokenizer, eos: frozenset[int] = frozenset()) -> Environment:
    """Builds the environment from `config.env`; `eos` ends nothing.

    Raises:
        ValueError: too many tokens or slots to enumerate, `env.writers` of another length, with other letters or
            without the agent, or an opening that the tokenizer cannot write.
    """
    writers = config.writers or "A" * config.length
    if tokenizer.get_vocab_size() > VOCABULARY:
        raise ValueError(f"env.name='tabular': the model's vocabulary has {tokenizer.get_vocab_size()} tokens, at most "
                         f"{VOCABULARY} can be enumerated; `kl_reg.envs.tabular.make_model` makes a small model")
    if config.length > HORIZON:
        raise ValueError(f"env.length={config.length}: env.name='tabular' enumerates episodes of at most {HORIZON} "
                         "tokens")
    if len(writers) != config.length or not set("A") <= set(writers) <= set(_WRITERS):
        raise ValueError(f"env.writers={config.writers!r} must be env.length={config.length} letters, A (the agent) or "
                         "S (the base model), with at least one A; or '' for the agent alone")
    roles = np.array([*(_WRITERS[writer] for writer in writers), PAD], np.int32)
    turns = np.cumsum(np.diff(roles[:-1], prepend=roles[0]) != 0, dtype=np.int32)

    def reset():
        return EnvState(jnp.int32(0), jnp.int32(0))

    def turn(state):
        return jnp.asarray(roles)[state.position], jnp.int32(0)

    def observe(state, token):
        position = jnp.minimum(state.position + 1, config.length)
        return EnvState(position, jnp.asarray(turns)[jnp.minimum(position, config.length - 1)])

    def read(transcript):
        return [_reply(config, tokenizer, *episode) for episode in enumerate(zip(*transcript[:3], strict=True))]

    openings = prompts.padded([_opening(config, tokenizer)])
    return Environment(reset, turn, observe, openings, config.length, read, students=STUDENT in roles)


def _opening(config, tokenizer):
    try:
        ids = text.opening(tokenizer, config.opening)
    except Exception as error:      # that library raises nothing more specific
        raise ValueError(f"env.opening={config.opening!r} cannot be written in the model's tokens "
                         f"({', '.join(sorted(tokenizer.get_vocab()))}): {error}") from None
    if not ids:
        raise ValueError(f"env.opening={config.opening!r} has no tokens")
    return ids


def _reply(config, tokenizer, number, episode):
    """All that was written behind the opening."""
    tokens, roles, turns = episode
    slots = np.flatnonzero(roles > OPENING)
    ids, end = tokens[slots].tolist(), int(np.flatnonzero(roles >= OPENING)[-1])
    return Reply(number, max(int(turns[end]), 0), AGENT, end, ids, text.decode(tokenizer, ids), config.opening, True,
                 True)


def make_model(folder: pathlib.Path, vocabulary: int, seed: int, scale: float = 1.0) -> None:
    """Writes a small random Llama, in the Hugging Face layout, whose tokens are "a", "b", ...; the same seed writes the
    same files.

    Args:
        vocabulary: number of tokens, 2 to 16.
        scale: standard deviation of the logits, about, nats. The entropy of a next token falls with it: at 1 it is in
            the mean 0.6 to 0.95 of log(vocabulary), with 2 or 3 tokens sometimes less.

    Raises:
        ValueError: another vocabulary.
    """
    if not 2 <= vocabulary <= VOCABULARY:
        raise ValueError(f"vocabulary={vocabulary} must be 2 to {VOCABULARY}")
    shapes = decoder.DecoderConfig(vocab=vocabulary, width=32, layers=2, heads=4, kv_heads=2, head_width=8,
                                   mlp_width=64, max_position=64, rope=Rope(10000.0, 8), tied=False)
    weights.save(folder, families.llama_settings(shapes), _params(shapes, seed, scale), "float32")
    tokens = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(string.ascii_lowercase[:vocabulary])}))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokens.save(str(folder / "tokenizer.json"))


@partial(jax.jit, static_argnums=0)
def _params(shapes, seed, scale):
    start, embed, unembed = jax.random.split(jax.random.key(seed), 3)
    params = decoder.init(shapes, start)
    # Layers add as much to the residual stream as the embeddings are, so that more counts than the last token.
    params["layers"] = jax.tree.map(lambda x: 12 * x if x.ndim > 2 else x, params["layers"])
    params["embed"] = jax.random.orthogonal(embed, shapes.width)[:shapes.vocab] * shapes.width**0.5
    params["unembed"] = jax.random.orthogonal(unembed, shapes.width)[:shapes.vocab] * scale
    return params
