"""The embedded base model: a 3.3M-parameter decoder trained on human conversation.

    pip install -e '.[data]' && python -m launch.pretrain --config=configs/pretrain_chitchat.py

Resumable; writes kl_reg/assets/ with a model card that states cost and quality.

Chosen values: Muon at its customary learning rate; a schedule that is constant until it decays, so that an interrupted
run can be resumed with another `steps`; 2,048 tokens, which keep the vocabulary-sized work of every RL step small.
"""
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.members = 1                                     # more: an ensemble, in config.output/0, 1, ...
    config.bootstrap = False                               # each member on its own resample of the conversations
    config.output = "kl_reg/assets"
    config.tokenizer = config_dict.placeholder(str)        # "embedded": the embedded model's; None: trained first
    config.vocab = 2048
    config.width = 256
    config.layers = 4
    config.heads = 4
    config.kv_heads = 2
    config.mlp_width = 640
    config.context = 256
    config.rows = 16
    config.dtype = "bfloat16"
    config.steps = 3800
    config.warmup = 50
    config.decay = 0.4
    config.muon_learning_rate = 0.02
    config.adam_learning_rate = 3e-3
    config.weight_decay = 0.01
    config.eval_every = 200
    return config
