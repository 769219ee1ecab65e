"""Checkpoints to parameters and back: settings and keys as files on the Hugging Face hub have them, shards, devices."""
import dataclasses
import json
import pathlib
import random
import shutil
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from kl_reg.export import huggingface
from kl_reg.models import decoder
from kl_reg.models.decoder import DecoderConfig
from kl_reg.models.layers import Rope
from kl_reg.pretrained import families, quantize, weight_map, weights
from kl_reg.pretrained.source import Source

LLAMA = dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3)
GEMMA = LLAMA | dict(head_dim=16, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=64)
NEOX = dict(model_type="gpt_neox", vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64, layer_norm_eps=1e-3, hidden_act="gelu")
GPT2 = dict(model_type="gpt2", vocab_size=96, n_ctx=64, n_positions=64, n_embd=32, n_head=4, n_layer=4)
MIXTRAL = LLAMA | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
SHAPES = dict(vocab=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp_width=40, max_position=64,
              norm_eps=1e-3, tied=False)
GEMMA_SHAPES = SHAPES | dict(head_width=16, norm="rms_plus_one", activation="gelu_pytorch_tanh", embed_scale=32**0.5,
                             tied=True)
GEMMA2_SHAPES = GEMMA_SHAPES | dict(post_norm=True, score_scale=1 / 8)
NEOX_SHAPES = SHAPES | dict(kv_heads=4, norm="layer", activation="gelu", gated=False, qkv_bias=True, out_bias=True,
                            mlp_bias=True)
GPT2_SHAPES = NEOX_SHAPES | dict(mlp_width=128, norm_eps=1e-5, activation="gelu_new", tied=True)

