"""Prefill and decode of a base model with int8 matrices (`kl_reg.pretrained.quantize`) against the float model.

    python -m benchmarks.quantized_decode [--model embedded] [--dtype float32] [--rows 8] [--prompt 64] [--tokens 64]
        [--repeats 5] [--json FILE]

Decode is what a rollout does: one compiled loop of `tokens` steps, each a token of every row with the KV cache, logits
and a greedy choice. Timed in one process, taking turns; rates are of the median time. Memory is told twice: the bytes
of the parameters, and what the compiled loop asks for beside its inputs, where a float copy of all matrices would show.
"""
from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from kl_reg.models import decoder
from kl_reg.pretrained import quantize, weights

KINDS = ("float", "int8")


class Shape(NamedTuple):
    """Rows decoded together, tokens of their prompts, tokens that are decoded."""

    rows: int
    prompt: int
    tokens: int


def build(config: decoder.DecoderConfig, params: dict, shape: Shape, prompt: jax.Array):
    """Compiled (params, prompt) -> cache, and (params, token, cache) -> tokens, the cache copied in."""
    start = jnp.zeros(shape.rows, jnp.int32)

    def prefill(params, prompt):
        return decoder.prefill(config, params, prompt, start, shape.prompt + shape.tokens)[1]

    def generate(params, token, cache):
        def step(carry, index):
            hidden, cache = decoder.decode(config, params, carry[0], start, index, carry[1])
            return (decoder.logits(config, params, hidden.last).argmax(-1).astype(jnp.int32), cache), carry[0]

        return jax.lax.scan(step, (token, cache), shape.prompt + jnp.arange(shape.tokens))[1]

    filled = jax.jit(prefill).lower(params, prompt).compile()
    cache = jax.eval_shape(prefill, params, prompt)
    return filled, jax.jit(generate).lower(params, prompt[:, -1], cache).compile()


def compare(path: str, dtype: str, shape: Shape, repeats: int) -> dict:
    """Tokens per second, bytes, and the KL of the int8 model."""
    model = weights.load(path, dtype)
    params = {"float": model.params, "int8": quantize.quantize(model.params)}
    held_out = quantize.held_out(model)
    divergence = quantize.measure(model.config, model.params, *(quantize.hidden(model.config, params[kind], held_out)
                                                                for kind in KINDS))
    prompt = jax.random.randint(jax.random.key(0), (shape.rows, shape.prompt), 0, model.config.vocab)
    programs = {kind: build(model.config, params[kind], shape, prompt) for kind in KINDS}
    caches = {kind: programs[kind][0](params[kind], prompt) for kind in KINDS}
    seconds = {kind: {"prefill": [], "decode": []} for kind in KINDS}
    for repeat in range(repeats + 1):       # the first is a warm-up
        for kind in KINDS if repeat % 2 else KINDS[::-1]:
            prefill, decode = programs[kind]
            calls = {"prefill": partial(prefill, params[kind], prompt),
                     "decode": partial(decode, params[kind], prompt[:, -1], caches[kind])}
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call())
                seconds[kind][name] += [time.perf_counter() - start] * (repeat > 0)
    count = {"prefill": shape.rows * shape.prompt, "decode": shape.rows * shape.tokens}
    return {"model": path, "dtype": dtype, "shape": shape._asdict(), "repeats": repeats, "kl": divergence._asdict(),
            **{f"{name}_tokens_per_second": {kind: count[name] / float(np.median(seconds[kind][name]))
                                             for kind in KINDS} for name in count},
            "weights_bytes": {kind: sum(leaf.nbytes for leaf in jax.tree.leaves(params[kind])) for kind in KINDS},
            "decode_temp_bytes": {kind: programs[kind][1].memory_analysis().temp_size_in_bytes for kind in KINDS}}


def report(result: dict) -> str:
    """The comparison as a table in Markdown between two sentences; ratios are int8 over float."""
    shape, rows, kl = Shape(**result["shape"]), [], result["kl"]
    for label, key, unit in (("decode, tokens per second", "decode_tokens_per_second", 1),
                             ("prefill, tokens per second", "prefill_tokens_per_second", 1),
                             ("weights, MB", "weights_bytes", 1e6),
                             ("temporary memory of decode, MB", "decode_temp_bytes", 1e6)):
        values = [result[key][kind] / unit for kind in KINDS]
        rows.append([label, *(f"{value:.4g}" for value in values), f"{values[1] / values[0]:.3f}"])
    return "\n".join([
        f"{result['model']} in {result['dtype']}: {shape.rows} rows, prompts of {shape.prompt} tokens, {shape.tokens} "
        f"decoded; {machine.ran(result)}.", "", machine.table(("", *KINDS, "ratio"), rows), "",
        f"KL to the float model {kl['to_float']:.3g} ± {kl['to_float_se']:.1g} nats per token. "
        f"{machine.disturbed(result['others'])}"])


def main(argv=None):
    parser = machine.benchmark(__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, size in (("rows", 8), ("prompt", 64), ("tokens", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options, watch = parser.parse_args(argv), machine.Watch()
    result = compare(options.model, options.dtype, Shape(options.rows, options.prompt, options.tokens),
                     options.repeats)
    result |= {"machine": machine.about(), "others": watch.others(), "versions": machine.versions()}
    machine.tell(result, report(result), options.json)


if __name__ == "__main__":
    main()
