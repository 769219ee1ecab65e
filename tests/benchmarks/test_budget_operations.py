"""The choice of the best rate by hand, and a small run of the benchmark."""
import numpy as np
import pytest

from benchmarks import budget_operations, machine
from benchmarks.budget_operations import BUDGETS, best_rates, report


def test_the_rate_of_the_largest_mean_is_chosen_of_each_operation():
    fixed = {"operation": "tilt", "task": "dense", "budget": 2.0, "spent": 0.5}
    rows = [fixed | {"rate": rate, "seed": seed, "gain": gain}
            for rate, gains in ((0.1, (0.9, 0.1)), (0.2, (0.5, 0.7))) for seed, gain in enumerate(gains)]
    (best,) = best_rates(rows)
    assert (best["rate"], best["gains"]) == (0.2, [0.5, 0.7])
    assert best["gain"] == pytest.approx(0.6) and best["se"] == pytest.approx(0.1)      # sqrt(0.02) / sqrt(2)


def test_a_small_run_learns_within_its_budgets(monkeypatch):
    for name, value in (("RATES", (1e-2,)), ("BATCHES", 2)):
        monkeypatch.setattr(budget_operations, name, value)
    rows = budget_operations.measure(seeds=2, iterations=8)
    assert {(row["operation"], row["budget"]) for row in rows} == {
        (name, nats) for name in ("tilt", "mixture") for nats in BUDGETS}
    gains = np.array([row["gain"] for row in rows if row["task"] == "dense"])
    assert (gains > 0.3).all() and (gains < 1.05).all()
    assert all(0.1 < row["spent"] <= 1 + 1e-5 for row in rows)
    printed = report({"seeds": 2, "rows": rows, "machine": machine.about(), "versions": machine.versions()})
    assert printed.count("\n| d") == 4 and "| tilt: gain |" in printed
