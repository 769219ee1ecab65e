"""Rewards as the configuration names them, their settings, weights and digests."""
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_staging import reply, settings

from kl_reg import rewards
from kl_reg.algorithms.reinforce import reinforce
from kl_reg.runs.fingerprint import digest_of, is_library, name_of


def shout(completions):
    return [float(text.isupper()) for text in completions]


class Shouting:
    def __init__(self, digest="x"):
        self.said = digest

    def __call__(self, completions):
        return shout(completions)

    def digest(self):
        return self.said


shouting, number = Shouting(), 3


def test_one_name_is_one_function_with_weight_one():
    reward = rewards.build(settings().reward)
    assert rewards.names(reward) == ("vader",) and reward.weights == (1.0,)
    assert rewards.gold(settings().reward) is None


def test_several_names_have_settings_and_weights_of_their_own():
    chosen = settings(name="length, test_reward_names.shout,regex", weights=(2, 0.5, -1.0), target=4, pattern="^N")
    reward = rewards.build(chosen.reward)
    assert rewards.names(reward) == ("length", "shout", "regex")
    out = rewards.score(reward, [reply("NO", ids=[1, 2]), reply("Yes", ids=[1, 2, 3, 4])])
    np.testing.assert_array_equal(out.total, np.float32([2 * -0.5 + 0.5 - 1, 0]))
    assert {name: part.tolist() for name, part in out.parts.items()} == {"length": [-0.5, 0], "shout": [1, 0],
                                                                          "regex": [1, 0]}


def test_gold_is_another_reward_with_settings_of_the_same_section():
    chosen = settings(name="length", weights=(3.0,), gold="regex,test_reward_names.shouting", target=2, pattern="o")
    gold = rewards.gold(chosen.reward)
    assert rewards.names(gold) == ("regex", "shouting") and gold.weights == (1.0, 1.0)
    assert rewards.names(rewards.build(chosen.reward)) == ("length",)
    assert rewards.score(gold, [reply("NO"), reply("no")]).total.tolist() == [1, 1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": "vadar"}, "reward.name='vadar'.*unknown.*classifier, distinct, length, log_likelihood, regex, table, va"),
    ({"name": "vader,vadar"}, "reward.name='vader,vadar': .*'vadar' is unknown"),
    ({"name": ""}, "reward.name=''"), ({"name": "vader,"}, "reward.name='vader,'"),
    ({"name": "length,vader,length"}, "reward.name=.* names 'length' twice"),
    ({"name": "test_reward_names.number"}, "reward.name='test_reward_names.number' is 3, no function"),
    ({"name": "test_reward_names.Shouting"}, "Shouting'>, which is no function"),
    ({"name": "test_reward_names.quiet"}, "reward.name='test_reward_names.quiet' cannot be imported"),
    ({"gold": "vadar"}, "reward.gold='vadar': .*unknown"), ({"gold": "vader,"}, "reward.gold='vader,'"),
    ({"weights": (1.0, 2.0)}, r"reward.weights=\(1.0, 2.0\) has 2 weights for the 1 of vader"),
    ({"name": "vader,length", "weights": (1.0,)}, r"has 1 weights for the 2 of vader, length"),
    ({"nan": "ignore"}, "reward.nan='ignore': choose of 'refuse', 'skip'"),
    ({"weights": (float("nan"),)}, "nan is no finite number"), ({"weights": ("1",)}, "'1' is no finite number"),
    ({"path": "x"}, "reward.path='x'.*no effect.*'vader'.*'classifier', 'log_likelihood', 'table'"),
    ({"label": "x"}, "reward.label='x'.*no effect.*'vader'.*'classifier'"),
    ({"pattern": "x"}, "reward.pattern='x'.*no effect.*'vader'.*'regex'"),
    ({"target": 3}, "reward.target=3.*no effect.*'vader'.*'length'"),
    ({"name": "length", "ngram": 3}, "reward.ngram=3.*no effect.*'length'.*'distinct'"),
    ({"name": "log_likelihood"}, "reward.path=''.*'log_like"),
    ({"gold": "log_likelihood"}, "reward.path=''.*'log_like"),
    ({"name": "regex"}, "reward.pattern=''"), ({"name": "regex", "pattern": "("}, "reward.pattern='[(]'.*unterminated"),
    ({"name": "length", "target": 0}, "reward.target=0"), ({"name": "distinct", "ngram": 0}, "reward.ngram=0")],
    ids=str)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        rewards.check(settings(**changes).reward)


@pytest.mark.parametrize("name", ["classifier", "log_likelihood", "table"])
def test_a_path_with_nothing_is_named(name):
    with pytest.raises(FileNotFoundError, match="reward.path='/nowhere'"):
        rewards.check(settings(name=name, path="/nowhere").reward)


def test_a_model_of_another_kind_is_refused(distilbert, tiny_folder):
    with pytest.raises(ValueError, match=f"{re.escape(str(distilbert))}.*distilbert"):
        rewards.check(settings(name="log_likelihood", path=str(distilbert)).reward)
    with pytest.raises(ValueError, match=f"{re.escape(str(tiny_folder))}.*llama"):
        rewards.check(settings(name="classifier", path=str(tiny_folder)).reward)


def test_functions_that_are_given_have_short_unique_names():
    reward = rewards.of([shout, shouting, functools.partial(shout), shouting.__call__, lambda completions: [1.0]])
    assert rewards.names(reward) == ("shout", "Shouting", "shout_2", "__call__", "lambda")


