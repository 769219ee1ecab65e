"""The completion part of `benchmarks.optimality`: frontier efficiency on a real model, ours beside TRL's RLOO.

Both train on the sentiment of one reply of the embedded model, with the same number of episodes, for a few KL
coefficients: kl_reg the paper's head on the frozen model (configs/sentiment_completion.py), TRL all weights. Efficiency
at 2, 4 and 6 nats is that of the reward which each reaches there, between its policies.
"""
from __future__ import annotations

import json
import pathlib
import subprocess

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

import kl_reg
from benchmarks.peers import environment
from configs import sentiment_completion
from kl_reg.analysis.optimum import efficiency as efficiencies
from kl_reg.analysis.optimum.exact import efficiency
from kl_reg.pretrained import folders

NATS = (2.0, 4.0, 6.0)
EPISODES = 2048         # of each policy, to measure it
ROOT = pathlib.Path(__file__).parents[1]      # `benchmarks` is not installed
PEER = {"group": 64, "epochs": 1, "rate": 3e-4, "coefficients": [0.007, 0.02, 0.06]}


def measure(seed: int, folder: pathlib.Path) -> dict:
    """{"holds", "rows", "report"}: `holds` where ours is ahead at each KL. Policies that `folder` has are not trained
    again."""
    config = sentiment_completion.get_config()
    config.sweep = [entry | {"seed": (seed,)} for entry in config.sweep]
    ours = kl_reg.train(config, workdir=folder / "ours")
    tokens = [_tokens(folder / f"ours/members/{i}") for i in range(len(ours.params))]
    peers = _peer(config, folder, seed)
    report = efficiencies.measure(str(ours.workdir), EPISODES, beside=[str(path) for path in peers])
    sampled = [json.loads((path / "sampled.json").read_text(encoding="utf-8"))["tokens"] for path in peers]
    for row, coefficient in zip(report["members"][-len(peers):], PEER["coefficients"], strict=True):
        row["title"] = f"TRL RLOO, beta {coefficient}"
    rows = [_at(report, nats, own) for nats in NATS for own in (True, False)]
    holds = all(None not in (own["efficiency"], peer["efficiency"]) and own["efficiency"] > peer["efficiency"]
                for own, peer in zip(rows[::2], rows[1::2], strict=True))
    report["run"] = "configs/sentiment_completion.py"
    return {"holds": holds, "seed": seed, "tokens": {"kl_reg": tokens, "TRL RLOO": sampled}, "peer": PEER, "rows": rows,
            "report": report}


def _tokens(member):
    """That it sampled in training."""
    lines = (member / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["tokens"] for line in lines)


def _peer(config, folder, seed):
    """Trains TRL's policies in a process of its own; where they are."""
    settings = {"model": str(folders.find(config.model.path)), "prompt": config.env.opening, "end": config.env.end,
                "length": config.env.length, "episodes": config.rl.episodes, "iterations": config.rl.iterations,
                "seed": seed, "out": str(folder / "peer"), **PEER}
    (folder / "peer.json").write_text(json.dumps(settings), encoding="utf-8")
    command = environment.python("trl"), "-m", "benchmarks.peers.trl_rloo", str(folder / "peer.json")
    subprocess.run(command, check=True, cwd=ROOT)
    return [folder / "peer" / str(coefficient) for coefficient in PEER["coefficients"]]


def _at(report, nats, own):
    """The reward at that KL, between a trainer's policies, and its efficiency; None beyond the farthest of them."""
    kl, reward = (np.array([point[key] for point in report["frontier"]]) for key in ("kl", "reward"))
    ess = np.array([point["ess"] for point in report["frontier"]])
    policies = sorted((row["kl"], row["reward"]) for row in report["members"] if (row["member"] is not None) == own)
    at, reached = np.array([(0.0, report["base_reward"]), *policies]).T
    row = {"trainer": "kl_reg" if own else "TRL RLOO", "nats": nats, "reward": None, "efficiency": None, "ess": None}
    if at[-1] < nats:
        return row
    value = float(np.interp(nats, at, reached))
    worth = efficiency(kl, reward, nats, value)
    needed = int(np.abs(kl - worth * nats).argmin()) if np.isfinite(worth) else int(np.abs(kl - nats).argmin())
    return row | {"reward": value, "efficiency": worth if np.isfinite(worth) else None, "ess": float(ess[needed])}


def report(result: dict) -> Group:
    """Every policy, and both trainers at equal KL."""
    policies, equal = Table(box=box.SIMPLE, padding=0), Table(box=box.SIMPLE, padding=0)
    for table, names in ((policies, ("policy", "nats", "reward", "efficiency")),
                         (equal, ("at nats", "trainer", "reward", "efficiency", "effective samples"))):
        for column in names:
            table.add_column(column, justify="left" if column in ("policy", "trainer") else "right")
    for row in result["report"]["members"]:
        policies.add_row(row["title"], f"{row['kl']:.2f} ± {row['kl_se']:.2f}",
                         f"{row['reward']:.4f} ± {row['reward_se']:.4f}", _percent(row["efficiency"]))
    for row in result["rows"]:
        equal.add_row(f"{row['nats']:g}", row["trainer"], "-" if row["reward"] is None else f"{row['reward']:.4f}",
                      _percent(row["efficiency"]), "-" if row["ess"] is None else f"{row['ess']:.0f}")
    tokens = result["tokens"]
    sampled = "; ".join(f"{name} {', '.join(map(str, counts))}" for name, counts in tokens.items())
    title = (f"Sentiment of one reply, embedded model; tokens sampled by each policy: {sampled}. Efficiency: KL of the "
             "best policy with the same reward over the policy's; effective samples of the frontier's point where that "
             "reward is.")
    return Group(title, policies, equal, f"kl_reg is {'' if result['holds'] else 'not '}ahead at each KL.")


def _percent(value):
    return "-" if value is None else f"{value:.1%}"
