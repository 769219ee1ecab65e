"""Weights read one by one, against what torch and transformers wrote; and what is said of broken files."""
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kl_reg.pretrained import weight_files
from tests import tiny_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A random Llama, saved by transformers in one file, in bfloat16: (folder, its state_dict)."""
    folder = tmp_path_factory.mktemp("whole")
    config = transformers.LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    model.save_pretrained(folder / "sharded", max_shard_size="6KB")
    return folder, model.state_dict()


@pytest.fixture
def sharded(whole, tmp_path):
    """A copy of that Llama in shards, to be broken."""
    return shutil.copytree(whole[0] / "sharded", tmp_path / "copy")


@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_saved_is_read(whole, shards):
    folder, state = whole
    folder = folder / "sharded" if shards else folder
    source = weight_files.open_source(folder)
    files = weight_files.weight_files(folder)
    assert len(files) > 3 if shards else files == [folder / "model.safetensors"]
    assert source.path == files[0] and set(files) == set(folder.glob("model*"))
    assert source.shapes == {name: tuple(value.shape) for name, value in state.items()}
    for name, value in state.items():
        ours = source.read(name)
        assert ours.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(ours.view(np.uint16), value.view(torch.uint16).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64, torch.bool])
def test_a_weight_keeps_its_dtype(tmp_path, dtype):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    safetensors.torch.save_file({"a": value, "scalar": value[1, 2].clone()}, tmp_path / "model.safetensors")
    source = weight_files.open_source(tmp_path)
    assert source.shapes == {"a": (2, 3), "scalar": ()}
    ours = source.read("a")
    assert ours.dtype == value.numpy().dtype and (ours == value.numpy()).all()
    assert source.read("scalar") == value[1, 2].numpy()


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: a cannot be read: .*float8"):
        weight_files.open_source(tmp_path).read("a")


def test_a_gguf_file_is_read_and_safetensors_go_first(whole, tmp_path):
    written = tiny_gguf.write(tmp_path / "any name.gguf")
    source = weight_files.open_source(tmp_path)
    assert source.path.name == "any name.gguf" and set(source.shapes) == set(written)
    np.testing.assert_array_equal(source.read("model.norm.weight"), written["model.norm.weight"])
    shutil.copy(whole[0] / "model.safetensors", tmp_path)
    assert weight_files.open_source(tmp_path).path.name == "model.safetensors"


def test_two_gguf_files_are_named(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        tiny_gguf.write(tmp_path / name)
    with pytest.raises(ValueError, match="2 GGUF files.*: a.gguf, b.gguf"):
        weight_files.open_source(tmp_path)


def test_missing_weights_say_what_is_accepted(tmp_path):
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(FileNotFoundError) as error:
        weight_files.open_source(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert "model.safetensors.index.json" in str(error.value) and ".gguf" in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_pickled_weights_are_refused_with_a_way_out(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="pickle.*runs.*safe_serialization=True") as error:
        weight_files.open_source(tmp_path)
    assert name in str(error.value)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weight_files.open_source(tmp_path).read("a").tolist() == [1, 1]


@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(whole, part):
    folder = whole[0] / "short"
    folder.mkdir(exist_ok=True)
    content = (whole[0] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match="cannot be read as safetensors") as error:
        weight_files.open_source(folder)
    assert str(folder / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("content", [b"GGUF\3\0\0\0", b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4" * 9])
def test_a_mislabelled_file_is_named(sharded, content):
    shard = weight_files.weight_files(sharded)[2]
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as safetensors") as error:
        weight_files.open_source(sharded)
    assert str(shard) in str(error.value)


def test_all_missing_shards_are_listed(sharded):
    _, first, *_, last = weight_files.weight_files(sharded)
    first.unlink(), last.unlink()
    with pytest.raises(FileNotFoundError) as error:
        weight_files.open_source(sharded)
    assert str(error.value) == f"{sharded / 'model.safetensors.index.json'}: missing {first.name}, {last.name}"


def test_all_weights_that_a_shard_lacks_are_listed(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["lm_head.weight"]
    content["weight_map"] |= {"x": shard, "y": shard}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"index.json does not fit its shards: {shard} lacks x; {shard} lacks y$"):
        weight_files.open_source(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_leaves_its_folder_is_refused(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json: no file of its folder: ") as error:
        weight_files.open_source(sharded)
    assert str(error.value).endswith(name)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
                                     '{"weight_map": ["a"]}', "null"])
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        weight_files.open_source(tmp_path)
