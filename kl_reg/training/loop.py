"""The loop around the pure step: all input and output of a training run."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kl_reg import config as configs
from kl_reg import rewards, storage, validation
from kl_reg.episodes.metrics import objective
from kl_reg.kl import budget
from kl_reg.pretrained import end_tokens, folders, quantize, tokenizer, weights
from kl_reg.runs import checkpoint, lineage
from kl_reg.runs import log as run_log
from kl_reg.runs.fingerprint import name_of
from kl_reg.sampling import rollout
from kl_reg.sharding import mesh as meshes
from kl_reg.sharding import multihost
from kl_reg.training import evaluate, member_groups, scoring
from kl_reg.training.rewarding import Judges, describe, judge_members
from kl_reg.types import Episodes


class Result(NamedTuple):
    """`summary` as in summary.json; `params` of each member, in the sweep's order; the paths of what was written
    (`report` None: not yet); `tokens_per_second` of all members, the median of the iterations that this call ran (None:
    there was none)."""

    summary: list[dict]
    params: list
    workdir: storage.Path
    tokens_per_second: float | None
    report: storage.Path | None = None


def train(config: ConfigDict, reward_fn: Callable | Sequence[Callable] | None = None,
          workdir: str | os.PathLike = "runs/latest", loss_fn: Callable | None = None,
          began: float | None = None, start: str | None = None) -> Result:
    """Trains all members of `config.sweep` (one, if it is empty) and evaluates them and the base.

    Arguments and errors are those of `kl_reg.train`, which writes the report as well.
    """
    began = time.monotonic() if began is None else began
    config, workdir = config.copy_and_resolve_references(), storage.path(workdir)
    weighted, nan, empty = config.reward.weights, config.reward.nan, config.reward.empty
    if reward_fn is not None:                   # whatever else was named is not used
        if not config.reward.gold:
            with config.unlocked():
                config.reward = configs.default().reward
        config.reward.update({"name": "vader", "weights": (), "nan": nan, "empty": empty})
    if loss_fn is not None:
        if any("rl.loss" in member for member in configs.members(config)):
            raise ValueError("loss_fn: the sweep has rl.loss, which it would replace in all members; give one of them")
        config.rl.loss = "reinforce"
    validation.validate(config)
    judges = Judges(_reward(config, reward_fn, weighted),
                    rewards.gold(config.reward), rewards.TrainerState(config.rl.iterations, config.rl.iterations))
    judged = [rewards.digest(reward) for reward in (judges.reward, judges.gold) if reward]
    if reward_fn is not None:
        config.reward.name, config.reward.weights = rewards.sources(judges.reward), weighted
    if loss_fn is not None:
        config.rl.loss = name_of(loss_fn)
    mesh = meshes.mesh_for(config.parallel)
    model, rounding = weights.load(config.model.path, config.model.dtype, meshes.sharding_of(mesh)), None
    if config.model.quantize:
        model, rounding = quantize.convert(model)
        _say(f"model.quantize={config.model.quantize}: {rounding}")
    digest = folders.digest(model.folder)
    origin = lineage.recorded(workdir) if start is None else lineage.open_start(start, config, digest)
    if origin is not None:
        _say(f"from {origin.address}, iteration {origin.iteration}: {', '.join(origin.changes) or 'the same settings'}")
    first = 0 if origin is None else origin.iteration
    groups = member_groups.plan(config, model, loss_fn, mesh, first)
    if groups[0].program.task.env.ends:
        words = tokenizer.load(model.folder)
        _say(f"end tokens: {end_tokens.describe(end_tokens.named(model.folder, words), words)}")
    student = config.env.student_model
    inputs = checkpoint.Inputs(
        digest, judged, [list(group.digests) for group in groups],
        groups[0].program.task.env.digest, folders.digest(folders.find(student)) if student else "",
        [list(group.functions) for group in groups], [] if origin is None else origin.digests)
    resolved = checkpoint.describe(config, inputs, [group.members for group in groups], rounding and rounding.record())
    if origin is not None:
        resolved["from"] = origin.record()
    longer = multihost.first(lambda: checkpoint.claim(workdir, resolved))
    if longer:
        _say(longer)
    states = [group.run.init(model.params, group.seeds, group.hyper) for group in groups]
    saved = checkpoint.Checkpoints(workdir / "checkpoints", resolved, config.checkpoint.keep)
    if origin is not None and saved.latest is None:
        if origin.states is None:               # the run ended before its first checkpoint
            origin = lineage.open_start(origin.address, config, digest, origin.iteration)
        states = [lineage.begin(origin, group.members, state) for group, state in zip(groups, states, strict=True)]
    states = saved.restore(states)
    if mesh is not None:
        _say(meshes.describe(mesh, model.params, states))
    try:
        rates = _iterate(config, groups, states, judges, workdir, saved, began)
    finally:
        saved.close()
    summary = evaluate.evaluate(config, groups, states, model, judges, workdir)
    multihost.first(lambda: storage.write_json(workdir / "summary.json", summary))
    params = {number: jax.tree.map(lambda x, i=i: x[i], state.params)
              for group, state in zip(groups, states, strict=True) for i, number in enumerate(group.members)}
    return Result(summary, [params[number] for number in sorted(params)], workdir,
                  float(np.median(rates)) if rates else None)


def _reward(config, reward_fn, weights):
    if reward_fn is None:
        return rewards.build(config.reward)
    return rewards.of(reward_fn, weights, config.reward.nan)._replace(empty=config.reward.empty)


def _say(text):
    if multihost.writes():
        print(run_log.writable(text, sys.stdout.encoding))


def _iterate(config, groups, states, judges, workdir, saved, start):
    """Runs the iterations that are left; `states` is updated in place, one entry a group. Tokens per second of each."""
    done, total = int(meshes.fetch(states[0].iteration)[0]), groups[0].program.schedule.end
    hypers, rates, late, silent = member_groups.hyper_of(config), [], set(), set()
    logs = [run_log.MemberLog(workdir / f"members/{i}", hyper, done, config.log.tensorboard)
            for i, hyper in enumerate(hypers)] if multihost.writes() else []
    with run_log.progress_bar("train", total, done, multihost.writes()) as bar, \
            run_log.compilations() as compiled:
        if done > groups[0].program.schedule.first:
            bar.log(f"{workdir}: already trained for {done} of {total} iterations")
        for iteration in range(done, total):
            began, before = time.monotonic(), len(compiled)
            state = rewards.TrainerState(iteration, total)
            rows = _iteration(groups, states, judges._replace(state=state))
            seconds = time.monotonic() - began
            if iteration == done:
                bar.log(f"first update after {time.monotonic() - start:.1f} s")
            if iteration > done + 1:
                _tell_compiled(bar, iteration, compiled[before:], late)
            rates.append(sum(row["tokens"] for row in rows.values()) / seconds)
            for number, log in enumerate(logs):
                log.write({"iteration": iteration, **rows[number], "seconds": seconds, "tokens_per_second": rates[-1]})
            _tell_unjudged(bar, iteration, rows, silent)
            shown = {name: np.mean([np.nan if row[name] is None else row[name] for row in rows.values()])
                     for name in ("return", "kl/nats_per_episode")}
            bar.step(**shown, **{"tokens/s": rates[-1]})
            if (iteration + 1) % config.checkpoint.every == 0 or iteration + 1 == total:
                for log in logs:
                    log.flush()
                saved.save(iteration + 1, states)
    for log in logs:
        log.close()
    return rates


def _tell_compiled(bar, iteration, names, told):
    """Says that an iteration compiled what two before it should have, once for each function; `told` is added to."""
    new = sorted(set(names) - told)
    if new:
        told.update(new)
        bar.log(f"iteration {iteration}: {len(names)} compilations, among them {', '.join(new)}; behind the second "
                "iteration nothing should compile (docs/performance.md)")


def _tell_unjudged(bar, iteration, rows, told):
    """Says of which members no reply of the batch was judged, once for each; `told` is added to."""
    new = {number for number, row in rows.items() if row["reward/unjudged_rate"] == 1} - told
    if new:
        told.update(new)
        bar.log(f"iteration {iteration}: no reward function gave a number for any reply of member "
                f"{', '.join(map(str, sorted(new)))}, so nothing was learned from them (docs/rewards.md)")


def _iteration(groups, states, judges):
    """One iteration of all groups; metrics by member. The next group's sampling is dispatched before the reward
    functions are asked about this one's episodes, so that the device samples meanwhile."""
    rows, waiting = {}, _sample(groups[0], states[0])
    for g, group in enumerate(groups):
        batch, waiting = waiting, _sample(groups[g + 1], states[g + 1]) if g + 1 < len(groups) else None
        states[g], new = _update(group, states[g], batch, judges)
        rows.update(new)
    return rows


