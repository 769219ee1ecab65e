from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from small_sweep import row

from kl_reg import config as configs
from kl_reg.analysis.report import equal_kl, figures
from kl_reg.analysis.report.conditions import settings

CONTROLLED = {"kl.controller": "pi", "kl.target": 10.0}
FREE = {"kl.controller": "fixed", "kl.target": 10.0}
EPISODES = 3      # of small_sweep's `final`


def found(rows, evaluations=None, base=None):
    nothing = {"returns": np.zeros(EPISODES), "kl": np.ones((EPISODES, 4))}
    grouped = settings(rows, configs.default(), "", {m["member"]: () for m in rows})
    base = base or {m["hyper"]["seed"]: np.ones(EPISODES) for m in rows}
    return equal_kl.blocks(grouped, base, evaluations or {m["member"]: nothing for m in rows})


def names(entries):
    return [entry.setting.label for entry in entries]


def test_settings_near_the_target_are_ranked_by_return_and_the_others_are_not():
    (block,) = found([row(0, 0.1, None, 0, 1.5, 8.5, **CONTROLLED), row(1, 0.0, 10.0, 0, 2.5, 10.0, **FREE),
                      row(2, 0.03, None, 0, 2.0, 11.5, **FREE), row(3, 0.01, None, 0, 9.0, 30.0, **FREE),
                      row(4, 0.3, None, 0, 9.0, 8.4, **FREE), row(5, 0.0, 20.0, 0, 9.0, 18.0, **FREE)])
    assert block.target == 10.0 and block.measured == "the base"
    assert names(block.ranked) == ["budget 10", "coef 0.03", "pi to 10 nats"]
    assert names(block.off) == ["coef 0.3", "coef 0.01"]         # nearest first; budget 20 aims elsewhere


def test_each_target_has_a_block_and_a_setting_alone_has_none():
    two = found([row(0, 0.0, 10.0, 0, 1.0, 10.0), row(1, 0.0, 5.0, 0, 1.0, 5.0), row(2, 0.1, None, 0, 1.0, 10.5),
                 row(3, 0.2, None, 0, 1.0, 5.1)])
    assert [block.target for block in two] == [5.0, 10.0]
    assert not found([row(0, 0.0, 10.0, 0, 1.0, 10.0), row(1, 0.0, 5.0, 0, 1.0, 5.0), row(2, 0.1, None, 0, 1.0, 7.0)])
    assert not found([row(0, 0.0, 0.0, 0, 1.0, 0.0), row(1, 0.1, None, 0, 1.0, 0.0)])


def test_two_that_aim_at_a_target_and_miss_it_are_shown_unranked():
    (block,) = found([row(0, 0.1, None, 0, 1.0, 5.0, **CONTROLLED), row(1, 0.0, 10.0, 0, 1.0, 3.0, **FREE)])
    assert not block.ranked
    assert names(block.off) == ["pi to 10 nats", "budget 10"]


def test_gain_per_nat_is_of_the_episodes_that_were_judged():
    rows = [row(0, 0.1, None, 0, 1.5, 9.5, **CONTROLLED), row(1, 0.0, 10.0, 0, 2.5, 10.0, **FREE)]
    evaluation = {"returns": np.array([3.0, np.nan, 7.0]), "kl": np.array([[1.0, 1.0], [50.0, 50.0], [0.0, 2.0]])}
    (block,) = found(rows, {0: evaluation, 1: evaluation})
    assert [entry.per_nat[0] for entry in block.ranked] == [(2 + 6) / 4] * 2
    rows[0]["final"]["return"] = rows[0]["final"]["return_se"] = None
    (block,) = found(rows, {0: {**evaluation, "returns": np.full(3, np.nan)}, 1: evaluation})
    assert {entry.setting.members[0]["member"]: np.isnan(entry.per_nat[0]) for entry in block.ranked} == {
        0: True, 1: False}


