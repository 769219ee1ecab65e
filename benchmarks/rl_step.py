"""Time of one RL step beside peers: rollout, reward, KL to a reference, one full-finetuning AdamW update.

    python -m benchmarks.rl_step --model=smollm2|tiny [--peers=trl,tunix] [--policy=full|head] [--kl=exact|k3]
                                 [--steps 3] [--json FILE]

GRPO in float32, one epoch, one minibatch, one member; sequences of fixed length, because nothing ends them. "smollm2"
is SmolLM2-135M (`python -m launch.fetch smollm2`), "tiny" a random Llama of 4 layers, width 192 and the same
vocabulary. All trainers read the same folder and take turns, one step each; a peer is a process in an environment of
its own, made at first use (peers/environment.py), and runs on the CPU. Compilation and warm-up do not count. KL: peers
have k3, kl_reg the exact one or, with --kl=k3, the same. --policy=head is the paper's head on the frozen trunk; peers
finetune everything then, too. The reference is read in "rollout" by kl_reg and in "reward" by the peers.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.peers import environment, stepping, work
from benchmarks.peers.stepping import PHASES, Clock, Step
from benchmarks.peers.work import Work
from kl_reg import config as configs
from kl_reg import rewards, rollout, validation
from kl_reg.models import tokenizer, weights
from kl_reg.training import sweep
from kl_reg.training.judging import Judges, judge
from kl_reg.types import PAD

GOALS = {("smollm2", "full"): 1.5, ("tiny", "full"): 4.0, ("smollm2", "head"): 5.0, ("tiny", "head"): 5.0}
PEERS = {"trl": ("benchmarks.peers.trl_grpo", {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}),
         "tunix": ("benchmarks.peers.tunix_grpo", {"JAX_PLATFORMS": "cpu"})}
"""Module and environment variables of each."""

_LOOKED_AT = {"full": lambda params: params["trunk"]["norm"], "head": lambda params: params["actor"]}


def experiment(settings: dict, policy: str, estimator: str) -> ConfigDict:
    """The work as a configuration."""
    file = pathlib.Path(settings["scratch"]) / "prompts.txt"
    file.write_text("\n".join(settings["prompts"]) + "\n")
    config = configs.default()
    config.update_from_flattened_dict({
        "model.path": settings["model"], "policy.kind": policy, "env.name": "completion", "env.openings": str(file),
        "env.end": "", "env.length": settings["generated"], "env.opening_tokens": settings["prompt"],
        "rl.algorithm": "grpo", "rl.group": settings["group"], "rl.episodes": settings["sequences"], "rl.epochs": 1,
        "kl.estimator": estimator, "kl.placement": "loss", "kl.coef": settings["kl_coef"],
        "optim.learning_rate": settings["learning_rate"], "optim.warmup": 1, "optim.final": 1.0})
    validation.validate(config)
    return config


def ours(settings: dict, policy: str, estimator: str) -> Callable[[], Step]:
    """kl_reg's trainer: a function that does one step, as `training.loop` does it."""
    config = experiment(settings, policy, estimator)
    model = weights.load(config.model.path)
    (group,) = sweep.plan(config, model)
    state, size = group.run.init(model.params, group.seeds, group.hyper), jnp.int32(group.program.group)

    def mean_id(completion_ids, **columns):
        return [sum(ids) / len(ids) / settings["vocabulary"] for ids in completion_ids]

    judges = Judges(rewards.of(mean_id), None)

    def step():
        nonlocal state
        before = jax.device_get(_LOOKED_AT[policy](state.params))
        clock, first = Clock(), jnp.zeros(1, jnp.int32)
        keys = rollout.member_keys(state.seed, state.iteration)
        episodes = jax.block_until_ready(
            group.run.sample(state.params, state.reference, group.hyper, group.frozen, keys, first, size))
        clock.mark("rollout")
        recorded = jax.device_get(episodes._replace(features=(), reference=(), kept=None))
        judged = judge(group.program, judges, jax.tree.map(lambda x: x[0], recorded))
        clock.mark("reward")
        stream = jnp.asarray(judged.stream[None])
        state, *said = group.run.update(state, group.hyper, group.frozen, episodes, stream)
        jax.block_until_ready((state, jax.device_get(said)))
        clock.mark("update")
        changes = jax.tree.map(lambda old, new: np.abs(new - old).max(), before, _LOOKED_AT[policy](state.params))
        return Step(clock.seconds, int((recorded.transcript.roles != PAD).sum()), float(max(jax.tree.leaves(changes))))

    return step


def matmul_peak(width: int = 2048, repeats: int = 5) -> float:
    """FLOPs per second of the best of several float32 matrix products on the default device."""
    product, table = jax.jit(jnp.matmul), jnp.ones((width, width))
    best = 0.0
    for rows in (64, 256, 1024, 2048):
        x = jax.block_until_ready(jnp.ones((rows, width)))
        jax.block_until_ready(product(x, table))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(product(x, table))
            best = max(best, 2 * rows * width**2 / (time.perf_counter() - start))
    return best


