"""Rewards by name: functions fn(prompts, completions, completion_ids, **columns) -> list[float | None].

A built-in name is a factory of such a function, from settings of `config.reward`; a dotted path is the function itself.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from kl_reg.config import default
from kl_reg.registry import Registry
from kl_reg.rewards import classifier as classifiers
from kl_reg.rewards import log_likelihood as likelihoods
from kl_reg.rewards.calls import Scores, score
from kl_reg.rewards.chat import texts
from kl_reg.rewards.distinct import distinct
from kl_reg.rewards.length import length
from kl_reg.rewards.regex import regex
from kl_reg.rewards.reward import NAN, Reward, assemble, digest, names, of, sources, weights_of
from kl_reg.rewards.table import table
from kl_reg.rewards.trainer import Trainer, TrainerState
from kl_reg.rewards.vader import scaled

__all__ = ["REWARDS", "Factory", "Reward", "Scores", "Trainer", "TrainerState", "build", "check", "digest", "gold",
           "names", "of", "score", "sources", "texts"]


class Factory(NamedTuple):
    """A reward with settings: `make`, called with those of `config.reward` that `uses` names, gives the function; so
    called, `check` raises what can be known without reading a model's weights (None: `make` is quick enough)."""

    make: Callable
    uses: tuple[str, ...] = ()
    check: Callable | None = None


REWARDS = Registry("reward.name")
REWARDS.register("vader", Factory(scaled, ("scale",)))
REWARDS.register("classifier", Factory(classifiers.classifier, ("path", "label", "scale"), classifiers.check))
REWARDS.register("log_likelihood", Factory(likelihoods.log_likelihood, ("path",), likelihoods.check))
REWARDS.register("length", Factory(length, ("target",)))
REWARDS.register("regex", Factory(regex, ("pattern",)))
REWARDS.register("distinct", Factory(distinct, ("ngram",)))
REWARDS.register("table", Factory(table, ("path",)))

_USES = sorted({key for name in REWARDS.names() for key in REWARDS[name].uses})


def check(settings: ConfigDict) -> None:
    """Whether `build` and `gold` can make their rewards, without reading a model's weights.

    Raises:
        ValueError: an unknown name or the same twice, a setting that is wrong or has no effect, or a wrong number of
            weights.
        FileNotFoundError: `reward.path` has no such model or file.
    """
    if settings.nan not in NAN:
        raise ValueError(f"reward.nan={settings.nan!r}: choose of {', '.join(map(repr, NAN))}")
    trained, measured = _named("name", settings), _named("gold", settings)
    weights_of(list(trained), settings.weights)
    factories = [found for found in (*trained.values(), *measured.values()) if isinstance(found, Factory)]
    for key in _USES:
        if settings[key] != default().reward[key] and not any(key in factory.uses for factory in factories):
            owners = [repr(name) for name in REWARDS.names() if key in REWARDS[name].uses]
            raise ValueError(f"reward.{key}={settings[key]!r} has no effect with reward.name={settings.name!r}; it is "
                             f"of {', '.join(owners)}")
    if settings.options and len(factories) == len(trained) + len(measured):
        raise ValueError(f"reward.options={dict(settings.options)!r} has no effect with reward.name={settings.name!r}; "
                         "it is of functions at dotted paths")
    for factory in factories:
        (factory.check or factory.make)(**_given(factory, settings))


def build(settings: ConfigDict) -> Reward:
    """The reward that `config.reward` trains on.

    Raises:
        ValueError, FileNotFoundError: as `check` does; or a model's weights do not fit.
    """
    check(settings)
    return _made(_named("name", settings), settings, settings.weights)._replace(empty=settings.empty)


def gold(settings: ConfigDict) -> Reward | None:
    """The reward that is only measured beside it, each of its functions with weight 1; None: none is named.

    Raises:
        ValueError, FileNotFoundError: as `build` does.
    """
    check(settings)
    found = _named("gold", settings)
    return _made(found, settings, ()) if found else None


def _named(key, settings):
    """What a setting names, in order: a Factory or a function by its name."""
    listed = [name.strip() for name in settings[key].split(",")] if settings[key] or key == "name" else []
    out = {}
    for name in listed:
        if name in out:
            raise ValueError(f"reward.{key}={settings[key]!r} names {name!r} twice; reward.weights says how much it "
                             "counts")
        try:
            out[name] = REWARDS[name]
        except ValueError as error:
            raise ValueError(f"reward.{key}={settings[key]!r}: {error}") from None
        if not isinstance(out[name], Factory) and (not callable(out[name]) or isinstance(out[name], type)):
            raise ValueError(f"reward.{key}={settings[key]!r}: {name} is {out[name]!r}, which is no function, nor an "
                             "object that is called like one")
    return out


def _given(factory, settings):
    return {key: settings[key] for key in factory.uses}


def _made(found, settings, weights):
    functions = [item.make(**_given(item, settings)) if isinstance(item, Factory) else
                 functools.partial(item, **settings.options) if settings.options else item for item in found.values()]
    return assemble([name.rpartition(".")[2] for name in found], functions, weights, settings.nan)
