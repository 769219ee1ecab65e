"""How Hugging Face names a family's settings and weights; one table a family.

A weight's rule is (our path, HF key, transpose): `{i}` stands for the layer, and a path with it is stacked over layers.
"""
from __future__ import annotations

from typing import NamedTuple

from kl_reg.models.decoder import DecoderConfig


class Family(NamedTuple):
    """A model family: `config` reads config.json, `weights` maps parameters."""

    config: object
    weights: tuple[tuple[str, str, bool], ...]


def _llama_config(hf: dict) -> DecoderConfig:
    unsupported = [key for key in ("attention_bias", "mlp_bias", "rope_scaling") if hf.get(key)]
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        unsupported.append("rope_parameters")
    if hf.get("hidden_act", "silu") != "silu":
        unsupported.append("hidden_act")
    if unsupported:
        raise ValueError(f"config.json: {', '.join(unsupported)} not supported for model_type 'llama'")
    return DecoderConfig(
        vocab=hf["vocab_size"], width=hf["hidden_size"], layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"], kv_heads=hf.get("num_key_value_heads", hf["num_attention_heads"]),
        head_width=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        mlp_width=hf["intermediate_size"], max_position=hf["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))), norm_eps=hf["rms_norm_eps"],
        tied=hf.get("tie_word_embeddings", False))


LLAMA = Family(_llama_config, (
    ("embed", "model.embed_tokens.weight", False),
    ("norm/scale", "model.norm.weight", False),
    ("unembed", "lm_head.weight", False),
    ("layers/attention_norm/scale", "model.layers.{i}.input_layernorm.weight", False),
    ("layers/query/kernel", "model.layers.{i}.self_attn.q_proj.weight", True),
    ("layers/key/kernel", "model.layers.{i}.self_attn.k_proj.weight", True),
    ("layers/value/kernel", "model.layers.{i}.self_attn.v_proj.weight", True),
    ("layers/out/kernel", "model.layers.{i}.self_attn.o_proj.weight", True),
    ("layers/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", False),
    ("layers/gate/kernel", "model.layers.{i}.mlp.gate_proj.weight", True),
    ("layers/up/kernel", "model.layers.{i}.mlp.up_proj.weight", True),
    ("layers/down/kernel", "model.layers.{i}.mlp.down_proj.weight", True),
))

FAMILIES = {"llama": LLAMA}


def hf_config(config: DecoderConfig) -> dict:
    """config.json of a Llama with these shapes, as `transformers` reads it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab,
            "hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
            "intermediate_size": config.mlp_width, "max_position_embeddings": config.max_position,
            "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16"}
