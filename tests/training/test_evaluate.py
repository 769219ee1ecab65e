"""Members that never learn are the base: what differs between their evaluations is the random numbers alone."""
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import kl_reg
from kl_reg import config as configs
from kl_reg.analysis.report import results
from kl_reg.sampling import rollout
from kl_reg.training import evaluate

EPISODES, SEEDS = 210, (3, 0, 1)


def reward(completion_ids):
    """Longer replies are better."""
    return [len(ids) / 10 for ids in completion_ids]


@pytest.fixture(scope="module")
def untrained(tiny_folder, tmp_path_factory):
    config = configs.default()
    config.model.path, config.policy.hidden, config.log.tensorboard = str(tiny_folder), 4, False
    config.env.opening, config.env.length = "<|start|>A: hi\n", 16
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes = 1, 32, EPISODES
    config.optim.learning_rate = 0.0
    config.sweep = [{"seed": SEEDS, "kl.coef": (0.0, 0.3)}]
    with pytest.warns(UserWarning, match="the policy stays as it is"):
        return kl_reg.train(config, reward, tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def evaluations(untrained):
    out = {}
    for member in (*range(2 * len(SEEDS)), "base"):
        with np.load(untrained.workdir / f"members/{member}/evaluation.npz") as arrays:
            out[member] = dict(arrays)
    return out


def by_seed(untrained, evaluations):
    """Seed -> the evaluations of its members."""
    rows = untrained.summary[1:]
    return {seed: [evaluations[row["member"]] for row in rows if row["hyper"]["seed"] == seed] for seed in SEEDS}


def test_settings_of_one_seed_draw_the_same_and_so_does_the_base(untrained, evaluations):
    base = evaluations["base"]
    for seed, (one, other) in by_seed(untrained, evaluations).items():
        own = base["seeds"] == seed
        assert own.sum() == EPISODES and (one["seeds"] == seed).all()
        for name in ("tokens", "roles", "turns", "returns"):
            np.testing.assert_array_equal(one[name], other[name])
            np.testing.assert_array_equal(one[name], base[name][own])
    assert list(dict.fromkeys(base["seeds"].tolist())) == list(SEEDS)       # of the sweep, in its order


def test_errors_of_different_seeds_are_independent(untrained, evaluations):
    """The correlation of returns at the same index is 0 within its 99.9 % interval."""
    returns = [one["returns"] for one, _ in by_seed(untrained, evaluations).values()]
    limit = np.tanh(scipy.stats.norm.ppf(0.9995) / np.sqrt(EPISODES - 3))          # Fisher's transformation
    for a, b in itertools.combinations(returns, 2):
        assert a.std() > 0 and abs(np.corrcoef(a, b)[0, 1]) < limit


def test_the_bases_row_is_over_the_episodes_of_all_seeds(untrained, evaluations):
    base, returns = untrained.summary[0], evaluations["base"]["returns"]
    blocks = [returns[i * EPISODES:(i + 1) * EPISODES] for i in range(len(SEEDS))]
    assert list(base["by_seed"]) == [str(seed) for seed in SEEDS]
    assert [own["return"] for own in base["by_seed"].values()] == pytest.approx([block.mean() for block in blocks])
    assert base["final"]["return"] == pytest.approx(returns.mean()) and base["final"]["episodes"] == len(returns)
    errors = [scipy.stats.sem(block) for block in blocks]
    assert base["final"]["return_se"] == pytest.approx(np.linalg.norm(errors) / len(SEEDS))
    assert base["final"]["return_se"] == pytest.approx(scipy.stats.sem(returns), rel=0.02)      # over all episodes
    found = results.read(untrained.workdir)
    assert found.independent
    for seed, block in zip(SEEDS, blocks, strict=True):
        np.testing.assert_array_equal(found.base_returns()[seed], block)
    assert json.loads((untrained.workdir / "summary.json").read_text()) == untrained.summary


def test_the_seeds_are_those_of_the_members():
    config = configs.default()
    assert evaluate.seeds_of(config) == [0]
    config.sweep = [{"kl.coef": (0.0, 0.1), "seed": (5, 2)}, {"kl.budget": (1.0,)}]
    assert evaluate.seeds_of(config) == [5, 2, 0]


def test_no_key_of_an_evaluation_is_one_of_training():
    """Also where the evaluation's seed is a member's: seeds and iterations from 0 to 5, and their episodes."""
    a, b = jnp.asarray(np.mgrid[:6, :6].reshape(2, -1), jnp.int32)
    first = jnp.zeros_like(a)
    trained = rollout.episode_keys(rollout.member_keys(a, b), first, 8)
    evaluated = rollout.episode_keys(rollout.evaluation_keys(a, b), first, 8)
    rows = {tuple(row) for keys in (trained, evaluated) for row in jax.random.key_data(keys).reshape(-1, 2).tolist()}
    assert len(rows) == 2 * 36 * 8
