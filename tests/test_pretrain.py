import itertools
import json

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict

from kl_reg import chitchat, pretrain
from kl_reg.models import weights


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny training on made-up conversations."""
    def make(name, count):
        return [chitchat.Conversation(f"{name}{i}", [f"hello {i}", "good day to you", f"yes {i}", "ok"])
                for i in range(count)]

    counts = {"conversations": 60, "messages": 240, "empty_messages": 0}
    monkeypatch.setattr(chitchat, "load", lambda: (make("train", 40), make("held", 20), counts))
    return ConfigDict({
        "seed": 0, "output": str(tmp_path / "assets"), "vocab": 300, "width": 16, "layers": 2, "heads": 2,
        "kv_heads": 1, "mlp_width": 32, "context": 64, "rows": 2, "dtype": "float32", "steps": 6, "warmup": 2,
        "decay": 0.5, "muon_learning_rate": 0.02, "adam_learning_rate": 3e-3, "weight_decay": 0.01,
        "eval_every": 3})


@pytest.mark.filterwarnings("ignore")
def test_training_lowers_the_loss_and_writes_a_loadable_model_with_its_card(config, tmp_path):
    config.steps = 30
    folder = pretrain.train(config, tmp_path / "run")
    card = json.loads((folder / "card.json").read_text())
    assert weights.load(str(folder)).config.width == 16
    assert card["nats_per_token"] < 0.9 * np.log(300)           # a random model is at log(vocabulary)
    assert card["held_out_conversations"] == 20 and card["tokens_seen"] == 30 * 2 * 64
    assert f"{card['nats_per_token']:.3f} nats per token" in (folder / "README.md").read_text()
    assert len((folder / "held_out.jsonl").read_text().splitlines()) == 20


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_training_resumes_to_the_same_weights(config, tmp_path, monkeypatch):
    whole = weights.load(str(pretrain.train(config, tmp_path / "whole"))).params
    batches = pretrain.batches

    def dying(*arguments):
        yield from itertools.islice(batches(*arguments), 4)     # the checkpoint is of step 3
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "batches", dying)
        pretrain.train(config, tmp_path / "part")
    resumed = weights.load(str(pretrain.train(config, tmp_path / "part"))).params
    chex.assert_trees_all_equal(resumed, whole)


def test_another_training_in_the_directory_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"fingerprint": "of another"}')
    with pytest.raises(FileExistsError, match="holds another experiment"):
        pretrain.train(config, tmp_path / "run")


def test_windows_cover_the_documents_once_an_epoch():
    documents = [np.arange(i * 10, i * 10 + 10, dtype=np.int32) for i in range(12)]
    stream = pretrain.batches(documents, 0, rows=2, length=6)
    seen = np.concatenate([next(stream).reshape(-1) for _ in range(10)])
    assert len(set(seen.tolist())) == 120
