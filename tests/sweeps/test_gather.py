import json
import shutil

import chex
import numpy as np
import pytest

import kl_reg
from kl_reg.analysis.compare import compare
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import gather, job, plan


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return kl_reg.train(config, workdir=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def divided(config, tmp_path_factory):
    """The same as two programs, trained one after the other."""
    sweep = plan.plan(config, tmp_path_factory.mktemp("divided") / "run")
    plan.write(sweep)
    for number in (1, 0):
        job.run(sweep.workdir, number)
    return sweep


def test_what_is_gathered_is_what_one_process_writes(whole, divided):
    """Programs are the same, so that their numbers are."""
    for name in ("config.json", "summary.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (divided.workdir, whole.workdir))
        assert ours == theirs
    for member in ("base", 0, 1, 2):
        with np.load(divided.workdir / f"members/{member}/evaluation.npz") as ours, \
                np.load(whole.workdir / f"members/{member}/evaluation.npz") as theirs:
            chex.assert_trees_all_equal(dict(ours), dict(theirs))
    for member in range(3):
        assert returns(divided.workdir, member) == returns(whole.workdir, member)
    assert (divided.workdir / "report.html").is_file()


def returns(workdir, member):
    lines = (workdir / f"members/{member}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["return"] for line in lines]


def test_checkpoints_are_found_by_the_members_numbers(whole, divided):
    assert run_directory.iterations(divided.workdir) == [1, 2]
    for iteration in (None, 1):
        ours, theirs = run_directory.load(divided.workdir, iteration), run_directory.load(whole.workdir, iteration)
        chex.assert_trees_all_equal([m.params for m in ours], [m.params for m in theirs])
        assert [(m.iteration, m.digest) for m in ours] == [(m.iteration, m.digest) for m in theirs]
        assert [m.config.to_dict() for m in ours] == [m.config.to_dict() for m in theirs]


def test_readers_of_runs_take_it_for_one(whole, divided):
    assert run_directory.parse(f"{divided.workdir}:2@1") == (divided.workdir, 2, 1)
    ours, theirs = compare.settings_of(divided.workdir), compare.settings_of(whole.workdir)
    assert [setting.label for setting in ours] == [setting.label for setting in theirs]


def test_training_does_not_start_over_in_it(config, divided):
    with pytest.raises(FileExistsError, match="sweep of several programs"):
        kl_reg.train(config, workdir=divided.workdir)


def copied(divided, tmp_path):
    shutil.copytree(divided.workdir, tmp_path / "run")
    return plan.read(tmp_path / "run")


def test_what_is_done_is_gathered_where_something_is_missing(divided, tmp_path):
    part = copied(divided, tmp_path)
    shutil.rmtree(part.folder(1))
    gather.gather(part.workdir)
    summary = json.loads((part.workdir / "summary.json").read_text())
    assert [row["member"] for row in summary] == ["base", 0, 2]
    with pytest.raises(FileNotFoundError, match=r"none at all of program 1 \(members 1\)"):
        run_directory.load(part.workdir)
    shutil.rmtree(part.workdir / "programs")
    with pytest.raises(FileNotFoundError, match="no program of the sweep has ended"):
        gather.gather(part.workdir)


@pytest.mark.parametrize("key, value", [("base", "0" * 12), ("rewards", ["0" * 12]), ("environment", "0" * 12)])
def test_programs_of_different_experiments_are_not_mixed(divided, tmp_path, key, value):
    part = copied(divided, tmp_path)
    file = part.folder(1) / "config.json"
    stored = json.loads(file.read_text())
    stored["inputs"][key] = value
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"programs/1 was trained with another {key} than .*programs/0"):
        gather.gather(part.workdir)
