"""What a hard budget costs: an iteration with one beside the same without, an earlier version's, and the limit.

    python -m benchmarks.budget_step [--baseline CHECKOUT] [--members 1 6] [--model smollm2] [--steps 3] [--json FILE]

`configs/smollm2_teacher.py` with 16 episodes of 256 tokens of each member, budgets of 10 nats, and policies away from
the base, whose proposals the budget limits. Arms: no budget; a budget, under the tilt and under the mixture; the linear
actor under the mixture. Each is a process of its own, which compiles, iterates once, and then `--steps` times from the
same state, so that all do the same work. --baseline: a checkout of an earlier version, whose kl_reg runs the same arms.

The limit is the time that products need at least: each token's pass of the layers and of the unembedding takes the
longer of its FLOPs at the rate of the best matrix product and its bytes at the rate of memory, both measured here; an
update reads each agent token's base and change once and the change's derivative once, in each epoch. Exits with 1 where
a goal is missed.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
ARMS = {"none": {}, "tilt": {"kl.budget": 10.0}, "mixture": {"kl.budget": 10.0, "kl.operation": "mixture"},
        "linear": {"kl.budget": 10.0, "kl.operation": "mixture", "policy.actor": "linear"}}
"""Settings of each arm, beside the configuration's."""

GOALS = {"faster": 3.0, "over none": 1.4, "of the limit": 0.4, "mixture": 1.2, "members": 4.5}
"""An iteration with a budget: at least so many times as fast as the baseline's; at most so many times one without; at
least this part of the limit; the mixture over the tilt; six members over one, or 60% of the limit."""


def arm(asked: dict) -> dict:
    """Runs one arm, in this process and with whatever kl_reg it has: seconds of its phases, and what it did. So that an
    earlier version can run it, nothing of this one is imported."""
    import jax
    import jax.numpy as jnp

    from kl_reg.pretrained import weights
    from kl_reg.sampling import rollout
    from kl_reg.training import member_groups
    sys.path.insert(0, str(ROOT))
    from configs import smollm2_teacher

    config, count = smollm2_teacher.get_config(), asked["members"]
    config.model.path, config.kl.budget = asked["model"], None
    config.rl.episodes, config.env.length = asked["episodes"], asked["length"]
    known = config.to_dict()
    config.update_from_flattened_dict({name: value for name, value in asked["settings"].items()
                                       if name.split(".")[1] in known[name.split(".")[0]]})
    config.sweep = [{"seed": tuple(range(count))}] if count > 1 else []
    (group,) = member_groups.plan(config, weights.load(config.model.path))
    state = group.run.init(group.frozen.base, group.seeds, group.hyper)
    rng = np.random.default_rng(0)
    scale = asked["moved"] * (0.1 if config.policy.get("actor", "mlp") == "linear" else 1.0)
    moved = lambda x: x + scale * rng.standard_normal(x.shape).astype(np.float32) / np.sqrt(x.shape[-2])  # noqa: E731
    params = jax.device_get(state.params)
    params["actor"] = jax.tree.map(lambda x: moved(x) if x.ndim > 2 else x, params["actor"])
    state = state._replace(params=jax.device_put(params))
    keys, first = rollout.member_keys(state.seed, state.iteration), jnp.zeros(count, jnp.int32)
    rewards, said = None, {"rollout": [], "update": []}
    for step in range(asked["steps"] + 1):
        began = time.monotonic()
        episodes = jax.block_until_ready(group.run.draw(
            state.params, state.reference, group.hyper, group.frozen, keys, first, group.program.algorithm.group))
        drawn = time.monotonic()
        if rewards is None:
            rewards = jnp.where(episodes.mask, rng.standard_normal(episodes.mask.shape).astype(np.float32), 0.0)
        own = jax.tree.map(lambda x: x + 0, state)          # an update gives away what it takes
        _, metrics, *_ = jax.block_until_ready(group.run.update(own, group.hyper, group.frozen, episodes, rewards))
        if step:
            said["rollout"].append(drawn - began)
            said["update"].append(time.monotonic() - drawn)
    mask = np.asarray(episodes.mask)
    return said | {
        "agent_tokens": int(mask.sum()), "longest": int(mask.sum(-1).max()), "epochs": config.rl.epochs,
        "tokens": int((np.asarray(episodes.transcript.roles) > 0).sum()),
        "nats": float(np.where(mask, np.asarray(episodes.kl), 0).sum() / mask.shape[0] / mask.shape[1]),
        "passes": float(np.mean(metrics["kl/ledger_passes"])) if "kl/ledger_passes" in metrics else None,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}


