"""How Hugging Face names a family's settings and weights; one table a family.

Settings are read by transformers' own configuration class, which knows every family's defaults and old spellings; a
table here turns them into a `DecoderConfig` and lists the checkpoint's tensors as `weight_map.Rule`s.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kl_reg.models.decoder import DecoderConfig
from kl_reg.models.layers import Rope
from kl_reg.pretrained import hf_config
from kl_reg.pretrained.weight_map import Rule, columns, dense, linear, norm, plain


class Family(NamedTuple):
    """A model family: `config(settings) -> DecoderConfig`, `rules(config)` of its tensors; `optional` are regular
    expressions of keys that a checkpoint may have beside, `renames` mend keys of older checkpoints."""

    config: Callable
    rules: Callable[[DecoderConfig], tuple[Rule, ...]]
    optional: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


def _rope(settings: dict, head_width: int) -> Rope:
    """From one entry of `rope_parameters`."""
    kind = settings["rope_type"]
    width = int(head_width * settings.get("partial_rotary_factor", 1.0))
    if kind in ("default", "dynamic"):      # dynamic scaling starts beyond the context that we accept
        return Rope(float(settings["rope_theta"]), width)
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type {kind!r} is not supported; known: default, dynamic, linear, llama3, yarn")
    if settings.get("factor") is None:
        raise ValueError(f"rope_type {kind!r} lacks its factor")
    names = {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high", "beta_fast": "beta_fast",
             "beta_slow": "beta_slow", "truncate": "truncate", "original_max_position_embeddings": "original"}
    given = {ours: settings[theirs] for theirs, ours in names.items() if settings.get(theirs) is not None}
    scale = _yarn_scale(settings) if kind == "yarn" else 1.0
    return Rope(float(settings["rope_theta"]), width, kind, scale=scale, **given)


def _yarn_scale(settings):
    """The attention factor: as given, or 0.1 ln(factor) + 1, or DeepSeek's quotient of two such."""
    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]
    mscale = lambda m: 0.1 * m * np.log(settings["factor"]) + 1 if settings["factor"] > 1 else 1.0  # noqa: E731
    top, bottom = settings.get("mscale"), settings.get("mscale_all_dim")
    return float(mscale(top) / mscale(bottom) if top and bottom else mscale(1))


def common(hf, **switches) -> DecoderConfig:
    """What almost all families call the same; `switches` add to it and override it."""
    # Only some families' classes have these two, and transformers' own models ask for them in this way.
    head_width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    given = dict(vocab=hf.vocab_size, width=hf.hidden_size, layers=hf.num_hidden_layers, heads=hf.num_attention_heads,
                 kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads, head_width=head_width,
                 mlp_width=hf.intermediate_size, max_position=hf.max_position_embeddings, tied=hf.tie_word_embeddings)
    if "rope" not in switches:
        given["rope"] = _rope(hf.rope_parameters, head_width)
    given |= {"norm_eps": hf.rms_norm_eps} if "norm_eps" not in switches else {}
    given |= {"activation": hf_config.activation(hf, "hidden_act")} if "activation" not in switches else {}
    return DecoderConfig(**given | switches)


def _whole(hf, **switches):
    """As `common`, of families whose torch models rotate whole heads."""
    config = common(hf, **switches)
    if config.rope.width != config.head_width or config.local_rope and config.local_rope.width != config.head_width:
        raise ValueError(f"partial_rotary_factor has to be 1 with model_type {hf.model_type!r}, which rotates whole "
                         "heads")
    return config


