"""wip"""
from configs import smollm2_teacher


def get_config():
    config = smollm2_teacher.get_config()
    config.model.path, config.model.dtype = "mistralai/Mixtral-8x7B-v0.1", "bfloat16"
    config.model.copies = False
    config.rl.episodes = 64
    return config
