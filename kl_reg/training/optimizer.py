"""The optimizer: one optax chain of clipping, a direction, and learning rates by label that warm up and decay."""
from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kl_reg.policies.interface import POLICY, VALUE
from kl_reg.types import Hyper


def schedule(warmup: int, final: float, iterations: int, first: int = 0) -> optax.Schedule:
    """The factor of a learning rate at an iteration: linear warm-up to 1, then linear decay to `final`. The run's first
    iteration is number `first`."""
    start = (optax.linear_schedule(1 / warmup, 1.0, warmup - 1) if warmup > 1 else optax.constant_schedule(1.0))
    joined = optax.join_schedules(
        [start, optax.linear_schedule(1.0, final, max(iterations - warmup, 1))], [warmup - 1])
    return lambda iteration: joined(iteration - first)


def chain(max_grad_norm: float | None, factor: optax.Schedule, labels: Callable,
          direction: optax.GradientTransformation | None = None, policy_grad_norm: float | None = None
          ) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, a direction, and a learning rate for each label, of one member.

    `update` takes `hyper`, `iteration` and `grad_norm` (of `safe_norm`) beside gradients, state and parameters.

    Args:
        max_grad_norm: None: no clipping.
        factor: of `schedule`.
        labels: parameters -> the label of each, POLICY or VALUE.
        direction: of a step of size 1, up the gradient (`algorithms.optimizers.direction`); None: Adam's.
        policy_grad_norm: that of the parameters with the label POLICY by themselves; None: no clipping of their own.
    """
    direction = optax.scale_by_adam() if direction is None else direction
    rates = {POLICY: lambda hyper: hyper.learning_rate, VALUE: value_learning_rate}
    first = clip(max_grad_norm) if max_grad_norm is not None else optax.identity()
    if policy_grad_norm is not None:
        own = {POLICY: clip_own(policy_grad_norm), VALUE: optax.identity()}
        first = optax.chain(first, optax.partition(own, labels))
    return optax.chain(first, direction,
                       optax.partition({label: descend(factor, rate) for label, rate in rates.items()}, labels))


def value_learning_rate(hyper: Hyper) -> Float[Array, ""]:
    """The learning rate of the value head: its own, where it has one."""
    return jnp.where(jnp.isfinite(hyper.value_learning_rate), hyper.value_learning_rate, hyper.learning_rate)


def descend(factor: optax.Schedule, rate: Callable) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate rate(hyper) of the iteration."""
    def update(updates, state, params=None, *, hyper: Hyper, iteration: Int[Array, ""], **others):
        del params, others
        step = -(rate(hyper) * factor(iteration))
        return jax.tree.map(lambda x: step * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Shrinks gradients to a global norm of at most `limit`; their norm is given, because a step logs it too."""
    def update(updates, state, params=None, *, grad_norm: Float[Array, ""], **others):
        del params, others
        shrink = jnp.minimum(1.0, limit / jnp.maximum(grad_norm, 1e-30))
        return jax.tree.map(lambda x: x * shrink, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def clip_own(limit: float) -> optax.GradientTransformation:
    """Shrinks the gradients that it is given to a norm of at most `limit`."""
    def update(updates, state, params=None):
        del params
        shrink = jnp.minimum(1.0, limit / jnp.maximum(safe_norm(updates), 1e-30))
        return jax.tree.map(lambda x: x * shrink, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def safe_norm(tree) -> Float[Array, ""]:
    """The global norm, of numbers that are scaled first where their squares overflow (k3 at 80 nats has gradients of
    1e34) or vanish."""
    def again(state):
        largest = jnp.maximum(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]).max(), 1e-30)
        return largest * optax.global_norm(jax.tree.map(lambda x: x / largest, tree)), jnp.bool_(True)

    # A loop of at most one turn: a condition would be a selection under `vmap`, and read everything three times.
    return jax.lax.while_loop(lambda state: ~((state[0] > 1e-15) & jnp.isfinite(state[0])) & ~state[1], again,
                              (optax.global_norm(tree), jnp.bool_(False)))[0]
