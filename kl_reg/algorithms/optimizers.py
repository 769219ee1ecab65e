"""The direction of a step, by the name of an optimizer."""
from __future__ import annotations

import inspect

import optax
from ml_collections import ConfigDict

from kl_reg.registry import Registry

OPTIMIZERS = Registry("optim.name")
"""Functions of `config.optim` that give the direction of a step; at a dotted path an optax factory."""


def adam(settings: ConfigDict) -> optax.GradientTransformation:
    """Adam's direction. Source: Kingma and Ba (2014)."""
    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)


def adamw(settings: ConfigDict) -> optax.GradientTransformation:
    """Adam's direction and, beside it, the decay of all weights. Source: Loshchilov and Hutter (2017)."""
    return optax.chain(adam(settings), optax.add_decayed_weights(settings.weight_decay))


OPTIMIZERS.register("adam", adam)
OPTIMIZERS.register("adamw", adamw)


def direction(settings: ConfigDict) -> optax.GradientTransformation:
    """The direction of a step of size 1, up the gradient.

    An optax factory is called with `optim.options`. One that has a learning rate gives whole steps: with 1, and turned
    round, they are directions.

    Raises:
        ValueError: `optim.name` is unknown, or what it names does not take `optim.options`.
    """
    make = OPTIMIZERS[settings.name]
    if "." not in settings.name:
        return make(settings)
    options = dict(settings.options)
    try:
        whole = "learning_rate" in inspect.signature(make).parameters
    except ValueError:      # of what is built in
        whole = False
    try:
        made = make(**(options | {"learning_rate": 1.0} if whole else options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim.options={options!r}: {settings.name} does not take them: {error}") from None
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optim.name={settings.name!r} gives {made!r}, no optax.GradientTransformation")
    return optax.chain(made, optax.scale(-1.0)) if whole else made
