"""The setting of the paper's authors, as their code has it: docs/paper_setting.md, row by row.

    python -m launch.plan --config=configs/paper_exact.py --topology=v5e:8x8 --config.parallel.expert=8 \\
        --config.parallel.tensor=-1
    python -m launch.sweep --config=configs/paper_exact.py --workdir=runs/exact
    python -m launch.train --config=configs/paper_exact.py --config.model.path=smollm2 --config.reward.name=vader \\
        --config.rl.iterations=3 --workdir=runs/exact_small

An arithmetic mixture, a ledger of sampled log-ratios (so the budget is not hard), a student at temperature 0.05, and a
reward that is never between 0.25 and 0.75. Half of the 750 iterations the budget grows; each has about 8,000 tokens of
the agent. Not run at full size. The opening is ours, in the form of theirs.
"""
from kl_reg.config import default

OPENING = """\
These are notes of private lessons, kept to improve later ones. Please do not pass them on.

Student: We have to talk about our lab reports...

Teacher: Yes?

Student: I never know what belongs into the part where the results are discussed.

Teacher: Can you"""


def get_config():
    config = default()
    config.model.path, config.model.dtype, config.model.quantize = "mistralai/Mixtral-8x7B-v0.1", "bfloat16", "int8"
    config.env.opening, config.env.opening_unfinished = OPENING, True
    config.env.opening_tokens = 72              # that the opening has, about; a plan without the tokenizer reads it
    config.env.teacher, config.env.student, config.env.end = "Teacher:", "Student:", "\n\n"
    config.env.markers, config.env.reply_limit, config.env.length = "written", 512, 184     # some 256 with the opening
    config.reward.name, config.reward.scale = "classifier", "signed_confidence"
    config.sampling.student_temperature = 0.05
    config.policy.actor, config.policy.spend_init = "linear", 1 / 17
    config.policy.critic_layers, config.policy.critic_activation = 2, "tanh"
    config.kl.budget, config.kl.operation, config.kl.ledger = 20.0, "mixture", "log_ratio"
    config.kl.target_floor, config.kl.miss_coef, config.kl.budget_ramp = 1e-6, 1.0, 0.5
    config.rl.advantage, config.rl.normalise, config.rl.clip, config.rl.epochs = "monte_carlo", True, 0.1, 8
    config.rl.episodes, config.rl.iterations = 80, 750
    config.rl.entropy_coef, config.rl.value_coef = 1e-4, 0.5
    config.optim.learning_rate, config.optim.value_learning_rate, config.optim.eps = 2e-5, 1e-4, 1e-5
    config.optim.warmup, config.optim.final = 1, 1.0
    config.optim.max_grad_norm, config.optim.policy_grad_norm = None, 0.1
    config.sweep = [{"kl.budget": (10.0, 20.0), "seed": (0, 1, 2)}]
    return config
