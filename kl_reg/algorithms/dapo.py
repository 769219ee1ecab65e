"""Decoupled clip and dynamic sampling policy optimisation: the parts of it that are a loss."""
from __future__ import annotations

from kl_reg.algorithms.grpo import GRPO

DAPO = GRPO._replace(reduction="token_mean", clip_high=0.28)
"""GRPO with more room above than below (0.2 and 0.28), and the mean over all tokens of the batch.

Distinguishing: an unlikely token may grow further before it is clipped, which keeps entropy up; a token of a long
episode counts as much as one of a short. Source: Yu et al. (2025), "DAPO".

Of the paper's four parts two are no part of a loss and are not here: dynamic sampling (groups whose episodes all have
the same return are drawn again; here their advantages are zero, and their tokens count in the mean) and overlong reward
shaping (a reward function's matter).
"""
