"""KL coefficients against hard KL budgets on the embedded model.

    python -m launch.sweep --config=configs/quickstart.py --workdir=runs/quickstart

About five minutes on two cores. KL falls from 37 to 0.4 nats per episode as the coefficient grows, and the return from
2.3 to 1.1 (base: 0.8); a budget of 10 nats buys 1.8, one of 20 nats 2.0.
"""
from kl_reg.config import default


def get_config():
    config = default()
    config.env.opening = "<|start|>A: Hi, how are you?\nB: I am good, how about you?\n"
    # At 1e-3 the policy without a penalty is deterministic after 40 iterations and the budgets buy less reward: the
    # first iterations look better there, the last do not.
    config.optim.learning_rate = 5e-4
    # Budgets are spent in full after about 30 iterations; the KL of the two smallest coefficients settles last.
    config.rl.iterations = 60
    # From no price to one (0.3 reward per nat) that leaves little to gain, in log-even steps; the paper's two budgets.
    config.sweep = [{"kl.coef": (0.0, 0.01, 0.03, 0.1, 0.3), "seed": (0, 1)},
                    {"kl.budget": (10.0, 20.0), "seed": (0, 1)}]
    return config