OLD_SPELLINGS = {
    "rope_theta at top level": (LLAMA | dict(rope_theta=5e5, rope_scaling=None),
                                SHAPES | dict(rope=Rope(5e5, 8))),
    "rope_scaling with type": (LLAMA | dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)),
                               SHAPES | dict(rope=Rope(5e5, 8, "linear", 2.0))),
    "dynamic scaling": (LLAMA | dict(rope_scaling=dict(type="dynamic", factor=2.0)), SHAPES | dict(rope=Rope(1e4, 8))),
    "llama 3.1": (LLAMA | dict(rope_theta=5e5, tie_word_embeddings=True, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)),
                  SHAPES | dict(tied=True, rope=Rope(5e5, 8, "llama3", 8.0, 1.0, 4.0, original=8))),
    "one head a kv-head where none are given": (
        {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"} | dict(pretraining_tp=1),
        SHAPES | dict(kv_heads=4, rope=Rope(1e4, 8))),
    "qwen2 without its window": (LLAMA | dict(
        model_type="qwen2", rope_theta=1e6, sliding_window=16, use_sliding_window=False, max_window_layers=2),
        SHAPES | dict(qkv_bias=True, rope=Rope(1e6, 8))),
    "qwen2 with yarn": (LLAMA | dict(model_type="qwen2", rope_theta=1e6, rope_scaling=dict(
        type="yarn", factor=4.0, original_max_position_embeddings=16)),
        SHAPES | dict(qkv_bias=True, rope=Rope(1e6, 8, "yarn", 4.0, original=16, scale=0.1 * np.log(4.0) + 1))),
    "mistral 0.1": (LLAMA | dict(model_type="mistral", rope_theta=1e4, sliding_window=16),
                    SHAPES | dict(rope=Rope(1e4, 8), local=(True,) * 4, window=16)),
    "mistral 0.2": (LLAMA | dict(model_type="mistral", rope_theta=1e6, sliding_window=None),
                    SHAPES | dict(rope=Rope(1e6, 8))),
    "mistral with layer_types": (
        LLAMA | dict(model_type="mistral", sliding_window=16, layer_types=["full_attention", "sliding_attention"] * 2),
        SHAPES | dict(rope=Rope(1e4, 8), local=(False, True) * 2, window=16)),
    "gemma's gelu is the approximate one": (
        GEMMA | dict(model_type="gemma", hidden_act="gelu", hidden_activation=None),
        GEMMA_SHAPES | dict(rope=Rope(1e4, 16))),
    "gemma2 alternates": (GEMMA | dict(
        model_type="gemma2", sliding_window=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        GEMMA2_SHAPES | dict(rope=Rope(1e4, 16), local=(True, False) * 2, window=16, score_cap=50.0, logit_cap=30.0)),
    "gemma3 with a pattern": (GEMMA | dict(
        model_type="gemma3", vision_config={}, tie_word_embeddings=False, text_config=GEMMA | dict(
            model_type="gemma3_text", sliding_window=16, sliding_window_pattern=3, rope_theta=1e6,
            rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0))),
        GEMMA2_SHAPES | dict(rope=Rope(1e6, 16, "linear", 8.0), local_rope=Rope(1e4, 16), qk_norm="head", window=16,
                             local=(True, True, False, True), tied=False)),
    "pythia": (NEOX | dict(rotary_pct=0.25, rotary_emb_base=500, use_parallel_residual=True),
               NEOX_SHAPES | dict(rope=Rope(500.0, 2), parallel=True)),
    "gpt2": (GPT2, GPT2_SHAPES),
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_old_spellings_of_settings_are_read(name):
    settings, expected = OLD_SPELLINGS[name]
    assert families.read(settings)[0] == DecoderConfig(**expected)


@pytest.mark.parametrize(("setting", "problem"), [
    (GPT2 | dict(activation_function="tanh"), "^activation_function 'tanh' is not supported; known: .*gelu_new"),
    (LLAMA | dict(hidden_act="tanh"), "^hidden_act 'tanh' is not supported"),
    (GEMMA | dict(model_type="gemma2", hidden_activation="tanh"), "^hidden_activation 'tanh' is not supported"),
    (LLAMA | dict(model_type="qwen3", layer_types=["full_attention", "chunked_attention"] * 2),
     "layer_types has chunked_attention; supported are full_attention, sliding_attention"),
    (GEMMA | dict(model_type="gemma2", sliding_window=None), "layer_types has .*sliding_window is None"),
    (LLAMA | dict(partial_rotary_factor=0.5), "partial_rotary_factor has to be 1 with model_type 'llama'"),
    (LLAMA | dict(model_type="olmo2", partial_rotary_factor=0.5), "partial_rotary_factor .* 'olmo2'"),
    (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (LLAMA | dict(layer_types=["sliding_attention"] * 4), "layer_types=.*'llama', which knows full_attention alone"),
    (LLAMA | dict(sliding_window=16), "sliding_window=16 is not supported with model_type 'llama'"),
    (LLAMA | dict(is_causal=False), "^is_causal=False is not supported$"),
    (LLAMA | dict(per_layer_config={"0": {"mlp_bias": True}}), "^per_layer_config=.* is not supported$"),
    (dict(model_type="gemma3", text_config=GEMMA | dict(attention_chunk_size=4)), "text_config.attention_chunk_size=4"),
    (GEMMA | dict(model_type="gemma", use_bidirectional_attention=True), "use_bidirectional_attention")])
def test_what_the_decoder_cannot_do_is_refused(setting, problem):
    with pytest.raises(ValueError, match=problem):
        families.read(setting)


def test_another_family_may_rotate_a_part_of_each_head():
    hf = transformers.StableLmConfig(hidden_size=32, num_attention_heads=4, partial_rotary_factor=0.25)
    assert families.common(hf, norm_eps=hf.layer_norm_eps).rope.width == 2


def test_the_language_model_of_a_gemma3_is_tied_as_the_whole_is():
    settings, expected = OLD_SPELLINGS["gemma3 with a pattern"]
    assert families.read(huggingface.settings_of(settings))[0] == DecoderConfig(**expected)


def test_config_json_of_a_llama_is_made_of_a_llama_only(tiny_shapes):
    bfloat16 = dataclasses.replace(tiny_shapes, dtype="bfloat16")
    assert families.read(families.llama_settings(bfloat16))[0] == tiny_shapes
    for switches, names in (({"rope": None}, "rope"), ({"qkv_bias": True, "gated": False}, "gated, out_bias"),
                            ({"rope": Rope(1e4, 8, "linear", 2.0)}, "rope")):
        with pytest.raises(ValueError, match=f"no Llama has these shapes; it would have another {names}$"):
            families.llama_settings(dataclasses.replace(tiny_shapes, **switches))


def model(settings):
    """A family's config and tables, and random parameters."""
    config, family = families.read(settings)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    return config, family, jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), shapes)


def read(settings, tensors, dtype="float32", sharding=None):
    config, family = families.read(settings)
    shapes = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))
    source = Source(pathlib.Path("memory"), {key: value.shape for key, value in tensors.items()}, tensors.__getitem__)
    return weight_map.read(family.rules(config), shapes, source, dtype, family.optional, family.renames, sharding)


def buffers(layer, *names):
    return {f"{layer}{i}.{name}": np.zeros(4, np.float32) for i in range(4) for name in names}


def prefixed(prefix, tensors):
    vision = {"vision_tower.vision_model.head.probe": np.zeros(3), "multi_modal_projector.mm_soft_emb_norm.weight":
              np.zeros(2)}
    return vision | {key.replace("model.", prefix, 1): value for key, value in tensors.items()}


GEMMA3 = dict(model_type="gemma3", text_config=GEMMA | dict(model_type="gemma3_text", sliding_window=16))
OLD_KEYS = {
    "gpt2 without a prefix": (GPT2, lambda tensors: {
        key.removeprefix("transformer."): value for key, value in tensors.items()} | buffers("h.", "attn.bias")),
    "gpt2 with one": (GPT2, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"]} | buffers(
        "transformer.h.", "attn.bias", "attn.masked_bias")),
    "llama": (LLAMA | dict(tie_word_embeddings=True), lambda tensors: tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"]} | buffers(
            "model.layers.", "self_attn.rotary_emb.inv_freq")),
    "pythia": (NEOX, lambda tensors: tensors | buffers(
        "gpt_neox.layers.", "attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")),
    "gemma3": (GEMMA3, partial(prefixed, "language_model.model.")),
    "gemma3 with newer keys": (GEMMA3, partial(prefixed, "model.language_model.")),
}