def _local(hf) -> dict:
    """The layers that have a sliding window, as `layer_types` says."""
    unknown = sorted(set(hf.layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer_types has {', '.join(unknown)}; supported are full_attention, sliding_attention")
    local = tuple(kind == "sliding_attention" for kind in hf.layer_types)
    if any(local) and not hf.sliding_window:
        raise ValueError(f"layer_types has sliding_attention, and sliding_window is {hf.sliding_window}; its size is "
                         "needed (and use_sliding_window=true where the family has it)")
    return {"local": local, "window": hf.sliding_window} if any(local) else {}


def _all_local(hf) -> dict:
    """One sliding window for all layers, of families that have no `layer_types`."""
    return {"local": (True,) * hf.num_hidden_layers, "window": hf.sliding_window} if hf.sliding_window else {}


def _llama(hf):
    return _whole(hf, qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def _mixtral(hf):
    return _whole(hf, **_all_local(hf), experts=hf.num_local_experts, chosen_experts=hf.num_experts_per_tok)


def _qwen3(hf):
    return _whole(hf, **_local(hf), qk_norm="head", qkv_bias=hf.attention_bias, out_bias=hf.attention_bias)


def _gemma(hf, **switches):
    if hf.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention=True is not supported")
    return _whole(hf, norm="rms_plus_one", qkv_bias=hf.attention_bias, out_bias=hf.attention_bias,
                  embed_scale=hf.hidden_size**0.5, **switches)


def _gemma2(hf, **switches):
    return _gemma(hf, **_local(hf), post_norm=True, activation=hf_config.activation(hf, "hidden_activation"),
                  score_scale=hf.query_pre_attn_scalar**-0.5, logit_cap=hf.final_logit_softcapping, **switches)


def _gemma3(hf, **switches):       # whose attention has no cap, whatever attn_logit_softcapping says
    rope, local = (_rope(hf.rope_parameters[kind], hf.head_dim) for kind in ("full_attention", "sliding_attention"))
    return _gemma2(hf, qk_norm="head", rope=rope, local_rope=local, **switches)


def _gemma3_with_images(hf):
    if hf.text_config.final_logit_softcapping is not None:
        raise ValueError(f"text_config.final_logit_softcapping={hf.text_config.final_logit_softcapping} is not "
                         "supported: transformers' Gemma 3 with images ignores it")
    return _gemma3(hf.text_config, tied=bool(hf.tie_word_embeddings))      # whatever text_config says of that


def _olmo2(hf):
    return _whole(hf, qk_norm="all", pre_norm=False, post_norm=True, qkv_bias=hf.attention_bias,
                  out_bias=hf.attention_bias)


def _gpt2(hf):
    if hf.scale_attn_by_inverse_layer_idx or not hf.scale_attn_weights:
        raise ValueError("scale_attn_by_inverse_layer_idx=True and scale_attn_weights=False are not supported")
    return DecoderConfig(
        vocab=hf.vocab_size, width=hf.n_embd, layers=hf.n_layer, heads=hf.n_head, kv_heads=hf.n_head,
        head_width=hf.n_embd // hf.n_head, mlp_width=hf.n_inner or 4 * hf.n_embd, max_position=hf.n_positions,
        norm="layer", norm_eps=hf.layer_norm_epsilon, activation=hf_config.activation(hf, "activation_function"),
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, tied=hf.tie_word_embeddings)


def _neox(hf):      # whose torch model has as many heads of keys as of queries, of this width, whatever else is given
    heads, head_width = hf.num_attention_heads, hf.hidden_size // hf.num_attention_heads
    if hf.to_dict().get("head_dim") not in (None, head_width):
        raise ValueError(f"head_dim={hf.head_dim} is not supported: torch's model takes it for positions alone; its "
                         f"heads have hidden_size / num_attention_heads = {head_width}")
    return common(hf, norm="layer", norm_eps=hf.layer_norm_eps, gated=False, parallel=hf.use_parallel_residual,
                  qkv_bias=hf.attention_bias, out_bias=hf.attention_bias, mlp_bias=True, kv_heads=heads,
                  head_width=head_width, rope=_rope(hf.rope_parameters, head_width))


_LAYER = "model.layers.{i}."
_ENDS = (plain("embed", "model.embed_tokens.weight"), plain("norm/scale", "model.norm.weight"),
         plain("unembed", "lm_head.weight"))
_ATTENTION = tuple(rule for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"),
                                             ("out", "o_proj"))
                   for rule in dense(f"layers/{ours}", f"{_LAYER}self_attn.{theirs}"))
_QK_NORM = (plain("layers/query_norm/scale", f"{_LAYER}self_attn.q_norm.weight"),
            plain("layers/key_norm/scale", f"{_LAYER}self_attn.k_norm.weight"))
_MLP = tuple(rule for name in ("gate", "up", "down")
             for rule in dense(f"layers/{name}", f"{_LAYER}mlp.{name}_proj"))
_EXPERTS = (linear("layers/experts/router/kernel", f"{_LAYER}block_sparse_moe.gate.weight"),
            *(linear(f"layers/experts/{ours}", f"{_LAYER}block_sparse_moe.experts.{{e}}.{theirs}.weight")
              for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))))


