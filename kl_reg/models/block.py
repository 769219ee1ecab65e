"""One layer of the decoder, and the switches that model families differ in."""
from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from kl_reg.models.experts import Experts
from kl_reg.models.layers import ACTIVATIONS, Linear, Norm, Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder; hashable, so a static argument of jit. The defaults are those of a Llama."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_position: int
    rope: Rope | None = None                # None: learned positions
    local: tuple[bool, ...] = ()            # layers that see only `window` tokens, themselves included; (): none
    window: int = 0
    local_rope: Rope | None = None          # of local layers; None: as the others'
    norm: str = "rms"                       # a kind of `layers.Norm`
    norm_eps: float = 1e-5
    pre_norm: bool = True                   # of what enters attention and MLP
    post_norm: bool = False                 # of what leaves them, before it is added
    parallel: bool = False                  # attention and MLP read the same residual stream
    qk_norm: str = "none"                   # of queries and keys: "head", each alone; "all", all heads together
    activation: str = "silu"
    gated: bool = True                      # down(act(gate(x)) * up(x)); else down(act(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0                        # 0: a dense MLP
    chosen_experts: int = 2
    score_scale: float | None = None        # of attention; None: head_width^-1/2
    score_cap: float | None = None
    logit_cap: float | None = None          # logits become cap * tanh(logit / cap)
    embed_scale: float | None = None        # of embeddings, rounded to the dtype
    tied: bool = True
    dtype: str = "float32"
    cache: str = ""                         # dtype of cached keys and values: "", as the others, "bfloat16" or "int8"
    remat: str = ""                         # what a gradient recomputes, of REMATS; "": nothing
    attention: str = ""                     # of whole sequences: "", `layers.attend`, or as in `layers.attend_fused`


REMATS = {"": None, "layers": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
"""What a backward pass finds of each layer: "": everything; "layers": its input alone; "products": also the results of
its matrix products, so that no product but those of attention is computed again."""


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    config: DecoderConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        residual = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        norm = partial(Norm, c.norm, c.norm_eps, dtype)
        self.query = Linear(c.heads * c.head_width, dtype, c.qkv_bias)
        self.key, self.value = (Linear(c.kv_heads * c.head_width, dtype, c.qkv_bias) for _ in range(2))
        self.out = Linear(c.width, dtype, c.out_bias, residual)
        if c.pre_norm:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norm:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        if c.qk_norm != "none":
            self.query_norm, self.key_norm = norm(), norm()
        if c.experts:
            self.experts = Experts(c.mlp_width, c.experts, c.chosen_experts, c.activation, dtype)
        else:
            if c.gated:
                self.gate = Linear(c.mlp_width, dtype, c.mlp_bias)
            self.up = Linear(c.mlp_width, dtype, c.mlp_bias)
            self.down = Linear(c.width, dtype, c.mlp_bias, residual)

    def __call__(self, x, look):
        """One layer over tokens x [n, d]. `look` knows which token sees which: it turns queries [n, h, f], keys and
        values [n, k, f] into what they attend to, [n, h * f], and something to return beside the layer's output."""
        c = self.config
        attended, beside = self._attention(self.attention_norm(x) if c.pre_norm else x, look)
        if c.post_norm:
            attended = self.attention_post_norm(attended)
        seen = x if c.parallel else x + attended
        y = self._mlp(self.mlp_norm(seen) if c.pre_norm else seen)
        return x + attended + (self.mlp_post_norm(y) if c.post_norm else y), beside

    def _attention(self, x, look):
        c = self.config
        split = lambda y: y.reshape(len(y), -1, c.head_width)  # noqa: E731
        query, key = self.query(x), self.key(x)
        if c.qk_norm == "all":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = split(query), split(key), split(self.value(x))
        if c.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        attended, beside = look(query, key, value)
        return self.out(attended), beside

    def _mlp(self, x):
        if self.config.experts:
            return self.experts(x)
        act = ACTIVATIONS[self.config.activation]
        return self.down(act(self.gate(x)) * self.up(x) if self.config.gated else act(self.up(x)))
