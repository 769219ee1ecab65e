"""Trains the embedded base model on human conversation and writes its assets folder; resumes where it stopped.

    python -m launch.pretrain --config=configs/pretrain_chitchat.py [--workdir=runs/pretrain]
"""
import pathlib

from absl import app, flags
from ml_collections import config_flags

from launch import command

CONFIG = config_flags.DEFINE_config_file("config", None, "the model and its training", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/pretrain", "checkpoints; a second call resumes from here")
flags.mark_flag_as_required("config")


def main(argv):
    from kl_reg import pretrain

    print(command.guarded(argv, lambda: pretrain.train(CONFIG.value, pathlib.Path(WORKDIR.value))))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
