"""REINFORCE leave-one-out."""
from __future__ import annotations

from kl_reg.algorithms.algorithm import Algorithm

RLOO = Algorithm("reinforce", "leave_one_out", "fixed_length", group=4)
r"""A_i = R_i - mean_{j \ne i} R_j over episodes with the same opening, given to each token of episode i.

Distinguishing: no value head and no bias. The sum over tokens, divided by a constant, has on-policy the very gradient
of the expected return (KL penalty included), whatever the lengths. Sources: Kool, van Hoof and Welling (2019), "Buy 4
REINFORCE samples, get a baseline for free!"; Ahmadian et al. (2024), "Back to basics".

Differs from TRL's RLOOTrainer, which clips the ratio of whole sequences as PPO does; here later epochs weigh tokens
with the truncated ratio.
"""