def run(asked: dict, checkout: pathlib.Path) -> dict:
    """`arm` in a process of its own, with the kl_reg of that checkout."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--arm", json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)
    return json.loads(done.stdout.splitlines()[-1])


def least(asked: dict, did: dict, shapes, peak: float, rate: float) -> float:
    """Seconds that the products of an iteration need at least.

    Args:
        did: of `arm`.
        shapes: of the base model.
        peak, rate: FLOPs and bytes a second.
    """
    rows, size = asked["members"] * asked["episodes"], 4
    heads, keys = shapes.heads * shapes.head_width, 2 * shapes.kv_heads * shapes.head_width
    matrices = shapes.layers * shapes.width * (2 * heads + keys + 3 * shapes.mlp_width)
    table = shapes.width * shapes.vocab
    linear = asked["settings"].get("policy.actor") == "linear"
    own = 3 * table if linear else table                # the table that a change of the agent is read with
    base_flops = rows * 2 * (matrices + table)
    extra = asked["members"] * own if linear else 0     # weights that are a member's own
    change_flops = 2 * own * did["agent_tokens"] / asked["length"]
    token = max((base_flops + change_flops) / peak, size * (matrices + table + extra) / rate)
    # base, change, and what the change's derivative is; a table that is trained has one of its own.
    read = 2 * (table + (2 + linear) * own) * did["agent_tokens"] * did["epochs"]
    return asked["length"] * token + read / peak


def measure(options: argparse.Namespace) -> dict:
    """Runs all arms: what goes to JSON."""
    from benchmarks import machine
    from kl_reg.pretrained import weights

    shapes, watch = weights.load_config(options.model), machine.Watch()
    peak, rate, rows = machine.matmul_peak(), machine.bandwidth(), []
    for members in options.members:
        for name in options.arms:
            if members > 1 and name == "linear":
                continue                        # several tables of three times the unembedding's size
            for version, checkout in (("this", ROOT), ("baseline", options.baseline)):
                if checkout is None or version == "baseline" and name == "none":
                    continue
                asked = {"members": members, "settings": ARMS[name], "model": options.model, "steps": options.steps,
                         "episodes": options.episodes, "length": options.length, "moved": options.moved}
                did = run(asked, checkout.resolve())
                rows.append({"arm": name, "members": members, "version": version,
                             "least": least(asked, did, shapes, peak, rate), **did})
    peak, rate = max(peak, machine.matmul_peak()), max(rate, machine.bandwidth())
    return {"model": options.model, "episodes": options.episodes, "length": options.length, "rows": rows,
            "matmul_flops_per_second": peak, "memory_bytes_per_second": rate, "machine": machine.about(),
            "versions": machine.versions(), "others": watch.others()}


def seconds_of(row: dict) -> float:
    """How long an iteration takes: the sum of the medians of its two phases."""
    return float(np.median(row["rollout"]) + np.median(row["update"]))


def goals(result: dict) -> list[tuple[str, float, float, bool]]:
    """(what, measured, goal, whether it is met), of all that were measured."""
    by = {(row["arm"], row["members"], row["version"]): row for row in result["rows"]}
    at = lambda *key: seconds_of(by[key])  # noqa: E731
    found = []
    for (name, members, version), row in by.items():
        if version != "this" or name == "none":
            continue
        what, here = f"{name}, {members} member{'s' * (members > 1)}: ", at(name, members, "this")
        if (name, members, "baseline") in by and (name, members) == ("tilt", 1):
            ratio = at(name, members, "baseline") / here
            found.append((what + "times as fast as the baseline", ratio, GOALS["faster"], ratio >= GOALS["faster"]))
        if ("none", members, "this") in by and (name, members) == ("tilt", 1):
            ratio = here / at("none", members, "this")
            found.append((what + "over no budget", ratio, GOALS["over none"], ratio <= GOALS["over none"]))
        if members == 1 and name != "mixture":
            part = row["least"] / here
            found.append((what + "part of the limit", part, GOALS["of the limit"], part >= GOALS["of the limit"]))
        if name == "mixture" and ("tilt", members, "this") in by:
            ratio = here / at("tilt", members, "this")
            found.append((what + "over the tilt", ratio, GOALS["mixture"], ratio <= GOALS["mixture"]))
        if name == "tilt" and members > 1 and (name, 1, "this") in by:
            ratio, part = here / at(name, 1, "this"), row["least"] / here
            found.append((what + f"over one ({part:.0%} of the limit)", ratio, GOALS["members"],
                          ratio <= GOALS["members"] or part >= 0.6))
    return found


def report(result: dict) -> str:
    """Two tables in Markdown between sentences."""
    from benchmarks import machine

    rows = [[f"{row['arm']}, {row['members']} member{'s' * (row['members'] > 1)}"
             + ", baseline" * (row["version"] == "baseline"),
             f"{np.median(row['rollout']):.2f}", f"{np.median(row['update']):.2f}", f"{seconds_of(row):.2f}",
             f"{row['least'] / seconds_of(row):.0%}", f"{row['agent_tokens']} ({row['longest']})",
             "" if row["passes"] is None else f"{row['passes']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}"]
            for row in result["rows"]]
    columns = ("budget", "rollout, s", "update, s", "iteration, s", "of the limit", "agent tokens (longest)", "passes",
               "peak, GB")
    held = [[what, f"{value:.2f}", f"{goal:g}", "yes" if met else "no"] for what, value, goal, met in goals(result)]
    return "\n".join([
        f"{result['model']}, {result['episodes']} episodes of {result['length']} tokens of each member; "
        f"{machine.ran(result)}. Median of {len(result['rows'][0]['rollout'])} iterations.", "",
        machine.table(columns, rows), "", machine.table(("goal", "measured", "wanted", "met"), held), "",
        f"Matrix products reach {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s here, memory "
        f"{result['memory_bytes_per_second'] / 1e9:.0f} GB/s. {machine.disturbed(result['others'])}"])


def main(argv=None) -> int:
    """0 where all goals are met, else 1."""
    from benchmarks import machine
    from benchmarks.peers import stepping

    parser = machine.benchmark(__doc__)
    parser.add_argument("--baseline", type=machine.place, help="a checkout of the version before")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--moved", type=float, default=1.0, help="how far the policies are from the base")
    options = parser.parse_args(argv)
    stepping.share_device()         # each arm is a process of its own beside this one
    result = measure(options)
    machine.tell(result, report(result), options.json)
    return int(not all(met for *_, met in goals(result)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        print(json.dumps(arm(json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
