"""Model folders: what transformers reads of ours, and what is said of a broken one."""
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.flax import load_file, save_file

from kl_reg.models import decoder
from kl_reg.models.layers import Rope
from kl_reg.pretrained import families, folders, weights


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to be broken or written over."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_transformers_reads_what_save_writes(tmp_path, tiny_shapes, tiny_params):
    shapes = dataclasses.replace(tiny_shapes, tied=False, rope=Rope(300.0, 8), norm_eps=1e-3)
    rng = np.random.default_rng(0)
    params = tiny_params | {"unembed": jnp.zeros_like(tiny_params["embed"])}
    params = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), params)
    weights.save(tmp_path, families.llama_settings(shapes), params)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, shapes.vocab)
    ours = decoder.forward(shapes, rounded, tokens, jnp.zeros(2, jnp.int32)).last @ decoder.unembedding(rounded).T
    theirs = model(torch.tensor(np.array(tokens))).logits.detach().numpy()
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_gives_what_was_saved_in_the_asked_dtype(copy, tiny_shapes, tiny_params, dtype):
    weights.save(copy, families.llama_settings(tiny_shapes), tiny_params)
    model = weights.load(str(copy), dtype)
    assert model.config == dataclasses.replace(tiny_shapes, dtype=dtype)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), tiny_params)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        weights.load(str(copy))
    assert str(copy / name) in str(error.value)


def test_a_missing_embedded_model_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "EMBEDDED", tmp_path)
    with pytest.raises(FileNotFoundError, match="embedded.*launch.pretrain"):
        weights.load("embedded")


def test_embedded_is_the_folder_in_the_package(copy, monkeypatch):
    monkeypatch.setattr(folders, "EMBEDDED", copy)
    assert weights.load("embedded").folder == copy


def test_a_stored_unembedding_of_a_tied_model_is_the_embeddings(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    same, other = (tensors["model.embed_tokens.weight"].at[7, 3].add(x) for x in (0, 1))
    save_file(tensors | {"lm_head.weight": same}, file)
    np.testing.assert_array_equal(decoder.unembedding(weights.load(str(copy)).params), same)
    save_file(tensors | {"lm_head.weight": other}, file)
    with pytest.raises(ValueError, match="lm_head.weight is not model.embed_tokens.weight.*tie_word_embeddings"):
        weights.load(str(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(decoder.unembedding(weights.load(str(copy)).params), other)


@pytest.mark.parametrize(("settings", "problem"), [
    ({"vocab_size": 3}, "lacks model_type; known: .*llama"),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`")])
def test_what_config_json_lacks_is_said_once(copy, settings, problem):
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json: {problem}"):
        weights.load(str(copy))


def test_an_unknown_family_lists_the_known(copy):
    (copy / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba'.*llama"):
        weights.load(str(copy))


@pytest.mark.parametrize("setting", [
    {"hidden_act": "tanh"}, {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
    {"quantization_config": {"quant_method": "gptq"}}])
def test_a_setting_that_would_change_the_model_is_refused(copy, setting):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match="(tanh|proportional|gptq).*not supported"):
        weights.load(str(copy))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.9])
def test_a_truncated_file_is_named(copy, part):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match="safetensors") as error:
        weights.load(str(copy))
    assert str(file) in str(error.value)


def test_missing_extra_and_misshapen_weights_are_all_listed(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = jnp.zeros((32, 16))
    tensors["model.layers.1.self_attn.k_proj.weight"] = jnp.zeros((32, 16))      # as if it had 4 kv-heads
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].T
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        weights.load(str(copy))
    for part in (str(file), "missing model.norm.weight", "missing model.layers.2.mlp.up_proj.weight",
                 "extra model.layers.3.mlp.up_proj.weight",
                 "model.layers.1.self_attn.k_proj.weight is (32, 16), expected (16, 16)",
                 "model.layers.0.mlp.down_proj.weight is (32, 16), expected (16, 32)"):
        assert part in str(error.value)
    assert str(error.value).count(";") == 4      # five problems, and nothing that is no problem


def test_an_untied_config_with_tied_weights_misses_the_unembedding(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        weights.load(str(copy))