def test_a_name_that_something_was_given_is_its_name():
    """As TRL has it; two judges of one type are told apart by it. Metrics of the reward have names of their own."""
    kind, strict, partial = Shouting(), Shouting(), functools.partial(shout)
    kind.__name__, strict.__name__, partial.__name__ = "kind", "strict", "loud"
    assert rewards.names(rewards.of([kind, strict, partial, twice(shout, 2)])) == ("kind", "strict", "loud", "shout")
    strict.__name__ = "unjudged_rate"
    assert rewards.names(rewards.of(strict)) == ("unjudged_rate_2",)


def test_sources_are_dotted_paths():
    assert rewards.sources(rewards.of([shout, shouting])) == "test_reward_names.shout,test_reward_names.Shouting"


@pytest.mark.parametrize("functions", [[], ["shout"], [shout, Shouting]])
def test_what_is_no_function_is_refused(functions):
    with pytest.raises(ValueError, match="no function"):
        rewards.of(functions)


# ---- what the fingerprint of a run tells apart

def scaled(by):
    return lambda completions: [by * len(text) for text in completions]


def test_functions_with_another_code_or_other_values_in_it_differ():
    def recursive(completions, by=1):
        return [1.0] if by else recursive(completions)

    a, b = np.zeros((2, 3)), np.zeros((3, 2))
    functions = [shout, scaled(1), scaled(2), scaled((1,)), scaled((1, 2)), scaled("1"), scaled(shout), scaled([]),
                 scaled(scaled(1)), scaled(a), scaled(b), scaled(jnp.zeros((2, 3))), scaled(Shouting("a")),
                 functools.partial(scaled, 1), functools.partial(scaled, 2), recursive, shouting, Shouting("y"),
                 lambda completions: [1.0 for _ in completions], lambda completions: [2.0 for _ in completions],
                 lambda completions, by=1: [1.0 for _ in completions], lambda completions: [1.0 in {1.0, 2.0}]]
    assert len({digest_of(function) for function in functions}) == len(functions)
    for same in ((2, 2), (a, a.copy()), ({}, {"what is": "remembered"})):
        assert len({digest_of(scaled(value)) for value in same}) == 1


def twice(inner, by):
    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        return [by * x for x in inner(*args, **kwargs)]
    return wrapper


def negated(inner):
    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        return [-x for x in inner(*args, **kwargs)]
    return wrapper


class Keeping:
    """A decorator that is an object, with the function inside in no closure."""

    def __init__(self, inner):
        functools.update_wrapper(self, inner)

    def __call__(self, completions):
        return self.__wrapped__(completions)


class Halving(Keeping):
    def __call__(self, completions):
        return [x / 2 for x in self.__wrapped__(completions)]


class Loud:
    @functools.partial(twice, by=2)
    def two(self, completions):
        return shout(completions)

    @functools.partial(twice, by=3)
    def three(self, completions):
        return shout(completions)


def marked(inner, by):
    """A partial that says that it wraps."""
    return functools.update_wrapper(functools.partial(scaled(1), by), inner)


def hidden(completions):
    return HIDDEN(completions)  # noqa: F821 - given with its globals below


def whisper(completions):
    return [float(text.islower()) for text in completions]


def hiding(inner):
    """A wrapper that has the function inside in no closure, and only says which it is."""
    outer = types.FunctionType(hidden.__code__, {"HIDDEN": inner}, "hidden")
    return functools.update_wrapper(outer, inner)


def test_a_wrapper_is_part_of_what_it_wraps():
    """An edited decorator, other constants in it, or another function inside."""
    functions = [shout, twice(shout, 2), twice(shout, 3), negated(shout), twice(twice(shout, 2), 3),
                 twice(twice(shout, 3), 2), twice(whisper, 2), Keeping(shout), Keeping(whisper), Halving(shout),
                 Loud().two, Loud().three, marked(shout, 2), marked(shout, 3), hiding(shout), hiding(whisper)]
    assert len({digest_of(function) for function in functions}) == len(functions)
    for make in (lambda: twice(shout, 2), lambda: Keeping(shout), lambda: Loud().two, lambda: hiding(shout)):
        assert digest_of(make()) == digest_of(make())


def test_what_compiles_or_remembers_is_what_it_wraps():
    for make in (jax.jit, functools.cache, functools.lru_cache(maxsize=2)):
        assert digest_of(make(shout)) == digest_of(shout) != digest_of(make(twice(shout, 2)))


def test_a_wrapper_of_a_function_of_the_library_is_not_the_librarys():
    assert is_library(reinforce)
    for own in (twice(reinforce, 2), functools.partial(reinforce), Keeping(reinforce), shout):
        assert not is_library(own)


def test_an_edit_inside_of_a_comprehension_is_another_function():
    made = {}
    for value in ("1.0", "2.0"):
        exec(f"def f(completions):\n    return [{value} for _ in completions]", made)
        made[value] = made.pop("f")
    assert digest_of(made["1.0"]) != digest_of(made["2.0"])


def test_weights_belong_to_a_reward():
    digests = [rewards.digest(rewards.of([shout, shouting], weights)) for weights in ((), (1, 1), (1, 2))]
    assert digests[0] == digests[1] != digests[2]


def test_objects_are_named_by_their_type():
    assert name_of(shouting) == "test_reward_names.Shouting"
    assert name_of(shouting.digest) == "test_reward_names.Shouting.digest"
