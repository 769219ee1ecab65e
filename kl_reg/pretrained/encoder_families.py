"""DistilBERT, BERT and RoBERTa classifiers on disk: how Hugging Face names their settings and weights.

Settings are read by transformers' own configuration class, which knows every family's defaults and old spellings.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from tokenizers import Tokenizer

from kl_reg.models import encoder
from kl_reg.models.encoder import PROBLEMS, EncoderConfig
from kl_reg.pretrained import embeddings, folders, hf_config, tokenizer, weight_map
from kl_reg.pretrained.weight_files import open_source
from kl_reg.pretrained.weight_map import Rule, dense, norm, plain


class Family(NamedTuple):
    """`config(settings) -> EncoderConfig`, the `rules` of its tensors, the `prefix` that their keys may have, and a key
    of the classification `head`."""

    config: Callable
    rules: tuple[Rule, ...]
    prefix: str
    head: str


class Classifier(NamedTuple):
    """`config` is static and names the labels, `params` is a pytree; `tokenizer` adds the special tokens and cuts a
    text to the model's context."""

    config: EncoderConfig
    params: dict
    tokenizer: Tokenizer


def _common(hf, **switches) -> EncoderConfig:
    """What all families call the same; `switches` are what they differ in."""
    if sorted(hf.id2label) != list(range(hf.num_labels)):
        raise ValueError(f"id2label numbers its labels {', '.join(map(str, hf.id2label))}; they must count from 0")
    labels = tuple(str(hf.id2label[i]) for i in range(hf.num_labels))
    # As transformers' own loss takes a model that does not say.
    problem = hf.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
    if problem not in PROBLEMS:
        raise ValueError(f"problem_type {problem!r} is not supported; known: {', '.join(PROBLEMS)}")
    return EncoderConfig(vocab=hf.vocab_size, width=hf.hidden_size, layers=hf.num_hidden_layers,
                         heads=hf.num_attention_heads, positions=hf.max_position_embeddings, labels=labels,
                         problem=problem, **switches)


def _distilbert(hf):
    return _common(hf, mlp_width=hf.hidden_dim, activation=hf_config.activation(hf, "activation"), pool="relu")


def _bert(hf, offset=0):
    if hf.is_decoder or hf.add_cross_attention:
        raise ValueError("is_decoder=True and add_cross_attention=True are not supported")
    return _common(hf, mlp_width=hf.intermediate_size, activation=hf_config.activation(hf, "hidden_act"),
                   pool="tanh", offset=offset, token_types=hf.type_vocab_size, norm_eps=hf.layer_norm_eps)


def _roberta(hf):
    return _bert(hf, offset=hf.pad_token_id + 1)


def _rules(layer, linears, norms, pool, classify):
    """Of a family whose layers' keys begin with `layer`."""
    return (plain("token", "embeddings.word_embeddings.weight"),
            plain("position", "embeddings.position_embeddings.weight"),
            plain("token_type", "embeddings.token_type_embeddings.weight"), *norm("norm", "embeddings.LayerNorm"),
            *(rule for ours, theirs in linears.items() for rule in dense(f"layers/{ours}", f"{layer}.{theirs}")),
            *(rule for ours, theirs in norms.items() for rule in norm(f"layers/{ours}", f"{layer}.{theirs}")),
            *dense("pool", pool), *dense("classify", classify))


_DISTILBERT = _rules(
    "transformer.layer.{i}",
    {"query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin", "out": "attention.out_lin",
     "up": "ffn.lin1", "down": "ffn.lin2"},
    {"attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"}, "pre_classifier", "classifier")
_bert_rules = partial(
    _rules, "encoder.layer.{i}",
    {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
     "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
    {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"})
_ROBERTA = Family(_roberta, _bert_rules("classifier.dense", "classifier.out_proj"), "roberta",
                  "classifier.out_proj.weight")

FAMILIES = {
    "distilbert": Family(_distilbert, _DISTILBERT, "distilbert", "classifier.weight"),
    "bert": Family(_bert, _bert_rules("pooler.dense", "classifier"), "bert", "classifier.weight"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""By `model_type` of config.json."""

_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_OPTIONAL = (r"position_ids$", r"^pooler\.", r"^(cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\.")
"""Buffers, and what is left of pretraining."""


def read(settings: dict) -> tuple[EncoderConfig, Family]:
    """What a classifier's config.json says.

    Raises:
        ValueError: an unknown family, or a setting that it does not support.
    """
    hf = hf_config.parse(settings, FAMILIES)
    position = settings.get("position_embedding_type", "absolute")      # unknown to today's classes
    if position != "absolute":
        raise ValueError(f"position_embedding_type {position!r} is not supported; known: absolute")
    return FAMILIES[hf.model_type].config(hf), FAMILIES[hf.model_type]


def _read(folder, dtype):
    settings = folders.settings(folder)
    with hf_config.errors_of(folder):
        config, family = read(settings)
    return dataclasses.replace(config, dtype=dtype), family


def load_config(path: str, dtype: str = "float32") -> EncoderConfig:
    """Shapes, labels and switches of a classifier, without its weights; `path` is anything that `folders.find` knows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown family, or a setting that is not supported.
    """
    return _read(folders.find(path, "reward.path", read), dtype)[0]


def load(path: str, dtype: str = "float32") -> Classifier:
    """Reads a classifier; parameters come in `dtype`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown family or setting, no classification head, a tokenizer that does not fit, or missing,
            extra or misshapen weights (all listed).
    """
    folder = folders.find(path, "reward.path", read)
    config, family = _read(folder, dtype)
    source = open_source(folder)
    if family.head not in source.shapes:
        raise ValueError(f"{source.path} has no sequence classification head ({family.head})")
    shapes = jax.eval_shape(partial(encoder.init, config), jax.random.key(0))
    renames = (*_OLD_NAMES, (rf"^{family.prefix}\.", ""))
    params = weight_map.read(family.rules, shapes, source, dtype, _OPTIONAL, renames)
    return Classifier(config, params, _tokenizer(folder, config))


def _tokenizer(folder, config):
    """With the special tokens of its own post-processor, and truncation at the model's context."""
    loaded = tokenizer.load(folder)
    loaded.enable_truncation(config.max_length)
    if not loaded.encode("").ids:
        raise ValueError(f"{folder}: the tokenizer adds no special token to a text, and the model reads the first one")
    embeddings.check(loaded.encode("").ids, config.vocab, "what the tokenizer adds to a text", str(folder), loaded)
    return loaded
