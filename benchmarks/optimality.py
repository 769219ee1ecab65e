"""How near each algorithm comes to the exact optimum of KL-regularised RL: three small tasks that can be enumerated.

    python -m benchmarks.optimality [--parts tabular completion] [--seed 0] [--workdir DIR] [--out benchmarks/results]

A random language model of 8 tokens writes episodes of 4. Every algorithm finetunes all its weights on J = reward - lam
KL; what the policy says is then read at all histories and evaluated without sampling, beside the base, J(beta), and
pi* ∝ beta e^{reward / lam}, J(pi*). "gap closed" is (J(pi) - J(beta)) / (J(pi*) - J(beta)), "efficiency" the KL of the
best policy with the same reward over the learned policy's. About 5 minutes on two cores (--parts tabular). The other
part, `completion_frontier.py`, holds policies on a real model, and those of another trainer, against the optimum;
that trainer runs in an environment of its own, made at first use. Exits with 1 where a limit is missed.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich import box
from rich.console import Console, Group
from rich.table import Table

from benchmarks import completion_frontier, machine
from kl_reg import config as configs
from kl_reg import validation
from kl_reg.algorithms import ALGORITHMS
from kl_reg.analysis.optimum.enumeration import Tree, enumerate_model, evaluate, tokens_of
from kl_reg.analysis.optimum.exact import efficiency, frontier, soft_optimum
from kl_reg.analysis.optimum.policy_tables import policy_tables
from kl_reg.envs.tabular import make_model
from kl_reg.pretrained import weights
from kl_reg.runs import log as run_log
from kl_reg.sampling import rollout
from kl_reg.training import member_groups

VOCAB, HORIZON = 8, 4
SEQUENCES = VOCAB**HORIZON

SAMPLED = {"kl.estimator": "k1", "kl.placement": "reward", "rl.iterations": 200, "rl.episodes": 256,
           "optim.learning_rate": 3e-3}
EXACT = {"kl.estimator": "exact", "kl.placement": "full", "rl.iterations": 400, "rl.episodes": 512,
         "optim.learning_rate": 1.5e-3}
"""At the optimum reward - lam L is the same for every episode, so with k1 in the reward the gradient's noise vanishes
there; the exact KL leaves that of the reward, and needs more episodes and smaller steps."""

SHARED = {"rl.epochs": 1, "rl.minibatches": 4, "optim.final": 0.0}
GROUP = {"rl.group": 64}
"""As in the GRPO paper. Among 8 a rare success counts at most 7 / sqrt(8) = 2.5 deviations, where those of the whole
batch would be 5, and two of six seeds of "grpo" stay with the easy reward of "deceptive"."""

OWN = {"awr": {"rl.temperature": 0.2}, "cispo": GROUP, "dapo": GROUP, "dr_grpo": GROUP, "grpo": GROUP,
       "gspo": GROUP | {"rl.minibatches": 1}, "ppo": {}, "ppo_dual_clip": {}, "reinforce": {}, "rloo": GROUP}
"""Of each algorithm; the rest is as it has it. One update moves nearly every episode's ratio beyond the clip of "gspo",
3e-4, so it makes one of each batch."""


class Task(NamedTuple):
    """Reward of every sequence [v**h], in the tree's order, and its price of a nat."""

    reward: np.ndarray
    lam: float


class Run(NamedTuple):
    """One program: an algorithm, its settings, and the part of the gap that it has to close on each task."""

    algorithm: str
    settings: dict
    limit: float


RUNS = (*(Run(name, SHARED | SAMPLED | OWN[name], 0.95) for name in ALGORITHMS.names()),
        *(Run(name, SHARED | EXACT | OWN[name], 0.98) for name in ("reinforce", "rloo", "ppo")))


def sequence_probs(log_policy) -> np.ndarray:
    """Of all sequences [v**h], from tables of log-probabilities."""
    log_probs = np.zeros(1)
    for table in log_policy:
        log_probs = (log_probs[:, None] + table).reshape(-1)
    return np.exp(log_probs)


