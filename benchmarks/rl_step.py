"""Time of one RL step beside peers: rollout, reward, KL to a reference, one full-finetuning AdamW update.

    python -m benchmarks.rl_step --model=smollm2|tiny [--peers=trl,tunix] [--policy=full|head] [--kl=exact|k3]
                                 [--steps 5] [--json FILE]

GRPO in float32, one epoch, one minibatch, one member; sequences of fixed length, because nothing ends them. "smollm2"
is SmolLM2-135M (`python -m launch.fetch smollm2`), "tiny" a random Llama of 4 layers, width 192 and the same
vocabulary, "shapes" random weights of SmolLM2's shapes, for which nothing is fetched. All trainers read the same
folder, run where JAX does here, and take turns, one step each; a peer is a process in an environment of its own, made
at first use (peers/environment.py). Compilation and warm-up do not count. KL: peers have k3, kl_reg the exact one or,
with --kl=k3, the same. --policy=head is the paper's head on the frozen trunk; peers finetune everything then, too. The
reference is read in "update" by kl_reg and in "reward" by the peers. With --torch-compile TRL compiles its model, which
takes minutes of several warm-up steps (--warmup 5).
"""
from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import jax
import numpy as np

from benchmarks import machine
from benchmarks.peers import environment, stepping, work
from benchmarks.peers.stepping import PHASES, Step
from benchmarks.peers.work import Work
from benchmarks.trainer import Trainer, experiment
from kl_reg.pretrained import tokenizer
from kl_reg.types import PAD

GOALS = {"smollm2": 1.5, "tiny": 4.0, "shapes": 1.5, "miniature": 1.0}
HEAD_GOAL = 5.0
ACCELERATOR_GOALS = {"trl": 10.0, "tunix": 2.0}
"""Of a peer's step over kl_reg's: on a CPU by model, the same for all peers; on an accelerator by peer."""

PEERS = {"trl": ("benchmarks.peers.trl_grpo", stepping.TORCH), "tunix": ("benchmarks.peers.tunix_grpo", {})}
"""Module and environment variables of each."""

_LOOKED_AT = {"full": lambda params: params["trunk"]["norm"], "head": lambda params: params["actor"]}


def ours(settings: dict, policy: str, estimator: str) -> Callable[[], Step]:
    """kl_reg's trainer: a function that does one step."""
    config = experiment(settings, policy__kind=policy, rl__algorithm="grpo", rl__epochs=1, kl__estimator=estimator,
                        kl__placement="loss")
    trainer = Trainer(config, settings["vocabulary"])

    def step():
        before = jax.device_get(_LOOKED_AT[policy](trainer.state.params))
        seconds, episodes = trainer.iterate()
        after = _LOOKED_AT[policy](trainer.state.params)
        changes = jax.tree.map(lambda old, new: np.abs(new - old).max(), before, after)
        return Step(seconds, int((episodes.transcript.roles != PAD).sum()), float(max(jax.tree.leaves(changes))))

    return step


def compare(seconds: dict[str, list[dict]], flops: dict[str, int], peak: float) -> dict:
    """What the times say of each trainer: medians, its median step over kl_reg's, and the part of `peak` that it
    reaches with the `flops` of its work."""
    median = {name: {phase: float(np.median([row[phase] for row in rows])) for phase in PHASES}
              | {"step": float(np.median([sum(row.values()) for row in rows]))} for name, rows in seconds.items()}
    step = {name: times["step"] for name, times in median.items()}
    return {"median": median, "ratio": {name: step[name] / step["kl_reg"] for name in step},
            "of_peak": {name: flops[name] / step[name] / peak for name in step}}


def _goal(peer: str, model: str, policy: str) -> float:
    if jax.default_backend() != "cpu":
        return ACCELERATOR_GOALS[peer]
    return HEAD_GOAL if policy == "head" else GOALS[model]


