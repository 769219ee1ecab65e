"""Exact terms of many tokens from hidden states, a chunk of rows at a time: no [n, v] array of all n rows is formed.

Axis names: n tokens, d model width, v vocabulary, p parts of r rows each.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl.exact import TokenTerms, token_terms

_DIFFERENTIABLE = ("log_prob", "kl", "entropy", "forward_kl")


class _Plan(NamedTuple):
    """The static arguments of `chunked_terms`."""

    relative: bool
    train_table: bool
    differentiate: tuple[str, ...]
    scale: float


def chunked_terms(policy: Float[Array, "n d"], policy_table: Float[Array, "v d"], base: Float[Array, "n d"],
                  base_table: Float[Array, "v d"], action: Int[Array, " n"], *, relative: bool, chunk: int,
                  train_table: bool = False, differentiate: tuple[str, ...] = ("log_prob", "kl"),
                  scale: float = 1.0) -> TokenTerms:
    r"""`token_terms` of n tokens whose logits are scale * (hidden @ table^T); float32 [n], nats per token.

    The derivatives with respect to `policy` are formed while a chunk's logits are there: scale * (dterm / dlogits) @
    policy_table, [n, d] for each name in `differentiate`; the backward pass only weights them. With `train_table` it
    recomputes each chunk's logits instead, for the derivatives of hidden states and table alike. Without a gradient
    neither is done. The largest temporary arrays are [chunk, v], and [m, chunk, v] under a vmap over m members.
    Idea of fusing the unembedding, the loss and its gradient: Hsu et al. (2024), "Liger Kernel", arXiv 2410.10989.

    Args:
        policy: final hidden states of the policy; with `relative` their change against `base`.
        policy_table: unembedding. Matrix products round their inputs to its dtype and sum in float32.
        base: final hidden states of the base. Base and base table are constants.
        base_table: unembedding of the base; may be the same array as `policy_table`.
        action: the tokens that were drawn.
        relative: whether the policy's logits are the base's plus scale * (policy @ policy_table^T).
        chunk: at most so many rows at a time, on all devices together where n is sharded.
        train_table: whether `policy_table` gets a gradient; a constant otherwise.
        differentiate: of log_prob, kl, entropy, forward_kl: the terms that have a derivative; the others are constants.
            log_ratio goes with log_prob. forward_kl is computed only if it is named here.
        scale: 1 / temperature.

    Raises:
        ValueError: an unknown name in `differentiate`, or `chunk` below 1.
    """
    unknown = [name for name in differentiate if name not in _DIFFERENTIABLE]
    if unknown:
        raise ValueError(f"differentiate={unknown} is unknown; choose from {', '.join(_DIFFERENTIABLE)}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    plan = _Plan(relative, train_table, tuple(differentiate), scale)
    tokens = action.shape[0]
    parts = max(-(-tokens // chunk), 1)
    split = partial(_split, parts=parts)
    terms = _terms(plan, split(policy.astype(jnp.float32)), policy_table, split(jax.lax.stop_gradient(base)),
                   jax.lax.stop_gradient(base_table), split(action))
    return TokenTerms(*(x.swapaxes(0, 1).reshape(-1)[:tokens] for x in terms))


def _split(x, parts):
    """[n, ...] -> [p, r, ...], padded. Part i takes every p-th row from i on, so that n may be sharded over devices."""
    rows = -(-x.shape[0] // parts)
    padded = jnp.pad(x, [(0, rows * parts - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(plan, policy, policy_table, base, base_table, action):
    def part(rows):
        logits, terms_of = _part(plan, policy_table, base_table, *rows)
        return terms_of(logits)

    return jax.lax.map(part, (policy, base, action))


def _part(plan, policy_table, base_table, policy, base, action):
    """Logits [r, v] of the policy, and the function from such logits to the terms [r]."""
    base_logits = _product("rd,vd->rv", base_table.dtype, base, base_table) * plan.scale
    logits = _product("rd,vd->rv", policy_table.dtype, policy, policy_table) * plan.scale
    log_base = jax.nn.log_softmax(base_logits)
    one = partial(token_terms, forward="forward_kl" in plan.differentiate)
    return base_logits + logits if plan.relative else logits, lambda z: jax.vmap(one)(z, log_base, action)


def _product(axes, dtype, left, right):
    return jnp.einsum(axes, left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32,
                      precision="highest")      # float32 stays float32 where the hardware has a coarser default


def _forward(plan, policy, policy_table, base, base_table, action):
    if plan.train_table:
        inputs = policy, policy_table, base, base_table, action
        return _terms(plan, *inputs), inputs

    def part(rows):
        logits, terms_of = _part(plan, policy_table, base_table, *rows)
        by_logits = {name: jax.grad(lambda z, name=name: terms_of(z)._asdict()[name].sum())(logits)
                     for name in plan.differentiate}
        return terms_of(logits), {name: _by_policy(plan, x, policy_table) for name, x in by_logits.items()}

    return jax.lax.map(part, (policy, base, action))


def _by_policy(plan, by_logits, policy_table):
    return _product("rv,vd->rd", policy_table.dtype, by_logits, policy_table) * plan.scale


def _backward(plan, residuals, cotangents):
    weights = cotangents._asdict()
    weights["log_prob"] = weights["log_prob"] + weights.pop("log_ratio")
    weights = {name: weights[name] for name in plan.differentiate}
    if plan.train_table:
        return *_by_policy_and_table(plan, residuals, weights), None, None, None
    by_policy = [weight[..., None] * residuals[name] for name, weight in weights.items()]
    return sum(by_policy) if by_policy else None, None, None, None, None


def _by_policy_and_table(plan, inputs, weights):
    """Gradients of the weighted sum of terms with respect to hidden states [p, r, d] and table [v, d]."""
    policy, policy_table, base, base_table, action = inputs

    def part(by_table, rows):
        weights, *rows = rows
        logits, terms_of = _part(plan, policy_table, base_table, *rows)

        def weighted(z):
            terms = terms_of(z)._asdict()
            return sum(((weight * terms[name]).sum() for name, weight in weights.items()), jnp.zeros(()))

        by_logits = jax.grad(weighted)(logits)
        by_table += _product("rv,rd->vd", policy_table.dtype, by_logits, rows[0]) * plan.scale
        return by_table, _by_policy(plan, by_logits, policy_table)

    zeros = jnp.zeros(policy_table.shape, jnp.float32)
    by_table, by_policy = jax.lax.scan(part, zeros, (weights, policy, base, action))
    return by_policy, by_table.astype(policy_table.dtype)


_terms.defvjp(_forward, _backward)