@pytest.mark.parametrize("change", [{"sampling.temperature": 0.5}, {"sampling.top_p": 0.9}, {"reference.name": "ema"}])
def test_kl_that_is_measured_otherwise_is_not_compared(change):
    plain = {key: configs.flat(configs.default())[key] for key in change}
    rows = [row(0, 0.0, 10.0, 0, 1.0, 10.0, **plain), row(1, 0.0, 10.0, 0, 2.0, 10.0, **change)]
    assert not found(rows)
    rows += [row(2, 0.1, None, 0, 3.0, 9.5, **change)]
    (block,) = found(rows)
    assert [entry.setting.members[0]["member"] for entry in block.ranked] == [2, 1]


def test_forward_nats_are_no_reverse_target():
    rows = [row(0, 0.1, None, 0, 1.0, 10.0, **CONTROLLED, **{"kl.direction": "forward"}),
            row(1, 0.2, None, 0, 1.0, 10.0, **CONTROLLED, **{"kl.direction": "forward"})]
    assert not found(rows)


def test_neighbours_with_several_seeds_are_compared_over_seeds():
    a, b = [2.0, 2.4, 2.1], [1.6, 1.1]
    rows = [row(i, 0.0, 10.0, i, x, 10.0) for i, x in enumerate(a)]
    rows += [row(3 + i, 0.1, None, i, x, 9.0 + 2 * i) for i, x in enumerate(b)]
    (block,) = found(rows)
    comparison = equal_kl.compare(*block.ranked)
    low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert comparison.over == "seeds"
    assert comparison.reward.value - comparison.reward.limit == pytest.approx(low)
    assert comparison.reward.value + comparison.reward.limit == pytest.approx(high)
    assert (block.ranked[1].kl.value, block.ranked[1].kl.error) == (10.0, pytest.approx(scipy.stats.sem([9.0, 11.0])))


def test_settings_with_the_same_seeds_are_compared_in_pairs():
    a, b = [2.0, 2.9, 1.1], [1.6, 2.8, 0.4]
    rows = [row(i, 0.0, 10.0, seed, x, 10.0) for i, (seed, x) in enumerate(zip((7, 0, 2), a, strict=True))]
    rows += [row(5 - i, 0.1, None, seed, x, 10.0) for i, (seed, x) in enumerate(zip((7, 0, 2), b, strict=True))]
    comparison = equal_kl.compare(*found(rows)[0].ranked)
    low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert comparison.over == "pairs of seeds"
    assert comparison.reward.value - comparison.reward.limit == pytest.approx(low)
    assert comparison.reward.value + comparison.reward.limit == pytest.approx(high)


def returns(*columns):
    """The evaluation of each member, with these returns."""
    return {i: {"returns": np.float32(column), "kl": np.ones((len(column), 4))} for i, column in enumerate(columns)}


def test_one_seed_is_compared_over_its_episodes_in_pairs():
    a, b = [3.0, 1.0, 2.5, 2.0], [2.0, 0.5, 2.5, 1.5]
    (block,) = found([row(0, 0.0, 10.0, 4, np.mean(a), 10.0), row(1, 0.1, None, 4, np.mean(b), 10.0)], returns(a, b),
                     {4: np.ones(4)})
    comparison, expected = equal_kl.compare(*block.ranked), scipy.stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert comparison.over == "episodes"
    assert comparison.reward.error == pytest.approx(np.mean(np.subtract(a, b)) / expected.statistic)
    assert comparison.reward.value - comparison.reward.limit == pytest.approx(low)
    assert comparison.reward.value + comparison.reward.limit == pytest.approx(high)
    assert (block.ranked[0].reward.error, block.ranked[0].kl.error) == (pytest.approx(0.1), pytest.approx(0.1))


