"""Hard KL budgets on SmolLM2-135M: the paper's two, half of the smaller and twice the larger, three seeds each.

    python -m launch.fetch smollm2
    python -m launch.sweep --config=configs/smollm2_budget_sweep.py --workdir=runs/smollm2_budgets \\
        --backend=slurm --minutes=240 --gpus=1 --members_per_job=3

The experiment of configs/smollm2_teacher.py with longer conversations, larger batches and more iterations. The twelve
members differ in budget and seed alone, so that without --members_per_job one program trains all of them. It has not
been run at full length: it is made for an accelerator.
"""
from configs import smollm2_teacher


def get_config():
    config = smollm2_teacher.get_config()
    config.kl.budget = None
    config.sweep = [{"kl.budget": (5.0, 10.0, 20.0, 40.0), "seed": (0, 1, 2)}]
    config.env.length = 256
    config.rl.episodes, config.rl.iterations = 32, 100
    config.evaluation.episodes = 256
    return config
