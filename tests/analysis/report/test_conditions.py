from __future__ import annotations

import hashlib

import hypothesis
import hypothesis.strategies as st
import pytest
from small_sweep import row

from kl_reg import config as configs
from kl_reg.analysis.report import figures
from kl_reg.analysis.report.conditions import kl_name, settings, varying, warnings
from kl_reg.training.member_groups import hyper_of

BASE = "3f2a9c00aa"
PLAIN = {"kl.coef": 0.1, "kl.budget": None, "seed": 0}


def settings_of(sweep, references=None, **changes):
    """What a sweep over these grids has."""
    config = configs.default()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config.sweep = sweep
    hypers = hyper_of(config)
    members = [{"member": i, "hyper": hyper, "final": {}} for i, hyper in enumerate(hypers)]
    return settings(members, config, BASE, references or dict.fromkeys(range(len(hypers)), ()))


def labels(sweep, **changes):
    return [s.label for s in settings_of(sweep, **changes)]


def test_settings_are_ordered_and_hold_their_seeds():
    members = [row(0, 1.0, None, 1, 0, 0), row(1, 0.1, 20.0, 0, 0, 0), row(2, 1.0, None, 0, 0, 0),
               row(3, 0.0, 5.0, 0, 0, 0), row(4, 0.0, None, 0, 0, 0)]
    groups = settings(members, configs.default(), BASE, dict.fromkeys(range(5), ()))
    assert [s.label for s in groups] == ["coef 0", "coef 1", "budget 5", "budget 20, coef 0.1"]
    assert [[m["member"] for m in s.members] for s in groups] == [[4], [2, 0], [3], [1]]
    assert varying(members) == ["kl.coef", "kl.budget", "seed"]


def test_ways_to_regularise_are_named_by_what_varies():
    seeds = {"seed": (0, 1)}
    found = settings_of([
        {"kl.estimator": ("k1",), "kl.placement": ("reward",), "kl.controller": ("pi",), "kl.target": (10.0,),
         "kl.coef": (0.05,), **seeds},
        {"kl.budget": (10.0,), **seeds},
        {"kl.controller": ("lagrangian",), "kl.coef": (0.05,), **seeds},
        {"kl.estimator": ("k3",), "kl.placement": ("loss",), "kl.controller": ("pi",), "kl.coef": (0.05,), **seeds},
        {"kl.coef": (0.1,), **seeds}])
    assert [(s.kind, s.label, s.target, len(s.members)) for s in found] == [
        ("coef", "exact full, coef 0.1", None, 2),
        ("controlled", "exact full, lagrangian to 10 nats", 10.0, 2),
        ("controlled", "k1 in reward, pi to 10 nats", 10.0, 2),
        ("controlled", "k3 in loss, pi to 10 nats", 10.0, 2),
        ("budget", "budget 10", 10.0, 2)]


@pytest.mark.parametrize(("sweep", "changes", "expected"), [
    ([{"kl.target": (5.0, 20.0)}], {"kl__controller": "pi", "kl__coef": 0.1}, ["pi to 5 nats", "pi to 20 nats"]),
    ([{"kl.coef": (0.1, 0.2)}], {"kl__controller": "adaptive"},
     ["adaptive to 10 nats, from coef 0.1", "adaptive to 10 nats, from coef 0.2"]),
    ([{"kl.controller": ("pi",), "kl.rate": (0.1, 0.2)}, {"kl.controller": ("fixed",)}], {"kl__coef": 0.1},
     ["coef 0.1", "pi to 10 nats, rate 0.1", "pi to 10 nats, rate 0.2"]),
    ([{"kl.coef": (0.0, 0.3)}], {"kl__controller": "linear", "kl__final": 0.1},
     ["linear from coef 0 to 0.1", "linear from coef 0.3 to 0.1"]),
    ([{"kl.estimator": ("k2", "k3")}], {"kl__placement": "loss", "kl__coef": 0.1}, ["k2, coef 0.1", "k3, coef 0.1"]),
    ([{"kl.placement": ("loss", "full")}], {"kl__coef": 0.1}, ["full, coef 0.1", "in loss, coef 0.1"]),
    ([{"kl.direction": ("forward", "reverse")}], {"kl__coef": 0.1, "kl__controller": "pi"},
     ["forward, pi to 10 forward nats", "reverse, pi to 10 nats"]),
    ([{"kl.reduction": ("token", "sequence")}], {"kl__estimator": "k1", "kl__placement": "reward", "kl__coef": 0.1},
     ["of each token, coef 0.1", "of the sequence, coef 0.1"]),
    ([{"kl.budget": (5.0,), "kl.spend": ("greedy", "uniform")}, {"kl.coef": (0.1,)}], {},
     ["coef 0.1", "budget 5, spend greedy", "budget 5, spend uniform"]),
    ([{"kl.turn_budget": (2.0, 3.0)}, {"kl.budget": (9.0,), "kl.token_budget": (0.5,)}], {},
     ["budget 9, token budget 0.5", "turn budget 2", "turn budget 3"]),
    ([{"rl.clip": (0.1, 0.2)}], {"kl__coef": 0.1}, ["coef 0.1, clip 0.1", "coef 0.1, clip 0.2"]),
    ([{"sampling.temperature": (0.5, 1.0)}], {}, ["coef 0, temperature 0.5", "coef 0, temperature 1"]),
    ([{"reference.name": ("base",)}, {"reference.name": ("ema",)}], {"kl__coef": 0.1},
     ["coef 0.1, to the base 3f2a9c", "coef 0.1, to the policy's average, decay 0.99 (from 3f2a9c)"])])
def test_labels(sweep, changes, expected):
    assert labels(sweep, **changes) == expected


