"""Trains base models on human conversation and writes their folders; resumes where it stopped.

    python -m launch.pretrain --config=configs/pretrain_chitchat.py [--workdir=runs/pretrain]

With configs/pretrain_ensemble.py: an ensemble of imitators.
"""
import json
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

from launch import command

CONFIG = config_flags.DEFINE_config_file("config", None, "the model and its training", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/pretrain", "checkpoints; a second call resumes from here")
flags.mark_flag_as_required("config")


def main(argv):
    from kl_reg import storage
    from kl_reg.pretraining import train as pretraining

    call = shlex.join(["python", "-m", "launch.pretrain", *sys.argv[1:]])
    folders = command.guarded(argv, lambda: pretraining.train(
        CONFIG.value, storage.local(WORKDIR.value, "--workdir"), call))
    for folder in folders:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        print(f"{folder}  {card['nats_per_token']:.3f} nats per token, held out")
    if len(folders) > 1:
        print(folders[0].parent / "ensemble.json")


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