def _norms(*pairs):
    return tuple(plain(f"layers/{ours}/scale", f"{_LAYER}{theirs}_layernorm.weight") for ours, theirs in pairs)


_PRE = _norms(("attention_norm", "input"), ("mlp_norm", "post_attention"))
_POST = _norms(("attention_post_norm", "post_attention"), ("mlp_post_norm", "post_feedforward"))
_BOTH = _norms(("attention_norm", "input"), ("mlp_norm", "pre_feedforward"),
               ("attention_post_norm", "post_attention"), ("mlp_post_norm", "post_feedforward"))


def _gpt2_rules(config):
    layer = "transformer.h.{i}."
    names = [f"layers/{name}" for name in ("query", "key", "value")]
    conv = lambda ours, theirs: (plain(f"{ours}/kernel", f"{theirs}.weight"),  # noqa: E731 - [in, out], as ours
                                 plain(f"{ours}/bias", f"{theirs}.bias"))
    return (plain("embed", "transformer.wte.weight"), plain("positions", "transformer.wpe.weight"),
            plain("unembed", "lm_head.weight"), *norm("norm", "transformer.ln_f"),
            *norm("layers/attention_norm", f"{layer}ln_1"), *norm("layers/mlp_norm", f"{layer}ln_2"),
            *(columns([f"{name}/{part}" for name in names], f"{layer}attn.c_attn.{theirs}")
              for part, theirs in (("kernel", "weight"), ("bias", "bias"))),
            *conv("layers/out", f"{layer}attn.c_proj"), *conv("layers/up", f"{layer}mlp.c_fc"),
            *conv("layers/down", f"{layer}mlp.c_proj"))


def _neox_rules(config):
    layer, shape = "gpt_neox.layers.{i}.", (config.heads, 3, config.head_width)
    names = [f"layers/{name}" for name in ("query", "key", "value")]

    def split(x):
        """Each head's query, key and value stand together: [h * 3 * f, ...] -> three [..., h * f]."""
        x = x.reshape(*shape, *x.shape[1:])
        return tuple(x[:, part].reshape(-1, *x.shape[3:]).T for part in range(3))

    def join(*parts):
        parts = [part.T.reshape(shape[0], 1, shape[2], *part.T.shape[1:]) for part in parts]
        return jnp.concatenate(parts, axis=1).reshape(-1, *parts[0].shape[3:])

    fused = lambda part, theirs: Rule(f"{layer}attention.query_key_value.{theirs}",  # noqa: E731
                                      tuple(f"{name}/{part}" for name in names), split, join)
    return (plain("embed", "gpt_neox.embed_in.weight"), plain("unembed", "embed_out.weight"),
            *norm("norm", "gpt_neox.final_layer_norm"),
            *norm("layers/attention_norm", f"{layer}input_layernorm"),
            *norm("layers/mlp_norm", f"{layer}post_attention_layernorm"),
            fused("kernel", "weight"), fused("bias", "bias"), *dense("layers/out", f"{layer}attention.dense"),
            *dense("layers/up", f"{layer}mlp.dense_h_to_4h"), *dense("layers/down", f"{layer}mlp.dense_4h_to_h"))


