"""The optimum of a run from samples, against enumeration on a tabular model."""
import numpy as np
import pytest

import kl_reg
from kl_reg.analysis import efficiency, efficiency_figure, optimal, tree
from kl_reg.config import default
from kl_reg.envs.tabular import make_model
from kl_reg.models import weights

REWARD = np.random.default_rng(0).normal(size=(4, 4, 4))


def lookup(completion_ids, **columns):
    return [float(REWARD[tuple(ids)]) for ids in completion_ids]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run of two members, one that learned, and its base as a tree."""
    folder = tmp_path_factory.mktemp("tabular")
    make_model(folder / "model", vocabulary=4, seed=0)
    config = default()
    config.model.path, config.policy.kind = str(folder / "model"), "full"
    config.env.name, config.env.opening, config.env.end, config.env.length = "tabular", "a", "", 3
    config.reward.name = f"{__name__}.lookup"
    config.rl.algorithm, config.rl.iterations, config.rl.episodes = "reinforce", 12, 64
    config.evaluation.episodes, config.optim.final = 64, 1.0
    config.sweep = [{"optim.learning_rate": (0.0, 3e-3), "kl.coef": (0.3,)}]
    kl_reg.train(config, workdir=folder / "run")
    model = weights.load(config.model.path)
    return folder / "run", tree.enumerate_model(model.config, model.params, [0], 3, REWARD)


@pytest.fixture(scope="module")
def report(own):
    return efficiency.measure(str(own[0]), 512)


def test_the_frontier_is_the_enumerated_one(own, report):
    points = [point for point in report["frontier"] if point["lam"] is not None]
    assert len(points) > 20
    for point in points:
        exact = optimal.soft_optimum(own[1], point["lam"])
        assert abs(point["reward"] - exact.reward) < 4 * point["reward_se"] + 1e-3
        assert abs(point["kl"] - exact.kl) < 4 * point["kl_se"] + 1e-3


def test_members_are_below_it_and_their_efficiency_is_the_exact_one(own, report):
    idle, learned = report["members"]
    assert idle["kl"] < 1e-9 and idle["efficiency"] is None
    assert learned["kl"] > 0.1 and learned["reward"] > idle["reward"] + 4 * learned["reward_se"]
    exact = optimal.frontier(own[1], np.array([np.inf, *np.geomspace(30, 0.01, 60)]))
    expected = optimal.efficiency(exact.kl, exact.reward, learned["kl"], learned["reward"])
    assert 0.2 < expected < 1.1
    np.testing.assert_allclose(learned["efficiency"], expected, rtol=0.25)


def test_best_of_n_of_the_base(own, report):
    mass = np.exp(own[1].log_base[0][0][:, None, None] + own[1].log_base[1].reshape(4, 4, 1)
                  + own[1].log_base[2].reshape(4, 4, 4)).ravel()
    order = np.argsort(REWARD.ravel())
    up_to = np.cumsum(mass[order])
    for row in report["best_of_n"][:3]:
        expected = (np.diff(up_to**row["n"], prepend=0) * REWARD.ravel()[order]).sum()
        assert abs(row["reward"] - expected) < 4 * row["reward_se"]


def test_the_figure_is_drawn(report, tmp_path):
    assert efficiency_figure.draw(report, tmp_path / "optimal.png").stat().st_size > 20_000


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run as RUN"):
        efficiency.measure(str(tmp_path), 8)
