"""Two processes with four devices each, over loopback: what one process gives; and what processes say to each other."""
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import scenario

import kl_reg
from kl_reg.pretrained import weights
from kl_reg.runs import checkpoint
from kl_reg.runs import directory as run_directory
from kl_reg.sharding import mesh as meshes
from kl_reg.sharding import multihost
from kl_reg.training import member_groups

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def alone_run(tiny_folder, prompts, tmp_path_factory):
    """The run of one device."""
    return kl_reg.train(scenario.experiment(str(tiny_folder), prompts), scenario.reward,
                        tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def both(tiny_folder, prompts, alone_run, tmp_path_factory):
    """What each of the two processes saw. They go on from the first checkpoint of the run of one device, in `workdir`.
    """
    folder = tmp_path_factory.mktemp("both")
    shutil.copytree(alone_run.workdir, folder / "run")
    for later in ("2", "3"):
        shutil.rmtree(folder / "run/checkpoints" / later)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    calls = [[sys.executable, str(HERE / "worker.py"), f"localhost:{port},2,{i}", str(tiny_folder), prompts,
              str(folder / "run"), str(folder / f"{i}.pickle")] for i in range(2)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    running = [subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for call in calls]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return folder / "run", [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(2)], said


def test_sampled_tokens_and_three_updates_are_those_of_one_device(both, alone):
    _, episodes, expected = alone("full")
    for own in both[1]:
        np.testing.assert_array_equal(own["tokens"], episodes.transcript.tokens)
        scenario.assert_same_updates(own["updates"], expected)
        assert own["addressable"] == (False, (1, 1, 16, 16))        # the other process has the other devices


def test_a_run_of_one_device_goes_on_as_it_would_have(both, alone_run):
    workdir, (one, other), _ = both
    for member in range(2):
        got, expected = ([json.loads(line) for line in (folder / f"members/{member}/metrics.jsonl").read_text()
                          .splitlines()] for folder in (workdir, alone_run.workdir))
        assert [row["iteration"] for row in got] == [0, 1, 2]
        for ours, theirs in zip(got, expected, strict=True):
            for name in ("return", "kl/nats_per_episode", "loss/policy_avg", "optim/grad_norm", "tokens"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
        with np.load(workdir / f"members/{member}/evaluation.npz") as ours, \
                np.load(alone_run.workdir / f"members/{member}/evaluation.npz") as theirs:
            np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
            np.testing.assert_array_equal(ours["returns"], theirs["returns"])
    assert one["summary"] == other["summary"] == json.loads((workdir / "summary.json").read_text())
    chex.assert_trees_all_close([own.params for own in run_directory.load(workdir)],
                                [own.params for own in run_directory.load(alone_run.workdir)], rtol=1e-4, atol=1e-6)


def test_each_process_asks_about_its_own_episodes_and_one_writes(both):
    """Two members, twice eight training episodes; the evaluation has eight of each member, and of the base twice."""
    _, (one, other), said = both
    assert one["asked"] == other["asked"] == [4] * (2 * 2 + 4)
    assert "already trained for 1 of 3" in said[0] and "already trained" not in said[1]


def test_an_error_of_one_process_stops_all(both):
    here, there = (own["raised"] for own in both[1])
    assert here == "ValueError: process 1: KeyError: 'only here'" and there == "KeyError: 'only here'"


def test_a_checkpoint_of_two_processes_is_restored_over_another_mesh(both, tiny_folder, prompts):
    workdir, config = both[0], scenario.experiment(str(tiny_folder), prompts)
    mesh = scenario.mesh_of(member=2, fsdp=4)
    model = weights.load(config.model.path, sharding=meshes.sharding_of(mesh))
    (group,) = member_groups.plan(config, model, mesh=mesh)
    fresh = group.run.init(model.params, group.seeds, group.hyper)
    resolved = json.loads((workdir / "config.json").read_text())
    saved = checkpoint.Checkpoints(workdir / "checkpoints", resolved, 10)
    (state,) = saved.restore([fresh])
    saved.close()
    assert {x.sharding.mesh for x in jax.tree.leaves(state)} == {mesh}
    assert jax.device_get(state.iteration).tolist() == [3, 3]
    for i, member in enumerate(run_directory.load(workdir)):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: np.asarray(x[i]), state.params), member.params)


@pytest.mark.parametrize("wrong", ["somewhere", "10.0.0.1:1234,2", "10.0.0.1,2,0", "10.0.0.1:1234,2,2", "a:1,x,0"])
def test_a_wrong_address_is_one_error(wrong):
    with pytest.raises(ValueError, match="hosts="):
        multihost.join(wrong)


def test_work_is_shared_evenly_and_none_twice(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(list(multihost.share(8)))
    assert sum(shares, []) == list(range(8)) and max(map(len, shares)) - min(map(len, shares)) <= 1
