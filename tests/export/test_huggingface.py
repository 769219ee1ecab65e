"""What PEFT and torch make of the files, for families whose tensors have other names, places and layouts."""
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from kl_reg.export import huggingface
from kl_reg.models import decoder
from kl_reg.policies import lora
from kl_reg.policies.actor import Actor
from kl_reg.pretrained import end_tokens, families, folders, tokenizer, weight_map, weights
from kl_reg.types import Sampling

COMMON = {"vocab_size": 96, "max_position_embeddings": 64}
SMALL = COMMON | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma2": transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
                                        sliding_window=4),
    "gpt2": transformers.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL)}
FUSED = {"gpt2", "gpt_neox"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_tokenizer):
    """Family -> (torch's model, ours), every weight random."""
    out = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tiny_tokenizer.save(str(folder / "tokenizer.json"))
        out[name] = model, weights.load(str(folder))
    return out


def low_rank(config, targets, rank=2):
    rng = np.random.default_rng(0)
    draw = lambda *shape: 0.3 * rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {name: {"a": draw(layers, inner, rank), "b": draw(layers, rank, outer)}
            for name, (layers, inner, outer) in lora.adaptable(config, targets).items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")      # PEFT's own use of transformers
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_merges_an_adapter_to_our_merged_weights(bases, family, tmp_path):
    _, base = bases[family]
    low = low_rank(base.config, "out|up|down" if family in FUSED else ".*")
    huggingface.adapter(tmp_path, base.folder, huggingface.origin(str(base.folder), base.folder), low, 2, 6.0,
                        "float32")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)          # finds the base by itself
    theirs = found.merge_and_unload().state_dict()
    rules = families.read(folders.settings(base.folder))[1].rules(base.config)
    ours = dict(weight_map.write(rules, lora.merged(base.params, low, 3.0)))
    plain, moved = dict(weight_map.write(rules, base.params)), 0
    for (key, value), before in zip(ours.items(), plain.values(), strict=True):
        key = key.replace("embed_out", "lm_head")           # GPT-NeoX's, in memory
        np.testing.assert_allclose(value, theirs[key].numpy(), atol=1e-5, err_msg=key)
        moved += bool(np.abs(value - before).max() > 0.1)
    assert moved == 3 * len(low)


@pytest.mark.parametrize("family, key", [("gpt2", "attn.c_attn"), ("gpt_neox", "attention.query_key_value")])
def test_matrices_in_one_tensor_have_no_adapter(bases, family, key, tmp_path):
    _, base = bases[family]
    low = low_rank(base.config, "query|out")
    with pytest.raises(ValueError, match=rf"{family} .*{key} holds query, key, value.*merge") as error:
        huggingface.adapter(tmp_path, base.folder, huggingface.Origin("x", None), low, 2, 6.0, "float32")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_head_says_the_same_in_torch(bases, family, tmp_path):
    _, base = bases[family]
    config, rng, tokens = base.config, np.random.default_rng(1), np.random.default_rng(2).integers(0, 96, (2, 10))
    shapes = jax.eval_shape(Actor(32, 5).init, jax.random.key(0), np.zeros(2 * 32 + 3, np.float32))["params"]
    actor = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    huggingface.head(tmp_path, base.folder, actor, {
        "base": {"path": str(base.folder), "revision": None, "digest": folders.digest(base.folder)},
        "dtype": "float32", "layers": 2, "length": 16, "temperature": 1.0, "budget": [0.25, 0.5]})
    with torch.no_grad():
        theirs = loader_in(tmp_path / "head_policy.py").load(tmp_path)(torch.tensor(tokens), opening=4).numpy()
    features = decoder.forward(config, base.params, jnp.array(tokens, jnp.int32), jnp.zeros(2, jnp.int32), 2).features
    time = np.maximum(np.arange(10) + 1 - 4, 0) / 16
    inputs = np.stack([np.full(10, 0.25), np.full(10, 0.5), time], axis=-1).astype(np.float32)
    x = np.concatenate([features, np.broadcast_to(inputs, (2, 10, 3))], axis=-1)
    change = Actor(32, 5).apply({"params": actor}, x)
    gap = change @ decoder.unembedding(base.params).T
    assert np.abs(gap).max() > 1.0
    np.testing.assert_allclose(theirs, decoder.logits(config, base.params, features[..., 32:]) + gap, atol=1e-4)


