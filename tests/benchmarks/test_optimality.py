"""The benchmark's pieces by hand and by listing all sequences, and a small run of it."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import optimality
from benchmarks.optimality import HORIZON, SEQUENCES, VOCAB, Run, Task
from kl_reg import config as configs
from kl_reg.algorithms import ALGORITHMS
from kl_reg.analysis.optimum.enumeration import Tree, enumerate_model, tokens_of
from kl_reg.analysis.optimum.policy_tables import policy_tables
from kl_reg.envs.tabular import make_model
from kl_reg.pretrained import weights
from kl_reg.sampling import rollout
from kl_reg.training import member_groups
from kl_reg.types import Sampling
from tests.programs import changed

SMALL = {"kl.estimator": "k1", "kl.placement": "reward", "rl.iterations": 10, "rl.episodes": 64,
         "optim.learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabular")
    make_model(folder, VOCAB, 0)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return weights.load(str(folder))


@pytest.fixture(scope="module")
def tree(model):
    return enumerate_model(model.config, model.params, (0,), HORIZON, np.zeros(SEQUENCES))


def tables_of(probs):
    """A distribution over all sequences as conditional log-probabilities."""
    behind = [probs.reshape(VOCAB**t, VOCAB, -1).sum(-1) for t in range(HORIZON)]
    return [np.log(joint / joint.sum(1, keepdims=True)) for joint in behind]


def test_sequences_multiply_up():
    tables = np.log([[0.3, 0.7]]), np.log([[0.5, 0.5], [0.2, 0.8]])
    np.testing.assert_allclose(optimality.sequence_probs(tables), [0.15, 0.15, 0.14, 0.56], rtol=1e-12)


def test_the_base_closes_nothing_and_the_optimum_everything(tree):
    """pi* and J(pi*) as sums over all sequences: beta e^{r/lam} / Z and lam log Z."""
    probs = optimality.sequence_probs(tree.log_base)
    for task in optimality.make_tasks(tree.log_base).values():
        own, tilted = tree._replace(reward=task.reward), probs * np.exp(task.reward / task.lam)
        base, best = (optimality.compare(own, task.lam, x) for x in (tree.log_base, tables_of(tilted)))
        assert base["gap_closed"] == 0 and base["nats_per_episode"] == 0
        assert best["gap_closed"] == pytest.approx(1, abs=1e-9) and best["efficiency"] == pytest.approx(1, abs=1e-3)
        assert best["optimum"] == pytest.approx(task.lam * np.log(tilted.sum()), rel=1e-9)
        assert best["base"] == pytest.approx(probs @ task.reward, rel=1e-9)


def test_a_comparison_by_hand():
    """Two tokens, horizon 1, beta = (1/2, 1/2), reward (1, 0), lam = 1; the policy (3/4, 1/4)."""
    made = optimality.compare(Tree((np.log([[0.5, 0.5]]),), np.array([1.0, 0.0]), "A"), 1.0, [np.log([[0.75, 0.25]])])
    kl, optimum = 0.75 * np.log(1.5) + 0.25 * np.log(0.5), np.log((np.e + 1) / 2)
    assert made["nats_per_episode"] == pytest.approx(kl) and made["learned"] == pytest.approx(0.75 - kl)
    assert made["gap_closed"] == pytest.approx((0.25 - kl) / (optimum - 0.5))
    assert made["efficiency"] == pytest.approx(1, abs=1e-3)      # with two tokens there is one policy a reward


def test_tasks_are_as_hard_as_they_should_be(tree):
    probs, tasks = optimality.sequence_probs(tree.log_base), optimality.make_tasks(tree.log_base)
    for reward, lam in tasks.values():
        assert np.log(probs @ np.exp(reward / lam)) - probs @ reward / lam >= 1      # the gap, in lam times nats
    assert 0.005 <= probs @ tasks["sparse"].reward < 0.006
    reward, lam = tasks["deceptive"]
    rare = np.isin(tokens_of(np.arange(SEQUENCES), VOCAB, HORIZON), (1, 3, 5))
    for here in rare.T:      # every one of these tokens looks worse than any other
        assert np.average(reward[here], weights=probs[here]) < np.average(reward[~here], weights=probs[~here]) - 0.05
    tilted = probs * np.exp(reward / lam)
    assert tilted[rare.all(1)].sum() > 0.9 * tilted.sum() and probs[rare.all(1)].sum() < 0.02


@pytest.mark.parametrize("run", optimality.RUNS, ids=lambda run: f"{run.algorithm}-{run.settings['kl.estimator']}")
def test_every_experiment_is_valid(folder, run):
    config = optimality.experiment(folder, run, {"one": Task(np.zeros(SEQUENCES), 0.5)}, seed=2)
    assert (config.rl.algorithm, config.sweep) == (run.algorithm, [{"kl.coef": (0.5,), "seed": (2,)}])


def test_every_algorithm_is_measured():
    assert {run.algorithm for run in optimality.RUNS if run.limit == 0.95} == set(ALGORITHMS.names())
    assert {run.algorithm for run in optimality.RUNS if run.limit == 0.98} == {"reinforce", "rloo", "ppo"}


@pytest.mark.parametrize("kind", ["full", "head"])
def test_a_policy_s_tables_are_what_its_sampler_says(folder, model, kind):
    config = configs.default()
    config.update_from_flattened_dict({
        "model.path": str(folder), "policy.kind": kind, "env.name": "tabular", "env.opening": "hb", "env.length": 3,
        "rl.episodes": 64, "sampling.temperature": 0.7, "policy.layers": 2})
    (group,) = member_groups.plan(config, model)
    state = group.run.init(model.params, group.seeds, group.hyper)
    params = jax.tree.map(lambda x: x + 0.2 * jnp.sin(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), state.params)
    keys, first = rollout.member_keys(state.seed, state.iteration), jnp.zeros(1, jnp.int32)
    episodes = group.run.sample(params, state.reference, group.hyper, group.frozen, keys, first)
    tables = policy_tables(group.program, jax.tree.map(lambda x: x[0], params), model.params, VOCAB)
    actions, said = np.asarray(episodes.action[0]), np.asarray(episodes.log_prob[0])
    for t, table in enumerate(tables):
        assert table.shape == (VOCAB**t, VOCAB)
        np.testing.assert_allclose(np.exp(table).sum(1), 1, rtol=1e-12)
        history = actions[:, :t] @ VOCAB ** np.arange(t)[::-1]
        np.testing.assert_allclose(table[history, actions[:, t]], said[:, t], atol=2e-5)
    assert np.abs(episodes.log_ratio[0]).mean() > 0.05
    for other in ({"constrained": True}, {"sampling": Sampling(top_k=2)}):
        with pytest.raises(ValueError, match="without a hard budget or truncation"):
            policy_tables(changed(group.program, **other), params, model.params, VOCAB)
    with pytest.raises(ValueError, match=r"1 openings and 300\*\*3 sequences"):
        policy_tables(group.program, params, model.params, 300)


def test_a_small_run_learns_and_is_stored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimality, "RUNS", (Run("rloo", SMALL, -1.0),))
    assert optimality.main(["--parts", "tabular", "--seed", "3", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "All limits hold." in printed and "rloo" in printed
    result = json.loads((tmp_path / "new/optimality_tabular.json").read_text())
    assert [row["task"] for row in result["rows"]] == list(result["lam"]) == ["dense", "sparse", "deceptive"]
    assert result["rows"][0]["gap_closed"] > 0.25 and 0 < result["rows"][0]["efficiency"] < 1
    for row in result["rows"]:
        assert row["gap_closed"] < 1 and row["episodes"] == 640 and row["nats_per_episode"] > 0.1
        assert row["learned"] == pytest.approx(row["reward"] - result["lam"][row["task"]] * row["nats_per_episode"])
        assert row["gap_closed"] == pytest.approx((row["learned"] - row["base"]) / (row["optimum"] - row["base"]))


def test_a_missed_limit_is_named_and_is_an_error(tmp_path, capsys, monkeypatch):
    row = {"task": "dense", "algorithm": "ppo", "kl": "k1, reward", "base": 0.0, "optimum": 1.0, "learned": 0.9,
           "gap_closed": 0.9, "limit": 0.95, "nats_per_episode": 1.5, "efficiency": 0.8, "episodes": 64, "seconds": 2.0}
    result = {"holds": False, "seed": 0, "lam": {"dense": 0.3}, "rows": [row, row | {"algorithm": "awr", "limit": 0.9,
                                                                               "efficiency": None}]}
    monkeypatch.setitem(optimality.PARTS, "tabular", (lambda seed, folder: result, optimality.report))
    assert optimality.main(["--parts", "tabular", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "Below the limit: ppo (k1, reward) on dense." in printed and "90.0%" in printed
    assert json.loads(pathlib.Path(tmp_path / "optimality_tabular.json").read_text()) == result
