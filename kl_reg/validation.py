"""Everything about an experiment that can be known to be wrong before any work starts."""
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from ml_collections import ConfigDict

from kl_reg import algorithms, envs, no_training, rewards
from kl_reg.algorithms import advantages, optimizers, reductions
from kl_reg.config import BUDGETS, flat, kl_config, members, override
from kl_reg.episodes.token_groups import compile_expressions
from kl_reg.kl import controllers, estimators
from kl_reg.kl.operations import OPERATIONS
from kl_reg.kl.spends import SPENDS
from kl_reg.policies import kinds as policies
from kl_reg.policies import lora
from kl_reg.pretrained import tokenizer, weights
from kl_reg.references import kinds as references
from kl_reg.runs import directory as run_directory
from kl_reg.settings import HYPER, SETTINGS, unknown
from kl_reg.sharding import mesh as meshes

_SHARED = ("sweep", "model", "env", "reward", "sampling", "evaluation", "checkpoint", "log", "parallel",
           "rl.iterations")
"""Settings that all members of a sweep share: they have one base model, one task and one evaluation."""

_RELATIVE = ("leave_one_out", "group", "group_batch", "group_mean")
"""Advantages that compare the episodes of a group."""

def validate(config: ConfigDict) -> None:
    """Everything that can be known to be wrong before any work starts; warns of runs that train nothing.

    Raises:
        ValueError: names the setting, its value and what is accepted.
        FileNotFoundError: the model folder or one of its files is missing.
    """
    given = flat(config)
    strange, missing = sorted(set(given) - set(SETTINGS)), sorted(set(SETTINGS) - set(given))
    if strange:
        raise ValueError(f"config: {'; '.join(map(unknown, strange))}")
    if missing:
        raise ValueError(f"config: {', '.join(missing)} is missing; start from kl_reg.config.default()")
    _validate_values(given)
    compile_expressions(config.log.groups)
    _validate_parallel(config)
    resolved = []
    for member in members(config):
        shared = [key for key in member if key.startswith(_SHARED)]
        if shared:
            raise ValueError(f"sweep: {', '.join(shared)} cannot differ between members, which share one base model, "
                             "task and evaluation; launch one sweep for each value")
        own = override(config, member)
        resolved.append(override(own, {f"rl.{key}": value for key, value in algorithms.resolve(own.rl).items()}))
        _validate_member(resolved[-1])
    for caution in no_training.cautions(resolved):
        warnings.warn(caution, stacklevel=2)


def _validate_values(values):
    """Raises on the first value that its setting does not accept, or on one of a setting that has no effect."""
    for key, value in values.items():
        SETTINGS[key].check(value)
    for key, value in values.items():
        other, idle = SETTINGS[key].idle or ("", ())
        if other and values[other] in idle and value != SETTINGS[key].default:
            raise ValueError(f"{key}={value!r} has no effect with {other}={values[other]!r}")


def _validate_member(config):
    values = flat(config)
    _validate_values(values)
    given = [key for key in BUDGETS if values[key] is not None]
    no_training.refuse(config)
    _validate_algorithm(config.rl)
    _validate_policy(config)
    _validate_kl(config, values, given)
    _validate_reference(config)
    if config.env.student_model:
        _fitting_model(config, "env.student_model", config.env.student_model)
    _validate_environment(config.env)
    rewards.check(config.reward)
    optimizers.direction(config.optim)
    with _naming("model.path", config.model.path):
        shapes = weights.load_config(config.model.path, config.model.dtype)
    if config.model.attention and shapes.score_cap is not None:
        raise ValueError(f"model.attention={config.model.attention!r}: {config.model.path!r} caps its attention's "
                         "scores, which only '' can")
    if config.model.attention == "cudnn" and config.model.dtype != "bfloat16":
        raise ValueError(f"model.attention='cudnn' with model.dtype={config.model.dtype!r}: its kernels compute in "
                         "'bfloat16'")
    if config.policy.kind == "lora":
        lora.adaptable(shapes, config.policy.targets)
    if config.policy.kind == "head" and config.policy.layers > shapes.layers:
        raise ValueError(f"policy.layers={config.policy.layers}: the model has {shapes.layers} layers")
    if config.env.length > shapes.max_position:
        raise ValueError(f"env.length={config.env.length}: longer than the model's context of {shapes.max_position}")


