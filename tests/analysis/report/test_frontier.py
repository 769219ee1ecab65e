from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from small_sweep import row, summary

from kl_reg import config as configs
from kl_reg.analysis.report import frontier
from kl_reg.analysis.report.conditions import settings


def points_of(rows):
    return frontier.points(settings(rows, configs.default(), "", {m["member"]: () for m in rows}))


def test_points_by_hand():
    points = points_of(summary()[:-1])
    assert [p.setting.label for p in points] == ["coef 0", "coef 1", "budget 5"]
    assert [(p.kl, p.reward) for p in points] == [(7.0, 2.5), (0.5, 1.2), (3.0, pytest.approx(1.6))]
    assert [p.interval for p in points] == ["range", "episodes", "range"]
    assert [p.kl_bar for p in points] == [(6.0, 8.0), (0.4, 0.6), (2.0, 4.0)]
    assert points[1].reward_bar == pytest.approx((1.1, 1.3))
    np.testing.assert_array_equal(points[0].seeds, [[8.0, 2.0], [6.0, 3.0]])


def test_three_seeds_give_a_t_interval_and_kl_stays_at_or_above_0():
    returns, kls = [1.0, 1.5, 1.2], [0.1, 0.9, 0.2]
    rows = [row(i, 0.1, None, i, *pair) for i, pair in enumerate(zip(returns, kls, strict=True))]
    (point,) = points_of(rows)
    assert point.interval == "t"
    expected = scipy.stats.t.interval(0.95, 2, loc=np.mean(returns), scale=scipy.stats.sem(returns))
    assert point.reward_bar == pytest.approx(expected)
    assert point.kl_bar[0] == 0.0
