"""Group-relative policy optimisation."""
from __future__ import annotations

from kl_reg.algorithms.algorithm import Algorithm

GRPO = Algorithm("ppo_clip", "group", "sequence_mean", group=8)
r"""A_i = (R_i - mean R) / (std R + 1e-4) over episodes with the same opening, PPO's clip, each episode's mean alike.

Distinguishing: no value head; a group's spread is taken out, so openings on which the policy is nearly always right or
wrong weigh as much as others. It does not descend the expected return: with two episodes a group it is the probability
of beating another episode, less that of losing to it. Source: Shao et al. (2024), "DeepSeekMath".

Differs from the paper and from TRL: the KL is what `config.kl` says, and a KL in the loss is divided by the group's
deviation too, so that it keeps its price in reward units; 1 / deviation is at most 100 (`advantages.CEILING`). The
paper's KL is kl.estimator="k3", kl.placement="loss", which descends the other direction (docs/kl.md); TRL has
"k3_weighted" since 1.10. "group_batch" and "group_mean" are its scale_rewards="batch" and "none".
"""