def _validate_parallel(config):
    settings = config.parallel
    for axis in meshes.AXES:
        if settings[axis] != -1 and settings[axis] < 1:
            raise ValueError(f"parallel.{axis}={settings[axis]} must be at least 1, or -1: all devices that are left")
        if settings.mode == "pmap" and axis != "data" and settings[axis] != 1:
            raise ValueError(f"parallel.{axis}={settings[axis]} with parallel.mode='pmap', which divides nothing but "
                             "episodes: use parallel.data, or parallel.mode='jit'")
    if sum(settings[axis] == -1 for axis in meshes.AXES) > 1:
        raise ValueError("parallel: only one axis can be -1, all devices that are left")


def _validate_environment(env):
    envs.ENVIRONMENTS[env.name]  # noqa: B018 - raises for an unknown name
    for key in ("opening", "teacher", "student", "end"):
        try:
            tokenizer.check_unicode(env[key])
        except ValueError as error:
            raise ValueError(f"env.{key}={env[key]!r}: {error}") from None


def _validate_algorithm(rl):
    for registry, name in ((algorithms.LOSSES, rl.loss), (advantages.ADVANTAGES, rl.advantage),
                           (reductions.REDUCTIONS, rl.reduction)):
        registry[name]  # noqa: B018 - raises for an unknown name
    for key in ("minibatches", "group"):
        if rl.episodes % rl[key]:
            raise ValueError(f"rl.episodes={rl.episodes} must be a multiple of rl.{key}={rl[key]}")
    if rl.episodes // rl.minibatches % rl.accumulate:
        raise ValueError(f"rl.accumulate={rl.accumulate} must divide a minibatch, rl.episodes={rl.episodes} over "
                         f"rl.minibatches={rl.minibatches}")
    if rl.group == 1 and rl.advantage in _RELATIVE:
        raise ValueError(f"rl.advantage={rl.advantage!r} compares episodes with the same opening: rl.group must be at "
                         "least 2")
    if rl.loss_options and "." not in rl.loss:
        raise ValueError(f"rl.loss_options={dict(rl.loss_options)!r} has no effect with rl.loss={rl.loss!r}; it is "
                         "of a loss at a dotted path")
    least = 1 + rl.clip_high * (rl.loss == "dual_clip")
    if not rl.dual_clip > least:
        raise ValueError(f"rl.dual_clip={rl.dual_clip!r} must be a number above {least:g}")


def _validate_policy(config):
    settings = config.policy
    policies.POLICIES[settings.kind]  # noqa: B018 - raises for an unknown name
    if settings.kind == "full" and config.model.quantize:
        raise ValueError(f"policy.kind='full' with model.quantize={config.model.quantize!r}: weights that are int8 "
                         "cannot be finetuned; use policy.kind='lora' or 'head'")
    if settings.kind == "lora" and settings.alpha == 0:
        raise ValueError(f"policy.alpha={settings.alpha!r} must be positive for policy.kind='lora'")


def _validate_kl(config, values, given):
    kl = config.kl
    contract = estimators.build(kl_config(config)).config
    if kl.temperature is not None and kl.temperature != config.sampling.temperature:
        raise ValueError(f"kl.temperature={kl.temperature} with sampling.temperature={config.sampling.temperature}: "
                         "tokens drawn at one temperature say nothing of the KL at another; leave kl.temperature unset")
    if contract.placement == "full" and config.rl.discount != 1 and (kl.coef or kl.controller != "fixed"):
        raise ValueError(f"kl.placement='full' with rl.discount={config.rl.discount}: its two halves would be "
                         "discounted differently; use rl.discount=1.0, or estimator='k1' with placement='reward'")
    if kl.spend != "neuron" and not given:
        raise ValueError(f"kl.spend={kl.spend!r} without a budget has no effect; set one of {', '.join(BUDGETS)}")
    OPERATIONS[kl.operation]  # noqa: B018 - raises for an unknown name
    for key in ("operation", "ledger", "miss_coef", "budget_ramp"):
        if kl[key] != SETTINGS[f"kl.{key}"].default and not given:
            raise ValueError(f"kl.{key}={kl[key]!r} without a budget has no effect; set one of {', '.join(BUDGETS)}")
    _validate_ledger(config)
    if kl.carry and kl.turn_budget is None and kl.token_budget is None:
        raise ValueError("kl.carry=True has no effect without kl.turn_budget or kl.token_budget")
    names = {field: key for key, field in HYPER.items()}
    for field in controllers.CONTROLLERS.facts(kl.controller)["positive"]:
        if not values[names[field]] > 0:
            raise ValueError(f"{names[field]}={values[names[field]]!r} must be positive for "
                             f"kl.controller={kl.controller!r}")


