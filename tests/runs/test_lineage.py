"""Runs that start from another's final state."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kl_reg
from kl_reg import config as configs
from kl_reg.kl.controllers import Progress, Scale
from kl_reg.runs import checkpoint, directory, lineage
from kl_reg.types import TrainState


def reward(prompts, completions, completion_ids):
    return [len(ids) / 10 for ids in completion_ids]


@pytest.fixture(scope="module")
def config(tiny_folder):
    config = configs.default()
    config.model.path = str(tiny_folder)
    config.env.opening, config.env.length, config.policy.hidden = "<|start|>A: hi\n", 12, 8
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes, config.rl.epochs = 2, 4, 4, 1
    config.optim.warmup, config.optim.final, config.checkpoint.every, config.log.tensorboard = 1, 1.0, 1, False
    config.sweep = [{"kl.coef": (0.0, 0.3)}]
    return config


def changed(config, sweep=None, **settings):
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    own.sweep = own.sweep if sweep is None else sweep
    return own


@pytest.fixture(scope="module")
def parent(config, tmp_path_factory):
    return kl_reg.train(config, reward, tmp_path_factory.mktemp("parent") / "run")


def lines(workdir, member=0):
    return [json.loads(line) for line in (workdir / f"members/{member}/metrics.jsonl").read_text().splitlines()]


def test_it_goes_on_as_one_run_would(config, parent, tmp_path, capsys):
    """Two iterations and two more are four, but for the rounding of two programs."""
    whole = kl_reg.train(changed(config, rl__iterations=4), reward, tmp_path / "whole")
    later = kl_reg.train(config, reward, tmp_path / "later", start=str(parent.workdir))
    assert [row["iteration"] for row in lines(later.workdir)] == [2, 3]
    for name in ("return", "kl/nats_per_episode", "optim/grad_norm"):
        for member in (0, 1):
            np.testing.assert_allclose([row[name] for row in lines(later.workdir, member)],
                                       [row[name] for row in lines(whole.workdir, member)[2:]], rtol=1e-4)
    for x, y in zip(jax.tree.leaves(later.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
    assert f"from {parent.workdir}, iteration 2: the same settings" in capsys.readouterr().out


def test_settings_may_change_and_are_listed(config, parent, tmp_path, capsys):
    """A longer chat, from one member for all; a second call resumes it without being told again."""
    longer = changed(config, env__length=16, rl__iterations=1)
    first = kl_reg.train(longer, reward, tmp_path / "run", start=f"{parent.workdir}:1")
    assert "env.length 12 -> 16" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run/config.json").read_text())["from"]
    assert stored["iteration"] == 2 and "env.length 12 -> 16" in stored["changes"]
    assert "It went on from" in first.report.read_text()
    assert directory.iterations(tmp_path / "run") == [3]
    again = kl_reg.train(longer, reward, tmp_path / "run")
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(x, y)
    counts = [int(state["opt_state"][1]["count"][0]) for state in checkpoint.read(tmp_path / "run/checkpoints", 3)]
    assert counts == [3]


@pytest.mark.parametrize("changes, start, says", [
    ({"policy__hidden": 16}, "{run}", r"policy.hidden is 8 there and 16 here"),
    ({"policy__kind": "lora"}, "{run}", r"policy.kind is 'head' there and 'lora' here"),
    ({"model__path": "embedded"}, "{run}", "another base model"), ({}, "{run}:7", "it has members 0 to 1"),
    ({"sweep": []}, "{run}", "the new run 1"), ({}, "nowhere", "there is no run"),
    ({}, "{run}@9", "there are checkpoints of iterations 1, 2")])
def test_what_cannot_go_on_is_refused_by_name(config, parent, tmp_path, changes, start, says):
    own = changed(config, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        kl_reg.train(own, reward, tmp_path / "run", start=start.format(run=parent.workdir))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, parent, expected", [
    (Scale, {"scale": 2.0}, 2.0), (Scale, None, 1.0), (Progress, {"iteration": 24.0}, 1.0)],
    ids=["the same kind", "another kind", "a schedule"])
def test_a_controller_goes_on_and_a_schedule_begins_anew(kind, parent, expected):
    """Of one array each: their shapes do not tell them apart."""
    one = jnp.ones(1)
    state = TrainState({"w": one}, (), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), kind(one))
    stored = {"params": {"w": np.float32(3)}, "opt_state": (), "reference": (),
              "controller": parent and {name: np.float32(value) for name, value in parent.items()}}
    new = lineage.begin(lineage.Start("runs/x", 24, [], [], {0: stored}), [0], state)
    assert new.controller[0].tolist() == [expected] and type(new.controller) is kind
    assert new.params["w"].tolist() == [3.0] and new.iteration.tolist() == [24]


def test_a_run_goes_on_without_the_one_that_it_started_from(config, parent, tmp_path):
    """What it needs is in its own checkpoint; but before there is one, the other run's is read again."""
    once = changed(config, rl__iterations=1, sweep=[])
    source = shutil.copytree(parent.workdir, tmp_path / "source")
    first = kl_reg.train(once, reward, tmp_path / "run", start=f"{source}:0")
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints")
    again = kl_reg.train(once, reward, tmp_path / "cut")
    shutil.rmtree(source)
    resumed = kl_reg.train(once, reward, tmp_path / "run")
    for x, y, z in zip(*(jax.tree.leaves(result.params) for result in (first, again, resumed)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
