"""The policy whose weights are low-rank changes of the frozen base's."""
from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp

from kl_reg.models import decoder
from kl_reg.policies.finetuned import Finetuned, beside_base
from kl_reg.policies.interface import Policy, flat


def adaptable(config: decoder.DecoderConfig, targets: str) -> dict[str, tuple[int, ...]]:
    """Linear layers whose whole name (query, key, value, out, gate, up, down) matches the regular expression, with the
    shapes [layers, in, out] of their matrices.

    Raises:
        ValueError: there is none, and lists those of the model; or it is no regular expression.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"policy.targets={targets!r} is no regular expression ({error}); '.*' is all layers") from None
    layers = jax.eval_shape(partial(decoder.init, config), jax.random.key(0))["layers"]
    known = {name: leaf["kernel"].shape for name, leaf in layers.items() if "kernel" in leaf}
    chosen = {name: shape for name, shape in known.items() if pattern.fullmatch(name)}
    if not chosen:
        raise ValueError(f"policy.targets={targets!r} matches no linear layer; there are {', '.join(known)}")
    return chosen


def merged(base: dict, adapter: dict, scale: float) -> dict:
    """The base's parameters with one member's adapter added to its matrices: kernel + scale a b.

    Raises:
        ValueError: a matrix is int8, and the sum would not be.
    """
    layers = dict(base["layers"])
    for name, low in adapter.items():
        kernel = layers[name]["kernel"]
        if kernel.dtype == jnp.int8:
            raise ValueError(f"layers/{name}/kernel is int8; an adapter is added to floats (`export.as_floats`)")
        change = scale * jnp.einsum("ldr,lro->ldo", low["a"], low["b"])
        layers[name] = layers[name] | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
    return base | {"layers": layers}


def lora(config: decoder.DecoderConfig, settings) -> Policy:
    """Low-rank changes of the frozen base's matrices, kernel + alpha / rank a b, with b zero at first; all members'
    rows go through the base as one batch. Source: Hu et al. (2021), "LoRA".

    Settings: `rank`, `alpha`, `targets` (a regular expression of layers, as `adaptable` takes it), `hidden`,
    `spend_init`. The adapter is float32 whatever the base's dtype.
    """
    shapes, rank = adaptable(config, settings.targets), settings.rank

    def init(key, base):
        del base
        adapter = {}
        for i, (name, (layers, inner, outer)) in enumerate(shapes.items()):
            limit = inner**-0.5
            a = jax.random.uniform(jax.random.fold_in(key, i), (layers, inner, rank), minval=-limit, maxval=limit)
            adapter[name] = {"a": a, "b": jnp.zeros((layers, rank, outer))}
        return adapter

    def scaled(own, members):
        """The adapter as `decoder` takes it; the member axis, where there is one, is the second."""
        place = (lambda x: jnp.moveaxis(x, 0, 1)) if members else (lambda x: x[:, None])
        return {name: {"a": place(low["a"]), "b": settings.alpha / rank * place(low["b"])}
                for name, low in own.items()}

    def prefill(own, base, tokens, start, chosen, slots, group):
        adapter = scaled(own, True)
        return decoder.prefill(config, base, tokens, start, slots, adapter=adapter, group=group, chosen=flat(chosen))[1]

    def decode(own, base, token, start, index, cache):
        adapter = scaled(own, True)
        hidden, cache = decoder.decode(config, base, flat(token), flat(start), index, cache, adapter=adapter)
        return hidden.last.reshape(*token.shape, -1), cache

    def forward(own, base, tokens, start, group, shared):
        adapter = scaled(own, False)
        return decoder.forward(config, base, tokens, start, adapter=adapter, group=group, shared=shared).last

    def table(own, base):
        del own
        return decoder.unembedding(base)

    return beside_base(config, settings, Finetuned("adapter", init, prefill, decode, forward, lambda own: own,
                                                   table, trained=False))