def machine() -> dict:
    """Processor, cores, and the default device."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in (info.read_text().splitlines() if info.is_file() else ())
             if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind, "system": platform.platform()}


def take_turns(trainers: dict[str, Callable[[], Step]], each: Work, warmup: int, steps: int) -> dict[str, list[dict]]:
    """Seconds of every trainer's counted steps.

    Raises:
        RuntimeError: a step did not do the work, or a peer ended.
    """
    seconds = {name: [] for name in trainers}
    for number in range(warmup + steps):
        for name, step in trainers.items():
            done, tokens = step(), each.sequences * (each.prompt + each.generated)
            if done.tokens != tokens or not done.moved > 0:
                raise RuntimeError(f"{name}: a step had {done.tokens} tokens of {tokens}, and changed its weights by "
                                   f"{done.moved:g}; such a step is not the same work")
            if number >= warmup:
                seconds[name].append(done.seconds)
    return seconds


def compare(seconds: dict[str, list[dict]], flops: dict[str, int], peak: float) -> dict:
    """What the times say of each trainer: medians, its median step over kl_reg's, and the part of `peak` that it
    reaches with the `flops` of its work."""
    median = {name: {phase: float(np.median([row[phase] for row in rows])) for phase in PHASES}
              | {"step": float(np.median([sum(row.values()) for row in rows]))} for name, rows in seconds.items()}
    step = {name: times["step"] for name, times in median.items()}
    return {"median": median, "ratio": {name: step[name] / step["kl_reg"] for name in step},
            "of_peak": {name: flops[name] / step[name] / peak for name in step}}


def measure(options: argparse.Namespace) -> dict:
    """Runs all trainers: what goes to JSON."""
    given = {name: getattr(options, name) for name in Work._fields if getattr(options, name) is not None}
    each = work.WORK[options.model]._replace(**given)
    pythons = {name: environment.python(name) for name in options.peers}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, scratch = pathlib.Path(name) / "model", pathlib.Path(name) / "scratch"
        scratch.mkdir()
        shapes = work.write_model(options.model, folder)
        said = work.prompts(tokenizer.load(folder), each.prompt)
        settings = work.settings_of(each, folder, scratch, shapes.vocab, said)
        file = scratch / "settings.json"
        file.write_text(json.dumps(settings))
        peak, trainers = matmul_peak(), {"kl_reg": ours(settings, options.policy, options.kl)}
        versions = {"kl_reg": {package: metadata.version(package) for package in ("kl_reg", "jax")}
                    | {"python": platform.python_version()}}
        for peer, python in pythons.items():
            module, env = PEERS[peer]
            trainer = stack.enter_context(stepping.running(peer, [str(python), "-m", module, str(file)], env))
            trainers[peer], versions[peer] = partial(stepping.step, trainer), trainer.versions
        seconds = take_turns(trainers, each, options.warmup, options.steps)
        peak = max(peak, matmul_peak())
    flops = {name: work.flops(shapes, each, options.policy if name == "kl_reg" else "full") for name in trainers}
    return {"model": options.model, "policy": options.policy, "kl": options.kl, "work": each._asdict(),
            "machine": machine(), "versions": versions, "flops": flops, "matmul_flops_per_second": peak,
            "goal": GOALS[options.model, options.policy], "seconds": seconds,
            **compare(seconds, {name: sum(parts.values()) for name, parts in flops.items()}, peak)}


def report(result: dict) -> str:
    """A table in Markdown between two sentences."""
    each, own = Work(**result["work"]), result["machine"]
    lines = [f"{result['model']}, policy {result['policy']}, kl {result['kl']}: {each.sequences} sequences of "
             f"{each.prompt} + {each.generated} tokens, groups of {each.group}, float32; {own['processor']}, "
             f"{own['cores']} cores, {own['device']}. Seconds, median of {len(result['seconds']['kl_reg'])} steps.", "",
             f"| trainer | step | {' | '.join(PHASES)} | of matmul peak | ratio | goal |",
             "| --- |" + " ---: |" * (len(PHASES) + 4)]
    for name, times in result["median"].items():
        title = ", ".join(f"{package} {version}" for package, version in result["versions"][name].items())
        ratio = ["", ""] if name == "kl_reg" else [f"{result['ratio'][name]:.2f}", f"{result['goal']:g}"]
        cells = [title, *(f"{times[phase]:.2f}" for phase in ("step", *PHASES)), f"{result['of_peak'][name]:.0%}"]
        lines.append(f"| {' | '.join(cells + ratio)} |")
    parts = result["flops"]["kl_reg"]
    lines += ["", f"kl_reg's step needs {sum(parts.values()) / 1e9:.1f} GFLOP ("
              + ", ".join(f"{phase} {count / 1e9:.1f}" for phase, count in parts.items())
              + f"); the best matrix product here reaches {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s."]
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(work.WORK), default="smollm2")
    parser.add_argument("--peers", type=lambda names: [name for name in names.split(",") if name],
                        default=list(PEERS), help=f"of {','.join(PEERS)}; '': none")
    parser.add_argument("--policy", choices=("full", "head"), default="full")
    parser.add_argument("--kl", choices=("exact", "k3"), default="exact", help="kl_reg's estimator")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    for name in Work._fields:
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers there as well")
    options = parser.parse_args(argv)
    result = measure(options)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
