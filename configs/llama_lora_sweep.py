"""KL coefficients against hard budgets on Llama-3.1-8B, finetuned by LoRA: how much reward a nat buys at that size.

    python -m launch.plan --config=configs/llama_lora_sweep.py --topology=v5e:4x4
    python -m launch.sweep --config=configs/llama_lora_sweep.py --workdir=runs/llama_lora

Planned for 16 chips of a TPU v5e (docs/scaling.md); not run yet. Coefficients and budgets are two programs; members of
one share each pass over the frozen model. The embedded prompts are the beginnings of held-out conversations.
"""
from kl_reg.config import default


def get_config():
    config = default()
    config.model.path, config.model.dtype = "meta-llama/Llama-3.1-8B", "bfloat16"
    config.model.remat = "layers"
    config.env.openings, config.env.opening_tokens = "held_out", 64
    config.env.teacher, config.env.student, config.env.opening = "Alex:", "Kim:", ""
    config.env.length = 128
    config.policy.kind, config.policy.rank, config.policy.alpha = "lora", 16, 32.0
    config.rl.episodes, config.rl.group, config.rl.iterations = 32, 4, 100
    config.optim.learning_rate = 1e-4
    config.evaluation.episodes = 256
    config.sweep = [{"kl.coef": (0.01, 0.03, 0.1, 0.3), "seed": (0, 1)},
                    {"kl.budget": (5.0, 20.0), "seed": (0, 1)}]
    config.parallel.data, config.parallel.tensor = -1, 8
    return config
