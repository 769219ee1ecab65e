"""A small sweep on disk."""
from __future__ import annotations

import json

import numpy as np
import pytest
from small_sweep import LINES, arrays, summary

from kl_reg.pretrained import tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_text("{}")
    trained = tokenizer.train([text for _, _, text in LINES], 300, ("A:", "B:"))
    trained.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def workdir(tmp_path, model_folder):
    config = {"model": {"path": str(model_folder)}, "env": {"name": "teacher_student"}, "reward": {"name": "vader"},
              "kl": {"estimator": "exact", "placement": "full"}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config, "fingerprint": "0123456789ab"}))
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    for member in summary():
        folder = tmp_path / "members" / str(member["member"])
        folder.mkdir(parents=True)
        own = arrays(model_folder, member["final"]["kl/nats_per_episode"] / 10)
        seeds = [member["hyper"]["seed"]] if member["hyper"] else [0, 1]
        parts = [own | {"seeds": np.full(3, seed)} for seed in seeds]
        np.savez(folder / "evaluation.npz", **{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
        if member["member"] != "base":
            (folder / "metrics.jsonl").write_text("".join(json.dumps(
                {"iteration": i, "return": 1.0 + i, "return_se": 0.1, "kl/nats_per_episode": 0.5 * i,
                 "kl/nats_per_token": 0.05 * i, "entropy/nats_per_token": 3.0, "teacher/silent_rate": None,
                 "student/silent_rate": None if i == 0 else 0.5}) + "\n" for i in range(3)))
    return tmp_path
