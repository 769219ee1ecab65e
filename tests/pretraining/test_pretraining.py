import hashlib
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import pretrain_ensemble
from kl_reg.analysis.behaviour.script_price import price_of_script
from kl_reg.pretrained import chitchat, folders, tokenizer, weights
from kl_reg.pretraining import train as pretraining

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {"seed": 0, "vocab": 300, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 32,
            "context": 48, "rows": 2, "dtype": "float32", "steps": 30, "warmup": 2, "decay": 0.5,
            "muon_learning_rate": 0.02, "adam_learning_rate": 3e-3, "weight_decay": 0.01, "eval_every": 15}


def conversations(name, count):
    names = [chr(97 + i % 26) * (1 + i % 5) for i in range(count)]
    return [chitchat.Conversation(f"{name}{i}", [f"hello {names[i]}", "good day to you", f"yes {i}", "ok"])
            for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def made_up_conversations():
    counts = {"conversations": 60, "messages": 240, "empty_messages": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chitchat, "load", lambda: (conversations("train", 40), conversations("held", 20), counts))
        patch.setattr(pretraining, "price_of_script", lambda *given, **named: price_of_script(
            *given, **named | {"episodes": 8}))
        yield


@pytest.fixture
def config(tmp_path):
    """A tiny training."""
    return ConfigDict(SETTINGS | {"output": str(tmp_path / "assets")})


def ensemble_in(folder, members=2):
    """A tiny ensemble, its output in `folder`."""
    return ConfigDict(SETTINGS | {"members": members, "bootstrap": True, "tokenizer": None,
                                  "output": str(folder / "ensemble")})


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Where a tiny ensemble and its checkpoints lie: `ensemble` and `run`."""
    folder = tmp_path_factory.mktemp("ensemble")
    folders = pretraining.train(ensemble_in(folder), folder / "run", "the command")
    assert folders == [folder / "ensemble/0", folder / "ensemble/1"]
    return folder


def dying_at(calls, seed, seen=None):
    """`pretrain.batches` whose stream of this seed breaks off; its documents are added to `seen`."""
    batches = pretraining.batches

    def dying(documents, stream_seed, rows, length):
        stream = batches(documents, stream_seed, rows, length)
        if rows != SETTINGS["rows"] or stream_seed != seed:
            return stream
        if seen is not None:
            seen.extend(documents)
        return itertools.chain(itertools.islice(stream, calls), interrupt())

    def interrupt():
        raise KeyboardInterrupt
        yield

    return dying


def params(folder):
    return weights.load(str(folder)).params


def times(folder):
    return {file: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_training_lowers_the_loss_and_writes_a_loadable_model_with_its_card(config, tmp_path):
    [folder] = pretraining.train(config, tmp_path / "run", "the command")
    card, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    assert folder == tmp_path / "assets"
    assert weights.load(str(folder)).config.width == 16
    assert card["nats_per_token"] < 0.9 * np.log(300)          # a random model is at log(vocabulary)
    assert card["held_out_conversations"] == 20 and card["tokens_seen"] == 30 * 2 * 48
    assert f"{card['nats_per_token']:.3f} nats per token" in text
    assert "Made by `the command`" in text and "at least two turns: 40 conversations, " in text
    assert "| seed | 0 (initialisation, order of the batches) |" in text
    # An opening is 11 tokens or more; ten empty turns of A and nine of B between them are 38: more than the context.
    assert card["price_of_silence_episodes"] == 0 and "No transcript has that many turns." in text
    assert len((folder / "held_out.jsonl").read_text().splitlines()) == 20
    assert not (folder / "ensemble.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_members_differ_and_share_one_tokenizer_of_all_conversations(ensemble, tmp_path):
    first, second = ensemble / "ensemble/0", ensemble / "ensemble/1"
    for a, b in zip(jax.tree.leaves(params(first)["layers"]), jax.tree.leaves(params(second)["layers"]), strict=True):
        assert a.shape == b.shape and not np.array_equal(a, b)
    all_of_them = [chitchat.transcript(c.turns) for c in conversations("train", 40)]
    tokenizer.train(all_of_them, 300, chitchat.SPEAKERS).save(str(tmp_path / "all.json"))
    drawn = [all_of_them[i] for i in pretraining.resample(40, seed=1)]
    tokenizer.train(drawn, 300, chitchat.SPEAKERS).save(str(tmp_path / "drawn.json"))
    assert (tmp_path / "all.json").read_bytes() != (tmp_path / "drawn.json").read_bytes()
    for member in (first, second):
        assert (member / "tokenizer.json").read_bytes() == (tmp_path / "all.json").read_bytes()
        assert (member / "held_out.jsonl").read_bytes() == (first / "held_out.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_members_card_is_of_its_own_resample_and_seed(ensemble):
    tok = tokenizer.load(ensemble / "run")
    lengths = np.array([len(tokenizer.encode(tok, "<|start|>" + chitchat.transcript(c.turns)))
                        for c in conversations("train", 40)])
    for k in (0, 1):
        drawn = pretraining.resample(40, seed=k)
        card, text = [(ensemble / f"ensemble/{k}" / name).read_text() for name in ("card.json", "README.md")]
        card = json.loads(card)
        assert card["train_tokens"] == lengths[drawn].sum() and card["seed"] == k
        assert text.startswith(f"# Imitator {k} of an ensemble\n") and "Made by `the command`" in text
        assert f": 40 conversations drawn with replacement, {len(set(drawn.tolist()))} of them distinct, " in text
        assert f"| seed | {k} (initialisation, order of the batches, draw of the conversations) |" in text
        assert "| tokenizer | trained on all training conversations |" in text


@pytest.mark.filterwarnings("ignore")
def test_the_index_names_members_seeds_digests_and_losses(ensemble):
    index = json.loads((ensemble / "ensemble/ensemble.json").read_text())
    assert index["bootstrap"] is True
    assert [(member["folder"], member["seed"]) for member in index["members"]] == [("0", 0), ("1", 1)]
    for member in index["members"]:
        folder = ensemble / "ensemble" / member["folder"]
        sums = [hashlib.sha256((folder / name).read_bytes()).hexdigest()
                for name in ("model.safetensors", "tokenizer.json", "config.json")]
        assert member["digest"] == "-".join(sums)
        assert f"| {member['held_out_nats_per_token']:.3f} nats per token" in (folder / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_ensemble_resumes_to_the_same_and_keeps_finished_members(ensemble, tmp_path, monkeypatch):
    config = ensemble_in(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "batches", dying_at(20, seed=1))    # the checkpoint is of step 15
        pretraining.train(config, tmp_path / "run", "the command")
    finished = times(tmp_path / "ensemble/0")
    assert not (tmp_path / "ensemble/1").exists() and not (tmp_path / "ensemble/ensemble.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "batches", dying_at(0, seed=0))     # member 0 draws nothing any more
        folders = pretraining.train(config, tmp_path / "run", "the command")
    assert times(tmp_path / "ensemble/0") == finished
    for folder in folders:
        chex.assert_trees_all_equal(params(folder), params(ensemble / "ensemble" / folder.name))
    assert (tmp_path / "ensemble/ensemble.json").read_text() == (ensemble / "ensemble/ensemble.json").read_text()


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_single_training_resumes_to_the_member_of_its_seed(ensemble, config, tmp_path, monkeypatch):
    config.seed, config.bootstrap = 1, True
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "batches", dying_at(20, seed=1))
        pretraining.train(config, tmp_path / "part", "the command")
    [folder] = pretraining.train(config, tmp_path / "part", "the command")
    chex.assert_trees_all_equal(params(folder), params(ensemble / "ensemble/1"))


@pytest.mark.filterwarnings("ignore")
def test_an_enlarged_ensemble_trains_its_new_member_alone(ensemble, tmp_path):
    shutil.copytree(ensemble, tmp_path, dirs_exist_ok=True)
    kept = [times(tmp_path / f"ensemble/{k}") for k in (0, 1)]
    pretraining.train(ensemble_in(tmp_path, members=3), tmp_path / "run", "the command")
    assert [times(tmp_path / f"ensemble/{k}") for k in (0, 1)] == kept
    index = json.loads((tmp_path / "ensemble/ensemble.json").read_text())
    assert [member["seed"] for member in index["members"]] == [0, 1, 2]


def test_the_command_prints_every_members_folder_and_loss(ensemble, tmp_path):
    (tmp_path / "tiny.py").write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n"
                                      f"    return ConfigDict({ensemble_in(ensemble).to_dict()})\n")
    done = subprocess.run([sys.executable, "-m", "launch.pretrain", f"--config={tmp_path}/tiny.py",
                           f"--workdir={ensemble}/run"], cwd=ROOT, text=True, capture_output=True)
    losses = [json.loads((ensemble / f"ensemble/{k}/card.json").read_text())["nats_per_token"] for k in (0, 1)]
    assert done.stdout.splitlines() == [
        *(f"{ensemble}/ensemble/{k}  {losses[k]:.3f} nats per token, held out" for k in (0, 1)),
        f"{ensemble}/ensemble/ensemble.json"], done.stderr


@pytest.mark.filterwarnings("ignore")
def test_the_embedded_tokenizer_is_used_as_it_is(config, tmp_path, monkeypatch):
    config.tokenizer, config.vocab, seen = "embedded", 2048, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "batches", dying_at(0, seed=0, seen=seen))
        pretraining.train(config, tmp_path / "run", "the command")
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (folders.EMBEDDED / "tokenizer.json").read_bytes()
    texts = [chitchat.transcript(c.turns) for c in conversations("train", 40)]
    tok = tokenizer.load(folders.EMBEDDED)
    assert [tokenizer.decode(tok, ids.tolist()) for ids in seen] == ["<|start|>" + text for text in texts]


def test_another_training_in_the_directory_is_refused(config, ensemble, tmp_path):
    with pytest.raises(FileExistsError, match="holds another experiment"):
        pretraining.train(config, ensemble / "run", "the command")
    without = ensemble_in(tmp_path)
    without.bootstrap = False
    with pytest.raises(FileExistsError, match="holds another experiment"):
        pretraining.train(without, ensemble / "run", "the command")


@pytest.mark.parametrize(("key", "value", "says"), [
    ("members", 0, "members=0 must be"), ("members", 2.0, "members=2.0 must be"), ("steps", 0, "steps=0 must be"),
    ("decay", -0.1, "decay=-0.1 must be"), ("weight_decay", float("nan"), "weight_decay=nan must be"),
    ("decay", 1.0, "steps=30: too few; warmup=2, decay=1.0"), ("seed", -1, "seed=-1"), ("seed", 2**31, "seed="),
    ("tokenizer", "gpt2", "tokenizer='gpt2': choose 'embedded'"), ("tokenizer", "embedded", "300: .*use vocab=2048"),
    ("vocab", 258, "vocab=258 must be at least 259"), ("heads", 3, "width=16 must be a multiple of 2 . heads, 6"),
    ("kv_heads", 3, "kv_heads=3"), ("dtype", "float16", "dtype='float16'"),
    ("member", 2, r"unknown settings \['member'\]")])
def test_a_wrong_setting_is_named(config, tmp_path, key, value, says):
    wrong = ConfigDict(config.to_dict() | {key: value})
    with pytest.raises(ValueError, match=says):
        pretraining.train(wrong, tmp_path / "run", "the command")
    assert not (tmp_path / "run").exists()


def test_without_any_learning_rate_there_is_no_training(config):
    pretraining.resolve(ConfigDict(config.to_dict() | {"adam_learning_rate": 0.0}))
    with pytest.raises(ValueError, match="muon_learning_rate=0 and adam_learning_rate=0 train nothing"):
        pretraining.resolve(ConfigDict(config.to_dict() | {"adam_learning_rate": 0.0, "muon_learning_rate": 0.0}))


def test_a_missing_setting_is_named(config):
    del config.rows
    with pytest.raises(ValueError, match=r"missing \['rows'\]"):
        pretraining.resolve(config)


def test_the_smallest_vocabulary_holds_its_tokenizer():
    assert tokenizer.train(["ab"], 259, chitchat.SPEAKERS).get_vocab_size() == 259
    assert tokenizer.train(["ab"], 258, chitchat.SPEAKERS).get_vocab_size() > 258


def test_a_resample_has_the_size_and_the_law_of_a_bootstrap():
    count = 10_000
    drawn = pretraining.resample(count, seed=3)
    assert drawn.shape == (count,) and drawn.min() >= 0 and drawn.max() < count
    np.testing.assert_array_equal(drawn, pretraining.resample(count, seed=3))
    assert (drawn != pretraining.resample(count, seed=4)).mean() > 0.99
    # An item is left out with probability (1 - 1/n)^n = 1/e; three standard deviations of the share are 0.94%.
    assert abs(len(np.unique(drawn)) / count - (1 - np.exp(-1))) < 0.0094
    assert (drawn != np.random.default_rng(3).integers(count, size=count)).mean() > 0.99      # not the batches' stream


def test_the_ensembles_members_have_the_embedded_models_shapes():
    config = pretraining.resolve(pretrain_ensemble.get_config())
    assert pretraining.shapes(config) == weights.load_config("embedded", config.dtype)
    assert (config.members, config.bootstrap, config.output) == (4, True, "runs/ensemble")


def test_windows_cover_the_documents_once_an_epoch():
    documents = [np.arange(i * 10, i * 10 + 10, dtype=np.int32) for i in range(12)]
    stream = pretraining.batches(documents, 0, rows=2, length=6)
    seen = np.concatenate([next(stream).reshape(-1) for _ in range(10)])
    assert len(set(seen.tolist())) == 120
