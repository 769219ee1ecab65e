"""The experiment's schema with every default, and its two halves: Static and Hyper."""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from kl_reg import algorithms
from kl_reg.kl.estimators import KLConfig
from kl_reg.kl.spends import SPENDS
from kl_reg.settings import HYPER, LATER, SETTINGS, unknown
from kl_reg.types import Hyper

BUDGETS = ("kl.budget", "kl.turn_budget", "kl.token_budget")

_RUN_ONLY = ("sweep", "checkpoint", "log", "parallel")     # settings that change no number of a result


def default() -> ConfigDict:
    """Every setting with its default (docs/settings.md); a configuration file changes some of them."""
    config = ConfigDict()
    for setting in SETTINGS.values():
        section, _, name = setting.name.rpartition(".")
        if section and section not in config:
            # So that a setting that is a dictionary stays one setting.
            config[section] = ConfigDict(convert_dict=False)
        (config[section] if section else config)[name] = (
            config_dict.placeholder(setting.type) if setting.default is None else copy.copy(setting.default))
    return config.lock()


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled program depends on: the configuration without `Hyper` and seed, and whether a budget is hard."""

    settings: str                         # canonical JSON
    constrained: bool

    def config(self) -> ConfigDict:
        """The settings, nested."""
        return ConfigDict(json.loads(self.settings))

    def kl(self) -> KLConfig:
        """How the KL is penalised."""
        return kl_config(self.config())


def kl_config(config: ConfigDict) -> KLConfig:
    """The KL contract of a configuration; it counts at the sampler's temperature.

    Raises:
        ValueError: kl.spend is unknown.
    """
    kl = config.kl
    return KLConfig(kl.direction, kl.estimator, kl.placement, kl.reduction, config.sampling.temperature,
                    kl.allow_biased, drawn=SPENDS.facts(kl.spend)["drawn"])


def flat(config: ConfigDict) -> dict:
    """Dotted keys -> values."""
    out = {}
    for key, value in config.items():
        out.update({f"{key}.{k}": v for k, v in flat(value).items()} if isinstance(value, ConfigDict) else {key: value})
    return out


def members(config: ConfigDict) -> list[dict]:
    """The members of the sweep, each as the dotted settings that it overrides; one without any for an empty sweep."""
    grids = config.sweep or [{}]
    out = [dict(zip(grid, values, strict=True)) for grid in grids
           for values in itertools.product(*(_choices(key, choice) for key, choice in grid.items()))]
    return [member for i, member in enumerate(out) if member not in out[:i]]


def _choices(key, choices):
    if not isinstance(choices, (list, tuple)) or not choices:
        raise ValueError(f"sweep: {key!r} has {choices!r}; give a tuple of values")
    return choices


def override(config: ConfigDict, member: dict) -> ConfigDict:
    """The configuration of one member, without the sweep.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    for key, value in member.items():
        if key not in SETTINGS or key == "sweep":
            raise ValueError(f"sweep: {unknown(key)}")
        try:
            config.update_from_flattened_dict({key: SETTINGS[key].converted(value)})
        except ValueError as error:
            raise ValueError(f"sweep: {error}") from None
    config.sweep = []
    return config


def split(config: ConfigDict) -> tuple[Static, Hyper, int]:
    """One member's (Static, Hyper, seed)."""
    config = _with_algorithm(config)
    values = {name: config[key.split(".")[0]][key.split(".")[1]] for key, name in HYPER.items()}
    values = {name: math.inf if value is None else value for name, value in values.items()}
    hyper = Hyper(**{name: jnp.float32(value) for name, value in values.items()})
    return static_of(config), hyper, config.seed


def static_of(config: ConfigDict) -> Static:
    """One member's `Static`; makes no array, so that no accelerator is taken."""
    config = _with_algorithm(config)
    settings = {key: value for key, value in flat(config).items() if key not in HYPER and key != "seed"}
    constrained = any(config.kl[key.split(".")[1]] is not None for key in BUDGETS)
    nested = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return Static(json.dumps(nested, sort_keys=True), constrained)


def _with_algorithm(config):
    """With what the algorithm decides where a setting is None."""
    return override(config, {f"rl.{key}": value for key, value in algorithms.resolve(config.rl).items()})


def counts(key: str) -> bool:
    """Whether a setting changes a result: those of logging, checkpoints and devices do not."""
    return key.split(".")[0] not in _RUN_ONLY or key == "sweep"


def fingerprint(config: ConfigDict, *inputs: str) -> str:
    """Twelve hexadecimal digits of everything that changes a result (so not of logging or checkpoint settings).

    Args:
        inputs: digests of what the settings only name: the model's weights, a reward function.
    """
    kept = {key: value for key, value in flat(config).items()
            if key.split(".")[0] not in _RUN_ONLY and (key, value) not in LATER.items()}
    kept["members"], kept["inputs"] = members(config), inputs
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
