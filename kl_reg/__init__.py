"""RL finetuning of language models under KL regularisation: `kl_reg.train(config, reward_fn=...)`."""
from kl_reg.training.loop import Result, train

__all__ = ["Result", "train"]
