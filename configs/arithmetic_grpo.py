"""Sums of two numbers on SmolLM2-135M: GRPO with a verifiable reward, on problems that code makes.

    python -m launch.fetch smollm2
    python -m launch.train --config=configs/arithmetic_grpo.py --workdir=runs/arithmetic

About 9 minutes on two busy cores (7.5 minutes of processor time). One seed: right answers go from 0.17 ±
0.02 to 0.62 ± 0.02 for 2.18 ± 0.06 nats per episode (512 episodes of the evaluation, ± standard error). Training draws
182 of the 2,401 problems; on the others it is 0.61 ± 0.02. The policy did not only get surer: the base, decoded
greedily, is right in 0.39 ± 0.02 of 480 problems.
"""
from kl_reg.config import default

EXAMPLE = "23 + 14 = 37\n"        # says what an answer looks like


def problems():
    """All sums of two numbers from 1 to 49, with their answers."""
    numbers = range(1, 50)
    return [{"prompt": f"{EXAMPLE}{a} + {b} =", "answer": str(a + b)} for a in numbers for b in numbers]


def correct(completions, answer, **columns):
    """1 where the completion is the answer, else 0."""
    return [float(said.strip() == wanted) for said, wanted in zip(completions, answer, strict=True)]


def get_config():
    config = default()
    config.model.path = "smollm2"
    config.env.name, config.env.openings = "completion", "configs.arithmetic_grpo.problems"
    config.env.length = 4                 # a space, two digits, the line break
    config.reward.name = "configs.arithmetic_grpo.correct"
    config.policy.kind = "lora"
    config.rl.algorithm = "grpo"
    config.rl.episodes, config.rl.iterations = 64, 24      # 8 problems an iteration, 8 answers each
    # In the loss alone: with the KL in the return, a group that is all right or all wrong has no spread but the KL's,
    # and GRPO would scale that up.
    config.kl.coef, config.kl.placement = 0.02, "loss"
    config.optim.learning_rate = 3e-4
    config.evaluation.episodes = 512
    return config
