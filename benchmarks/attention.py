"""The three ways of attention over whole sequences (`model.attention`): time, memory and values of a pass and its
gradient.

    python -m benchmarks.attention [--model shapes|smollm2|FOLDER] [--dtype bfloat16] [--rows 8] [--length 2048]
        [--repeats 5] [--json FILE]

"own" is this project's attention, "xla" `jax.nn.dot_product_attention` without a kernel of its own, "cudnn" the same
with cuDNN's fused kernels, which an NVIDIA GPU and bfloat16 have; elsewhere that row is left out. Each computes the
final hidden states of the same random tokens, and, by the embeddings, the gradient of their mean product with random
numbers. Timed in one process, taking turns; the largest difference is from "own" in float32. Memory is what the
compiled gradient asks for beside its inputs.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.peers import work
from kl_reg.models import decoder
from kl_reg.pretrained import weights

KINDS = {"own": "", "xla": "xla", "cudnn": "cudnn"}


def kinds(dtype: str) -> list[str]:
    """Those that can run here."""
    fused = jax.default_backend() == "gpu" and dtype == "bfloat16"
    return [kind for kind in KINDS if kind != "cudnn" or fused]


def build(config: decoder.DecoderConfig, params: dict, tokens: jax.Array):
    """Compiled params -> final hidden states [b, t, d], and params -> the gradient of their mean product with random
    numbers by the embeddings [v, d]."""
    start = jnp.zeros(len(tokens), jnp.int32)
    along = jax.random.normal(jax.random.key(1), (*tokens.shape, config.width))

    def hidden(params):
        return decoder.forward(config, params, tokens, start).last.astype(jnp.float32)

    def by_embeddings(params):
        return jax.grad(lambda embed: (along * hidden(params | {"embed": embed})).mean())(params["embed"])

    return tuple(jax.jit(function).lower(params).compile() for function in (hidden, by_embeddings))


def compare(path: str, dtype: str, rows: int, length: int, repeats: int) -> dict:
    """Seconds, bytes and differences of each kind."""
    exact = weights.load(path, "float32")
    tokens = jax.random.randint(jax.random.key(0), (rows, length), 0, exact.config.vocab)
    expected = [np.asarray(run(exact.params)) for run in build(exact.config, exact.params, tokens)]
    model, found = weights.load(path, dtype), kinds(dtype)
    runs = {kind: build(dataclasses.replace(model.config, attention=KINDS[kind]), model.params, tokens)
            for kind in found}
    seconds = {kind: {"forward": [], "gradient": []} for kind in found}
    for repeat in range(repeats + 1):       # the first is a warm-up
        for kind in found if repeat % 2 else found[::-1]:
            for name, run in zip(("forward", "gradient"), runs[kind], strict=True):
                began = time.perf_counter()
                jax.block_until_ready(run(model.params))
                seconds[kind][name] += [time.perf_counter() - began] * (repeat > 0)
    apart = {kind: [float(np.abs(np.asarray(run(model.params), np.float32) - other).max() / np.abs(other).max())
                    for run, other in zip(runs[kind], expected, strict=True)] for kind in found}
    memory = {kind: runs[kind][1].memory_analysis().temp_size_in_bytes for kind in found}
    return {"model": path, "dtype": dtype, "rows": rows, "length": length, "repeats": repeats, "seconds": seconds,
            "largest_difference": apart, "temp_bytes": memory}


def report(result: dict) -> str:
    """A table in Markdown between two sentences; ratios are over \"own\"."""
    median = {kind: {name: float(np.median(each)) for name, each in times.items()}
              for kind, times in result["seconds"].items()}
    rows = [[kind, *(f"{median[kind][name]:.4f}" for name in ("forward", "gradient")),
             *(f"{median[kind][name] / median['own'][name]:.2f}" for name in ("forward", "gradient")),
             f"{result['temp_bytes'][kind] / 1e6:.0f}", *(f"{x:.1e}" for x in result["largest_difference"][kind])]
            for kind in result["seconds"]]
    columns = ("attention", "forward, s", "gradient, s", "forward, ratio", "gradient, ratio", "gradient, MB",
               "states differ by", "gradients differ by")
    return "\n".join([
        f"{pathlib.Path(result['model']).name} in {result['dtype']}: {result['rows']} sequences of {result['length']} "
        f"tokens; {machine.ran(result)}. Median of {result['repeats']} runs.", "", machine.table(columns, rows), "",
        "Differences are the largest ones from float32, over the largest entry. "
        f"{machine.disturbed(result['others'])}"])


def main(argv=None) -> None:
    parser = machine.benchmark(__doc__)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    for name, size in (("rows", 8), ("length", 2048), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options, watch = parser.parse_args(argv), machine.Watch()
    result = measure(options)
    result |= {"machine": machine.about(), "others": watch.others(), "versions": machine.versions()}
    machine.tell(result, report(result), options.json)


def measure(options: argparse.Namespace) -> dict:
    """`compare`, of random weights or of a model's own."""
    if options.model not in work.RANDOM:
        return compare(options.model, options.dtype, options.rows, options.length, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / options.model
        work.write_model(options.model, folder)
        return compare(str(folder), options.dtype, options.rows, options.length, options.repeats)


if __name__ == "__main__":
    main()
