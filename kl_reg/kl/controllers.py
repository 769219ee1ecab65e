r"""KL coefficients that move during training: schedules, and controllers that hold the KL at a target.

A controller is three pure functions of one member. Its state, float32 scalars, lives in the train state, so a sweep
vmaps over it and a checkpoint keeps it; the batch of iteration t is charged read(state) after t updates.

Controllers that follow a target T (nats per episode) keep the coefficient within a factor of 1,000 of kl_coef: the
range has the units of any reward, a start further off is better corrected by hand, and after a stretch in which T was
out of reach the coefficient is back at its start after at most log(1000) / kl_rate iterations of full error.

"lagrangian" and "pi" act on the error e = clip(KL / T - 1, -0.2, 1). However large its KL, one batch changes log coef
by at most kl_rate, and until the next one by at most 1.2 kl_gain more. The lower bound is the nearer one because
training starts at KL = 0 and takes tens of iterations to reach T at any price: N of them lower log coef by at most
0.2 (kl_rate N + kl_gain), where errors of -1 make the price collapse and the KL overshoot. On an enumerable policy that
takes about 40, with kl_rate = 0.05 and the right kl_coef, the KL of "lagrangian" peaks at 1.3 T, with -1 as the
bound at 1.8 T; with "pi" and kl_gain = 2 at 1.1 T. In return the way down from a kl_coef that is too large is slower,
and batches that scatter beyond the bound settle on the base's side of T: 2 % below it for a relative standard deviation
of 20 %, 5.5 % for 30 %.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kl_reg.registry import Registry

CONTROLLERS = Registry("kl.controller", reads=None, positive=())
"""Factories. `reads`: the fields of `Hyper` that a controller reads, any other KL setting of a controller having no
effect; None: perhaps all. `positive`: those of them that must be positive for it to work at all; the others may be
zero, and none may be negative. A controller that follows a target multiplies kl_coef, so it cannot be zero there."""

_RANGE = 1000.0             # how far from its start a coefficient may go, as a factor
_LOWEST, _HIGHEST = -0.2, 1.0     # of the relative error, see above


class Controller(NamedTuple):
    """init(hyper) -> state; update(state, kl, hyper) -> state; read(state, hyper) -> coefficient, reward units per nat.

    `update` is called once an iteration with the batch's mean exact KL, nats per episode. The registry holds factories:
    factory(iterations, episodes) -> Controller, for a run of that many iterations with batches of that many episodes.
    """

    init: Callable
    update: Callable
    read: Callable


class Progress(NamedTuple):
    """The state of a schedule: iterations done."""

    iteration: Float[Array, ""]


class Scale(NamedTuple):
    """The state of the adaptive controller: the coefficient over kl_coef."""

    scale: Float[Array, ""]


class Dual(NamedTuple):
    """The state of dual ascent: log of the coefficient over kl_coef."""

    log_scale: Float[Array, ""]


class ProportionalIntegral(NamedTuple):
    """The state of PI control: the accumulated part of log(coefficient / kl_coef), and the error of the last batch."""

    integral: Float[Array, ""]
    error: Float[Array, ""]


def fixed(iterations: int, episodes: int) -> Controller:
    """kl_coef throughout."""
    del iterations, episodes
    return Controller(lambda hyper: (), lambda state, kl, hyper: state, lambda state, hyper: hyper.kl_coef)


def linear(iterations: int, episodes: int) -> Controller:
    """From kl_coef at iteration 0 to kl_final at the last iteration, in equal steps."""
    del episodes
    return _schedule(iterations, lambda part: part)


def cosine(iterations: int, episodes: int) -> Controller:
    r"""From kl_coef at iteration 0 to kl_final at the last one along (1 - cos(\pi x)) / 2, flat at both ends."""
    del episodes
    return _schedule(iterations, lambda part: 0.5 * (1 - jnp.cos(jnp.pi * part)))


def _schedule(iterations, shape):
    """Past the last iteration it stays at kl_final; a run of one iteration has kl_coef."""

    def read(state, hyper):
        done = shape(jnp.minimum(state.iteration / max(iterations - 1, 1), 1.0))
        return (1 - done) * hyper.kl_coef + done * hyper.kl_final

    return Controller(lambda hyper: Progress(jnp.float32(0.0)), lambda state, kl, hyper: Progress(state.iteration + 1),
                      read)


def adaptive(iterations: int, episodes: int) -> Controller:
    r"""coef <- coef (1 + e episodes / kl_horizon), e = clip(KL / kl_target - 1, -0.2, 0.2).

    Source: Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", with K_\beta = 0.1 for
    episodes / kl_horizon, which is how their code has it. The range of the coefficient is ours.
    """
    del iterations

    def update(state, kl, hyper):
        error = jnp.clip(kl / hyper.kl_target - 1, -0.2, 0.2)
        moved = state.scale * (1 + error * episodes / hyper.kl_horizon)
        return Scale(jnp.clip(moved, 1 / _RANGE, _RANGE))

    return Controller(lambda hyper: Scale(jnp.float32(1.0)), update,
                      lambda state, hyper: hyper.kl_coef * state.scale)


def lagrangian(iterations: int, episodes: int) -> Controller:
    """Dual ascent on the logarithm, log coef <- log coef + kl_rate e, projected to the range.

    The coefficient is the multiplier of the constraint KL <= kl_target; its logarithm makes it positive and a step the
    same part of any coefficient. The error and its bounds are those of the module.
    """
    del iterations, episodes

    def update(state, kl, hyper):
        return Dual(_in_range(state.log_scale + hyper.kl_rate * _error(kl, hyper)))

    return Controller(lambda hyper: Dual(jnp.float32(0.0)), update,
                      lambda state, hyper: hyper.kl_coef * jnp.exp(state.log_scale))


def pi(iterations: int, episodes: int) -> Controller:
    """log coef = log kl_coef + integral + kl_gain e, the integral being what "lagrangian" accumulates.

    The proportional term follows the present error, so the coefficient rises while the KL still does, which damps the
    oscillation of pure dual ascent. Anti-windup: the integral stays in the range, by itself and together with the
    proportional term, besides the bounded error.
    Source: Stooke, Achiam and Abbeel (2020), "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
    whose controller acts on the coefficient itself and cuts it and the integral off at zero; ours on its logarithm.
    """
    del iterations, episodes

    def update(state, kl, hyper):
        error = _error(kl, hyper)
        return ProportionalIntegral(_in_range(state.integral + hyper.kl_rate * error), error)

    def read(state, hyper):
        return hyper.kl_coef * jnp.exp(_in_range(state.integral + hyper.kl_gain * state.error))

    return Controller(lambda hyper: ProportionalIntegral(jnp.float32(0.0), jnp.float32(0.0)), update, read)


def _error(kl, hyper):
    return jnp.clip(kl / hyper.kl_target - 1, _LOWEST, _HIGHEST)


def _in_range(log_scale):
    return jnp.clip(log_scale, -math.log(_RANGE), math.log(_RANGE))


CONTROLLERS.register("fixed", fixed, reads=("kl_coef",))
CONTROLLERS.register("linear", linear, reads=("kl_coef", "kl_final"))
CONTROLLERS.register("cosine", cosine, reads=("kl_coef", "kl_final"))
for _name, _factory, _reads in (("adaptive", adaptive, ("kl_coef", "kl_target", "kl_horizon")),
                                ("lagrangian", lagrangian, ("kl_coef", "kl_target", "kl_rate"))):
    CONTROLLERS.register(_name, _factory, reads=_reads, positive=_reads)
CONTROLLERS.register("pi", pi, reads=("kl_coef", "kl_target", "kl_rate", "kl_gain"),
                     positive=("kl_coef", "kl_target", "kl_rate"))
