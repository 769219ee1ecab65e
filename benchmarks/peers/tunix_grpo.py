"""The peer "tunix" of `benchmarks.rl_step`: steps of Tunix's GRPOLearner.

    python -m benchmarks.peers.tunix_grpo SETTINGS.json

SETTINGS.json holds what `work.settings_of` gives. The learner's own loop runs; a step begins when it asks its data for
the next batch. Its Llama 3 class reads the same weights (it has a rope base of its own, which costs the same), its
vanilla rollout a KV cache of the sequences' length; nothing is rematerialised, and no token ends a sequence. "reward"
includes the reference's log-probabilities. Runs in the environment of `tunix.txt`.
"""
from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from tokenizers import Tokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers.stepping import Told

_NO_TOKEN = -1


class _Words:
    """The tokenizer of a folder, as Tunix asks it; it has no special tokens."""

    def __init__(self, folder):
        self._tokenizer = Tokenizer.from_file(str(pathlib.Path(folder, "tokenizer.json")))

    def encode(self, text, **kwargs):
        return self._tokenizer.encode(text).ids

    def decode(self, ids, **kwargs):
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def bos_id(self):
        return None

    def eos_id(self):
        return _NO_TOKEN

    def pad_id(self):
        return _NO_TOKEN


class _Cluster(rl_cluster.RLCluster):
    """Marks where rollout and reward end."""

    told: Told
    said = None

    def generate(self, *args, **kwargs):
        self.said = super().generate(*args, **kwargs)
        self.told.clock.mark("rollout")
        return self.said

    def update_actor(self, train_ds, *args, **kwargs):
        jax.block_until_ready(train_ds)
        self.told.clock.mark("reward")
        super().update_actor(train_ds, *args, **kwargs)


def _norm(cluster):
    """A copy of the last norm's weights, when all weights are there."""
    weights = jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))
    return np.array(weights["final_norm"]["w"][...])


def _batches(settings, told, cluster):
    """A batch of prompts whenever a step is wanted; it is over when the next one is asked for."""
    prompts = settings["prompts"]
    rows = [prompts[i % len(prompts)] for i in range(settings["sequences"] // settings["group"])]
    norm = _norm(cluster)
    while told.wait():
        yield {"prompts": np.array(rows)}
        before, norm = norm, _norm(cluster)
        told.clock.mark("update")
        told.done((cluster.said.left_padded_prompt_tokens != _NO_TOKEN).sum() + sum(map(len, cluster.said.tokens)),
                  np.abs(norm - before).max())


def _model(settings, mesh):
    folder = pathlib.Path(settings["model"])
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = llama.ModelConfig(
        num_layers=found["num_hidden_layers"], vocab_size=found["vocab_size"], embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"], num_heads=found["num_attention_heads"], head_dim=found["head_dim"],
        num_kv_heads=found["num_key_value_heads"], rope_theta=10_000, norm_eps=found["rms_norm_eps"],
        weight_tying=True, remat_config=llama.RematConfig.NONE)
    return params.create_model_from_safe_tensors(str(folder), config, mesh)


def main(settings: dict) -> None:
    """Steps until nobody asks for more."""
    told = Told()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    length = settings["prompt"] + settings["generated"]
    rollout = RolloutConfig(max_tokens_to_generate=settings["generated"], max_prompt_length=settings["prompt"],
                            kv_cache_size=length, temperature=1.0, top_p=1.0, top_k=None, eos_tokens=[_NO_TOKEN])
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(settings["learning_rate"],
                                                                                weight_decay=0.0)),
        eval_every_n_steps=10**6, max_steps=10**6)
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    cluster = _Cluster(
        actor=_model(settings, mesh), reference=_model(settings, mesh), tokenizer=_Words(settings["model"]),
        cluster_config=rl_cluster.ClusterConfig(role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla",
                                                training_config=training, rollout_config=rollout))
    cluster.told = told

    def reward(prompts, completions, **kwargs):
        return [float(ids.mean()) / settings["vocabulary"] for ids in cluster.said.tokens]

    learner = GRPOLearner(cluster, GRPOConfig(num_generations=settings["group"], num_iterations=1,
                                              beta=settings["kl_coef"], kl_loss_mode="low_var_kl"), reward)
    told.ready("google-tunix", "jax", "flax")
    learner.train(_batches(settings, told, cluster))


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
