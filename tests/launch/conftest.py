"""One small run that the commands read, and a gcloud that knows one slice."""
import os
import pathlib
import sys

import jax
import pytest

import kl_reg
from kl_reg.config import default


@pytest.fixture(scope="package", autouse=True)
def optimised():
    """Sampling is compared with what another program sampled, token by token: both are to round alike."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="package")
def run(optimised, tiny_folder, tmp_path_factory):
    """Member 0 never learns, 1 has no limit, 2 draws what it spends of a budget; 40 episodes of evaluation."""
    config = default()
    config.model.path, config.policy.hidden = str(tiny_folder), 4
    config.env.opening, config.env.length = "<|start|>A: hi\n", 16
    config.rl.iterations, config.rl.episodes, config.checkpoint.every = 2, 8, 1
    config.evaluation.episodes, config.optim.warmup, config.optim.final = 40, 1, 1.0
    config.evaluation.seed = 1_000_002      # with it the agent of every member ends its first turn
    config.sweep = [{"optim.learning_rate": (0.0, 0.3)},
                    {"optim.learning_rate": (0.3,), "kl.budget": (0.5,), "kl.spend": ("sampled",)}]
    folder = tmp_path_factory.mktemp("runs") / "small"
    kl_reg.train(config, workdir=folder)
    return folder


class Gcloud:
    """A fake gcloud on PATH: tests/launch/fake_gcloud.py says what its files are."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "home"
        (folder / "bin").mkdir()
        fake = pathlib.Path(__file__).with_name("fake_gcloud.py").read_text()
        self.stub("gcloud", f"#!{sys.executable} -IS\n{fake}")
        self.environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "FAKE": str(folder)}

    def stub(self, name, text):
        (self.folder / f"bin/{name}").write_text(text)
        (self.folder / f"bin/{name}").chmod(0o755)

    def ready(self):
        self.home.mkdir()
        (self.folder / "vm").write_text("READY")

    def calls(self):
        file = self.folder / "calls"
        made = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix("gcloud compute tpus ") for line in made]

    def changes(self):
        return [call for call in self.calls() if " describe " not in call]


@pytest.fixture
def gcloud(tmp_path):
    return Gcloud(tmp_path)
