"""A GGUF file as Hugging Face would have it: weights under their names there, config.json, tokenizer."""
from __future__ import annotations

import pathlib
import re

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kl_reg.pretrained import gguf_header, hf_config
from kl_reg.pretrained.source import Source

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
          "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
          "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ROPE = "rope_freqs.weight"

_READ = ("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length", "block_count",
         "feed_forward_length", "context_length", "attention.layer_norm_rms_epsilon", "rope.freq_base")
_INERT = ("vocab_size", "tensor_data_layout", "pooling_type", "expert_used_count", "rope.scaling.finetuned",
          "rope.scaling.original_context_length")
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
# Of a byte-level BPE: a pattern whose matches are pieces by themselves, and whether it replaces GPT-2's.
_SPLITS = {"gpt-2": (None, False), "smollm": (r"\p{N}", False), "llama-bpe": (_LLAMA3, True),
           "qwen2": (_LLAMA3.replace("{1,3}", ""), True)}


def source(file: pathlib.Path) -> Source:
    """The weights of `file`, dequantised to float32 one by one as they are read.

    llama.cpp turns the rows of each head of q and k of a Llama, from [2, d/2] to [d/2, 2], for its rotary embedding:
    this is undone.

    Raises:
        ValueError: the file cannot be read, its architecture is not known, or it has tensors that have no Hugging Face
            name (all listed).
    """
    header = gguf_header.read(file)
    config = _config(file, header)
    names = {_hugging_face(name): name for name in header.tensors if name != _ROPE}
    unknown = [name for name in header.tensors if name != _ROPE and _hugging_face(name) is None]
    if unknown:
        raise ValueError(f"{file}: {config['model_type']} has no such weights: {', '.join(unknown)}")

    def read(key: str) -> np.ndarray:
        value = _values(file, names[key], header)
        part = re.search(r"self_attn\.([qk])_proj\.", key)
        if part and config["model_type"] == "llama":
            heads = config["num_attention_heads" if part[1] == "q" else "num_key_value_heads"]
            value = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        return value

    return Source(file, {key: header.tensors[name].shape for key, name in names.items()}, read)


def settings(file: pathlib.Path) -> dict:
    """config.json of `file`.

    Raises:
        ValueError: the file cannot be read, its architecture is not known, or one of its settings is missing or asks
            for what the architecture does not have at Hugging Face.
    """
    return _config(file, gguf_header.read(file))


def tokenizer(file: pathlib.Path) -> Tokenizer:
    """The tokenizer of `file`, its control and user-defined tokens whole.

    Raises:
        ValueError: the file cannot be read, or its tokenizer is not known.
    """
    kept = _tokenizer_settings(gguf_header.read(file))
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kept.get("model") not in kinds:
        raise ValueError(f"{file}: tokenizer.ggml.model={kept.get('model')!r} is not supported; known: {sorted(kinds)}")
    try:
        result = kinds[kept["model"]](kept)
        for kind, add in ((_CONTROL, result.add_special_tokens), (_USER_DEFINED, result.add_tokens)):
            add([AddedToken(token, normalized=False, special=kind == _CONTROL)
                 for token, its in zip(kept["tokens"], kept["token_type"], strict=True) if its == kind])
        if kept.get("add_bos_token", kept["model"] == "llama" or kept["pre"] == "llama-bpe"):     # as llama.cpp has it
            first = kept["tokens"][kept["bos_token_id"]]
            result.post_processor = processors.TemplateProcessing(
                single=[first, "$A"], pair=[first, "$A", f"{first}:1", "$B:1"],
                special_tokens=[(first, kept["bos_token_id"])])
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} of its tokenizer") from None
    except Exception as error:      # `tokenizers` raises nothing more exact
        raise ValueError(f"{file}: its tokenizer cannot be built: {error}") from None
    return result


def tokenizer_config(file: pathlib.Path) -> dict:
    """tokenizer_config.json of `file`: special tokens and chat template.

    Raises:
        ValueError: the file cannot be read, or a special token is none of its tokens.
    """
    header = gguf_header.read(file)
    kept, result = _tokenizer_settings(header), {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "tokenizer.chat_template" in header.settings:
        result["chat_template"] = header.settings["tokenizer.chat_template"]
    try:
        return result | {name: kept["tokens"][kept[key]] for name, key in _SPECIAL.items() if key in kept}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file}: its special tokens cannot be read: {error}") from None


