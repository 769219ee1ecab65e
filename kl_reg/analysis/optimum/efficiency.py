"""How far the policies of a run are from the best that any policy could do at their KL: `python -m launch.optimal`.

The optimum is estimated from what the base and the members themselves say (`tilted.py`): their samples, weighted.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kl_reg import rewards
from kl_reg.analysis.compare import compare
from kl_reg.analysis.compare import policies as compared
from kl_reg.analysis.compare.divergence import log_prob
from kl_reg.analysis.optimum.best_of_n import best_of_n
from kl_reg.analysis.optimum.exact import efficiency
from kl_reg.analysis.optimum.importance import Tilted, expected_budget, importance_frontier
from kl_reg.rewards import Reward, replies
from kl_reg.runs import directory as run_directory
from kl_reg.runs import log as run_log
from kl_reg.types import AGENT, OPENING, Episodes

_BATCH = 128        # episodes that are sampled at a time
_POINTS = 60        # of the frontier, before those with too few effective samples are left out
_SMALLEST = 0.01    # coefficient, in standard deviations of the base's reward per nat


class Spoken(NamedTuple):
    """The judged episodes of one policy: `rewards` and log-probabilities of the base [b], nats; `kl` [b], exact, of the
    path."""

    episodes: Episodes
    rewards: Float[np.ndarray, " b"]
    log_base: Float[np.ndarray, " b"]
    kl: Float[np.ndarray, " b"]


def measure(name: str, episodes: int, seed: int | None = None, least: float = 100.0, beside: Sequence[str] = ()
            ) -> dict:
    """Frontier, members, best-of-n and, for each hard budget of the members, the most that policies can do whose
    *expected* KL is at most that (left out where there are too few samples); as docs/optimum.md has them.

    Args:
        name: RUN[:MEMBER][@ITERATION].
        episodes: of the base and of each member.
        seed: of the sampling; None: that of the run's evaluation.
        least: points of the frontier with fewer effective samples are left out.
        beside: models of the same vocabulary, as `model.path`, that are held against the frontier, too.

    Raises:
        ValueError: no run, or another vocabulary; somebody else than the agent writes in its episodes; KL is not
            measured to the base; a member draws how much it spends, so that no one knows how likely its episodes are;
            or no point has samples enough.
        FileNotFoundError: there is no such checkpoint.
    """
    address = run_directory.parse(name)
    if address is None:
        raise ValueError(f"{name!r} is no run as RUN[:MEMBER][@ITERATION]: there is no config.json of a run")
    base, side = compared.open_sides(("base", name), "run", min(episodes, _BATCH))
    side = compared.load(side, address.iteration)
    _check(side)
    seed = side.config.evaluation.seed if seed is None else seed
    reward, parts = rewards.build(side.config.reward), []
    others = [compared.open_sides((path, name), "run", min(episodes, _BATCH))[0].teams[0] for path in beside]
    teams = [*side.teams, *others]
    with run_log.progress_bar("optimal", 1 + len(teams) + sum(len(team.numbers) for team in teams)) as bar:
        for team in (base.teams[0], *teams):
            # Each with keys of its own: policies near each other would say the same, and count as many samples.
            first = seed + len(parts)
            parts += _speak(team, reward, episodes, [(first + i) % 2**31 for i in range(len(team.numbers))])
            bar.step()
        key = compared.keys_of(base.teams[0], seed)[0]         # nothing is drawn any more
        under = [np.concatenate([part.log_base for part in parts])]
        for team in teams:
            read = jax.jit(partial(log_prob, team.program))
            for i in range(len(team.numbers)):
                function = partial(read, compare.writer_of(team, i))
                under.append(np.concatenate([np.float64(compare.batched(function, part.episodes.transcript, key))
                                             for part in parts]))
                bar.step()
    return {"run": name, "iteration": side.iteration, "episodes": episodes, "seed": seed, "least": least,
            **_report([*_members(side), *map(_model, beside)], parts, np.stack(under), least)}


def _check(side):
    for team in side.teams:
        if not team.program.agent.reference.is_base:
            raise ValueError(f"{side.name}: reference.name={side.config.reference.name!r}; the optimum is that of "
                             "KL to the base model")
        if team.program.algorithm.kl.config.drawn:
            raise ValueError(f"{side.name}: with kl.spend='sampled' the probability of an episode is not known")


def _members(side):
    """Who they are, in the order of their teams."""
    for number in (number for team in side.teams for number in team.numbers):
        setting, hyper = compare.setting_of(side.address.workdir, number)
        yield {"member": number, "title": f"{setting.label}, seed {hyper['seed']}", "hyper": hyper}


def _model(path):
    return {"member": None, "title": path, "hyper": {}}


def _speak(team: compared.Team, reward: Reward, count, seeds):
    """What each policy of a team says."""
    whole, out = compared.sample(team, count, seeds), []
    for i in range(len(team.numbers)):
        own = jax.tree.map(lambda x, i=i: x[i], whole)
        roles = own.transcript.roles
        if not ((roles <= OPENING) | (roles == AGENT)).all():
            raise ValueError("somebody else than the agent writes in these episodes; with a student, what the best "
                             "policy is worth cannot be weighed from samples (env.name='completion' has none)")
        turns = team.program.task.env.read(own.transcript)
        credit = replies.credit(turns, rewards.score(reward, turns), own.slot, own.mask)
        if not credit.judged.any():
            raise ValueError("no reward function gave a number for any episode of a policy, so nothing is known of its "
                             "reward")
        own, returns = jax.tree.map(lambda x, known=credit.judged: x[known], (own, credit.returns))
        total = lambda x, own=own: np.where(own.mask, x, 0.0).sum(1, dtype=np.float64)  # noqa: E731
        out.append(Spoken(own, np.float64(returns), total(own.log_prob) - total(own.log_ratio), total(own.kl)))
    return out


def _report(names, parts, under, least):
    at, spread = _optimum(parts, under), max(float(parts[0].rewards.std()), 1e-12)
    points = _frontier(at, spread, least, parts)
    kl, best = np.array([point.kl for point in points]), np.array([point.reward for point in points])
    members = []
    for name, part in zip(names, parts[1:], strict=True):
        own = name | {"reward": part.rewards.mean(), "reward_se": _error(part.rewards), "kl": part.kl.mean(),
                      "kl_se": _error(part.kl)}
        closest = points[int(np.abs(kl - own["kl"]).argmin())]
        members.append({key: _plain(value) for key, value in own.items()} | {
            "best_reward": _plain(np.interp(own["kl"], kl, best) if own["kl"] <= kl.max() else np.nan),
            "efficiency": _plain(efficiency(kl, best, own["kl"], own["reward"])), "ess": _plain(closest.ess)})
    budgets = sorted({member["hyper"]["kl.budget"] for member in members if member["hyper"]} - {None, 0.0})
    bounds = [(nats, expected_budget(at, nats, spread * _SMALLEST)) for nats in budgets]
    return {"base_reward": _plain(parts[0].rewards.mean()), "frontier": [_row(point) for point in points],
            "members": members, "best_of_n": _best_of(parts[0]),
            "budgets": [{"nats": nats, **_row(point)} for nats, point in bounds if point.ess >= least]}


def _optimum(parts, under):
    """The optimum's point at a coefficient. Each prompt has an optimum of its own; together they weigh as they were
    drawn, as the policies' means do."""
    reward = np.concatenate([part.rewards for part in parts])
    prompt = np.concatenate([part.episodes.transcript.opening for part in parts])
    policy = np.repeat(np.arange(len(parts)), [len(part.rewards) for part in parts])
    groups = [np.flatnonzero(prompt == label) for label in np.unique(prompt)]
    counts = [np.bincount(policy[rows], minlength=len(parts)) for rows in groups]
    weight = np.array([len(rows) for rows in groups]) / len(prompt)

    def at(lam: float) -> Tilted:
        same = [importance_frontier(reward[rows], under[0][rows], under[:, rows], count, np.array([lam]), least=0.0)[0]
                for rows, count in zip(groups, counts, strict=True)]
        column = {key: np.array([getattr(point, key) for point in same]) for key in Tilted._fields}
        mean = lambda values: float((weight * values).sum())  # noqa: E731
        error = lambda values: float(np.sqrt(((weight * values) ** 2).sum()))  # noqa: E731
        return Tilted(float(lam), mean(column["reward"]), error(column["reward_se"]), mean(column["kl"]),
                      error(column["kl_se"]), float(column["ess"].min()))

    return at


