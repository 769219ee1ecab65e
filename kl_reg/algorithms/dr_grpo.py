"""GRPO done right."""
from __future__ import annotations

from kl_reg.algorithms.algorithm import Algorithm

DR_GRPO = Algorithm("ppo_clip", "group_mean", "fixed_length", group=8)
r"""A_i = R_i - mean R over episodes with the same opening, PPO's clip; the sum over tokens, divided by a constant.

Distinguishing: without the deviation and the episode's own length there is nothing left that favours some openings or
some lengths. On-policy the gradient is (g - 1) / g of that of the expected return, because an episode is part of its
own baseline; `rloo` leaves it out. Source: Liu et al. (2025), "Understanding R1-Zero-like training".

The constant is episodes times the longest stream that the environment allows, as in TRL (`max_completion_length`).
"""
