"""`launch.optimal`: the optimum of a run from samples, against enumeration on a tabular model."""
import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from trees import random_tree, sequence_log_probs

import kl_reg
from kl_reg.analysis.optimum import efficiency, enumeration
from kl_reg.analysis.optimum import exact as exact_optimum
from kl_reg.config import default
from kl_reg.envs.tabular import make_model
from kl_reg.pretrained import weights
from launch import optimal as command

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
    return folder / "run", enumeration.enumerate_model(model.config, model.params, [0], 3, REWARD)


@pytest.fixture(scope="module")
def printed(own):
    """What the command says of that run."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.main([str(own[0]), "--episodes=512"])
    return out.getvalue()


@pytest.fixture(scope="module")
def report(own, printed):
    return json.loads((own[0] / "optimal/optimal.json").read_text())


def test_every_policy_has_a_row(report, printed):
    lines = [line.split() for line in printed.splitlines()]
    for row in report["members"]:
        cells = next(line for line in lines if line[:1] == [str(row["member"])])
        assert cells[-9:-3] == [f"{row['kl']:.2f}", "±", f"{row['kl_se']:.2f}", f"{row['reward']:.3f}", "±",
                                f"{row['reward_se']:.3f}"]
        assert cells[-2:] == ["–" if row["efficiency"] is None else f"{row['efficiency']:.0%}", f"{row['ess']:.0f}"]
    assert ["best", "of", "2"] in [line[:3] for line in lines] and "optimal/optimal.png" in printed


def test_the_bound_of_a_hard_budget_has_a_row(report, capsys):
    command._print(report | {"budgets": [{"nats": 2.5, "kl": 2.5, "reward": 0.75, "reward_se": 0.01, "ess": 123.0}]})
    assert "bound at 2.5 nats" in (said := capsys.readouterr().out) and "0.750 ± 0.010" in said


@pytest.mark.parametrize(("arguments", "says"), [(["nowhere"], "is no run as RUN"), ([], "required: RUN"),
                                                 (["x", "--episodes=1"], "--episodes 1 must"),
                                                 (["x", "--seed=-1"], "--seed -1 must")])
def test_a_wrong_call_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as done:
        command.main(arguments)
    said = capsys.readouterr().err
    assert done.value.code == 2 and says in said and said.count("\n") == 1


def test_the_frontier_is_the_enumerated_one(own, report):
    points = [point for point in report["frontier"] if point["lam"] is not None]
    assert len(points) > 20
    for point in points:
        exact = exact_optimum.soft_optimum(own[1], point["lam"])
        assert abs(point["reward"] - exact.reward) < 4 * point["reward_se"] + 1e-3
        assert abs(point["kl"] - exact.kl) < 4 * point["kl_se"] + 1e-3


def test_members_are_below_it_and_their_efficiency_is_the_exact_one(own, report):
    idle, learned = report["members"]
    assert idle["kl"] < 1e-9 and idle["efficiency"] is None
    assert learned["kl"] > 0.1 and learned["reward"] > idle["reward"] + 4 * learned["reward_se"]
    exact = exact_optimum.frontier(own[1], np.array([np.inf, *np.geomspace(30, 0.01, 60)]))
    expected = exact_optimum.efficiency(exact.kl, exact.reward, learned["kl"], learned["reward"])
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


def test_a_hard_budget_is_bounded_by_the_optimum_that_may_spend_it_on_average():
    """Base and member have said each sequence once together, as often as their mixture does."""
    flat = random_tree(2, "AAAA", 3, scale=0.1)
    under = np.stack([sequence_log_probs(flat.log_base, 2)] * 2)
    under[1] = np.log(2 / 16 - np.exp(under[0]))
    episodes = SimpleNamespace(transcript=SimpleNamespace(opening=np.zeros(8, int)))
    parts = [efficiency.Spoken(episodes, flat.reward[rows], under[0, rows], np.zeros(8))
             for rows in (slice(8), slice(8, 16))]
    names = [{"member": 0, "title": "one", "hyper": {"kl.budget": 0.4}}]
    (bound,), exact = efficiency._report(names, parts, under, 2.0)["budgets"], exact_optimum.expected_budget(flat, 0.4)
    np.testing.assert_allclose((bound["nats"], bound["kl"], bound["reward"]), (0.4, 0.4, exact.reward), rtol=1e-6)
    assert not efficiency._report(names, parts, under, 14.0)["budgets"]         # too few samples
    assert not efficiency._report([names[0] | {"hyper": {}}], parts, under, 2.0)["budgets"]


def test_the_figure_is_drawn(own, report):
    assert (own[0] / "optimal/optimal.png").stat().st_size > 20_000
