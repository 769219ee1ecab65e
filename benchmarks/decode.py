"""Tokens per second of the rollout alone, beside torch's `generate`, and how near both are to the hardware's limit.

    python -m benchmarks.decode [--model=smollm2|tiny] [--policy=head|full|lora] [--shared] [--dtype=float32]
                                [--steps 5] [--json FILE]

64 sequences of 32 + 32 tokens: 16 prompts, 4 samples of each. kl_reg's row is the compiled rollout of a training
program, one member; "separate" reads every sequence's prompt by itself, as `generate` does, and "shared" (--shared)
samples groups of 4, whose prompt is read once. The policy "head" has one pass of the layers and one unembedding a
token, as plain sampling has, and so have "full" and "lora" with layers of their own; the base reads the transcripts
later, in the update. Samplers take turns; a peer is a process in an environment of its own (peers/environment.py), and
runs where JAX does here.

The roofline is the time that plain sampling needs at least: each pass of the layers, that over the prompts and one a
token, takes the longer of its FLOPs at the rate of the best matrix product, and of its bytes, weights and cache read
once, at the rate of memory, both measured here. With --torch-compile `generate` has a static cache, for which it
compiles on a GPU.
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
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, trainer
from benchmarks.peers import environment, stepping, work
from benchmarks.peers.stepping import Clock, Step
from benchmarks.peers.work import Work
from kl_reg.models.decoder import DecoderConfig
from kl_reg.pretrained import tokenizer
from kl_reg.types import PAD

SIZES = Work(sequences=64, prompt=32, generated=32, group=4)
GOALS = {"separate": 1.25, "shared": 1.7}
OF_ROOFLINE = 0.6
"""The goal of both on an accelerator, where decoding waits for memory."""


def ours(settings: dict, policy: str, dtype: str, shared: bool) -> Callable[[], Step]:
    """kl_reg's sampler: a function that samples all sequences. Prompts that are not shared are as many as sequences,
    so that none is read once for several."""
    given = settings if shared else settings | {"group": 1, "prompts": settings["prompts"] * settings["group"]}
    own = trainer.Trainer(trainer.experiment(given, policy__kind=policy, model__dtype=dtype,
                                             rl__algorithm="reinforce"), settings["vocabulary"])

    def step():
        clock = Clock()
        episodes = own.rollout()
        clock.mark("rollout")
        return Step(clock.seconds, int((episodes.transcript.roles != PAD).sum()), None)

    return step


def passes(shapes: DecoderConfig, each: Work, shared: bool, size: int) -> list[tuple[int, int]]:
    """FLOPs and bytes of each pass of the layers: that over the prompts but their last tokens, then one a token.

    Bytes are those of all weights, the unembedding's where it is used, and of the cached keys and values that are read,
    `size` each. Shared prompts are read once in a group, by the first pass and by attention. A multiply-add is two
    FLOPs.
    """
    heads, keys = shapes.heads * shapes.head_width, 2 * shapes.kv_heads * shapes.head_width
    matrices = shapes.width * (2 * heads + keys + 3 * shapes.mlp_width)
    prompts, before = each.sequences // (each.group if shared else 1), each.prompt - 1
    flops = prompts * shapes.layers * (2 * matrices * before + 4 * heads * before * (before + 1) // 2)
    out = [(flops, size * shapes.layers * matrices)]
    unembedding = shapes.width * shapes.vocab
    for said in range(each.generated):
        flops = each.sequences * (shapes.layers * (2 * matrices + 4 * heads * (each.prompt + said)) + 2 * unembedding)
        cached = shapes.layers * keys * (prompts * each.prompt + each.sequences * said)
        out.append((flops, size * (shapes.layers * matrices + unembedding + cached)))
    return out


def least(steps: list[tuple[int, int]], peak: float, rate: float) -> tuple[float, float]:
    """Seconds that these passes take at least, and which part of them memory decides."""
    limits = [(flops / peak, moved / rate) for flops, moved in steps]
    total = sum(map(max, limits))
    return total, sum(moved for flops, moved in limits if moved > flops) / total


def measure(options: argparse.Namespace) -> dict:
    """Runs all samplers: what goes to JSON."""
    given = {name: getattr(options, name) for name in Work._fields if getattr(options, name) is not None}
    each, dtype = SIZES._replace(**given), jnp.dtype(options.dtype)
    python = None if options.alone else environment.python("trl", jax.default_backend())
    watch = machine.Watch()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, scratch = pathlib.Path(name) / "model", pathlib.Path(name) / "scratch"
        scratch.mkdir()
        shapes = work.write_model(options.model, folder)
        said = work.prompts(tokenizer.load(folder), each.prompt, max(each.sequences // each.group, 1))
        settings = work.settings_of(each, folder, scratch, shapes.vocab, said)
        file = scratch / "settings.json"
        settings |= {"dtype": options.dtype, "torch_compile": options.torch_compile}
        file.write_text(json.dumps(settings), encoding="utf-8")
        kinds = ["separate", "shared"][:1 + options.shared]
        samplers = {kind: ours(settings, options.policy, options.dtype, kind == "shared") for kind in kinds}
        told = dict.fromkeys(kinds, machine.versions())
        peak, rate = machine.matmul_peak(dtype=dtype), machine.bandwidth()
        if python:
            peer = stack.enter_context(stepping.running("generate", [
                str(python), "-m", "benchmarks.peers.torch_generate", str(file)], stepping.TORCH))
            samplers["generate"], told["generate"] = partial(stepping.step, peer), peer.versions
        seconds = stepping.take_turns(samplers, each.tokens, options.warmup, options.steps)
        peak, rate = max(peak, machine.matmul_peak(dtype=dtype)), max(rate, machine.bandwidth())
    limits = {name: least(passes(shapes, each, name == "shared", dtype.itemsize), peak, rate) for name in samplers}
    return {"model": options.model, "policy": options.policy, "dtype": options.dtype, "work": each._asdict(),
            "torch_compile": options.torch_compile, "machine": machine.about(), "others": watch.others(),
            "versions": told, "matmul_flops_per_second": peak, "memory_bytes_per_second": rate,
            "seconds": {name: [row["rollout"] for row in rows] for name, rows in seconds.items()},
            "least_seconds": {name: limit for name, (limit, _) in limits.items()},
            "part_of_memory": {name: part for name, (_, part) in limits.items()}}


def report(result: dict) -> str:
    """A table in Markdown between sentences."""
    each, rows = Work(**result["work"]), []
    median = {name: float(np.median(times)) for name, times in result["seconds"].items()}
    for name, seconds in median.items():
        title = machine.listed(result["versions"][name])
        ratio = f"{median['generate'] / seconds:.2f}" if name != "generate" and "generate" in median else ""
        rows.append([f"{title}, {'prompts ' * (name != 'generate')}{name}",
                     f"{each.sequences * each.generated / seconds:.0f}", f"{seconds:.2f}",
                     f"{result['least_seconds'][name] / seconds:.0%}", ratio,
                     f"{GOALS[name]:g}" if name in GOALS else ""])
    goal = f" (goal on an accelerator: {OF_ROOFLINE:.0%})" if result["machine"]["device"] != "cpu" else ""
    memory = ", ".join(f"{part:.0%} ({name})" for name, part in result["part_of_memory"].items())
    return "\n".join([
        f"{result['model']}, policy {result['policy']}: {each.sequences} sequences of {each.prompt} + "
        f"{each.generated} tokens, {each.group} of a prompt, {result['dtype']}; {machine.where(result['machine'])}. "
        f"Generated tokens per second, median of {len(next(iter(result['seconds'].values())))} runs.", "",
        machine.table(("sampler", "tokens/s", "seconds", "of roofline", "ratio", "goal"), rows), "",
        f"Matrix products reach {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s here, memory "
        f"{result['memory_bytes_per_second'] / 1e9:.0f} GB/s. Part of the roofline's time that memory decides{goal}: "
        f"{memory}. {machine.disturbed(result['others'])}"])


def main(argv=None) -> None:
    parser = machine.benchmark(__doc__)
    parser.add_argument("--model", choices=tuple(work.WORK), default="smollm2")
    parser.add_argument("--policy", choices=("head", "full", "lora"), default="head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shared", action="store_true", help="also with prompts that a group shares")
    parser.add_argument("--alone", action="store_true", help="without torch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--torch-compile", action="store_true", help="of torch")
    for name in Work._fields:
        parser.add_argument(f"--{name}", type=int, help=f"instead of {getattr(SIZES, name)}")
    options = parser.parse_args(argv)
    stepping.share_device()
    result = measure(options)
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