def _tokenizer_settings(header):
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): value for key, value in header.settings.items() if key.startswith(prefix)}


def _byte_level(kept):
    """As GPT-2's; `pre` names the pattern that text is split by first."""
    if kept["pre"] not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={kept['pre']!r} is not supported; known: {sorted(_SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in kept["merges"]]
    result = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(kept["tokens"])}, merges=merges,
                                  ignore_merges=kept["pre"] == "llama-bpe"))
    if kept["pre"] == "qwen2":
        result.normalizer = normalizers.NFC()
    split, whole = _SPLITS[kept["pre"]]
    result.pre_tokenizer = pre_tokenizers.Sequence([
        *([pre_tokenizers.Split(Regex(split), "isolated")] if split else []),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)])
    result.decoder = decoders.ByteLevel()
    return result


def _sentence_piece(kept):
    """As Llama 2's: any two tokens that make up a third may merge, that with the highest score first."""
    ids = {token: i for i, token in enumerate(kept["tokens"])}
    normal = [i for i, kind in enumerate(kept["token_type"]) if kind == _NORMAL]
    merges = [(token[:cut], token[cut:]) for i in sorted(normal, key=lambda i: -kept["scores"][i])
              for token in [kept["tokens"][i]] for cut in range(1, len(token))
              if token[:cut] in ids and token[cut:] in ids]
    result = Tokenizer(models.BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True))
    space = kept.get("add_space_prefix", True)
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if space else "never", split=False)
    result.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        *([decoders.Strip(" ", 1, 0)] if space else [])])
    return result


def _hugging_face(name):
    stem, _, suffix = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.{suffix}"
    return f"{_OUTER[stem]}.{suffix}" if stem in _OUTER else None


def _values(file, name, header):
    shape, kind, data = header.tensors[name]
    try:
        return np.array(gguf.quants.dequantize(data, kind), copy=kind == gguf.GGMLQuantizationType.F32).reshape(shape)
    except NotImplementedError as error:
        raise ValueError(f"{file}: {name}: {error}") from None


def _config(file, header):
    family, tensors = header.settings.get("general.architecture"), header.tensors
    if family not in ARCHITECTURES:
        raise ValueError(f"{file}: {hf_config.unsupported('architecture', family, ARCHITECTURES)}")

    def number(key, otherwise=None):
        value = header.settings.get(f"{family}.{key}", otherwise)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file}: {family}.{key} is {value!r}, not a positive number")
        return value

    width, heads = number("embedding_length"), number("attention.head_count")
    head_width = number("attention.key_length", width // heads)
    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0,
               "rope.dimension_count": head_width, "attention.value_length": head_width, "attention.causal": True,
               "expert_count": 0}
    special = []
    for key, value in header.settings.items():
        name = key.removeprefix(f"{family}.")
        if name not in (key, *_READ, *_INERT) and (name not in neutral or value != neutral[name]):
            special.append(f"{key}={value!r}")
    if special or "token_embd.weight" not in tensors:
        raise ValueError(f"{file}: not supported: {', '.join(special) or 'no token_embd.weight'}")
    tokens = {f"{name}_id": header.settings[f"tokenizer.ggml.{key}"] for name, key in _SPECIAL.items()
              if f"tokenizer.ggml.{key}" in header.settings}
    return tokens | {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_size": width,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "num_hidden_layers": number("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads), "head_dim": head_width,
        "intermediate_size": number("feed_forward_length"), "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")), "hidden_act": "silu",
        "rope_parameters": _rope(file, header, _shortest(number("rope.freq_base", 10000.0)), head_width),
        "attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors}


def _shortest(value):
    """1e-05 of the float32 that is 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(file, header, theta, head_width):
    """rope_parameters. Of Llama 3's scaling llama.cpp keeps only what each frequency is divided by, a tensor."""
    if _ROPE not in header.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    divisors = _values(file, _ROPE, header)
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_width, 2) / head_width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / rope["factor"] + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{file}: {_ROPE} is not the scaling of Llama 3.1 or later")
    return rope