def test_settings_that_differ_in_what_has_no_effect_are_told_apart():
    assert labels([{"kl.rate": (0.1, 0.2)}]) == ["coef 0, kl.rate=0.1", "coef 0, kl.rate=0.2"]
    assert labels([{"kl.coef": (0.1, 0.1000000001)}]) == ["coef 0.1, kl.coef=0.1", "coef 0.1, kl.coef=0.1000000001"]


@pytest.mark.parametrize(("changes", "target"), [
    ({"kl.controller": "pi"}, 10.0), ({"kl.controller": "pi", "kl.budget": 4.0}, 4.0), ({"kl.budget": 7.0}, 7.0),
    ({"kl.controller": "pi", "kl.budget": 40.0}, 10.0), ({"kl.controller": "cosine"}, None), ({}, None),
    ({"kl.controller": "pi", "kl.direction": "forward"}, None), ({"kl.token_budget": 1.0}, None)])
def test_what_a_setting_aims_at_is_reverse_nats_per_episode(changes, target):
    (found,) = settings([{"member": 0, "hyper": {**PLAIN, **changes}}], configs.default(), BASE, {0: ()})
    assert found.target == target


@pytest.mark.parametrize(("changes", "digests", "expected"), [
    ({}, [], "the base 3f2a9c"),
    ({"reference.name": "checkpoint", "reference.paths": ["a"]}, ["97ad14fe"], "the checkpoint 97ad14"),
    ({"reference.name": "mixture", "reference.paths": ["a", "b"]}, ["aa", "bb"],
     f"the mixture of 2 ({hashlib.sha256(b'aabb').hexdigest()[:6]})"),
    ({"reference.name": "pessimistic", "reference.paths": ["a", "b"], "reference.cut": "cumulative"}, ["aa", "bb"],
     f"the pessimistic minimum of 2, alpha 0.1, cumulative ({hashlib.sha256(b'aabb').hexdigest()[:6]})"),
    ({"reference.name": "sync"}, [], "the policy, synced every 10 (from 3f2a9c)"),
    ({"reference.name": "my.own"}, ["123456789"], "my.own (123456)")])
def test_what_kl_is_measured_to(changes, digests, expected):
    (found,) = settings([{"member": 3, "hyper": {**PLAIN, **changes}}], configs.default(), BASE, {3: digests})
    assert kl_name([found]) == f"KL to {expected}"


def test_without_digests_there_is_no_fingerprint():
    for name, expected in (("base", "the base"), ("ema", "the policy's average, decay 0.99")):
        (found,) = settings([{"member": 0, "hyper": {**PLAIN, "reference.name": name}}], configs.default(), "", {0: ()})
        assert found.reference == expected


def test_several_references_have_no_common_axis():
    both = settings_of([{"reference.name": ("base", "ema")}])
    assert kl_name(both) == "KL to each setting's own reference"
    assert len({s.measured for s in both}) == 2


def test_temperature_and_truncation_are_part_of_what_is_measured():
    found = settings_of([{"sampling.temperature": (1.0, 0.5), "sampling.top_k": (0, 20)}])
    assert sorted(s.measured for s in found) == [
        "the base 3f2a9c", "the base 3f2a9c, temperature 0.5", "the base 3f2a9c, temperature 0.5, top_k 20",
        "the base 3f2a9c, top_k 20"]


def test_a_biased_term_that_acts_is_warned_of():
    biased = {"kl__estimator": "k1", "kl__placement": "loss", "kl__allow_biased": True}
    (line,) = warnings(settings_of([{"kl.coef": (0.0, 0.1, 0.2)}, {"kl.budget": (5.0,)}], **biased))
    assert line == "coef 0.1; coef 0.2: k1 reverse KL, loss [biased: descends nothing]"
    (line,) = warnings(settings_of([{"kl.coef": (0.1, 0.2)}], **biased))
    assert line.startswith("all settings: k1 reverse KL")
    assert not warnings(settings_of([{"kl.coef": (0.0, 0.1)}]))


def test_what_is_refused_by_now_is_shown_with_a_warning():
    """As an earlier version trained it: a loss in which the drawn budget fractions have no gradient."""
    (line,) = warnings(settings_of([{"kl.budget": (5.0,)}], kl__coef=0.1, kl__estimator="k2", kl__placement="loss",
                                   kl__spend="sampled"))
    assert "biased" in line and "the drawn budget fractions held" in line


CHOICES = {"kl.coef": (0.0, 0.1, 0.3), "kl.budget": (None, 5.0, 20.0), "kl.turn_budget": (None, 2.0),
           "kl.estimator": ("k1", "k2", "k3"), "kl.placement": ("reward", "loss"), "kl.target": (5.0, 10.0),
           "kl.controller": ("fixed", "pi", "lagrangian", "linear"), "kl.rate": (0.1, 0.2), "rl.clip": (0.1, 0.2),
           "kl.spend": ("neuron", "greedy"), "reference.name": ("base", "ema", "sync")}
GRID = st.fixed_dictionaries({}, optional={
    key: st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True).map(tuple)
    for key, values in CHOICES.items()}).filter(lambda grid: len(grid) < 6)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.lists(GRID, min_size=1, max_size=3))
def test_no_two_settings_share_a_label_or_a_look(sweep):
    found = settings_of(sweep, kl__allow_biased=True, kl__estimator="k2", kl__placement="loss")
    assert len({s.label for s in found}) == len(found)
    looks = figures.looks(found)
    assert len({(tuple(look["color"]), str(look["linestyle"]), look["marker"]) for look in looks}) == len(found)
    assert len({tuple(look["color"]) for look in looks}) == len(found)
