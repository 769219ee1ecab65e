"""Mutated configurations: each is accepted, or refused in one line that names a setting that was changed.

    python -m tests.fuzz --configs=5000 [--run=300] [--seed=0]

Prints a tally, and every configuration that ends otherwise; exits with 1 if there is one. --run: so many of the
accepted ones also run one iteration, in a directory that is removed.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import io
import math
import pathlib
import random
import sys
import tempfile
import warnings

import numpy as np

import kl_reg
from kl_reg import config as configs
from kl_reg import validation
from kl_reg.settings import SETTINGS

_NUMBERS = (0, 1, -1, 2, 3, 8, 64, 2**31, 2**70, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-50, 1e-12, 1e30, 1e308, math.inf,
            -math.inf, math.nan, np.float32(0.25), np.int64(3), np.float64("nan"))
_TEXTS = ("", " ", "x", "..", "a.b", "math.sqrt", "os.path", "/nowhere", "\udc80", "é", "a\nb", "(", "*", "-1", "1e3",
          "vader,length", "runs/x:3", "embedded", "%s", "{}")
_OTHERS = (None, True, False, (), (1.0,), ("x",), ("x", "y"), [], [{}], {}, {"a": "("}, {"a": "b"}, object, b"x")
_LIKELY = ("kl.budget", "kl.coef", "kl.operation", "kl.ledger", "kl.spend", "kl.controller", "rl.algorithm", "env.name",
           "policy.kind", "reference.name", "kl.estimator", "kl.placement", "reward.name")
_NAMES = {
    "kl.operation": ("tilt", "mixture"), "kl.spend": ("neuron", "sampled", "greedy", "uniform"),
    "kl.controller": ("fixed", "linear", "cosine", "adaptive", "lagrangian", "pi"), "policy.kind": ("lora", "full"),
    "rl.algorithm": ("reinforce", "rloo", "grpo", "dapo", "gspo", "awr", "cispo"),
    "env.name": ("completion", "tabular"), "reference.name": ("ema", "sync", "mixture", "checkpoint"),
    "kl.estimator": ("k1", "k2", "k3", "k3_weighted"), "kl.placement": ("reward", "loss", "full"),
    "reward.name": ("length", "distinct", "regex", "vader,length")}
_DECIDES = {"rl.algorithm": "rl.", "reward.name": "reward.", "env.name": "env.", "policy.kind": "policy.",
            "reference.name": "reference."}
"""Names of pieces, and what else may be wrong with them."""


def mutation(rng: random.Random) -> dict:
    """One to four settings with values of any kind."""
    names = [rng.choice(_LIKELY if rng.random() < 0.4 else tuple(SETTINGS)) for _ in range(rng.randint(1, 4))]
    return {name: _value(rng, name) for name in names if name != "sweep"} or {"seed": 1}


def _value(rng, name):
    setting = SETTINGS[name]
    fitting = [*setting.choices, *_NAMES.get(name, ()), setting.default]
    if setting.type in (int, float):
        fitting += [setting.type(x) for x in (0, 1, 2, 3)] + [0.5] * (setting.type is float)
    if setting.type is bool:
        fitting += [True, False]
    pool = rng.choice((fitting, fitting, fitting, _NUMBERS, _TEXTS, _OTHERS))
    return rng.choice(pool)


def refusal(config, changes: dict) -> str | None:
    """What is said of the configuration with these changes; None: it is accepted.

    Raises:
        Exception: whatever else than a refusal ends the check.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            validation.validate(configs.override(config, changes))
        except (ValueError, FileNotFoundError) as error:
            return str(error)
    return None


def fault(said: str, changes: dict) -> str | None:
    """What is wrong with a refusal."""
    if "\n" in said.strip():
        return "has several lines"
    wanted = [*changes, *(_DECIDES[name] for name in changes if name in _DECIDES)]
    return None if any(name in said for name in wanted) else "names no setting that was changed"


def base():
    """A configuration that runs in seconds."""
    config = configs.default()
    config.env.length, config.rl.episodes, config.rl.iterations, config.evaluation.episodes = 8, 8, 1, 2
    config.policy.hidden, config.optim.warmup, config.log.tensorboard = 4, 1, False
    return config


def runs(config, changes: dict) -> None:
    """One iteration of it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = configs.override(config, changes)
        own.rl.iterations = 1
        kl_reg.train(own, workdir=pathlib.Path(folder) / "run")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=5000)
    parser.add_argument("--run", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng, config, tally, accepted = random.Random(options.seed), base(), collections.Counter(), []
    for _ in range(options.configs):
        changes = mutation(rng)
        try:
            said = refusal(config, changes)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally["traceback"] += 1
            print(f"traceback: {changes!r}: {type(error).__name__}: {str(error)[:200]!r}")
            continue
        if said is None:
            tally["accepted"] += 1
            accepted.append(changes)
        elif wrong := fault(said, changes):
            tally[wrong] += 1
            print(f"{wrong}: {changes!r}: {said[:200]!r}")
        else:
            tally["refused"] += 1
    rng.shuffle(accepted)
    for changes in accepted[:options.run]:
        try:
            runs(config, changes)
            tally["ran"] += 1
        except (ValueError, FileNotFoundError) as error:      # known only once it runs, as a reward that is NaN
            tally["refused by the run" if fault(str(error), changes) is None else "wrong name in the run"] += 1
            print(f"the run: {changes!r}: {str(error)[:200]!r}")
        except Exception as error:  # noqa: BLE001
            tally["traceback of the run"] += 1
            print(f"traceback of the run: {changes!r}: {type(error).__name__}: {str(error)[:200]!r}")
    print(", ".join(f"{name} {count}" for name, count in sorted(tally.items())))
    return int(any(tally[name] for name in tally if name not in ("accepted", "refused", "ran", "refused by the run")))


if __name__ == "__main__":
    sys.exit(main())
