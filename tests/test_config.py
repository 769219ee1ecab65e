import hashlib
import json
import math
import re
import shutil

import jax.numpy as jnp
import pytest

from kl_reg import config as configs
from kl_reg import no_training, validation
from kl_reg.algorithms import ALGORITHMS
from kl_reg.runs import checkpoint
from kl_reg.training import loop, optimizer
from kl_reg.types import Hyper


@pytest.fixture
def config(tiny_folder):
    config = configs.default()
    config.model.path = str(tiny_folder)
    config.env.length = 16
    return config


def test_a_sweep_is_the_union_of_its_grids_without_repetition(config):
    config.sweep = [{"kl.coef": (0.0, 1.0), "seed": (0, 1)}, {"kl.budget": (5.0,), "seed": (0,)}, {"kl.coef": (1.0,),
                                                                                                 "seed": (1,)}]
    assert configs.members(config) == [
        {"kl.coef": 0.0, "seed": 0}, {"kl.coef": 0.0, "seed": 1}, {"kl.coef": 1.0, "seed": 0},
        {"kl.coef": 1.0, "seed": 1}, {"kl.budget": 5.0, "seed": 0}]


def test_hyper_and_seed_leave_static_alone(config):
    static, hyper, seed = configs.split(configs.override(config, {"kl.coef": 0.5, "rl.clip": 0.1, "seed": 7}))
    other, _, _ = configs.split(config)
    assert static == other and hash(static) == hash(other)
    assert (float(hyper.kl_coef), round(float(hyper.clip), 6), seed) == (0.5, 0.1, 7)


def test_a_budget_is_static_in_its_presence_and_hyper_in_its_size(config):
    none, hyper, _ = configs.split(config)
    small, small_hyper, _ = configs.split(configs.override(config, {"kl.budget": 0.0}))
    large, _, _ = configs.split(configs.override(config, {"kl.budget": 3.0}))
    assert math.isinf(hyper.kl_budget) and float(small_hyper.kl_budget) == 0.0
    assert small == large and small != none and small.constrained and not none.constrained


def test_every_hyper_field_comes_from_a_setting(config):
    assert set(configs.HYPER.values()) == set(Hyper._fields)
    assert set(configs.HYPER) <= set(configs.flat(config))


def test_static_settings_come_back_as_they_were(config):
    static, _, _ = configs.split(config)
    assert static.config().env.to_dict() == config.env.to_dict()
    assert "coef" not in static.config().kl and "seed" not in static.config()
    json.loads(static.settings)


def test_settings_that_came_later_leave_the_fingerprints_of_earlier_runs_as_they_were():
    """By hand: the digest of a run whose configuration had no such settings."""
    config = configs.default()
    earlier = {key: value for key, value in configs.flat(config).items()
               if key.split(".")[0] not in ("sweep", "checkpoint", "log", "parallel") and key not in configs.LATER}
    earlier |= {"members": [{}], "inputs": ["model"]}
    want = hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()[:12]
    assert configs.fingerprint(config, "model") == want
    config.env.prefill = "continue"
    assert configs.fingerprint(config, "model") != want


def test_the_fingerprint_moves_with_results_only(config):
    before = configs.fingerprint(config)
    config.checkpoint.every = 3
    config.log.tensorboard = False
    assert configs.fingerprint(config) == before
    config.kl.coef = 0.1
    assert configs.fingerprint(config) != before


@pytest.mark.parametrize("key, value, says", [
    ("kl.coef", -0.1, "kl.coef=-0.1"), ("kl.budget", -1.0, "kl.budget=-1.0"), ("kl.coef", math.nan, "kl.coef=nan"),
    ("rl.iterations", 0, "rl.iterations=0"), ("rl.discount", 1.5, "rl.discount=1.5"), ("rl.loss", "ppo", "ppo_clip"),
    ("kl.placement", "reward", "no gradient"), ("kl.estimator", "k7", "k1"), ("policy.kind", "prefix", "lora"),
    ("policy.layers", 9, "the model has 3 layers"), ("env.length", 65, "context of 64"), ("seed", -1, "seed=-1"),
    ("policy.spend_init", 1.0, "policy.spend_init"), ("rl.minibatches", 5, "multiple of rl.minibatches=5"),
    ("model.cache", "int4", "model.cache='int4'"), ("model.remat", "all", "'layers', 'products'"),
    ("model.attention", "flash", "'xla', 'cudnn'"), ("model.attention", "cudnn", "compute in 'bfloat16'"),
    ("rl.accumulate", 5, "rl.accumulate=5 must divide"), ("model.path", "/nowhere", "/nowhere"),
    ("reward.name", "no.such.reward", "cannot be imported"), ("evaluation.seed", -1, "evaluation.seed=-1"),
    ("evaluation.seed", 2**70, "evaluation.seed=1180591620717411303424 must be less than"),
    ("evaluation.seed", 2**32 + 7, "evaluation.seed=4294967303 must be less than"),
    ("optim.value_learning_rate", math.inf, "optim.value_learning_rate=inf must be a finite number above 0"),
    ("reward.weights", (1e308,), "reward.weights=(1e+308,) is out of the range of float32")])
