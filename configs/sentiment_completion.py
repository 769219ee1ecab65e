"""Sentiment of one reply, on the embedded model: the task on which learned policies are held against the optimum.

    python -m launch.sweep --config=configs/sentiment_completion.py --workdir=runs/sentiment
    python -m launch.optimal runs/sentiment

A few minutes on two cores, each. The reward goes from the base's 0.66 to 0.89 for 2 nats per
episode, 0.92 for 3.5 and 0.96 for 7: about twice the nats that the best policy would need (docs/optimum.md).
"""
from kl_reg.config import default

OPENING = "<|start|>A: Hi, how are you?\nB:"


def get_config():
    config = default()
    config.env.name, config.env.opening, config.env.end, config.env.length = "completion", OPENING, "\n", 24
    config.rl.algorithm, config.rl.group = "rloo", 64           # one prompt: all episodes are one group
    config.rl.episodes, config.rl.iterations, config.rl.epochs = 64, 60, 4
    config.optim.learning_rate, config.optim.final = 5e-4, 0.0
    config.evaluation.episodes = 1024
    config.sweep = [{"kl.coef": (0.007, 0.01, 0.02, 0.04), "seed": (0,)}]
    return config