def make_tasks(log_base) -> dict[str, Task]:
    """Three kinds of reward, at most of the order of 1.

    dense: every token and every pair of neighbours pays. sparse: one sequence pays, the rarest that the base writes
    with probability 0.5 % at least. deceptive: each token but b, d and f pays a little, and what is of these three
    alone, one episode of the base in 60, far more (Deb and Goldberg, 1993, "Analyzing deception in trap functions").
    """
    tokens, probs = tokens_of(np.arange(SEQUENCES), VOCAB, HORIZON), sequence_probs(log_base)
    random = np.random.default_rng(0)
    own, pairs = random.normal(size=(HORIZON, VOCAB)), random.normal(size=(VOCAB, VOCAB))
    dense = (own[np.arange(HORIZON), tokens].sum(1) + pairs[tokens[:, :-1], tokens[:, 1:]].sum(1)) / np.sqrt(7)
    sparse = np.arange(SEQUENCES) == np.where(probs >= 0.005, probs, np.inf).argmin()
    rare = np.isin(tokens, (1, 3, 5)).sum(1)
    deceptive = np.where(rare == HORIZON, 1.0, 0.4 * (HORIZON - 1 - rare) / (HORIZON - 1))
    return {"dense": Task(dense, 0.3), "sparse": Task(sparse.astype(float), 0.125), "deceptive": Task(deceptive, 0.1)}


def experiment(folder: pathlib.Path, run: Run, tasks: dict[str, Task], seed: int) -> ConfigDict:
    """Its configuration: one member a task, all in one program."""
    config = configs.default()
    config.model.path, config.policy.kind, config.rl.algorithm = str(folder), "full", run.algorithm
    config.env.update({"name": "tabular", "opening": "a", "length": HORIZON})
    config.update_from_flattened_dict(run.settings)
    config.sweep = [{"kl.coef": (task.lam,), "seed": (len(tasks) * seed + i,)} for i, task in enumerate(tasks.values())]
    validation.validate(config)
    return config


def train(config: ConfigDict, model: weights.Model, tables: np.ndarray) -> tuple[member_groups.Group, object]:
    """Trains all members, each on its own table [m, v**h]; their program and parameters [m, ...]."""
    (group,) = member_groups.plan(config, model)
    tables, place = jnp.asarray(tables, jnp.float32), jnp.asarray(VOCAB ** np.arange(HORIZON)[::-1])

    @jax.jit
    def judge(episodes):
        rewards = jnp.take_along_axis(tables, episodes.action @ place, axis=1)
        return jnp.zeros(episodes.mask.shape).at[:, :, -1].set(rewards)

    state, first = group.run.init(model.params, group.seeds, group.hyper), jnp.zeros(len(tables), jnp.int32)
    size = group.program.algorithm.group
    for _ in range(config.rl.iterations):
        keys = rollout.member_keys(state.seed, state.iteration)
        episodes = group.run.draw(state.params, state.reference, group.hyper, group.frozen, keys, first, size)
        state, *_ = group.run.update(state, group.hyper, group.frozen, episodes, judge(episodes))
    return group, jax.block_until_ready(state.params)


def compare(tree: Tree, lam: float, log_policy) -> dict:
    """A policy, given as tables, beside the base and the optimum; no efficiency where it earns less than the base."""
    best, (reward, kl) = soft_optimum(tree, lam), evaluate(tree, log_policy)
    base, learned = evaluate(tree, tree.log_base)[0], reward - lam * kl
    line = frontier(tree, np.r_[np.inf, np.geomspace(100 * lam, lam / 100, 60), 0.0])
    efficient = efficiency(line.kl, line.reward, kl, reward)
    return {"base": base, "optimum": best.value, "learned": learned,
            "gap_closed": (learned - base) / (best.value - base), "reward": reward, "nats_per_episode": kl,
            "efficiency": None if np.isnan(efficient) else efficient}


