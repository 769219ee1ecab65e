"""Rewards by name: plain functions fn(prompts, completions, completion_ids, **columns) -> list[float | None]."""
from kl_reg.registry import Registry
from kl_reg.rewards.vader import vader

REWARDS = Registry("reward.name")
REWARDS.register("vader", vader)
