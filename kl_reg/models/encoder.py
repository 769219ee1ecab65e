"""A bidirectional encoder with a classification head: DistilBERT, BERT and RoBERTa as one Flax module.

Parameters are a pytree {"token": [v, d], "position": [p, d], "token_type": [n, d] where there are types, "norm",
"layers": {... each [layers, ...]}, "pool", "classify"}. Rows are padded on the right and masked by their lengths.
"""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from kl_reg.models.layers import ACTIVATIONS, Linear, Norm, Source, Stored, attend

POOLS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
PROBLEMS = {"single_label_classification": jax.nn.softmax, "multi_label_classification": jax.nn.sigmoid,
            "regression": lambda logits: logits}
"""From logits to probabilities, by the `problem_type` of config.json."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shapes and switches of an encoder; hashable, so a static argument of jit."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int                  # rows of the position table
    labels: tuple[str, ...]
    problem: str                    # one of PROBLEMS
    pool: str                       # one of POOLS
    offset: int = 0                 # row of the first token's position
    token_types: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dtype: str = "float32"

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self.positions - self.offset


class Block(nn.Module):
    """Attention and MLP, each added to its input and then normalised (post-norm)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x, mask):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        linear, norm = partial(Linear, dtype=dtype, use_bias=True), partial(Norm, "layer", c.norm_eps, dtype)
        split = lambda y: y.reshape(*y.shape[:2], c.heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
        query, key, value = (split(linear(c.width, name=name)(x)) for name in ("query", "key", "value"))
        y = attend(query, [Source(Stored(key), Stored(value), mask)], scale=(c.width // c.heads) ** -0.5, cap=None)
        x = norm(name="attention_norm")(x + linear(c.width, name="out")(y))
        y = ACTIVATIONS[c.activation](linear(c.mlp_width, name="up")(x))
        return norm(name="mlp_norm")(x + linear(c.width, name="down")(y)), None


class Encoder(nn.Module):
    """Embeddings, blocks scanned over layers, and the head on the first token. Source: Devlin et al. (2019), "BERT"."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens, length):
        c, dtype, t = self.config, jnp.dtype(self.config.dtype), tokens.shape[1]
        table = lambda name, rows: self.param(  # noqa: E731
            name, nn.initializers.normal(0.02), (rows, c.width)).astype(dtype)
        x = table("token", c.vocab)[tokens] + table("position", c.positions)[None, c.offset:c.offset + t]
        if c.token_types:
            x += table("token_type", c.token_types)[None, :1]       # one text: all tokens are of the first type
        x = Norm("layer", c.norm_eps, dtype, name="norm")(x)
        mask = (jnp.arange(t)[None] < length[:, None])[:, None]
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.layers)
        x, _ = layers(c, name="layers")(x, mask)
        x = POOLS[c.pool](Linear(c.width, dtype, use_bias=True, name="pool")(x[:, 0]))
        return Linear(len(c.labels), jnp.float32, use_bias=True, name="classify")(x)


def init(config: EncoderConfig, key: Array) -> dict:
    """Random parameters, float32."""
    return Encoder(config).init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))["params"]


def forward(config: EncoderConfig, params: dict, tokens: Int[Array, "b t"], length: Int[Array, " b"]
            ) -> Float[Array, "b c"]:
    """Class logits, float32.

    Args:
        tokens: [b, t], special tokens included, t at most `config.max_length`; what stands behind the first `length`
            of a row is never looked at.
    """
    return Encoder(config).apply({"params": params}, tokens, length)


def probabilities(config: EncoderConfig, logits: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """What logits say: a distribution over the labels; of a multi-label model the probability of each label; of a
    regression the logits themselves.
    """
    return PROBLEMS[config.problem](logits)