def measure(seed: int, folder: pathlib.Path) -> dict:
    """Trains everything: {"holds", "tasks", "rows"}, a row for each task and run. `folder` gets the language model."""
    rows = []
    with run_log.progress_bar("optimality", len(RUNS)) as bar:
        make_model(folder, VOCAB, 0)
        model = weights.load(str(folder))
        empty = enumerate_model(model.config, model.params, (0,), HORIZON, np.zeros(SEQUENCES))
        tasks = make_tasks(empty.log_base)
        trees = {name: empty._replace(reward=task.reward) for name, task in tasks.items()}
        for run in RUNS:
            began = time.monotonic()
            config = experiment(folder, run, tasks, seed)
            group, params = train(config, model, np.stack([task.reward for task in tasks.values()]))
            seconds = time.monotonic() - began
            for i, (name, tree) in enumerate(trees.items()):
                own = jax.tree.map(lambda x, i=i: x[i], params)
                tables = policy_tables(group.program, own, model.params, VOCAB)
                rows.append({"task": name, "algorithm": run.algorithm, "limit": run.limit, "settings": run.settings,
                             "kl": f"{config.kl.estimator}, {config.kl.placement}",
                             **compare(tree, tasks[name].lam, tables),
                             "episodes": config.rl.iterations * config.rl.episodes, "seconds": seconds})
            bar.step()
    return {"holds": all(row["gap_closed"] >= row["limit"] for row in rows), "seed": seed,
            "lam": {name: task.lam for name, task in tasks.items()}, "rows": rows}


def report(result: dict) -> Group:
    """The rows, task by task, between two sentences."""
    table = Table(box=box.SIMPLE, padding=0)
    for column in ("task", "algorithm", "KL", "J(beta)", "J(pi*)", "J(pi)", "gap closed", "limit", "nats", "efficiency",
                   "episodes", "seconds"):
        table.add_column(column, justify="left" if column in ("task", "algorithm", "KL") else "right")
    for name in result["lam"]:
        for row in (row for row in result["rows"] if row["task"] == name):
            table.add_row(name, row["algorithm"], row["kl"], f"{row['base']:.4f}", f"{row['optimum']:.4f}",
                          f"{row['learned']:.4f}", f"{row['gap_closed']:.1%}", f"{row['limit']:.0%}",
                          f"{row['nats_per_episode']:.2f}",
                          "-" if row["efficiency"] is None else f"{row['efficiency']:.3f}", f"{row['episodes']}",
                          f"{row['seconds']:.0f}")
        table.add_section()
    title = (f"{VOCAB} tokens, episodes of {HORIZON}, seed {result['seed']}; J = reward - lam KL, lam "
             + ", ".join(f"{lam} ({name})" for name, lam in result["lam"].items())
             + ". Nats are per episode; seconds of the three tasks together, compilation included.")
    missed = [f"{row['algorithm']} ({row['kl']}) on {row['task']}" for row in result["rows"]
              if row["gap_closed"] < row["limit"]]
    return Group(title, table, f"Below the limit: {'; '.join(missed)}." if missed else "All limits hold.")


PARTS = {"tabular": (measure, report), "completion": (completion_frontier.measure, completion_frontier.report)}
"""measure(seed, folder) -> a dictionary for JSON, whose "holds" says whether all limits hold; report(it) -> what is
printed."""


def main(argv=None) -> int:
    """0 where all limits hold, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=machine.place, help="what is trained lies in DIR/<part>, and a second call "
                        "of the completion part goes on from there (default: a temporary folder)")
    parser.add_argument("--out", type=machine.place, default=pathlib.Path("benchmarks/results"),
                        help="folder for optimality_<part>.json")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    holds = True
    with tempfile.TemporaryDirectory() as scratch:
        if not jax.config.jax_compilation_cache_dir:        # programs that differ in their loss alone sample alike
            jax.config.update("jax_compilation_cache_dir", scratch)
        for part in options.parts:
            run, show = PARTS[part]
            folder = (options.workdir or pathlib.Path(scratch)) / part
            folder.mkdir(parents=True, exist_ok=True)
            result = run(options.seed, folder)
            Console(width=120).print(show(result))
            (options.out / f"optimality_{part}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            holds &= result["holds"]
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
