"""KL coefficient against a hard KL budget on the embedded model.

    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/quickstart
"""
from kl_reg.config import default


def get_config():
    config = default()
    config.env.opening = "<|start|>A: Hi, how are you?\nB: I am good, how about you?\n"
    config.rl.iterations = 50
    config.sweep = [{"kl.coef": (0.0, 0.01, 0.03, 0.1, 0.3), "seed": (0, 1)},
                    {"kl.budget": (10.0,), "seed": (0, 1)}]
    return config