@pytest.mark.parametrize("name", OLD_KEYS)
def test_keys_of_older_files_are_read(name):
    settings, change = OLD_KEYS[name]
    config, family, params = model(settings)
    tensors = {key: np.asarray(value) for key, value in weight_map.write(family.rules(config), params)}
    changed = change(tensors)
    assert set(changed) != set(tensors)
    jax.tree.map(np.testing.assert_array_equal, read(settings, changed), params)


def test_a_file_of_another_family_is_told_apart():
    config, family, params = model(GPT2)
    tensors = {key: np.asarray(value) for key, value in weight_map.write(family.rules(config), params)}
    with pytest.raises(ValueError, match="memory does not fit its config.json: missing gpt_neox.embed_in.weight"):
        read(NEOX, tensors)


def test_a_parameter_that_no_rule_gives_is_named_with_the_other_problems(tiny_folder, tiny_shapes, monkeypatch):
    rules = [rule for rule in families.FAMILIES["llama"].rules(tiny_shapes) if "layers/up/kernel" not in rule.ours]
    family = families.FAMILIES["llama"]._replace(rules=lambda config: rules)
    monkeypatch.setitem(families.FAMILIES, "llama", family)
    with pytest.raises(ValueError, match="extra model.layers.0.mlp.up_proj.weight; .*no rule gives layers/up/kernel$"):
        weights.load(str(tiny_folder))


def test_int8_weights_are_not_written(tmp_path, tiny_shapes, tiny_params):
    rounded = quantize.quantize(tiny_params)
    with pytest.raises(ValueError, match="no rule writes layers/down/kernel_scale, .*value/kernel_scale .*floats"):
        weights.save(tmp_path, families.llama_settings(tiny_shapes), rounded)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=[NEOX, MIXTRAL], ids=["fused", "experts"])
def checkpoint(request):
    """Settings, parameters, and the tensors that hold them."""
    config, family, params = model(request.param)
    tensors = weight_map.write(family.rules(config), params)
    return request.param, params, {key: np.asarray(value) for key, value in tensors}


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_shards_hold_what_one_device_would(checkpoint, seed, dtype):
    """Any axes of an array, the layers' and the experts' too, over one or both axes of 8 devices."""
    settings, params, tensors = checkpoint
    mesh, draw = jax.make_mesh((2, 4), ("data", "fsdp")), random.Random(seed)
    sizes = {"data": 2, "fsdp": 4, ("data", "fsdp"): 8}

    def sharding(path, shape):
        spec = [None] * len(shape)
        names = draw.choice([[], ["data"], ["fsdp"], ["data", "fsdp"], [("data", "fsdp")]])
        for name in names:
            free = [i for i, size in enumerate(shape) if spec[i] is None and size % sizes[name] == 0]
            if free:
                spec[draw.choice(free)] = name
        asked[path] = NamedSharding(mesh, PartitionSpec(*spec))
        return asked[path]

    asked = {}
    sharded = read(settings, tensors, dtype, sharding)

    def check(path, ours, whole):
        assert ours.sharding == asked["/".join(key.key for key in path)]
        expected = np.asarray(whole.astype(dtype))
        assert ours.dtype == dtype
        for shard in ours.addressable_shards:
            assert shard.data.shape == ours.sharding.shard_shape(whole.shape)
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])

    jax.tree_util.tree_map_with_path(check, sharded, params)


def test_load_puts_a_model_into_its_shards(tiny_folder, tiny_shapes):
    mesh = jax.make_mesh((8,), ("fsdp",))

    def sharding(path, shape):
        axis = next((i for i, size in enumerate(shape) if size % 8 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*[None] * (axis or 0), *["fsdp"] * (axis is not None)))

    whole = weights.load(str(tiny_folder)).params
    sharded = weights.load(str(tiny_folder), sharding=sharding).params
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    query = sharded["layers"]["query"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(3, 2, 32)}
    assert len({shard.device for shard in query.addressable_shards}) == 8


def test_several_files_are_written_for_transformers_and_for_us(tmp_path, tiny_folder, tiny_shapes, tiny_params,
                                                               monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")        # with another model, in one file
    monkeypatch.setattr(weights, "_SHARD", 8000)                    # bytes; the embeddings alone are 9600
    weights.save(folder, families.llama_settings(tiny_shapes), tiny_params)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    held = {key: name for name in files for key in safe_open(folder / name, "numpy").keys()}    # noqa: SIM118
    assert held == index["weight_map"]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tiny_params)
    jax.tree.map(np.testing.assert_array_equal, weights.load(str(folder)).params, rounded)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = dict(weight_map.write(families.FAMILIES["llama"].rules(tiny_shapes), rounded))
    assert set(theirs) - set(ours) == {"lm_head.weight"}            # tied
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key].numpy())
    assert index["metadata"]["total_size"] == 2 * sum(value.size for value in ours.values())
