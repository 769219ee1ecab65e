"""Sentiment of one reply, on the embedded model: the task on which learned policies are held against the optimum.

    python -m launch.sweep --config=configs/sentiment_completion.py --workdir=runs/sentiment
    python -m launch.optimal runs/sentiment
"""
from kl_reg.config import default

OPENING = "<|start|>A: Hi, how are you?\nB:"


def get_config():
    config = default()
    config.env.name, config.env.opening, config.env.end, config.env.length = "completion", OPENING, "\n", 24
    config.policy.kind = "full"
    config.rl.algorithm = "reinforce"
    config.rl.episodes, config.rl.iterations = 64, 60
    config.optim.learning_rate = 1e-4
    config.evaluation.episodes = 1024
    config.sweep = [{"kl.coef": (0.02, 0.04, 0.08, 0.16), "seed": (0,)}]
    return config