def test_a_bad_setting_is_one_error_that_names_it(config, key, value, says):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(says)):
        validation.validate(configs.override(config, {key: value}))


DEFAULTS = configs.flat(configs.default())
FLOATS = [*(key for key, value in DEFAULTS.items() if isinstance(value, float)), "kl.budget", "kl.turn_budget",
          "kl.token_budget", "kl.temperature", "optim.value_learning_rate", "rl.clip", "rl.value_coef", "rl.stop_kl",
          "rl.value_clip"]


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if value is not None and key != "sweep"])
def test_none_is_refused_where_a_setting_has_a_value(config, key):
    """Before anything reads it, and in one line; two settings mean "no limit" by it."""
    if key in ("rl.truncation", "optim.max_grad_norm"):
        return
    with pytest.raises((ValueError, TypeError), match=key.replace(".", "[.]")) as error:
        validation.validate(configs.override(config, {key: None}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) is int and key != "rl.entries"])
@pytest.mark.parametrize("value", [2**31, 2**32 + 7, 2**70])
def test_no_whole_number_wraps_around(config, key, value):
    with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')}={value} must be less than"):
        validation.validate(configs.override(config, {key: value}))


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [1e308, 4e38, 1e-50])
def test_a_number_that_float32_makes_infinite_or_zero_is_refused(config, key, value):
    with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')}={value!r}".replace("+", "[+]")):
        validation.validate(configs.override(config, {key: value}))


@pytest.mark.parametrize("key", ["rl.loss", "rl.advantage", "rl.reduction", "rl.algorithm", "policy.kind", "env.name",
                                 "reference.name", "kl.controller", "kl.estimator", "reward.name", "reward.gold"])
def test_a_name_that_is_no_function_is_refused(config, key):
    with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')}='math.pi'.* is 3.14") as error:
        validation.validate(configs.override(config, {key: "math.pi"}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting, change", [
    ("env.student_model", {}), ("reference.paths", {"reference.name": "checkpoint"}), ("model.path", {})])
@pytest.mark.parametrize("broken", ["missing", "no weights", "another family", "no JSON"])
def test_a_model_that_cannot_be_read_is_named_by_its_setting(config, tiny_folder, tmp_path, setting, change, broken):
    place = tmp_path / "model"
    if broken != "missing":
        shutil.copytree(tiny_folder, place)
    if broken == "no weights":
        (place / "model.safetensors").unlink()
    if broken == "another family":
        (place / "config.json").write_text('{"model_type": "mamba"}')
    if broken == "no JSON":
        (place / "config.json").write_text("{")
    value = (str(place),) if setting == "reference.paths" else str(place)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{setting}") as error:
        validation.validate(configs.override(config, {**change, setting: value}))
    assert setting == "model.path" or "model.path" not in str(error.value)


def test_an_unknown_swept_setting_lists_what_exists(config):
    config.sweep = [{"kl.coeff": (0.1,)}]
    with pytest.raises(ValueError, match=r"'kl\.coeff'.*kl\.coef"):
        validation.validate(config)


def test_a_swept_value_of_the_wrong_type_is_refused(config):
    config.sweep = [{"kl.coef": ("much",)}]
    with pytest.raises(ValueError, match=r"kl\.coef='much'"):
        validation.validate(config)


def test_a_setting_that_the_schema_lacks_is_refused(config):
    with config.unlocked():
        config.kl.extra = 1
    with pytest.raises(ValueError, match=r"config: unknown setting 'kl\.extra'; sections are model, env"):
        validation.validate(config)


