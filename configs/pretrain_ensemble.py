"""Four imitators of the same conversations as the embedded model's, with its shapes and its tokenizer.

    python -m launch.pretrain --config=configs/pretrain_ensemble.py --workdir=runs/pretrain_ensemble

Resumable; writes the model folders runs/ensemble/0 ... 3, each with its card, and runs/ensemble/ensemble.json. Members
differ in seed (initialisation, order of the batches) and in a bootstrap resample of the training conversations.

On two cores a step took 0.94 seconds (mean of 20) and the rest of a member, its card above all, about a minute: by that
an hour for the four.
"""
from configs import pretrain_chitchat


def get_config():
    config = pretrain_chitchat.get_config()      # equal shapes, so that members can be stacked
    config.members = 4
    config.bootstrap = True
    config.output = "runs/ensemble"
    config.tokenizer = "embedded"
    config.steps = 800                           # of 4,096 tokens: nine tenths of an epoch
    return config
