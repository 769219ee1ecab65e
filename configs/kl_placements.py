"""The same KL, 10 nats per episode, by five ways: which buys more reward?

    python -m launch.sweep --config=configs/kl_placements.py --workdir=runs/kl_placements
"""
from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.rl.iterations = 80
    config.kl.target = 10.0
    config.kl.coef = 0.045                # near what 10 nats cost; the controllers find the rest
    seeds = {"seed": (0, 1)}
    steered = {"kl.controller": ("pi",), **seeds}
    config.sweep = [{"kl.estimator": ("k1",), "kl.placement": ("reward",), **steered},
                    {"kl.estimator": ("exact",), "kl.placement": ("full",), **steered},
                    {"kl.estimator": ("k3",), "kl.placement": ("loss",), **steered},
                    {"kl.estimator": ("exact",), "kl.placement": ("full",), "kl.controller": ("lagrangian",), **seeds},
                    {"kl.budget": (10.0,), "kl.coef": (0.0,), **seeds}]
    return config
