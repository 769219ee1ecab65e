"""The settings table: what is made of it, what it accepts, and what it suggests."""
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_reg import config as configs
from kl_reg import settings, validation
from kl_reg.algorithms.optimizers import OPTIMIZERS
from kl_reg.envs import ENVIRONMENTS
from kl_reg.kl.controllers import CONTROLLERS
from kl_reg.kl.spends import LEDGERS
from kl_reg.models.block import REMATS
from kl_reg.policies.actor import ACTIVATIONS
from kl_reg.policies.kinds import POLICIES
from kl_reg.references.bayes import CUTS
from kl_reg.references.kinds import REFERENCES
from kl_reg.settings import SETTINGS
from kl_reg.sharding import mesh
from tests import fuzz

REGISTRIES = {"env.name": ENVIRONMENTS, "policy.kind": POLICIES, "optim.name": OPTIMIZERS,
              "kl.controller": CONTROLLERS, "reference.name": REFERENCES}
ROOT = pathlib.Path(__file__).parent.parent
ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
                     st.lists(st.floats(), max_size=2), st.tuples(st.text(max_size=3)),
                     st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=1),
                     st.sampled_from([np.float32(0.5), np.int64(2), np.float64(math.nan)]))


def test_the_page_is_that_of_the_table():
    """`python -c "from kl_reg import settings; print(settings.markdown(), end='')" > docs/settings.md`."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings.markdown()


def test_every_setting_says_what_it_is_in_a_sentence():
    assert set(configs.flat(configs.default())) == set(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.help[0].isupper() or setting.help[0] in "'g t", name
        assert setting.help.endswith((".", "?")) and setting.section in settings.SECTIONS, name
        assert (setting.default is None) <= bool(setting.kind and setting.none), name
        setting.check(setting.default)
        if setting.idle:
            other, idle = setting.idle
            assert set(idle) <= set(REGISTRIES[other].names()), name


def test_choices_are_those_of_the_code():
    assert set(SETTINGS["model.remat"].choices) == set(REMATS) and set(SETTINGS["reference.cut"].choices) == set(CUTS)
    assert SETTINGS["kl.ledger"].choices == LEDGERS and set(SETTINGS["parallel.mode"].choices) == set(mesh.MODES)
    assert set(SETTINGS["policy.critic_activation"].choices) == set(ACTIVATIONS)
    assert {f"parallel.{axis}" for axis in mesh.AXES} < set(SETTINGS)


@pytest.mark.parametrize("name, near", [
    ("rl.lr", "optim.learning_rate"), ("kl.beta", "kl.coef"), ("kl.coff", "kl.coef"), ("rl.batch_size", "rl.episodes"),
    ("model.name", "env.name"), ("env.lenght", "env.length"), ("max_new_tokens", "env.length"),
    ("gamma", "rl.discount"), ("kl_budget", "kl.budget")])
def test_a_misspelt_name_suggests_the_nearest(name, near):
    assert settings.unknown(name).startswith(f"unknown setting {name!r}; did you mean ") and near in (
        settings.unknown(name))


def test_a_name_that_is_near_nothing_gets_the_sections():
    assert settings.unknown("qqqq.zzzz").endswith("log") and "sections are model, env" in settings.unknown("qqqq.zzzz")


@pytest.mark.parametrize("name, value, says", [
    ("rl.iterations", True, "rl.iterations=True must be a whole number"), ("rl.iterations", 2.5, "a whole number"),
    ("kl.coef", "0.1", "kl.coef='0.1' must be a number"), ("kl.coef", False, "kl.coef=False must be a number"),
    ("kl.budget", "ten", "kl.budget='ten' must be a number, or None"), ("kl.carry", 1, "must be True or False"),
    ("model.dtype", "bfloat61", "did you mean 'bfloat16'?"), ("kl.ledger", "exakt", "did you mean 'exact'?"),
    ("reward.weights", "x", "must be a tuple"), ("log.groups", [], "must be a dictionary")])
def test_a_value_of_another_kind_is_refused(name, value, says):
    with pytest.raises(ValueError) as error:
        SETTINGS[name].check(value)
    assert says in str(error.value) and str(error.value).startswith(f"{name}=")


def test_numbers_of_numpy_and_whole_ones_are_accepted():
    config = configs.override(configs.default(), {"kl.coef": np.float32(0.25), "rl.iterations": np.int64(3),
                                                  "kl.budget": 2})
    assert (config.kl.coef, config.rl.iterations, config.kl.budget) == (0.25, 3, 2.0)
    assert [type(x) for x in (config.kl.coef, config.rl.iterations, config.kl.budget)] == [float, int, float]


@given(st.sampled_from(sorted(SETTINGS)), ANYTHING)
def test_a_value_is_accepted_or_refused_in_one_line_that_names_it(name, value):
    try:
        SETTINGS[name].check(value)
    except ValueError as error:
        assert str(error).startswith(f"{name}=") and "\n" not in str(error).replace(repr(value), "")
        return
    if SETTINGS[name].type in (int, float) and value is not None:
        assert math.isfinite(value) or SETTINGS[name].endless


def test_what_has_no_effect_is_refused_with_the_reason():
    config = configs.default()
    with pytest.raises(ValueError, match="policy.rank=4 has no effect with policy.kind='head'"):
        validation.validate(configs.override(config, {"policy.rank": 4}))


def test_mutated_configurations_are_accepted_or_refused_by_name():
    """`python -m tests.fuzz` with fewer of them."""
    assert fuzz.main(["--configs=300", "--seed=7"]) == 0


def test_what_the_fuzzer_calls_wrong():
    assert fuzz.fault("two\nlines of kl.coef", {"kl.coef": 1}) == "has several lines"
    assert fuzz.fault("rl.clip is wrong", {"kl.coef": 1}) == "names no setting that was changed"
    assert fuzz.fault("rl.clip is wrong", {"rl.algorithm": "grpo"}) is None