class _Batch(NamedTuple):
    """Episodes on the device, and the part of them that the host reads, which may still be computed."""

    episodes: Episodes
    said: Episodes


def _hyper_at(group, state):
    """The group's settings at this iteration: budgets may grow (`kl.budget_ramp`)."""
    if not group.program.agent.constrained:
        return group.hyper
    return _ramped(group.program.schedule, group.hyper, state.iteration)


@partial(jax.jit, static_argnums=0)
def _ramped(schedule, hyper, iteration):
    caps = budget.ramped(scoring.caps_of(hyper), hyper.kl_budget_ramp, iteration - schedule.first, schedule.iterations)
    return hyper._replace(kl_budget=caps.episode, kl_turn_budget=caps.turn, kl_token_budget=caps.token)


def _sample(group, state):
    keys = rollout.member_keys(state.seed, state.iteration)
    first = meshes.put_members(np.zeros(len(group.members), np.int32), group.mesh)
    with jax.transfer_guard("disallow"):        # what moves between host and device is said here
        episodes = group.run.draw(state.params, state.reference, _hyper_at(group, state), group.frozen, keys, first,
                                  group.program.algorithm.group)
        return _Batch(episodes, meshes.readable(evaluate.without_features(episodes)))


def _update(group, state, batch, judges):
    """The group's new state, and metrics by member."""
    with jax.transfer_guard("disallow"):
        said = jax.device_get(batch.said)
    judged = judge_members(group.program, judges, [jax.tree.map(lambda x, i=i: x[i], said)
                                                   for i in range(len(group.members))])
    with jax.transfer_guard("disallow"):
        stream, known = (meshes.put_episodes(np.stack([getattr(own.credit, name) for own in judged]), group.mesh)
                         for name in ("stream", "judged"))
        state, parts, extreme, episodes = group.run.update(
            state, _hyper_at(group, state), group.frozen, batch.episodes._replace(judged=known), stream)
        parts, extreme, recorded = meshes.fetch((parts, extreme, episodes))
    rows = [describe(group.program, own, jax.tree.map(lambda x, i=i: x[i], recorded)) for i, own in enumerate(judged)]
    for i, row in enumerate(rows):
        row.update({name: float(value[i]) for name, value in parts.items()})
        bad = [name for name, value in row.items() if value is not None and not np.isfinite(value)]
        if bad:
            raise ValueError(_overflow(group, i, bad, recorded, jax.tree.map(lambda x, i=i: x[i], extreme)))
        row.update(objective(row))
    return state, dict(zip(group.members, rows, strict=True))


def _overflow(group, i, bad, recorded, extreme):
    """Says which member, metric and token."""
    episode, position = int(extreme.episode), int(extreme.position)
    slot = int(recorded.slot[i, episode, position])
    return (f"member {group.members[i]}: {', '.join(bad)} not finite; training stops before it is saved. The most "
            f"extreme token is {int(recorded.action[i, episode, position])}, in slot {slot} of episode {episode}, with "
            f"log pi - log ref = {float(extreme.log_ratio):.4g} nats (k3 and ratios are finite to 80 at least, the "
            "other estimators to 100). A smaller optim.learning_rate usually helps")
