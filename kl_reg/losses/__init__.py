"""Policy-gradient losses by name: loss(log_prob, old_log_prob, advantage, hyper) -> [k], over one stream."""
from kl_reg.losses.ppo_clip import ppo_clip
from kl_reg.losses.reinforce import reinforce
from kl_reg.registry import Registry

LOSSES = Registry("rl.loss")
LOSSES.register("ppo_clip", ppo_clip)
LOSSES.register("reinforce", reinforce)
