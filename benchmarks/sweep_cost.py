"""What a sweep costs: seconds an iteration of 1, 4 and 16 members that share one program and one frozen model.

    python -m benchmarks.sweep_cost [--model=smollm2|tiny] [--policy=head|lora] [--members 1,4,16] [--parts 1]
                                    [--steps 5] [--json FILE]

Members differ in KL coefficient and seed. Each samples 8 completions of 26 + 32 tokens in an iteration and updates with
the schema's own settings (PPO, two epochs, exact KL in full). Sweeps of all sizes are compiled in one process and take
turns; compilation and warm-up do not count. Without fusion m members would cost m times as much as one.
"""
from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import machine, trainer
from benchmarks.peers import stepping, work
from benchmarks.peers.stepping import PHASES, Step
from benchmarks.peers.work import Work
from kl_reg.pretrained import tokenizer
from kl_reg.types import PAD

SIZES = Work(sequences=8, prompt=26, generated=32, group=1)
"""Of one member."""

GOALS = {"cpu": 8.0, "gpu": 2.5}
"""At most, of 16 `head` members to one."""


def coefficients(members: int) -> tuple[float, ...]:
    """As many KL coefficients, log-even from 0.01 to 1."""
    return tuple(float(x) for x in np.geomspace(0.01, 1.0, members))


def fused(settings: dict, policy: str, members: int, parts: int) -> Callable[[], Step]:
    """A sweep: a function that does one iteration of all its members."""
    grids = [{"kl.coef": (coefficient,), "seed": (seed,)} for seed, coefficient in enumerate(coefficients(members))]
    own = trainer.Trainer(trainer.experiment(settings, policy__kind=policy, rl__accumulate=parts, sweep=grids),
                          settings["vocabulary"])
    part = {"head": "actor", "lora": "adapter"}[policy]

    def step():
        before = jax.device_get(own.state.params[part])
        seconds, episodes = own.iterate()
        changes = jax.tree.map(lambda old, new: np.abs(new - old).reshape(members, -1).max(1), before,
                               own.state.params[part])
        least = np.stack(jax.tree.leaves(changes)).max(0).min()       # of all members: each has to move
        return Step(seconds, int((episodes.transcript.roles != PAD).sum()) // members, float(least))

    return step


def measure(options: argparse.Namespace) -> dict:
    """Runs all sweeps: what goes to JSON."""
    given = {name: getattr(options, name) for name in Work._fields if getattr(options, name) is not None}
    each, watch = SIZES._replace(**given), machine.Watch()
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = pathlib.Path(name) / "model", pathlib.Path(name) / "scratch"
        scratch.mkdir()
        shapes = work.write_model(options.model, folder)
        said = work.prompts(tokenizer.load(folder), each.prompt)
        settings = work.settings_of(each, folder, scratch, shapes.vocab, said)
        sweeps = {str(members): fused(settings, options.policy, members, options.parts) for members in options.members}
        seconds = stepping.take_turns(sweeps, each.tokens, options.warmup, options.steps)
    return {"model": options.model, "policy": options.policy, "parts": options.parts, "work": each._asdict(),
            "machine": machine.about(), "backend": jax.default_backend(), "others": watch.others(),
            "versions": machine.versions(), "seconds": seconds}


def report(result: dict) -> str:
    """A table in Markdown between two sentences."""
    each, rows, whole = Work(**result["work"]), [], {}
    for members, times in result["seconds"].items():
        phases = [float(np.median([row[phase] for row in times])) for phase in PHASES]
        whole[members] = float(np.median([sum(row.values()) for row in times]))
        goal = GOALS.get(result["backend"]) if members == "16" and result["policy"] == "head" else None
        rate = int(members) * each.sequences * each.generated / whole[members]
        rows.append([members, *(f"{x:.2f}" for x in (whole[members], *phases)), f"{whole[members] / whole['1']:.2f}",
                     "" if goal is None else f"{goal:g}", f"{rate:.0f}"])
    return "\n".join([
        f"{result['model']}, policy {result['policy']}: {each.sequences} episodes a member of {each.prompt} + "
        f"{each.generated} tokens, float32; {machine.ran(result)}. Seconds an iteration, "
        f"median of {len(result['seconds']['1'])}; ratio to one member.", "",
        machine.table(("members", "iteration", *PHASES, "ratio", "goal, at most", "tokens/s"), rows), "",
        machine.disturbed(result["others"])])


def _members(text):
    return sorted({1, *map(int, text.split(","))})


def main(argv=None) -> None:
    parser = machine.benchmark(__doc__)
    parser.add_argument("--model", choices=tuple(work.WORK), default="smollm2")
    parser.add_argument("--policy", choices=("head", "lora"), default="head")
    parser.add_argument("--members", type=_members, default=[1, 4, 16],
                        help="numbers of members; 1 is always among them")
    parser.add_argument("--parts", type=int, default=1,
                        help="that an update reads its episodes in (rl.accumulate), where those of all do not fit")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    for name in Work._fields:
        parser.add_argument(f"--{name}", type=int, help=f"of one member, instead of {getattr(SIZES, name)}")
    options = parser.parse_args(argv)
    result = measure(options)
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