def _validate_ledger(config):
    kl = config.kl
    if kl.ledger == "exact":
        if kl.target_floor:
            raise ValueError(f"kl.target_floor={kl.target_floor!r} with kl.ledger='exact': tokens would cost more than "
                             "remains, and the budget would not be hard; it is of kl.ledger='log_ratio'")
        return
    for key, usual in (("spend", "neuron"), ("turn_budget", None), ("token_budget", None)):
        own = SPENDS.facts(kl.spend)["drawn"] if key == "spend" else kl[key] is not None
        if own:
            raise ValueError(f"kl.ledger='log_ratio' with kl.{key}={kl[key]!r}: a log-ratio, which may be negative, is "
                             f"charged to the budget of the episode alone; kl.{key} must be {usual!r}")
    if not references.REFERENCES.facts(config.reference.name)["proper"]:
        raise ValueError(f"kl.ledger='log_ratio' with reference.name={config.reference.name!r}: the floor of a "
                         "semi-distribution is charged exactly; use kl.ledger='exact'")


def _validate_reference(config):
    settings = config.reference
    facts = references.REFERENCES.facts(settings.name)
    low, high = facts["paths"]
    if not low <= len(settings.paths) <= high:
        text = {0: "none", 1: "one", 2: "two model folders or more"}.get(low, f"at least {low}")
        raise ValueError(f"reference.paths={tuple(settings.paths)!r} with reference.name={settings.name!r}: give "
                         f"{text}")
    if not facts["proper"]:
        estimators.check_semi(kl_config(config))
    if facts["follows"] and any(flat(config)[key] is not None for key in BUDGETS):
        raise ValueError(f"reference.name={settings.name!r} with a hard budget: what the policy does depends on its "
                         "ledger, and its proposal would become a reference that no budget holds; use a penalty")
    for path in settings.paths:
        if run_directory.parse(path):
            _validate_run(config, path)
            continue
        try:
            shapes = _fitting_model(config, "reference.paths", path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"reference.paths: {path!r} is neither a run's member (runs/x:0@60) nor a model "
                                    f"folder ({error})") from None
        if shapes != weights.load_config(config.reference.paths[0]):
            raise ValueError(f"reference.paths: {path!r} has another shape than {config.reference.paths[0]!r}; the "
                             "models of one reference are stacked")


@contextlib.contextmanager
def _naming(setting: str, path: str) -> Iterator[None]:
    """What is wrong with a model's files becomes an error that names the setting, too."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(error).startswith(setting):
            raise
        raise type(error)(f"{setting}={path!r}: {error}") from None


def _fitting_model(config, setting, path):
    """Its shapes; raises where it cannot read the base model's transcripts."""
    with _naming(setting, path):
        shapes, words = weights.load_config(path, setting=setting), weights.vocabulary(path, setting)
    with _naming("model.path", config.model.path):
        base = weights.vocabulary(config.model.path)
    if words != base:
        raise ValueError(f"{setting}: {path!r} has another tokenizer or vocabulary than model.path="
                         f"{config.model.path!r}; all models of an experiment need one vocabulary")
    if shapes.max_position < config.env.length:
        raise ValueError(f"{setting}: {path!r} has a context of {shapes.max_position} tokens; env.length is "
                         f"{config.env.length}")
    return shapes


def _validate_run(config, path):
    if config.reference.name != "checkpoint":
        raise ValueError(f"reference.paths: {path!r} is a run; only reference.name='checkpoint' takes one, mixtures "
                         "are of model folders")
    address = run_directory.parse(path)
    swept, have = members(run_directory.config_of(address.workdir)), run_directory.iterations(address.workdir)
    if address.member is None or address.member >= len(swept) or address.iteration not in have:
        raise ValueError(f"reference.paths: {path!r} must name a member and an iteration, as {address.workdir}:0@60; "
                         f"there are {len(swept)} members, iterations {', '.join(map(str, have)) or 'none'}")
    theirs = override(run_directory.config_of(address.workdir), swept[address.member])
    if any(flat(theirs)[key] is not None for key in BUDGETS):
        raise ValueError(f"reference.paths: {path!r} has a hard budget: what it does depends on its own ledger, so it "
                         "is no reference for another policy")
    if theirs.policy.kind == "head" and any(not run_directory.parse(own) for own in theirs.reference.paths):
        raise ValueError(f"reference.paths: {path!r} is a head on reference.name={theirs.reference.name!r}, not on the "
                         "base model; only members whose reference is the base or a follower can be one")
    if theirs.policy != config.policy or any(theirs.model[key] != config.model[key] for key in ("path", "quantize")):
        raise ValueError(f"reference.paths: {path!r} has another policy or base model: policy.*, model.path and "
                         "model.quantize must be the same")
