"""kl_reg's own trainer for the benchmarks: one program, phase by phase, as `training.loop` runs it."""
from __future__ import annotations

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.peers.stepping import Clock
from kl_reg import config as configs
from kl_reg import rewards, validation
from kl_reg.pretrained import weights
from kl_reg.sampling import rollout
from kl_reg.training import member_groups
from kl_reg.training.rewarding import Judges, judge
from kl_reg.types import Episodes


def experiment(settings: dict, **changes) -> ConfigDict:
    """Completions of fixed length, because nothing ends them, as a configuration.

    Args:
        settings: as `work.settings_of` gives them.
        changes: further settings, with __ for the dot.
    """
    file = pathlib.Path(settings["scratch"]) / "prompts.txt"
    file.write_text("\n".join(settings["prompts"]) + "\n", encoding="utf-8")
    config = configs.default()
    config.update_from_flattened_dict({
        "model.path": settings["model"], "env.name": "completion", "env.openings": str(file), "env.end": "",
        "env.length": settings["generated"], "env.opening_tokens": settings["prompt"], "rl.group": settings["group"],
        "rl.episodes": settings["sequences"], "kl.coef": settings["kl_coef"],
        "optim.learning_rate": settings["learning_rate"], "optim.warmup": 1, "optim.final": 1.0,
        **{name.replace("__", "."): value for name, value in changes.items() if name != "sweep"}})
    if "sweep" in changes:
        config.sweep = changes["sweep"]
    validation.validate(config)
    return config


class Trainer:
    """The one program of a configuration. The reward of a completion is the mean of its token ids over `vocabulary`."""

    def __init__(self, config: ConfigDict, vocabulary: int):
        model = weights.load(config.model.path, config.model.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "env.end=''")         # all completions are to have one length
            (self.group,) = member_groups.plan(config, model)
        self.state = self.group.run.init(model.params, self.group.seeds, self.group.hyper)

        def mean_id(completion_ids, **columns):
            return [sum(ids) / len(ids) / vocabulary for ids in completion_ids]

        self._judges = Judges(rewards.of(mean_id), None)

    def rollout(self) -> Episodes:
        """Episodes of all members [m, b, ...], drawn on the device."""
        state, group = self.state, self.group
        keys, first = rollout.member_keys(state.seed, state.iteration), jnp.zeros(len(group.members), jnp.int32)
        return jax.block_until_ready(group.run.draw(state.params, state.reference, group.hyper, group.frozen, keys,
                                                    first, group.program.algorithm.group))

    def reward(self, episodes: Episodes) -> jax.Array:
        """The rewards of the agent streams [m, b, k]."""
        recorded = jax.device_get(episodes._replace(features=(), reference=(), allowed=None))
        members = [jax.tree.map(lambda x, i=i: x[i], recorded) for i in range(len(self.group.members))]
        return jnp.asarray(np.stack([judge(self.group.program, self._judges, own).credit.stream for own in members]))

    def update(self, episodes: Episodes, stream: jax.Array) -> None:
        """Takes the step; done when the metrics are on the host and the new state is on the device."""
        self.state, *said = self.group.run.update(self.state, self.group.hyper, self.group.frozen, episodes, stream)
        jax.block_until_ready((self.state, jax.device_get(said)))

    def iterate(self) -> tuple[dict[str, float], Episodes]:
        """One iteration: seconds of its phases, and what was sampled."""
        clock = Clock()
        episodes = self.rollout()
        clock.mark("rollout")
        stream = self.reward(episodes)
        clock.mark("reward")
        self.update(episodes, stream)
        clock.mark("update")
        return clock.seconds, episodes
