"""Memory and time of the exact KL and its gradient: `kl_reg.kl.chunked` against the plain formula on all logits.

    python -m benchmarks.kl_memory [--rows 2048] [--vocab 49152] [--width 576] [--chunk 64] [--json FILE]

Both compute the mean over rows of D(pi || beta) from hidden states and one unembedding, and its gradient with respect
to the policy's hidden states, in float32. Timed in one process, taking turns. Memory is told twice: what the compiled
program asks for beside its inputs (temporary and output buffers), and by how much the peak of resident memory rises
during one call, each in a process of its own (on Linux, from /proc; the scratch of the matrix products included).
"""
from __future__ import annotations

import pathlib
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from kl_reg.kl.chunked import chunked_terms

KINDS = ("naive", "chunked")


class Shape(NamedTuple):
    """Rows of hidden states, entries of the vocabulary, model width, rows in a chunk."""

    rows: int
    vocab: int
    width: int
    chunk: int


def make_inputs(shape: Shape):
    """Hidden states of policy and base, and an unembedding: base logits spread by 3, the policy's change by 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    base = jax.random.normal(keys[0], (shape.rows, shape.width))
    table = jax.random.normal(keys[1], (shape.vocab, shape.width)) * 3 / shape.width**0.5
    return base + jax.random.normal(keys[2], base.shape) / 3, table, base


def naive(policy, table, base):
    """D(pi || beta) of each row, written down as the formula says."""
    log_policy, log_base = jax.nn.log_softmax(policy @ table.T), jax.nn.log_softmax(base @ table.T)
    return (jnp.exp(log_policy) * (log_policy - log_base)).sum(-1)


def chunked(policy, table, base, chunk):
    """The same by chunks."""
    action = jnp.zeros(policy.shape[0], jnp.int32)
    return chunked_terms(policy, table, base, table, action, relative=False, chunk=chunk, differentiate=("kl",)).kl


def build(kind: str, shape: Shape, inputs):
    """Compiled (policy, table, base) -> ((mean, KL of each row), gradient of the mean)."""
    rows = naive if kind == "naive" else partial(chunked, chunk=shape.chunk)

    def mean(*inputs):
        kl = rows(*inputs)
        return kl.mean(), kl

    return jax.jit(jax.value_and_grad(mean, has_aux=True)).lower(*inputs).compile()


def compare(shape: Shape, repeats: int) -> dict:
    """Time, compiled memory and results of both."""
    inputs = make_inputs(shape)
    programs = {kind: build(kind, shape, inputs) for kind in KINDS}
    results = {kind: jax.block_until_ready(program(*inputs)) for kind, program in programs.items()}
    seconds = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        for kind in KINDS if repeat % 2 else KINDS[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[kind](*inputs))
            seconds[kind].append(time.perf_counter() - start)
    memory = {kind: program.memory_analysis() for kind, program in programs.items()}
    (_, kl), gradient = results["naive"]
    (_, kl_chunked), gradient_chunked = results["chunked"]
    return {
        "shape": shape._asdict(), "repeats": repeats, "mean_kl": float(kl.mean()),
        "seconds_median": {kind: float(np.median(times)) for kind, times in seconds.items()},
        "seconds_min": {kind: min(times) for kind, times in seconds.items()},
        "compiled_bytes": {kind: m.temp_size_in_bytes + m.output_size_in_bytes for kind, m in memory.items()},
        "largest_difference_kl": float(jnp.abs(kl - kl_chunked).max()),
        "largest_difference_gradient": float(jnp.abs(gradient - gradient_chunked).max()),
        "largest_gradient": float(jnp.abs(gradient).max())}


def resident_rise(kind: str, shape: Shape) -> int:
    """Bytes by which one call raises the peak of this process's resident memory above what it is before."""
    inputs = jax.block_until_ready(make_inputs(shape))
    program = build(kind, shape, inputs)
    pathlib.Path("/proc/self/clear_refs").write_bytes(b"5")        # sets the recorded peak to the present
    before = _peak_resident()
    jax.block_until_ready(program(*inputs))
    return _peak_resident() - before


def _peak_resident():
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def resident_rise_alone(kind: str, shape: Shape) -> int:
    """`resident_rise` in a process of its own."""
    sizes = [word for name, size in shape._asdict().items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "benchmarks.kl_memory", "--resident-of", kind, *sizes]
    root = pathlib.Path(__file__).parent.parent
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout)


def report(result: dict) -> str:
    """The comparison as a table in Markdown between two sentences; ratios are chunked over naive."""
    shape, rows = Shape(**result["shape"]), []
    for label, key, unit in (("seconds, median", "seconds_median", 1), ("seconds, min", "seconds_min", 1),
                             ("compiled temp + output, MB", "compiled_bytes", 1e6),
                             ("rise of peak resident memory, MB", "resident_bytes", 1e6)):
        if key in result:
            values = [result[key][kind] / unit for kind in KINDS]
            rows.append([label, *(f"{value:.4g}" for value in values), f"{values[1] / values[0]:.3f}"])
    return "\n".join([
        f"Exact KL and its gradient: n = {shape.rows}, v = {shape.vocab}, d = {shape.width}, chunk {shape.chunk}; "
        f"{machine.ran(result)}.", "", machine.table(("", *KINDS, "ratio"), rows), "",
        f"Mean KL {result['mean_kl']:.4f} nats per token. Largest difference of a row's KL "
        f"{result['largest_difference_kl']:.1e} nats, of an entry of the gradient "
        f"{result['largest_difference_gradient']:.1e} (largest entry {result['largest_gradient']:.1e}). "
        f"{machine.disturbed(result['others'])}"])


def main(argv=None):
    parser = machine.benchmark(__doc__)
    for name, size in (("rows", 2048), ("vocab", 49152), ("width", 576), ("chunk", 64), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--resident-of", choices=KINDS, help="print only the rise of peak resident memory, bytes")
    parser.add_argument("--no-resident", action="store_true", help="leave that out")
    options = parser.parse_args(argv)
    shape = Shape(options.rows, options.vocab, options.width, options.chunk)
    if options.resident_of:
        print(resident_rise(options.resident_of, shape))
        return
    watch = machine.Watch()
    result = compare(shape, options.repeats)
    if not options.no_resident:
        result["resident_bytes"] = {kind: resident_rise_alone(kind, shape) for kind in KINDS}
    result |= {"machine": machine.about(), "others": watch.others(), "versions": machine.versions()}
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
