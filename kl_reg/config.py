"""The experiment's schema with every default, its validation, and its two halves: Static and Hyper."""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from kl_reg import advantages, envs, losses, rewards
from kl_reg.kl import estimators
from kl_reg.models import policy, weights
from kl_reg.types import Hyper

HYPER = {"kl.coef": "kl_coef", "kl.budget": "kl_budget", "optim.learning_rate": "learning_rate", "rl.clip": "clip",
         "rl.entropy_coef": "entropy_coef", "rl.value_coef": "value_coef", "rl.discount": "discount",
         "rl.gae_lambda": "gae_lambda"}
"""Settings that members of one program may differ in, and their names in `Hyper`."""

_RUN_ONLY = ("sweep", "checkpoint", "log")     # settings that change no number of a result
_SHARED = ("sweep", "model", "env", "reward", "evaluation", "checkpoint", "log", "rl.iterations")
"""Settings that all members of a sweep share: they have one base model, one task and one evaluation."""


def default() -> ConfigDict:
    """Every setting with its default; a configuration file changes some of them."""
    config = ConfigDict()
    config.seed = 0
    config.sweep = []                     # a union of grids: [{"kl.coef": (0.0, 0.1), "seed": (0, 1)}, ...]

    config.model = ConfigDict()
    config.model.path = "embedded"        # or a folder: config.json, model.safetensors, tokenizer.json
    config.model.dtype = "float32"        # of parameters and activations; KL and losses are float32

    config.policy = ConfigDict()
    config.policy.kind = "head"           # "head": on the frozen trunk; "full": all weights
    config.policy.layers = 3              # last hidden layers that a head reads
    config.policy.hidden = 128
    config.policy.spend_init = 0.05       # part of the remaining budget that a token may spend at first

    config.env = ConfigDict()
    config.env.name = "teacher_student"
    config.env.openings = "fixed"         # "fixed": env.opening; "held_out": it and turns of held-out conversations
    config.env.opening = "<|start|>"
    config.env.opening_turns = 2
    config.env.opening_tokens = 48        # longer held-out openings are left out
    config.env.teacher = "A:"
    config.env.student = "B:"
    config.env.end = "\n"
    config.env.markers = "forced"         # "written": whoever has the turn writes the markers, as in the paper
    config.env.length = 64                # tokens of an episode behind its opening

    config.reward = ConfigDict()
    config.reward.name = "vader"

    config.kl = ConfigDict()
    config.kl.coef = 0.0                  # reward units per nat
    config.kl.estimator = "exact"
    config.kl.placement = "full"
    config.kl.budget = config_dict.placeholder(float)      # nats per episode; None: no hard budget

    config.rl = ConfigDict()
    config.rl.loss = "ppo_clip"
    config.rl.advantage = "gae"
    config.rl.iterations = 50
    config.rl.episodes = 32               # of each member, an iteration
    config.rl.epochs = 2
    config.rl.minibatches = 1
    config.rl.clip = 0.2
    config.rl.discount = 1.0
    config.rl.gae_lambda = 0.95
    config.rl.normalise = True            # advantages to zero mean and unit deviation; the KL loss by the same factor
    config.rl.value_coef = 0.5
    config.rl.entropy_coef = 0.0

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-3
    config.optim.warmup = 2               # iterations
    config.optim.final = 0.1              # part of the learning rate that is left at the last iteration
    config.optim.max_grad_norm = 1.0

    config.evaluation = ConfigDict()
    config.evaluation.episodes = 256
    config.evaluation.seed = 1_000_003    # the same for all members

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10          # iterations
    config.log = ConfigDict()
    config.log.tensorboard = True
    return config.lock()


@dataclasses.dataclass(frozen=True)
class Static:
    """What a compiled program depends on: the configuration without `Hyper` and seed, and whether there is a budget."""

    settings: str                         # canonical JSON
    constrained: bool

    def config(self) -> ConfigDict:
        """The settings, nested."""
        return ConfigDict(json.loads(self.settings))


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
    known = flat(config)
    for key, value in member.items():
        if key not in known or key == "sweep":
            raise ValueError(f"sweep: unknown setting {key!r}; settings are {', '.join(sorted(known))}")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"sweep: {key}={value!r}: {error}") from None
    config.sweep = []
    return config