def test_episodes_of_different_seeds_are_independent():
    a, b = [3.0, 1.0, 2.5, 2.0], [2.0, 0.5, 2.5, 1.5]
    (block,) = found([row(0, 0.0, 10.0, 4, np.mean(a), 10.0), row(1, 0.1, None, 5, np.mean(b), 10.0)], returns(a, b),
                     {4: np.ones(4), 5: np.ones(4)})
    reward = equal_kl.compare(*block.ranked).reward
    low, high = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (reward.value - reward.limit, reward.value + reward.limit) == pytest.approx((low, high))


def test_one_run_against_several_is_paired_where_the_seed_is_the_same():
    a, b, c = [3.0, 1.0, 2.5, 2.0], [2.0, 0.5, 2.5, 1.5], [1.0, 1.0, 2.0, 0.5]
    rows = [row(0, 0.0, 10.0, 0, np.mean(a), 10.0), row(1, 0.1, None, 0, np.mean(b), 10.0),
            row(2, 0.1, None, 1, np.mean(c), 10.0)]
    reward = equal_kl.compare(*found(rows, returns(a, b, c), {0: np.ones(4), 1: np.ones(4)})[0].ranked).reward
    assert reward.value == pytest.approx(np.mean(a) - (np.mean(b) + np.mean(c)) / 2)
    assert reward.error == pytest.approx(np.hypot(scipy.stats.sem(np.subtract(a, np.divide(b, 2))),
                                                  scipy.stats.sem(np.divide(c, 2))))


def test_gain_per_nat_is_a_ratio_of_means_of_pairs_with_the_base():
    """Over seeds: gains 1 and 2 for 9 and 11 nats. Over episodes: gains 0, 1, 5 for 4, 4 and 16 nats."""
    evaluations = {i: {"returns": np.array([1.0, 2.0, 6.0], np.float32),
                       "kl": np.array([[1, 3, 0], [4, 0, 0], [0, 8, 8]], np.float32)} for i in range(2)}
    evaluations[2] = evaluations[0] | {"returns": np.array([2.0, 1.0, 6.0], np.float32)}
    (block,) = found([row(0, 0.0, 10.0, 0, 2.0, 9.0), row(1, 0.0, 10.0, 1, 3.5, 11.0), row(2, 0.1, None, 0, 1.1, 10.0)],
                     evaluations, {0: np.array([2.0, 0.0, 1.0]), 1: np.array([1.0, 1.5, 2.0])})
    seeds, episodes = block.ranked
    assert seeds.per_nat[0] == pytest.approx(3 / 20)
    assert seeds.per_nat[1] == pytest.approx(scipy.stats.sem([1 - 9 * 3 / 20, 2 - 11 * 3 / 20]) / 10)
    assert episodes.per_nat[0] == pytest.approx(6 / 24)
    assert episodes.per_nat[1] == pytest.approx(scipy.stats.sem([0 - 4 / 4, 1 - 4 / 4, 5 - 16 / 4]) / 8)


def test_no_kl_has_no_gain_per_nat():
    blocks = found([row(0, 0.1, None, 0, 1.5, 1e-13), row(1, 0.0, 10.0, 0, 2.0, 10.0), row(2, 0.2, None, 0, 2.0, 10.0)])
    assert np.isnan(blocks[0].off[0].per_nat).all()


def test_the_figure_shows_the_ranked_settings_and_the_target(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    rows = [row(i, 0.0, 10.0, i, 2.0 + i, 9.0 + 2 * i) for i in range(2)] + [row(2, 0.1, None, 0, 1.5, 10.0)]
    (block,) = found(rows)
    equal_kl.draw([block], settings(rows, configs.default(), "", {m["member"]: () for m in rows}), tmp_path / "x.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["budget 10", "coef 0.1"]
    assert right.get_xlabel() == "KL to the base (nats per episode)"
    lines = [line.get_xdata() for line in right.lines]
    assert any(list(x) == [9.0, 11.0] for x in lines)         # the seeds
    assert any(list(x) == [10.0, 10.0] for x in lines)        # the target