@pytest.mark.parametrize("key, value", [("model.path", "embedded"), ("env.length", 8), ("reward.name", "vader"),
                                        ("rl.iterations", 3), ("evaluation.episodes", 8),
                                        ("sampling.temperature", 0.5)])
def test_what_members_share_cannot_be_swept(config, key, value):
    config.sweep = [{key: (value,), "seed": (0,)}]
    with pytest.raises(ValueError, match=rf"sweep: {key.replace('.', '[.]')} cannot differ"):
        validation.validate(config)


@pytest.mark.parametrize("changes, says", [
    ({"rl.discount": 0.9, "kl.coef": 0.1}, "discounted differently"),
    ({"kl.temperature": 0.7}, "drawn at one temperature"), ({"kl.spend": "all"}, "kl.spend='all' is unknown"),
    ({"kl.spend": "sampled", "kl.budget": 1.0, "kl.estimator": "k3", "kl.placement": "loss"},
     "log-probability of the budget fraction"),
    ({"kl.operation": "sum"}, "kl.operation='sum' is unknown"), ({"kl.operation": "mixture"}, "without a budget"),
    ({"kl.ledger": "none", "kl.budget": 1.0}, "kl.ledger='none' is unknown; choose one of 'exact', 'log_ratio'"),
    ({"kl.ledger": "log_ratio"}, "without a budget"), ({"kl.miss_coef": 1.0}, "without a budget"),
    ({"kl.target_floor": 1e-6, "kl.budget": 1.0}, "the budget would not be hard"),
    ({"kl.ledger": "log_ratio", "kl.budget": 1.0, "kl.spend": "sampled"}, "with kl.spend=.sampled."),
    ({"kl.ledger": "log_ratio", "kl.budget": 1.0, "kl.token_budget": 1.0}, "log_ratio' with kl.token_budget=1.0"),
    ({"kl.budget_ramp": 2.0, "kl.budget": 1.0}, "kl.budget_ramp=2.0 must be a number of at least 0 and at most 1"),
    ({"sampling.student_temperature": 0.0}, "sampling.student_temperature=0.0 must be a number above 0, or None"),
    ({"policy.actor": "table"}, "policy.actor='table' is unknown; choose one of 'mlp', 'linear'"),
    ({"policy.actor": "linear", "policy.kind": "lora"}, "policy.actor='linear' has no effect with policy.kind='lora'"),
    ({"optim.eps": 0.0}, "optim.eps=0.0 must be a number above 0"),
    ({"env.reply_limit": -1}, "env.reply_limit=-1 must be a number of at least 0"),
    ({"kl.spend": "greedy"}, "without a budget"), ({"kl.carry": True}, "no effect without kl.turn_budget"),
    ({"kl.controller": "pi"}, "kl.coef=0.0 must be positive for kl.controller='pi'"),
    ({"kl.controller": "pid"}, "lagrangian"), ({"kl.turn_budget": -1.0}, "kl.turn_budget=-1.0"),
    ({"sampling.temperature": 0.0}, "must be a number above 0"), ({"sampling.top_p": 0.0}, "above 0 and at most 1"),
    ({"reference.name": "best"}, "pessimistic"), ({"reference.name": "checkpoint"}, "give one"),
    ({"reference.paths": ("x",)}, "give none"), ({"reference.name": "mixture", "reference.paths": ("x",)}, "or more"),
    ({"reference.cut": "top"}, "'best', 'cumulative'"), ({"reference.alpha": 2.0}, "at most 1"),
    ({"reference.name": "checkpoint", "reference.paths": ("embedded",)}, "another tokenizer"),
    ({"reference.name": "checkpoint", "reference.paths": ("nowhere",)}, "neither a run's member .* nor a model"),
    ({"reference.name": "ema", "kl.budget": 1.0}, "no budget holds"),
    ({"kl.estimator": "3"}, "ambiguous"), ({"model.dtype": "bf16"}, "'bfloat16'"),
    ({"seed": 2**31}, "less than"),
    ({"policy.kind": "lora", "policy.targets": "*"}, r"policy.targets='\*' is no regular expression"),
    ({"policy.kind": "lora", "policy.alpha": 0.0}, "policy.alpha=0.0 must be positive"),
    ({"policy.rank": 4}, "policy.rank=4 has no effect with policy.kind='head'"),
    ({"policy.alpha": 8.0, "policy.kind": "full"}, "policy.alpha=8.0 has no effect"),
    ({"policy.targets": "up"}, "policy.targets='up' has no effect"),
    ({"rl.algorithm": "a2c"}, "rl.algorithm='a2c' is unknown; choose one of awr, cispo"),
    ({"rl.algorithm": "math.sqrt"}, "no kl_reg.algorithms.algorithm.Algorithm"),
    ({"rl.reduction": "mean"}, "fixed_length, sequence_mean, token_mean"),
    ({"rl.algorithm": "grpo", "rl.group": 1}, "rl.advantage='group' compares episodes"),
    ({"rl.group": 5}, "rl.episodes=32 must be a multiple of rl.group=5"),
    ({"rl.algorithm": "ppo_dual_clip", "rl.dual_clip": 1.1}, "rl.dual_clip=1.1 must be a number above 1.2"),
    ({"rl.truncation": 0.0}, "rl.truncation=0.0 must be a number above 0, or None"),
    ({"rl.stop_kl": 0.0}, "rl.stop_kl=0.0 must be a number above 0"), ({"rl.temperature": 0.0}, "rl.temperature=0.0"),
    ({"rl.normalise": "no"}, "rl.normalise='no'"), ({"env.writers": "A"}, "env.writers='A' has no effect"),
    ({"env.name": "completion", "env.turns": 2}, "env.turns=2 has no effect with env.name='completion'"),
    ({"env.student_model": "embedded"}, "env.student_model: 'embedded' has another tokenizer"),
    ({"env.opening_tokens": 0}, "env.opening_tokens=0 must be a number of at least 1")])
