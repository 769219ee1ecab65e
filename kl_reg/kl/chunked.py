"""Exact terms of many tokens from hidden states, and losses of them, a chunk of rows at a time: no [n, v] array of all
n rows is formed.

Axis names: n tokens, d model width, v vocabulary, p parts of r rows each. A part's products with the tables are made at
once, and worked on `block` rows at a time: long products are fast, and few rows stay in a processor's cache.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.sharding.batching import take, write

_DIFFERENTIABLE = ("log_prob", "kl", "entropy", "forward_kl")


class _Plan(NamedTuple):
    """The static arguments of `chunked_terms`."""

    relative: bool
    train_table: bool
    differentiate: tuple[str, ...]
    scale: float
    cap: float | None
    block: int | None


def chunked_terms(policy: Float[Array, "n h"], policy_table: Float[Array, "v h"], base: Float[Array, "n d"],
                  base_table: Float[Array, "v d"], action: Int[Array, " n"], *, relative: bool, chunk: int,
                  train_table: bool = False, differentiate: tuple[str, ...] = ("log_prob", "kl"),
                  scale: float = 1.0, cap: float | None = None, used: Int[Array, ""] | None = None,
                  block: int | None = None) -> TokenTerms:
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
        cap: logits are scale * cap * tanh(hidden @ table^T / cap), a relative policy's change is not; None: nothing is.
        used: only so many of the ceil(n / chunk) parts are computed, of which part i holds every ceil(n / chunk)-th row
            from i on; the others are zero. None: all.
        block: so many rows of a chunk at a time, or a number near it that divides the chunk; None: all.

    Raises:
        ValueError: an unknown name in `differentiate`, or `chunk` below 1.
    """
    unknown = [name for name in differentiate if name not in _DIFFERENTIABLE]
    if unknown:
        raise ValueError(f"differentiate={unknown} is unknown; choose from {', '.join(_DIFFERENTIABLE)}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    plan = _Plan(relative, train_table, tuple(differentiate), scale, cap, block)
    tokens = action.shape[0]
    parts = max(-(-tokens // chunk), 1)
    split = partial(_split, parts=parts)
    terms = _terms(plan, split(policy.astype(jnp.float32)), policy_table, split(jax.lax.stop_gradient(base)),
                   jax.lax.stop_gradient(base_table), split(action), jnp.int32(parts) if used is None else used)
    return TokenTerms(*(x.swapaxes(0, 1).reshape(-1)[:tokens] for x in terms))


def _split(x, parts):
    """[n, ...] -> [p, r, ...], padded. Part i takes every p-th row from i on, so that n may be sharded over devices."""
    rows = -(-x.shape[0] // parts)
    padded = jnp.pad(x, [(0, rows * parts - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)


def over_parts(function: Callable, used: Int[Array, ""], *xs):
    """`lax.map` over the parts of pytrees [p, r, ...]; zeros behind the first `used` ones."""
    def part(args):
        index, *rows = args
        nothing = lambda *rows: jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *rows))
        return jax.lax.cond(index < used, function, nothing, *rows)

    return jax.lax.map(part, (jnp.arange(len(jax.tree.leaves(xs)[0])), *xs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(plan, policy, policy_table, base, base_table, action, used):
    def part(policy, base, action):
        products = _products(policy_table, base_table, policy, base)
        return _over_rows(plan.block, lambda *row: (None, _terms_of(plan, *row)), *products, action)[1]

    return over_parts(part, used, policy, base, action)


def _products(policy_table, base_table, policy, base):
    """[r, v] of policy and base, each with its table."""
    own = _product("rd,vd->rv", policy_table.dtype, policy, policy_table)
    return own, _product("rd,vd->rv", base_table.dtype, base, base_table)


def _terms_of(plan, product, base_product, action):
    """The terms of one token, from its rows [v] of the products."""
    shape = lambda z: z if plan.cap is None else plan.cap * jnp.tanh(z / plan.cap)  # noqa: E731
    base_logits = shape(base_product) * plan.scale
    logits = base_logits + product * plan.scale if plan.relative else shape(product) * plan.scale
    return token_terms(logits, jax.nn.log_softmax(base_logits), action, forward="forward_kl" in plan.differentiate)


def _over_rows(block, function, product, *xs):
    """function(row of product, rows of xs) -> (what takes the place of the product's; None: nothing, others), of all
    rows, a block at a time."""
    rows = len(product)
    if block is None or block >= rows:
        return jax.vmap(function)(product, *xs)
    size = _size(rows, block)

    def work(i, carry):
        product, outs = carry
        here = jax.tree.map(lambda x: take(x, i * size, size, 0), (product, *xs))
        own, new = jax.vmap(function)(*here)
        put = lambda out, x: write(out, x, i * size, 0)  # noqa: E731
        return product if own is None else put(product, own), jax.tree.map(put, outs, new)

    own, shapes = jax.eval_shape(jax.vmap(function), product, *xs)
    outs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    product, outs = jax.lax.fori_loop(0, rows // size, work, (product, outs))
    return None if own is None else product, outs


def over_blocks(block: int | None, function: Callable, *xs):
    """function(pytrees [n, ...]) of all rows [r, ...], about `block` of them at a time; None: all."""
    rows = len(jax.tree.leaves(xs)[0])
    if block is None or block >= rows:
        return function(*xs)
    size = _size(rows, block)
    out = jax.lax.map(lambda xs: function(*xs), jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), xs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _size(rows, block):
    """The divisor of `rows` that is nearest to `block`."""
    return min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(math.log(n / block)))


def _product(axes, dtype, left, right):
    return jnp.einsum(axes, left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32,
                      precision="highest")      # float32 stays float32 where the hardware has a coarser default


def _forward(plan, policy, policy_table, base, base_table, action, used):
    inputs = policy, policy_table, base, base_table, action, used
    if plan.train_table:
        return _terms(plan, *inputs), inputs

    def row(product, *rest):
        """The terms of one token and their derivatives by its product."""
        terms_of = lambda product: _terms_of(plan, product, *rest)  # noqa: E731
        return terms_of(product), {name: jax.grad(lambda z, name=name: terms_of(z)._asdict()[name])(product)
                                   for name in plan.differentiate}

    return with_derivatives(row, policy, policy_table, base, base_table, action, used=used, block=plan.block)


def with_derivatives(row: Callable, policy: Float[Array, "p r h"], policy_table: Float[Array, "v h"],
                     base: Float[Array, "p r d"], base_table: Float[Array, "v d"], given, *, used: Int[Array, ""],
                     block: int | None):
    """What row(product [v] of a token's policy, product of its base, entry of `given`) -> (out, {name: derivative [v]
    by the policy's product}) says of all tokens; with derivatives by `policy` [p, r, h] instead of by its product.

    Args:
        given: a pytree of [p, r, ...].
        used: only the first so many parts are computed, the others are zero.
        block: so many rows of a part at a time, or a number near it; None: all.
    """
    def part(policy, base, given):
        products = _products(policy_table, base_table, policy, base)
        _, (out, by_product) = _over_rows(block, lambda *xs: (None, row(*xs)), *products, given)
        return out, {name: _by_policy(x, policy_table) for name, x in by_product.items()}

    return over_parts(part, used, policy, base, given)


def _by_policy(by_product, policy_table):
    return _product("rv,vd->rd", policy_table.dtype, by_product, policy_table)


def _backward(plan, residuals, cotangents):
    weights = cotangents._asdict()
    weights["log_prob"] = weights["log_prob"] + weights.pop("log_ratio")
    weights = {name: weights[name] for name in plan.differentiate}
    if plan.train_table:
        return *_by_policy_and_table(plan, residuals, weights), None, None, None, None
    by_policy = [weight[..., None] * residuals[name] for name, weight in weights.items()]
    return sum(by_policy) if by_policy else None, None, None, None, None, None


def _by_policy_and_table(plan, inputs, weights):
    """Gradients of the weighted sum of terms with respect to hidden states [p, r, d] and table [v, d]."""
    policy, policy_table, base, base_table, action, used = inputs

    def weighted(product, base_product, action, weights):
        terms = _terms_of(plan, product, base_product, action)._asdict()
        return sum((weight * terms[name] for name, weight in weights.items()), jnp.zeros(()))

    def read(by_table, weights, policy, base, action):
        products = _products(policy_table, base_table, policy, base)
        by_product, _ = _over_rows(plan.block, lambda *row: (jax.grad(weighted)(*row), ()), *products, action, weights)
        by_table += _by_table(by_product, policy, policy_table)
        return by_table, _by_policy(by_product, policy_table)

    def part(by_table, xs):
        index, weights, *rows = xs
        nothing = lambda by_table, weights, policy, *_: (by_table, jnp.zeros_like(policy))  # noqa: E731
        return jax.lax.cond(index < used, read, nothing, by_table, weights, *rows)

    zeros = jnp.zeros(policy_table.shape[::-1], jnp.float32)
    by_table, by_policy = jax.lax.scan(part, zeros, (jnp.arange(len(policy)), weights, policy, base, action))
    return by_policy, _as_table(by_table, policy_table)


def _by_table(by_product, policy, table):
    """[d, v]. Here and in `_as_table` a barrier keeps the transpose out of the product, which is faster without."""
    return _product("dr,rv->dv", table.dtype, jax.lax.optimization_barrier(policy.T), by_product)


def _as_table(by_table, table):
    """The gradient [d, v] as one of the table [v, d]."""
    return jax.lax.optimization_barrier(by_table).T.astype(table.dtype)


_terms.defvjp(_forward, _backward)


def chunked_loss(loss: Callable, policy: Float[Array, "p r h"], policy_table: Float[Array, "v h"],
                 base: Float[Array, "p r d"], base_table: Float[Array, "v d"], action: Int[Array, "p r"], given, shared,
                 *, relative: bool, train_table: bool = False, forward: bool = False, scale: float = 1.0,
                 cap: float | None = None, used: Int[Array, ""] | None = None, block: int | None = None
                 ) -> tuple[Float[Array, ""], TokenTerms]:
    r"""The sum of loss(terms, given, shared) over all tokens, and their `token_terms` [p, r], which are constants.

    The loss of a token may depend on nothing but its own terms, so its derivative by the logits is formed while they
    are there: each of the four matrix products (logits of policy and base, gradients of hidden states and table) is
    done once, where `chunked_terms` has to compute logits twice.

    Args:
        loss: from `TokenTerms` of scalars, one token's entry of `given` and `shared` to a scalar.
        given: a pytree of [p, r]; `shared`: a pytree. Both are constants.
        forward: whether D(beta || pi) is among the terms.
        used: only the first so many parts are computed, the others are zero; None: all.
        others: as of `chunked_terms`.
    """
    plan = _Plan(relative, train_table, ("forward_kl",) * forward, scale, cap, block)
    used = jnp.int32(len(action)) if used is None else used
    return _loss(plan, loss, policy.astype(jnp.float32), policy_table, jax.lax.stop_gradient(base),
                 jax.lax.stop_gradient(base_table), action, given, shared, used)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(plan, loss, policy, policy_table, base, base_table, action, given, shared, used):
    def row(product, base_product, action, given):
        terms = _terms_of(plan, product, base_product, action)
        return None, (loss(terms, given, shared=shared), terms)

    def part(policy, base, action, given):
        products = _products(policy_table, base_table, policy, base)
        _, (values, terms) = _over_rows(plan.block, row, *products, action, given)
        return values.sum(), terms

    losses, terms = over_parts(part, used, policy, base, action, given)
    return losses.sum(), terms


def _loss_forward(plan, loss, policy, policy_table, base, base_table, action, given, shared, used):
    def row(product, base_product, action, given):
        def total(product):
            terms = _terms_of(plan, product, base_product, action)
            return loss(terms, given, shared=shared), terms

        return jax.value_and_grad(total, has_aux=True)(product)[::-1]

    def read(by_table, policy, base, action, given):
        products = _products(policy_table, base_table, policy, base)
        by_product, (values, terms) = _over_rows(plan.block, row, *products, action, given)
        if plan.train_table:
            by_table += _by_table(by_product, policy, policy_table)
        return by_table, (values.sum(), terms, _by_policy(by_product, policy_table))

    def part(by_table, xs):
        index, *rows = xs
        _, shapes = jax.eval_shape(read, by_table, *rows)
        nothing = lambda by_table, *_: (by_table, jax.tree.map(  # noqa: E731
            lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        return jax.lax.cond(index < used, read, nothing, by_table, *rows)

    by_table = jnp.zeros(policy_table.shape[::-1] if plan.train_table else (), jnp.float32)
    by_table, (values, terms, by_policy) = jax.lax.scan(
        part, by_table, (jnp.arange(len(action)), policy, base, action, given))
    return (values.sum(), terms), (by_policy, _as_table(by_table, policy_table) if plan.train_table else None)


def _loss_backward(plan, loss, residuals, cotangents):
    by_inputs = jax.tree.map(lambda x: cotangents[0].astype(x.dtype) * x, residuals)
    return *by_inputs, *[None] * 6


_loss.defvjp(_loss_forward, _loss_backward)
