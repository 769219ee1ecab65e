import json

import pytest

from kl_reg import config as configs
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import plan


def test_members_that_share_static_settings_share_a_program(config, tmp_path):
    """Members 0 and 2 differ in the coefficient alone, 3 to 5 in the size of a budget; another reference is another
    program."""
    config = config.copy_and_resolve_references()
    config.sweep = [*config.sweep, {"kl.budget": (1.0, 2.0), "seed": (5,)}, {"kl.budget": (3.0,)}]
    assert plan.plan(config, tmp_path / "x").programs == [[0, 2], [1], [3, 4, 5]]
    assert plan.plan(config, tmp_path / "x", members_per_job=2).programs == [[0, 2], [1], [3, 4], [5]]
    assert not (tmp_path / "x").exists()


def test_a_large_program_is_divided_in_order(config, tmp_path):
    many = config.copy_and_resolve_references()
    many.sweep = [{"seed": tuple(range(5))}]
    assert plan.plan(many, tmp_path / "x", members_per_job=2).programs == [[0, 1], [2, 3], [4]]
    many.sweep = []
    assert plan.plan(many, tmp_path / "x").programs == [[0]]


def test_the_programs_configurations_make_the_sweep(config, tmp_path):
    """Also once they went through the directory: settings that are tuples, dictionaries or None included."""
    config = config.copy_and_resolve_references()
    config.log.groups, config.kl.target, config.reward.weights = {"polite": "thanks"}, 3.0, (2.0,)
    config.sweep = [*config.sweep, {"kl.budget": (None, 1.0), "seed": (7,), "reference.paths": ((),)}]
    sweep = plan.plan(config, tmp_path / "x", members_per_job=2)
    plan.write(sweep)
    found, expected = plan.read(tmp_path / "x"), {}
    assert found.programs == sweep.programs
    for group in run_directory.groups(config):
        expected.update({number: configs.split(own) for number, own in group})
    for number, own in enumerate(sweep.programs):
        (group,) = run_directory.groups(plan.config_of(found, number))
        for (_, member), at in zip(group, own, strict=True):
            assert configs.split(member) == expected[at]
    assert plan.config_of(found, 0).log.groups == {"polite": "thanks"}


def test_a_program_of_one_member_without_overrides_has_no_sweep(config, tmp_path):
    single = config.copy_and_resolve_references()
    single.sweep = []
    assert plan.config_of(plan.plan(single, tmp_path / "x"), 0).sweep == []


def test_equal_members_under_two_names_stay_two(config, tmp_path):
    """A grid that says the default and one that leaves it out."""
    twice = config.copy_and_resolve_references()
    twice.sweep = [{"seed": (0,)}, {"seed": (0,), "kl.coef": (0.0,)}]
    sweep = plan.plan(twice, tmp_path / "x")
    assert sweep.programs == [[0, 1]] and len(configs.members(plan.config_of(sweep, 0))) == 2


def test_a_directory_keeps_its_division_and_its_experiment(config, tmp_path):
    plan.write(plan.plan(config, tmp_path / "x", members_per_job=1))
    config = config.copy_and_resolve_references()
    config.checkpoint.every = 7                                     # changes no result
    again = plan.plan(config, tmp_path / "x")
    assert again.programs == [[0], [2], [1]] and again.config.checkpoint.every == 7
    with pytest.raises(ValueError, match="members_per_job=2: .* divided into 3 programs of at most 1 members"):
        plan.plan(config, tmp_path / "x", members_per_job=2)
    config.rl.epochs = 7
    with pytest.raises(FileExistsError, match="holds another sweep"):
        plan.plan(config, tmp_path / "x")


@pytest.mark.parametrize("file, says", [("config.json", "holds a run of one process"),
                                        ("notes.txt", "not empty and holds no sweep.json")])
def test_other_directories_are_refused(config, tmp_path, file, says):
    (tmp_path / file).write_text(json.dumps({"fingerprint": "x"}))
    with pytest.raises(FileExistsError, match=says):
        plan.plan(config, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [file]


def test_a_bad_setting_or_division_is_found_before_anything_is_written(config, tmp_path):
    bad = config.copy_and_resolve_references()
    bad.rl.epochs = 0
    with pytest.raises(ValueError, match="rl.epochs=0"):
        plan.plan(bad, tmp_path / "x")
    with pytest.raises(ValueError, match="members_per_job=0 must be at least 1"):
        plan.plan(config, tmp_path / "x", members_per_job=0)
    assert not (tmp_path / "x").exists()


def test_people_read_names(config, tmp_path):
    sweep = plan.Sweep(tmp_path, config, [[0, 1, 2, 3], [4], [5, 7], [8, 9]])
    assert [sweep.name(i) for i in range(4)] == [
        "program 0 (members 0 to 3)", "program 1 (member 4)", "program 2 (members 5, 7)", "program 3 (members 8, 9)"]


def test_a_lock_keeps_others_out_as_long_as_it_is_held(tmp_path):
    with plan.locked(tmp_path / "lock", otherwise="busy"), pytest.raises(BlockingIOError, match="^busy$"), \
            plan.locked(tmp_path / "lock", otherwise="busy"):
        pass
    with plan.locked(tmp_path / "lock", otherwise="busy"):
        pass