def _fixed(*groups):
    rules = sum(groups, ())
    return lambda config: rules


_TIED = (r"^lm_head\.weight$",)       # some checkpoints store the tied unembedding a second time
_BUFFERS = (r"rotary_emb\.inv_freq$",)
_TEXT_PART = ((r"^language_model\.model\.|^model\.language_model\.", "model."),
              (r"^language_model\.lm_head", "lm_head"))

FAMILIES = {
    "llama": Family(_llama, _fixed(_ENDS, _ATTENTION, _MLP, _PRE), _TIED + _BUFFERS),
    "mistral": Family(lambda hf: _whole(hf, **_all_local(hf)), _fixed(_ENDS, _ATTENTION, _MLP, _PRE), _TIED + _BUFFERS),
    "ministral": Family(lambda hf: _whole(hf, **_local(hf)), _fixed(_ENDS, _ATTENTION, _MLP, _PRE), _TIED + _BUFFERS),
    "mixtral": Family(_mixtral, _fixed(_ENDS, _ATTENTION, _EXPERTS, _PRE), _TIED + _BUFFERS),
    "qwen2": Family(lambda hf: _whole(hf, **_local(hf), qkv_bias=True), _fixed(_ENDS, _ATTENTION, _MLP, _PRE), _TIED),
    "qwen3": Family(_qwen3, _fixed(_ENDS, _ATTENTION, _QK_NORM, _MLP, _PRE), _TIED),
    "gemma": Family(_gemma, _fixed(_ENDS, _ATTENTION, _MLP, _PRE), _TIED),
    "gemma2": Family(lambda hf: _gemma2(hf, score_cap=hf.attn_logit_softcapping),
                     _fixed(_ENDS, _ATTENTION, _MLP, _BOTH), _TIED),
    "gemma3_text": Family(_gemma3, _fixed(_ENDS, _ATTENTION, _QK_NORM, _MLP, _BOTH), _TIED),
    "gemma3": Family(_gemma3_with_images, _fixed(_ENDS, _ATTENTION, _QK_NORM, _MLP, _BOTH),
                     (*_TIED, r"vision_tower\.", r"multi_modal_projector\."), _TEXT_PART),
    "olmo2": Family(_olmo2, _fixed(_ENDS, _ATTENTION, _QK_NORM, _MLP, _POST), _TIED),
    "gpt2": Family(_gpt2, _gpt2_rules, (*_TIED, r"\.attn\.(masked_)?bias$"),
                   ((r"^(?!transformer\.|lm_head\.)", "transformer."),)),
    "gpt_neox": Family(_neox, _neox_rules, (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")),
}
"""By `model_type` of config.json."""


def llama_settings(config: DecoderConfig) -> dict:
    """config.json of a Llama with these shapes.

    Raises:
        ValueError: no Llama has them; names what one would have otherwise.
    """
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab,
        "hidden_size": config.width, "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_width, "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_position, "rope_theta": config.rope.theta if config.rope else 1e4,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied, "hidden_act": config.activation,
        "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    given, made = (dataclasses.asdict(x) for x in (config, read(settings)[0]))
    other = [name for name in given if name != "dtype" and given[name] != made[name]]
    if other:
        raise ValueError(f"no Llama has these shapes; it would have another {', '.join(other)}")
    return settings


def read(settings: dict) -> tuple[DecoderConfig, Family]:
    """What a config.json says.

    Raises:
        ValueError: an unknown family, or a setting that it does not support.
    """
    hf = hf_config.parse(settings, FAMILIES)
    return FAMILIES[hf.model_type].config(hf), FAMILIES[hf.model_type]