def split(config: ConfigDict) -> tuple[Static, Hyper, int]:
    """One member's (Static, Hyper, seed)."""
    settings = {key: value for key, value in flat(config).items() if key not in HYPER and key != "seed"}
    values = {name: config[key.split(".")[0]][key.split(".")[1]] for key, name in HYPER.items()}
    constrained = values["kl_budget"] is not None
    values["kl_budget"] = values["kl_budget"] if constrained else math.inf
    nested = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    hyper = Hyper(**{name: jnp.float32(value) for name, value in values.items()})
    return Static(json.dumps(nested, sort_keys=True), constrained), hyper, config.seed


def fingerprint(config: ConfigDict, *inputs: str) -> str:
    """Twelve hexadecimal digits of everything that changes a result (so not of logging or checkpoint settings).

    Args:
        inputs: digests of what the settings only name: the model's weights, a reward function.
    """
    kept = {key: value for key, value in flat(config).items() if key.split(".")[0] not in _RUN_ONLY}
    kept["members"], kept["inputs"] = members(config), inputs
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


_AT_LEAST_ONE = ("rl.iterations", "rl.episodes", "rl.epochs", "rl.minibatches", "env.length", "policy.layers",
                 "policy.hidden", "evaluation.episodes", "checkpoint.every", "optim.warmup")
_NOT_NEGATIVE = ("kl.coef", "rl.clip", "rl.value_coef", "rl.entropy_coef", "optim.learning_rate", "optim.max_grad_norm",
                 "optim.final", "seed", "env.opening_turns")
_PARTS = ("rl.discount", "rl.gae_lambda", "policy.spend_init")


def validate(config: ConfigDict) -> None:
    """Everything that can be known to be wrong before any work starts.

    Raises:
        ValueError: names the setting, its value and what is accepted.
        FileNotFoundError: the model folder or one of its files is missing.
    """
    unknown, missing = set(flat(config)) - set(flat(default())), set(flat(default())) - set(flat(config))
    if unknown or missing:
        raise ValueError(f"config: unknown settings {sorted(unknown)}, missing settings {sorted(missing)}; "
                         "start from kl_reg.config.default()")
    for member in members(config):
        shared = [key for key in member if key.startswith(_SHARED)]
        if shared:
            raise ValueError(f"sweep: {', '.join(shared)} cannot differ between members, which share one base model, "
                             "task and evaluation; launch one sweep for each value")
        _validate_member(override(config, member))


def _validate_member(config):
    values = flat(config)
    given = () if config.kl.budget is None else ("kl.budget",)
    for key in (*_AT_LEAST_ONE, *_NOT_NEGATIVE, *_PARTS, *given):
        value, low = values[key], 1 if key in _AT_LEAST_ONE else 0
        if not math.isfinite(value) or value < low:
            raise ValueError(f"{key}={value!r} must be a number of at least {low}")
        if key in _PARTS and value > 1:
            raise ValueError(f"{key}={value!r} must be at most 1")
    if config.seed >= 2**31:
        raise ValueError(f"seed={config.seed} must be less than 2**31")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={config.model.dtype!r}: choose 'float32' or 'bfloat16'")
    if config.policy.kind == "full" and config.model.dtype != "float32":
        raise ValueError("policy.kind='full' with model.dtype='bfloat16': updates are smaller than a weight's "
                         "resolution; use model.dtype='float32'")
    if config.kl.placement == "full" and config.rl.discount != 1:
        raise ValueError(f"kl.placement='full' with rl.discount={config.rl.discount}: its two halves would be "
                         "discounted differently; use rl.discount=1.0, or estimator='k1' with placement='reward'")
    if not 0 < config.policy.spend_init < 1:
        raise ValueError(f"policy.spend_init={config.policy.spend_init!r} must lie strictly between 0 and 1")
    if config.rl.episodes % config.rl.minibatches:
        raise ValueError(f"rl.episodes={config.rl.episodes} must be a multiple of "
                         f"rl.minibatches={config.rl.minibatches}")
    estimators.check(config.kl.estimator, config.kl.placement)
    for registry, name in ((policy.POLICIES, config.policy.kind), (losses.LOSSES, config.rl.loss),
                           (advantages.ADVANTAGES, config.rl.advantage), (envs.ENVIRONMENTS, config.env.name),
                           (rewards.REWARDS, config.reward.name)):
        registry[name]  # noqa: B018 - raises for an unknown name
    shapes = weights.load_config(config.model.path, config.model.dtype)
    if config.policy.layers > shapes.layers:
        raise ValueError(f"policy.layers={config.policy.layers}: the model has {shapes.layers} layers")
    if config.env.length > shapes.max_position:
        raise ValueError(f"env.length={config.env.length}: longer than the model's context of {shapes.max_position}")
