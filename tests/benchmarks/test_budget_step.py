"""The limit, the goals and the tables by hand."""
import pytest

from benchmarks import budget_step


def row(arm, seconds, members=1, version="this", least=1.0, passes=None):
    return {"arm": arm, "members": members, "version": version, "least": least, "rollout": [seconds - 1.0] * 3,
            "update": [1.0, 1.0, 7.0], "agent_tokens": 100, "longest": 20, "passes": passes, "peak_bytes": 2e9}


RESULT = {"model": "small", "episodes": 16, "length": 32, "matmul_flops_per_second": 2e11,
          "memory_bytes_per_second": 3e10, "machine": {"processor": "Abacus", "cores": 2, "device": "cpu"},
          "versions": {"jax": "1"}, "others": None,
          "rows": [row("none", 4.0), row("tilt", 5.0, least=2.5, passes=1.5), row("tilt", 20.0, version="baseline"),
                   row("mixture", 7.0), row("linear", 10.0, least=3.0), row("tilt", 30.0, members=6, least=12.0)]}


def test_seconds_are_those_that_products_need_at_least(tiny_shapes):
    """3 layers of 3072 multiply-adds and a table of 16 x 300 (`test_decode`), two rows of 4 tokens; 6 tokens of the
    agent in two epochs. Then by memory alone: weights once for each of the 4 tokens."""
    asked = {"members": 1, "episodes": 2, "length": 4, "settings": {}}
    did = {"agent_tokens": 6, "epochs": 2}
    matrices, table = 3 * 3072, 16 * 300
    flops = 4 * 2 * 2 * (matrices + table) + 2 * table * 6 + 2 * (3 * table) * 6 * 2
    assert budget_step.least(asked, did, tiny_shapes, 1.0, 1e30) == pytest.approx(flops)
    assert budget_step.least(asked, did, tiny_shapes, 1e30, 1.0) == pytest.approx(4 * 4 * (matrices + table))
    linear = asked | {"settings": {"policy.actor": "linear"}}       # three tables' worth, trained
    flops = 4 * 2 * 2 * (matrices + table) + 2 * 3 * table * 6 + 2 * (10 * table) * 6 * 2
    assert budget_step.least(linear, did, tiny_shapes, 1.0, 1e30) == pytest.approx(flops)


def test_goals_by_hand():
    said = {what: (value, met) for what, value, _, met in budget_step.goals(RESULT)}
    assert said == {
        "tilt, 1 member: times as fast as the baseline": (4.0, True),
        "tilt, 1 member: over no budget": (1.25, True),
        "tilt, 1 member: part of the limit": (0.5, True),
        "mixture, 1 member: over the tilt": (1.4, False),
        "linear, 1 member: part of the limit": (0.3, False),
        "tilt, 6 members: over one (40% of the limit)": (6.0, False)}


def test_the_tables():
    said = budget_step.report(RESULT)
    assert "| tilt, 1 member | 4.00 | 1.00 | 5.00 | 50% | 100 (20) | 1.5 | 2.0 |" in said
    assert "| tilt, 1 member, baseline | 19.00 | 1.00 | 20.00 | 5% | 100 (20) |  | 2.0 |" in said
    assert "| tilt, 1 member: over no budget | 1.25 | 1.4 | yes |" in said
    assert "reach 200 GFLOP/s here, memory 30 GB/s" in said
