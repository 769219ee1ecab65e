"""The question of configs/paper_exact.py without what confounds it: a budget that is hard, a student as random as the
base model, and a reward in which silence is neutral.

    python -m launch.plan --config=configs/paper_sound.py --topology=v5e:8x8 --config.parallel.expert=8 \\
        --config.parallel.tensor=-1
    python -m launch.sweep --config=configs/paper_sound.py --workdir=runs/sound
    python -m launch.train --config=configs/paper_sound.py --config.model.path=smollm2 --config.reward.name=vader \\
        --config.rl.iterations=3 --workdir=runs/sound_small

The exact KL is charged and differentiated through, the reference is tilted, the reward is the probability that a reply
is positive, and an empty reply is worth 0.5. docs/paper_setting.md says what follows from each. Not run at
full size.
"""
from configs import paper_exact


def get_config():
    config = paper_exact.get_config()
    config.sampling.student_temperature = None
    config.reward.scale, config.reward.empty = "", 0.5
    config.kl.operation, config.kl.ledger, config.kl.target_floor, config.kl.miss_coef = "tilt", "exact", 0.0, 0.0
    config.policy.actor, config.policy.spend_init = "mlp", 0.05
    return config