def loader_in(file):
    """The module in a file of an exported folder."""
    spec = importlib.util.spec_from_file_location("exported_head_policy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_head_on_another_base_is_refused(bases, tmp_path):
    _, base = bases["llama"]
    (tmp_path / "head.json").write_text(json.dumps({
        "base": {"path": str(base.folder), "revision": None, "digest": "0-0"}, "dtype": "float32"}))
    with pytest.raises(ValueError, match="does not hold the weights"):
        loader_in(huggingface.LOADER).load(tmp_path)


def test_shards_have_the_digest_that_the_run_has_recorded(bases, tmp_path, monkeypatch):
    _, base = bases["llama"]
    monkeypatch.setattr(weights, "_SHARD", 20_000)
    huggingface.model(tmp_path, base.folder, base.params, "float32", None)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert loader_in(huggingface.LOADER)._digest(tmp_path) == folders.digest(tmp_path).split("-")[0]


def test_of_a_gemma_with_images_the_text_model_is_left():
    text = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
            "num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 8}
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
             "torch_dtype": "bfloat16"}
    left = huggingface.settings_of(whole)
    assert left["model_type"] == "gemma3_text" and "torch_dtype" not in left
    assert families.read(left)[0] == families.read(whole)[0]
    built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**left))
    assert type(built) is transformers.Gemma3ForCausalLM


def test_where_transformers_finds_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "cache/snapshots/0123abcd"
    for folder in (snapshot, tmp_path / "org/name"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_text("")
    assert huggingface.origin("org/other@main", snapshot) == ("org/other", "0123abcd")
    assert huggingface.origin("org/name", tmp_path / "org/name") == (str(tmp_path / "org/name"), None)
    assert not huggingface.unloadable(snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gemma3"}')
    assert "with images" in huggingface.unloadable(snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "weights.gguf")
    assert "GGUF" in huggingface.unloadable(snapshot)


def test_files_have_the_mode_that_the_umask_gives(bases, tmp_path):
    """safetensors alone would write 0600."""
    _, base = bases["llama"]
    actor = {"hidden": {"kernel": np.ones((67, 5)), "bias": np.ones(5)}, "change": {"kernel": np.ones((5, 32))}}
    before = os.umask(0o027)
    try:
        for name in ("model", "adapter", "head"):
            (tmp_path / name).mkdir()
        huggingface.model(tmp_path / "model", base.folder, base.params, "float32", Sampling())
        huggingface.adapter(tmp_path / "adapter", base.folder, huggingface.Origin("x", None),
                            low_rank(base.config, "up"), 2, 6.0, "float32")
        huggingface.head(tmp_path / "head", base.folder, actor, {})
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.rglob("*") if file.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "head.safetensors"} < set(modes)
    assert set(modes.values()) == {"0o640"}


def test_the_embedded_model_declares_its_special_tokens(tmp_path):
    """As GPT-2 does, all are one token: pretraining joins documents that begin with it."""
    huggingface.model(tmp_path, folders.EMBEDDED, weights.load("embedded").params, "float32", Sampling())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert {words.bos_token, words.eos_token, words.pad_token, words.unk_token} == {"<|start|>"}
    start = words.convert_tokens_to_ids("<|start|>")
    assert words("A: hi\n").input_ids == words("A: hi\n", add_special_tokens=False).input_ids     # none is put in front
    for found in (transformers.AutoConfig.from_pretrained(tmp_path),
                  transformers.GenerationConfig.from_pretrained(tmp_path)):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (start,) * 3
    padded = words(["A: hi", "A: hello there"], padding=True, return_tensors="pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generate(**padded, max_new_tokens=2, do_sample=False).shape[0] == 2
    assert set(end_tokens.named(tmp_path, tokenizer.load(tmp_path))) == {start}


def test_a_base_keeps_the_special_tokens_that_it_declares(bases, tmp_path):
    _, base = bases["llama"]
    huggingface.model(tmp_path, base.folder, base.params, "float32", Sampling())
    declared = [json.loads((folder / "config.json").read_text()) for folder in (base.folder, tmp_path)]
    for name in ("bos", "eos", "pad"):
        assert declared[0].get(f"{name}_token_id") == declared[1].get(f"{name}_token_id")
    assert "eos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_the_run_says_how_tokens_are_drawn(bases, tmp_path):
    """Beside the base's special tokens nothing of how the base is recommended to be sampled is left."""
    _, base = bases["gpt2"]
    (base.folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [2, 3], "repetition_penalty": 1.3, "top_p": 0.8, "temperature": 0.6}))
    huggingface.model(tmp_path, base.folder, base.params, "float32", Sampling(temperature=0.5))
    found = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 0.5, 0, 1.0)
    assert found.eos_token_id == [2, 3] and found.repetition_penalty in (None, 1.0)
