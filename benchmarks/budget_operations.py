"""Which operation of the hard budget trains better: the exponential tilt beside the arithmetic mixture.

    python -m benchmarks.budget_operations [--seeds 5] [--json FILE]

The three tasks of `optimality.py`, language models of 8 tokens that write 4, under budgets of 0.5 and 2 nats per
episode. Both operations train the same agents from the same seeds, at three learning rates each; what an operation
reaches is that of its best rate, as the means over seeds choose it. "gain" is (R(pi) - R(beta)) / (R(best) - R(beta)),
R the expected reward and "best" the enumerated optimum under the same budget, which is the same for both. It is
measured on 4,096 episodes a policy. About ten minutes on two cores.
"""
from __future__ import annotations

import pathlib
import tempfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import machine, optimality
from benchmarks.optimality import HORIZON, SEQUENCES, VOCAB
from kl_reg import config as configs
from kl_reg import validation
from kl_reg.analysis.optimum.enumeration import Tree, enumerate_model, evaluate
from kl_reg.analysis.optimum.hard_budget import hard_budget
from kl_reg.envs.tabular import make_model
from kl_reg.kl.operations import OPERATIONS
from kl_reg.pretrained import weights
from kl_reg.runs import log as run_log
from kl_reg.sampling import rollout
from kl_reg.training import member_groups

BUDGETS, RATES = (0.5, 2.0), (1e-3, 3e-3, 1e-2)
ITERATIONS, EPISODES, BATCHES = 150, 128, 32        # of training; then so many batches measure a policy


class Member(NamedTuple):
    """One agent."""

    task: str
    budget: float
    rate: float
    seed: int


def experiment(folder: pathlib.Path, operation: str, members: list[Member], iterations: int) -> ConfigDict:
    """One program of all members: REINFORCE on all weights, the exact ledger differentiated through."""
    config = configs.default()
    config.model.path, config.policy.kind, config.rl.algorithm = str(folder), "full", "reinforce"
    config.env.update({"name": "tabular", "opening": "a", "length": HORIZON})
    config.rl.update({"iterations": iterations, "episodes": EPISODES, "epochs": 1, "minibatches": 4})
    config.kl.coef, config.kl.operation, config.optim.final = 0.0, operation, 0.0
    config.sweep = [{"kl.budget": (member.budget,), "optim.learning_rate": (member.rate,), "seed": (member.seed,)}
                    for member in members]
    validation.validate(config)
    return config


def earned(group: member_groups.Group, params, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expected reward [m], nats on the dearest path [m]) of each policy, of episodes that training has not seen."""
    place, rewards, nats = VOCAB ** np.arange(HORIZON)[::-1], [], []
    first, state = jnp.zeros(len(tables), jnp.int32), group.run.init(group.frozen.base, group.seeds, group.hyper)
    for batch in range(BATCHES):
        keys = rollout.member_keys(state.seed, jnp.full_like(state.iteration, 10**6 + batch))
        episodes = group.run.sample(params, state.reference, group.hyper, group.frozen, keys, first)
        rewards.append(np.take_along_axis(tables, np.asarray(episodes.action) @ place, axis=1))
        nats.append(np.asarray(jnp.where(episodes.mask, episodes.kl, 0.0).sum(-1)))
    return np.concatenate(rewards, 1).mean(1), np.concatenate(nats, 1).max(1)


def measure(seeds: int, iterations: int = ITERATIONS) -> list[dict]:
    """A row an agent: its operation, what it is, its gain, and the part of the budget that its dearest path spent."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        make_model(folder, VOCAB, 0)
        model = weights.load(str(folder))
        empty = enumerate_model(model.config, model.params, (0,), HORIZON, np.zeros(SEQUENCES))
        tasks = optimality.make_tasks(empty.log_base)
        members = [Member(task, budget, rate, len(tasks) * seed + i) for i, task in enumerate(tasks)
                   for budget in BUDGETS for rate in RATES for seed in range(seeds)]
        bounds = {(task, budget): _bounds(empty._replace(reward=tasks[task].reward), budget)
                  for task in tasks for budget in BUDGETS}
        tables, rows = np.stack([tasks[member.task].reward for member in members]), []
        with run_log.progress_bar("budget operations", len(OPERATIONS.names())) as bar:
            for operation in OPERATIONS.names():
                group, params = optimality.train(experiment(folder, operation, members, iterations), model, tables)
                for member, reward, nats in zip(members, *earned(group, params, tables), strict=True):
                    base, best = bounds[member.task, member.budget]
                    gain = float((reward - base) / (best - base))
                    rows.append({"operation": operation, **member._asdict(), "gain": gain,
                                 "spent": float(nats / member.budget)})
                bar.step()
    return rows


def _bounds(tree: Tree, nats: float) -> tuple[float, float]:
    """Rewards of the base and of the best policy under the budget."""
    return evaluate(tree, tree.log_base)[0], hard_budget(tree, nats).reward


def best_rates(rows: list[dict]) -> list[dict]:
    """For each task, budget and operation: the rate of the largest mean gain, that mean and its standard error over
    seeds, and the gains [seeds]."""
    best = []
    for task, budget, operation in sorted({(row["task"], row["budget"], row["operation"]) for row in rows}):
        own = [row for row in rows if (row["task"], row["budget"], row["operation"]) == (task, budget, operation)]
        gains = {rate: [row["gain"] for row in own if row["rate"] == rate] for rate in {row["rate"] for row in own}}
        rate = max(gains, key=lambda rate: np.mean(gains[rate]))
        best.append({"task": task, "budget": budget, "operation": operation, "rate": rate, "gains": gains[rate],
                     "gain": float(np.mean(gains[rate])),
                     "se": float(np.std(gains[rate], ddof=1) / np.sqrt(len(gains[rate])))})
    return best


def report(result: dict) -> str:
    """The operations side by side."""
    best = {(row["task"], row["budget"], row["operation"]): row for row in best_rates(result["rows"])}
    names = OPERATIONS.names()
    rows = []
    for task, budget in dict.fromkeys((task, budget) for task, budget, _ in best):
        own = [best[task, budget, name] for name in names]
        rows.append([f"{task}, {budget} nats", *(f"{row['gain']:.1%} ± {row['se']:.1%}" for row in own),
                     *(f"{row['rate']:g}" for row in own)])
    columns = ("", *(f"{name}: gain" for name in names), *(f"{name}: rate" for name in names))
    most = max(row["spent"] for row in result["rows"])
    return "\n".join([f"Gain in reward over the base, of that of the best policy under the budget, ± over "
                      f"{result['seeds']} seeds; {machine.ran(result)}.", "", machine.table(columns, rows), "",
                      f"The dearest path of any policy spent {most:.4f} of its budget."])


def main(argv=None):
    parser = machine.benchmark(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of each agent, at least 2")
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"--seeds={options.seeds} must be at least 2, for a standard error")
    result = {"seeds": options.seeds, "rows": measure(options.seeds), "machine": machine.about(),
              "versions": machine.versions()}
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
