"""A small sweep of three members in two programs."""
import json

import numpy as np
import pytest

import kl_reg
from kl_reg.config import default, members


@pytest.fixture(scope="session")
def config(tiny_folder):
    config = default()
    config.model.path, config.policy.hidden = str(tiny_folder), 4
    config.env.opening, config.env.length = "<|start|>A: hi\n", 16
    config.reward.name, config.optim.learning_rate = "length", 1e-2
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes, config.checkpoint.every = 2, 4, 6, 1
    config.sweep = [{"kl.coef": (0.0,), "seed": (0,)}, {"reference.name": ("ema",), "kl.coef": (0.1,), "seed": (1,)},
                    {"kl.coef": (0.3,), "seed": (0,)}]
    return config


@pytest.fixture
def trains(monkeypatch):
    """Stands for training: writes a run's files without any. Members with kl.coef=0.3 fail."""
    def train(config, workdir):
        own = members(config)
        for i in ["base", *range(len(own))]:
            (workdir / f"members/{i}").mkdir(parents=True, exist_ok=True)
            np.savez(workdir / f"members/{i}/evaluation.npz", returns=np.zeros(1))
        for i in range(len(own)):
            (workdir / f"members/{i}/metrics.jsonl").write_text(
                "".join(json.dumps({"iteration": at, "return": 1.5, "kl/nats_per_episode": 0.25,
                                    "tokens_per_second": 10.0}) + "\n" for at in range(config.rl.iterations)))
        if {"kl.coef": 0.3, "seed": 0} in own:
            print("about to diverge")
            raise ValueError("loss not\nfinite")
        (workdir / "summary.json").write_text("[]")

    monkeypatch.setattr(kl_reg, "train", train)
