"""Four members on the embedded model, 20 seconds each once they are compiled."""
import time

from kl_reg.config import default


def slow_length(prompts, completions, completion_ids, **columns):
    """Longer replies are better; a call takes two seconds, so that there is time to kill a member between them."""
    time.sleep(2)
    return [len(completion) / 10 for completion in completions]


def get_config():
    config = default()
    config.env.opening, config.env.length = "<|start|>A: Hi, how are you?\nB: I am good, how about you?\n", 32
    config.reward.name = "tests.integration.experiment.slow_length"
    config.policy.hidden, config.optim.learning_rate = 8, 2e-3
    config.rl.iterations, config.rl.episodes = 8, 4
    config.evaluation.episodes, config.checkpoint.every, config.checkpoint.keep = 8, 1, 10
    config.log.tensorboard = False
    config.sweep = [{"kl.coef": (0.0, 0.1), "seed": (0, 1)}]
    return config
