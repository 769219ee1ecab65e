"""The best iterate of a log."""
import json

import pytest

from kl_reg.runs import log as run_log


def best(tmp_path, *rows):
    """Of a log of (return, nats per episode) at a coefficient of 0.5."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"iteration": i, "return": reward, "kl/nats_per_episode": nats, "kl/coef": 0.5})
                            + "\n" for i, (reward, nats) in enumerate(rows)))
    return run_log.best(file)


def test_iterations_without_a_judged_episode_are_left_out(tmp_path):
    """Net 1, 1, 1, 1, 1, 2 and 2 beside them: the last window has 1, 1, 1, 2, 2."""
    out = best(tmp_path, (1, 0), (None, 4), (1, 0), (1, 0), (2, 2), (1, 0), (None, 0), (2, 0), (3, 2), (0, 0))
    assert out["iteration"] == 8 and out["return"] == pytest.approx(9 / 5)
    assert out["kl/nats_per_episode"] == pytest.approx(4 / 5)


def test_without_any_return_the_last_iteration_is_given(tmp_path):
    assert best(tmp_path, (None, 1), (None, 3)) == {"iteration": 1, "return": None, "kl/nats_per_episode": 3.0}
