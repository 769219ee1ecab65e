"""The evaluation of a run: fresh episodes of every member and of the base, and their metrics."""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import storage
from kl_reg.episodes.metrics import ledger, pooled
from kl_reg.pretrained import weights
from kl_reg.runs import log as run_log
from kl_reg.sampling import rollout
from kl_reg.sharding import mesh as meshes
from kl_reg.sharding import multihost
from kl_reg.training import member_groups
from kl_reg.training.rewarding import Judges, describe, judge
from kl_reg.types import Episodes


def evaluate(config: ConfigDict, groups: Sequence[member_groups.Group], states: Sequence, model: weights.Model,
             judges: Judges, workdir: storage.Path) -> list[dict]:
    """Evaluates the base and every member; writes evaluation.npz of each and returns the summary's rows.

    An episode is drawn with a key of `evaluation.seed`, the member's seed and the episode's index: members that differ
    in other settings are compared on the same random numbers, and the errors of different seeds are independent. The
    base is evaluated on the keys of every seed.
    """
    hypers, rows = member_groups.hyper_of(config), {}
    with run_log.progress_bar("evaluate", len(groups) + 1, shown=multihost.writes()) as bar:
        plain = member_groups.base_group(groups, config, model)
        rows["base"] = _evaluate_base(config, plain, model, judges, workdir / "members/base")
        bar.step()
        for group, state in zip(groups, states, strict=True):
            seeds = [hypers[number]["seed"] for number in group.members]
            episodes = _sample_members(config, group, state, seeds)
            for i, number in enumerate(group.members):
                folder = workdir / f"members/{number}"
                final, arrays = _final(group, jax.tree.map(lambda x, i=i: x[i], episodes), judges, seeds[i])
                _write(folder, arrays)
                rows[number] = {"member": number, "hyper": hypers[number], "final": final,
                                "best": multihost.first(partial(run_log.best, folder / "metrics.jsonl"))}
            bar.step()
    return [rows[key] for key in sorted(rows, key=lambda key: -1 if key == "base" else key)]


def seeds_of(config: ConfigDict) -> list[int]:
    """The different seeds of a sweep's members, in the order of the members."""
    return list(dict.fromkeys(row["seed"] for row in member_groups.hyper_of(config)))


def _evaluate_base(config, group, model, judges, folder):
    """The base's row: `final` is over the episodes of all seeds, `by_seed` has the same of each seed's."""
    episodes, finals, parts = _sample_base(config, group, model.params), {}, []
    for seed, own in episodes.items():
        finals[str(seed)], arrays = _final(group, own, judges, seed)
        parts.append(arrays)
    _write(folder, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return {"member": "base", "hyper": {}, "final": pooled(list(finals.values())), "by_seed": finals}


def _sample_members(config, group, state, seeds):
    """`evaluation.episodes` of each member [m, count, ...], in batches of the size that training compiled."""
    count, size = config.evaluation.episodes, group.program.schedule.episodes
    parts = [_sample(config, group, state, seeds, [first] * len(seeds)) for first in range(0, count, size)]
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :count], *parts)


def _sample_base(config, group, base):
    """The base's episodes [count, ...] by seed. Untrained members are the base; each samples another batch."""
    count, size, members = config.evaluation.episodes, group.program.schedule.episodes, len(group.members)
    fresh, seeds, parts = group.run.init(base, group.seeds, group.hyper), seeds_of(config), []
    batches = [(seed, first) for seed in seeds for first in range(0, count, size)]
    for begin in range(0, len(batches), members):
        chosen = (batches[begin:begin + members] + [batches[-1]] * members)[:members]
        sampled = _sample(config, group, fresh, *zip(*chosen, strict=True))
        parts += [jax.tree.map(lambda x, i=i: x[i], sampled) for i in range(members)]
    each = math.ceil(count / size)
    return {seed: jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts[i * each:(i + 1) * each])
            for i, seed in enumerate(seeds)}


def _sample(config, group, state, seeds, first):
    """A batch of each member [m, b, ...] on the host: episodes `first`, `first` + 1, ... of these seeds."""
    evaluation = np.full(len(seeds), config.evaluation.seed)
    evaluation, seeds, first = meshes.put_members(
        tuple(np.array(x, np.int32) for x in (evaluation, seeds, first)), group.mesh)
    keys = rollout.evaluation_keys(evaluation, seeds)
    return meshes.fetch(without_features(group.run.sample(state.params, state.reference, group.hyper, group.frozen,
                                                            keys, first)))


def without_features(episodes: Episodes) -> Episodes:
    """The episodes without what the models read, for the host."""
    return episodes._replace(features=(), reference=(), allowed=None)


def _final(group, episodes, judges, seed):
    """Metrics of one policy's evaluation episodes [b, ...], drawn with this seed's keys, and what is stored of them."""
    transcript, judged = episodes.transcript, judge(group.program, judges, episodes)
    row, returns = describe(group.program, judged, episodes), judged.credit.returns
    arrays = {"tokens": transcript.tokens, "roles": transcript.roles.astype(np.int8), "turns": transcript.turns,
              "openings": transcript.opening, "returns": returns, "seeds": np.full(len(returns), seed, np.int32)}
    return row | {"episodes": len(returns)}, arrays | ledger(episodes)


def _write(folder, arrays):
    if multihost.writes():
        storage.write_arrays(folder / "evaluation.npz", arrays)