def _frontier(at, spread, least, parts):
    """Its points with samples enough."""
    points = [at(lam) for lam in (math.inf, *(spread * np.geomspace(30, _SMALLEST, _POINTS)))]
    kept = [point for point in points if point.ess >= least]
    if not kept:
        prompts = np.unique(np.concatenate([part.episodes.transcript.opening for part in parts]))
        raise ValueError(f"no point of the frontier has {least:g} effective samples: {len(prompts)} prompts share "
                         f"{sum(len(part.rewards) for part in parts)} episodes, and each prompt needs its own; the "
                         f"most is {max(point.ess for point in points):.0f}. Take more episodes, or a smaller least")
    return kept


def _row(point):
    return {key: _plain(value) for key, value in point._asdict().items()}


def _error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


def _plain(value):
    """As JSON has it: NaN and infinity, which is a coefficient at which nothing changes, are null."""
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _best_of(base):
    """Of 2, 4, 8, ... base samples to each prompt, as far as there are four times as many."""
    openings = base.episodes.transcript.opening
    each = [base.rewards[openings == number] for number in np.unique(openings)]
    count = min(map(len, each))
    table = np.stack([own[:count] for own in each])
    ns = [2**i for i in range(1, 12) if 4 * 2**i <= count]
    return [{key: _plain(value) for key, value in best_of_n(table, n)._asdict().items()} for n in ns]
