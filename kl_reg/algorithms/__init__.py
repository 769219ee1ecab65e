"""Losses and algorithms by name.

A loss is loss(log_prob [k], old_log_prob [k], advantage [k], mask [k], hyper) -> [k], over one stream; outside the mask
its first three are zero, and what it returns there is ignored. An `Algorithm` names a loss, an advantage and a
reduction, with the settings that go with them.
"""
from ml_collections import ConfigDict

from kl_reg.algorithms.algorithm import Algorithm
from kl_reg.algorithms.awr import AWR, awr
from kl_reg.algorithms.cispo import CISPO, cispo
from kl_reg.algorithms.dapo import DAPO
from kl_reg.algorithms.dr_grpo import DR_GRPO
from kl_reg.algorithms.grpo import GRPO
from kl_reg.algorithms.gspo import GSPO, gspo
from kl_reg.algorithms.ppo import PPO, ppo_clip
from kl_reg.algorithms.ppo_dual_clip import PPO_DUAL_CLIP, dual_clip
from kl_reg.algorithms.reinforce import REINFORCE, reinforce
from kl_reg.algorithms.rloo import RLOO
from kl_reg.registry import Registry

LOSSES = Registry("rl.loss", per_token=False)
"""`per_token`: no token's loss depends on another token, so an update need not know all tokens before it differentiates
the first."""
LOSSES.register("awr", awr, per_token=True)
LOSSES.register("cispo", cispo, per_token=True)
LOSSES.register("dual_clip", dual_clip, per_token=True)
LOSSES.register("gspo", gspo)
LOSSES.register("ppo_clip", ppo_clip, per_token=True)
LOSSES.register("reinforce", reinforce, per_token=True)

ALGORITHMS = Registry("rl.algorithm", Algorithm)
ALGORITHMS.register("awr", AWR)
ALGORITHMS.register("cispo", CISPO)
ALGORITHMS.register("dapo", DAPO)
ALGORITHMS.register("dr_grpo", DR_GRPO)
ALGORITHMS.register("grpo", GRPO)
ALGORITHMS.register("gspo", GSPO)
ALGORITHMS.register("ppo", PPO)
ALGORITHMS.register("ppo_dual_clip", PPO_DUAL_CLIP)
ALGORITHMS.register("reinforce", REINFORCE)
ALGORITHMS.register("rloo", RLOO)


def resolve(rl: ConfigDict) -> dict:
    """Settings of `config.rl` that an algorithm has defaults for: each as given, or else as the algorithm has it.

    `clip_high`, where neither gives it, is `clip`.

    Raises:
        ValueError: the algorithm is unknown, or is none.
    """
    out = {name: value if rl[name] is None else rl[name] for name, value in ALGORITHMS[rl.algorithm]._asdict().items()}
    return out | {"clip_high": out["clip"] if out["clip_high"] is None else out["clip_high"]}
