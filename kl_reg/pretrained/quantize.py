"""int8 weights of a frozen base model, and what they cost: its KL to the float model.

The matrices of the layers become int8, with a float32 scale for each output channel: W_io ~ scale_o * q_io with
scale_o = max_i |W_io| / 127 and q = round(W / scale), so no weight moves by more than half a step. Embeddings, norms,
biases and the router of experts stay as they are, and activations in the model's dtype. Source: Krishnamoorthi (2018),
"Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, symmetric and per channel.
"""
from __future__ import annotations

import itertools
import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from kl_reg.kl.exact import reverse_kl
from kl_reg.models import decoder
from kl_reg.models.decoder import DecoderConfig
from kl_reg.pretrained import chitchat, embeddings, folders, tokenizer
from kl_reg.pretrained.weights import Model

_CONVERSATIONS, _LENGTH = 16, 128      # of held-out text that KL is measured on, tokens of each


class Divergence(NamedTuple):
    """KL between next-token distributions at temperature 1, nats per token; standard errors over conversations."""

    to_float: float             # D(int8 || float)
    to_float_se: float
    from_float: float           # D(float || int8)
    from_float_se: float


class Rounding(NamedTuple):
    """What int8 changed: `divergence` on so many `tokens` of held-out text, and the bytes of all parameters."""

    divergence: Divergence
    tokens: int
    bytes: int
    float_bytes: int

    def __str__(self):
        kl, error = (np.format_float_positional(x, digits, fractional=False)
                     for x, digits in ((self.divergence.to_float, 3), (self.divergence.to_float_se, 1)))
        return (f"KL to the float model {kl} ± {error} nats per token (held-out text, {self.tokens} tokens), weights "
                f"{self.bytes / 1e6:.4g} MB instead of {self.float_bytes / 1e6:.4g} MB")

    def record(self) -> dict:
        """As config.json has it."""
        return {**{f"kl_{name}": value for name, value in self.divergence._asdict().items()}, "tokens": self.tokens,
                "bytes": self.bytes, "float_bytes": self.float_bytes}


def quantize(params: dict, donate: bool = False) -> dict:
    """The parameters with int8 matrices, each beside its scales: "kernel" [..., i, o] and "kernel_scale" [..., o].

    Args:
        donate: delete each float array when it is rounded: one array holds a matrix of all layers, so memory holds
            beside the model that one in int8 and in float32 at most.

    Raises:
        ValueError: they are int8 already.
    """
    flat = flatten_dict(params)
    done = ["/".join(path) for path, leaf in flat.items() if leaf.dtype == jnp.int8]
    if done:
        raise ValueError(f"{', '.join(done)}: int8 already")
    for path, leaf in list(flat.items()):
        if path[0] == "layers" and leaf.ndim > 2 and "router" not in path:
            flat[path], flat[*path[:-1], f"{path[-1]}_scale"] = _round(leaf)
            if donate:
                leaf.delete()
    return unflatten_dict(flat)


@jax.jit
def _round(weight):
    weight = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(weight).max(-2) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(weight / scale[..., None, :]).astype(jnp.int8), scale


def convert(model: Model) -> tuple[Model, Rounding]:
    """The model with int8 matrices, and what that changed. The parameters given are donated."""
    tokens = held_out(model)
    before, size = hidden(model.config, model.params, tokens), _bytes(model.params)
    params = quantize(model.params, donate=True)
    divergence = measure(model.config, params, before, hidden(model.config, params, tokens))
    return model._replace(params=params), Rounding(divergence, tokens.size, _bytes(params), size)


def held_out(model: Model) -> Int[Array, "b t"]:
    """The beginnings of held-out human conversations, in the model's own tokens; those that are too short left out."""
    words = tokenizer.load(model.folder)
    lines = (folders.EMBEDDED / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    length = min(_LENGTH, model.config.max_position)
    rows = (tokenizer.opening(words, chitchat.transcript(json.loads(line)["turns"]))[:length] for line in lines)
    kept = list(itertools.islice((row for row in rows if len(row) == length), _CONVERSATIONS))
    embeddings.check(itertools.chain(*kept), model.config.vocab, "held-out conversations", str(model.folder), words)
    return jnp.array(kept)


@partial(jax.jit, static_argnums=0)
def hidden(config: DecoderConfig, params: dict, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Final hidden states of conversations."""
    return decoder.forward(config, params, tokens, jnp.zeros(len(tokens), jnp.int32)).last


def measure(config: DecoderConfig, params: dict, before: Float[Array, "b t d"], after: Float[Array, "b t d"]
            ) -> Divergence:
    """Exact KL between the model before and after, by their hidden states on the same tokens; rows are conversations,
    whose tokens depend on each other. Logits are formed for one conversation at a time.

    Args:
        params: of either; they share the unembedding.
    """
    rows = np.asarray(_divergences(config, params, before, after), np.float64)
    (to, back), (to_se, back_se) = rows.mean(0), rows.std(0, ddof=1) / len(rows)**0.5
    return Divergence(float(to), float(to_se), float(back), float(back_se))


@partial(jax.jit, static_argnums=0)
def _divergences(config, params, before, after):
    """Means over the tokens of each conversation, [b, 2]."""

    def conversation(states):
        old, new = (jax.nn.log_softmax(decoder.logits(config, params, x)) for x in states)
        return jnp.stack([jax.vmap(reverse_kl)(new, old).mean(), jax.vmap(reverse_kl)(old, new).mean()])

    return jax.lax.map(conversation, (before, after))


def _bytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
