"""One small run that the commands read."""
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
    config.sweep = [{"optim.learning_rate": (0.0, 0.3)},
                    {"optim.learning_rate": (0.3,), "kl.budget": (0.5,), "kl.spend": ("sampled",)}]
    folder = tmp_path_factory.mktemp("runs") / "small"
    kl_reg.train(config, workdir=folder)
    return folder