def test_unsound_combinations_are_refused(config, changes, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        validation.validate(configs.override(config, changes))


@pytest.mark.parametrize("changes, says", [
    ({"optim.max_grad_norm": 0.0}, "of at least 1e-06, or None"),
    ({"optim.max_grad_norm": math.inf}, "optim.max_grad_norm=inf must be a finite number .* or None"),
    ({"optim.max_grad_norm": 1e-9}, "vanish beside the epsilon of Adam"),
    ({"optim.max_grad_norm": -1.0}, "optim.max_grad_norm=-1.0"),
    ({"optim.max_grad_norm": math.nan}, "optim.max_grad_norm=nan"),
    ({"optim.learning_rate": 1e-50}, "optim.learning_rate=1e-50 is out of the range of float32"),
    ({"optim.learning_rate": None}, "optim.learning_rate=None: give it a value"),
    ({"rl.clip": 0.0}, "rl.clip=0.0 with rl.clip_high=0.0 and rl.loss='ppo_clip': every ratio but 1"),
    ({"rl.algorithm": "gspo", "rl.clip": 0.0, "rl.clip_high": 0.0}, "rl.loss='gspo'"),
    ({"sampling.top_k": 1}, "sampling.top_k=1 leaves .* at least 2"),
    ({"sampling.min_p": 1.0}, "sampling.min_p=1.0 leaves .* below 1")])
def test_what_can_train_nothing_is_refused(config, changes, says):
    with pytest.raises(ValueError, match=says):
        validation.validate(configs.override(config, changes))


@pytest.mark.parametrize("changes", [
    {"optim.max_grad_norm": None}, {"optim.max_grad_norm": 1e-6}, {"rl.clip": 0.0, "rl.clip_high": 0.1},
    {"rl.algorithm": "cispo", "rl.clip": 0.0, "rl.clip_high": 0.0}, {"sampling.top_k": 2},
    {"optim.warmup": 2, "rl.iterations": 1}, {"optim.final": 0.0, "rl.iterations": 3},
    {"optim.final": 0.0, "rl.iterations": 1, "optim.warmup": 1}, {"reward.weights": (0.0,), "kl.coef": 0.1}])
def test_what_trains_is_accepted_without_a_word(config, changes):
    validation.validate(configs.override(config, changes))             # pytest makes an error of a warning


@pytest.mark.parametrize("changes, says", [
    ({"optim.learning_rate": 0.0}, "optim.learning_rate=0.0: the policy stays as it is"),
    ({"kl.budget": 0.0}, "kl.budget=0.0: the policy"), ({"kl.token_budget": 1e-13}, "kl.token_budget=1e-13: the"),
    ({"reward.weights": (0.0,)}, r"reward.weights=\(0.0,\), without a KL"),
    ({"optim.warmup": 1000}, "the run ends at 0.05 of optim.learning_rate"),
    ({"optim.final": 0.0, "optim.warmup": 1, "rl.iterations": 2}, "one of these iterations has the learning rate 0")])
def test_a_run_that_trains_next_to_nothing_is_warned_of(config, changes, says):
    with pytest.warns(UserWarning, match=says):
        validation.validate(configs.override(config, changes))


def test_a_member_that_cannot_change_is_a_control_beside_others(config):
    config.sweep = [{"optim.learning_rate": (0.0, 1e-3)}, {"kl.budget": (0.0,)}]
    validation.validate(config)
    config.sweep = [{"optim.learning_rate": (0.0,)}, {"kl.budget": (0.0,)}]
    with pytest.warns(UserWarning, match="in every member of this run"):
        validation.validate(config)


@pytest.mark.parametrize("warmup, iterations, final", [(1, 1, 0.0), (1, 2, 0.0), (2, 2, 0.0), (2, 5, 0.0), (9, 2, 1.0)])
def test_cautions_about_the_schedule_are_those_of_the_rates(config, warmup, iterations, final):
    """A caution where at least half of the iterations have no rate, or where the rate never comes to half."""
    config.optim.warmup, config.rl.iterations, config.optim.final = warmup, iterations, final
    rates = [float(optimizer.schedule(warmup, final, iterations)(jnp.int32(i))) for i in range(iterations)]
    expected = rates.count(0) >= iterations / 2 or max(rates) < 1 / 2
    assert bool(no_training.cautions([config])) == expected


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_every_algorithm_is_valid_as_it_is(config, name):
    config.rl.algorithm = name
    validation.validate(config)


def test_what_is_set_goes_before_what_the_algorithm_has(config):
    """GRPO's clip below and above is one number, where only the lower one is set."""
    config.rl.algorithm, config.rl.reduction, config.rl.clip = "grpo", "token_mean", 0.1
    static, hyper, _ = configs.split(config)
    rl = static.config().rl
    assert (rl.loss, rl.advantage, rl.reduction, rl.group) == ("ppo_clip", "group", "token_mean", 8)
    assert (hyper.clip, hyper.clip_high, hyper.value_coef) == tuple(map(jnp.float32, (0.1, 0.1, 0.0)))
    assert jnp.isinf(hyper.value_clip) and jnp.isinf(hyper.stop_kl)


def test_a_loss_that_the_sweep_names_is_not_replaced(config, tmp_path):
    config.sweep = [{"rl.loss": ("cispo", "reinforce")}]
    with pytest.raises(ValueError, match="loss_fn: the sweep has rl.loss"):
        loop.train(config, None, tmp_path, loss_fn=reward_of_length)


def test_only_a_head_reads_layers_and_only_lora_has_a_rank(config):
    validation.validate(configs.override(config, {"policy.kind": "lora", "policy.layers": 9, "policy.rank": 4}))
    config.sweep = [{"policy.rank": (8, 4)}]
    with pytest.raises(ValueError, match="policy.rank=4 has no effect"):
        validation.validate(config)


def test_a_reward_function_needs_no_other_reward_and_its_run_can_be_configured_again(config, tmp_path, monkeypatch):
    class Claimed(Exception):
        """Raised where training would begin."""

    def claim(workdir, resolved):
        raise Claimed(resolved)

    monkeypatch.setattr(checkpoint, "claim", claim)
    config.reward.name, config.reward.path, config.reward.label = "classifier", "/nowhere", "positive"
    with pytest.raises(Claimed) as stopped:
        loop.train(config, reward_of_length, tmp_path)
    assert config.reward.path == "/nowhere"                         # the caller's own
    again = config.copy_and_resolve_references()
    again.update(stopped.value.args[0]["config"])
    assert again.reward.to_dict() == {**configs.default().reward.to_dict(), "name": f"{__name__}.reward_of_length"}
    validation.validate(again)


def reward_of_length(prompts, completions, completion_ids, **columns):
    return [float(len(completion)) for completion in completions]


def test_the_fingerprint_knows_what_the_settings_only_name(config):
    assert configs.fingerprint(config, "weights") != configs.fingerprint(config, "other weights")