def measure(options: argparse.Namespace) -> dict:
    """Runs all trainers: what goes to JSON."""
    given = {name: getattr(options, name) for name in Work._fields if getattr(options, name) is not None}
    each = work.WORK[options.model]._replace(**given)
    pythons = {name: environment.python(name, jax.default_backend()) for name in options.peers}
    watch = machine.Watch()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, scratch = pathlib.Path(name) / "model", pathlib.Path(name) / "scratch"
        scratch.mkdir()
        shapes = work.write_model(options.model, folder)
        said = work.prompts(tokenizer.load(folder), each.prompt)
        settings = work.settings_of(each, folder, scratch, shapes.vocab, said)
        file = scratch / "settings.json"
        file.write_text(json.dumps(settings | {"torch_compile": options.torch_compile}), encoding="utf-8")
        peak, trainers = machine.matmul_peak(), {"kl_reg": ours(settings, options.policy, options.kl)}
        told = {"kl_reg": machine.versions()}
        for peer, python in pythons.items():
            module, env = PEERS[peer]
            trainer = stack.enter_context(stepping.running(peer, [str(python), "-m", module, str(file)], env))
            trainers[peer], told[peer] = partial(stepping.step, trainer), trainer.versions
        seconds = stepping.take_turns(trainers, each.tokens, options.warmup, options.steps)
        peak = max(peak, machine.matmul_peak())
    flops = {name: work.flops(shapes, each, options.policy if name == "kl_reg" else "full") for name in trainers}
    return {"model": options.model, "policy": options.policy, "kl": options.kl, "work": each._asdict(),
            "torch_compile": options.torch_compile, "machine": machine.about(), "others": watch.others(),
            "versions": told, "flops": flops, "matmul_flops_per_second": peak,
            "goal": {name: _goal(name, options.model, options.policy) for name in pythons}, "seconds": seconds,
            **compare(seconds, {name: sum(parts.values()) for name, parts in flops.items()}, peak)}


def report(result: dict) -> str:
    """A table in Markdown between sentences."""
    each, rows = Work(**result["work"]), []
    for name, times in result["median"].items():
        title = machine.listed(result["versions"][name])
        ratio = ["", ""] if name == "kl_reg" else [f"{result['ratio'][name]:.2f}", f"{result['goal'][name]:g}"]
        rows.append([title, *(f"{times[phase]:.2f}" for phase in ("step", *PHASES)), f"{result['of_peak'][name]:.0%}",
                     *ratio])
    parts = result["flops"]["kl_reg"]
    needed = ", ".join(f"{phase} {count / 1e9:.1f}" for phase, count in parts.items())
    return "\n".join([
        f"{result['model']}, policy {result['policy']}, kl {result['kl']}: {each.sequences} sequences of {each.prompt} "
        f"+ {each.generated} tokens, groups of {each.group}, float32; {machine.where(result['machine'])}. Seconds, "
        f"median of {len(result['seconds']['kl_reg'])} steps.", "",
        machine.table(("trainer", "step", *PHASES, "of matmul peak", "ratio", "goal"), rows), "",
        f"kl_reg's step needs {sum(parts.values()) / 1e9:.1f} GFLOP ({needed}); the best matrix product here reaches "
        f"{result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s. {machine.disturbed(result['others'])}"])


def main(argv=None) -> None:
    parser = machine.benchmark(__doc__)
    parser.add_argument("--model", choices=tuple(work.WORK), default="smollm2")
    parser.add_argument("--peers", type=lambda names: [name for name in names.split(",") if name],
                        default=list(PEERS), help=f"of {','.join(PEERS)}; '': none")
    parser.add_argument("--policy", choices=("full", "head"), default="full")
    parser.add_argument("--kl", choices=("exact", "k3"), default="exact", help="kl_reg's estimator")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--torch-compile", action="store_true", help="of TRL")
    for name in Work._fields:
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    options = parser.parse_args(argv)
    stepping.share_device()
    result = measure(options)
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
