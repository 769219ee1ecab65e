import json
import os
import pathlib
import subprocess
import sys

import pytest

from kl_reg.settings import SETTINGS
from launch import command as commands
from launch import parent

ROOT = pathlib.Path(__file__).parents[2]


def launch(command, *arguments, **env):
    return subprocess.run([sys.executable, "-m", f"launch.{command}", *map(str, arguments)], cwd=ROOT, encoding="utf-8",
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env)


@pytest.fixture(scope="module")
def small(tiny_folder):
    """The quickstart on a tiny model, two iterations."""
    settings = {"model.path": tiny_folder, "env.opening": "<|start|>A: hi\n", "env.length": 12, "rl.iterations": 2,
                "rl.episodes": 2, "evaluation.episodes": 4, "policy.hidden": 4}
    return ["--config=configs/quickstart.py", *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize("command", ["train", "sweep", "report", "pretrain"])
def test_help_explains_itself(command):
    done = launch(command, "--help")
    assert done.returncode == 0 and f"python -m launch.{command}" in done.stdout and "workdir" in done.stdout


def test_one_member_trains_and_a_second_call_finds_it_done(small, tmp_path):
    first = launch("train", *small, "--config.kl.budget=20.", f"--workdir={tmp_path}/läuft")
    assert first.returncode == 0, first.stderr
    summary = json.loads((tmp_path / "läuft/summary.json").read_text())
    assert [row["member"] for row in summary] == ["base", 0] and summary[1]["hyper"]["kl.budget"] == 20.0
    assert first.stdout.strip().endswith(f"report  {tmp_path}/läuft/report.html")
    said = first.stdout.splitlines()
    assert said[0].startswith("first update after ") and said[1].startswith("2/2  return ")     # benchmarks.startup
    second = launch("train", *small, "--config.kl.budget=20.", f"--workdir={tmp_path}/läuft", PYTHONIOENCODING="ascii")
    assert second.returncode == 0 and "already trained" in second.stdout
    assert json.loads((tmp_path / "läuft/summary.json").read_text()) == summary
    other = launch("train", *small, "--config.kl.budget=10.", f"--workdir={tmp_path}/läuft")
    assert other.returncode == 2 and "holds another experiment" in other.stderr


@pytest.mark.parametrize("argument, says", [
    ("--config.kl.coff=1", "unknown setting 'kl.coff'; did you mean kl.coef?"),
    ("--config.rl.lr=1", "unknown setting 'rl.lr'; did you mean optim.learning_rate?"),
    ("--config.kl.coef=-1", "error: kl.coef=-1.0"),
    ("--config=configs/none.py", "configs/none.py"), ("more", "unexpected arguments"),
    ("--hosts=everywhere", "error: hosts='everywhere': give auto, slurm")])
def test_a_wrong_call_is_one_line(small, tmp_path, argument, says):
    done = launch("train", *small, argument, f"--workdir={tmp_path}/run")
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_compilations_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands.keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/kl_reg/xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    commands.keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    commands.keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/home/somebody/.cache/kl_reg/xla"


def test_help_has_every_setting():
    said = launch("train", "--help").stdout
    assert all(f"--config.{name}=" in said for name in SETTINGS) and "The hard budget of an episode." in said


def test_a_run_that_starts_from_another_has_its_settings(run, tmp_path):
    """Those of one member, or of the whole sweep; a --config of one's own is left alone."""
    own = parent.get_config(f"{run}:2")
    assert (own.sweep, own.kl.budget, own.kl.spend, own.env.length) == ([], 0.5, "sampled", 16)
    assert len(parent.get_config(str(run)).sweep) == 2 and parent.get_config(f"{run}:0").kl.budget is None
    for wrong, says in ((f"{run}:3", "there are members 0 to 2"), (str(tmp_path), "there is no run")):
        with pytest.raises(FileNotFoundError, match=says):
            parent.get_config(wrong)
    argv = commands._with_config(["train", f"--from={run}:2", "--workdir=x"])
    assert argv[1] == f"--config={ROOT}/launch/parent.py:{run}:2" and argv[2:] == [f"--from={run}:2", "--workdir=x"]
    assert commands._with_config(["train", "--from", f"{run}:2"])[1] == argv[1]
    for given in (["train", "--config=c.py", "--from=x"], ["train", "--config", "c.py", "--from=x"], ["train"]):
        assert commands._with_config(given) == given


@pytest.mark.slow
def test_the_command_goes_on_from_another_run_without_a_configuration(run, tmp_path):
    done = launch("train", f"--from={run}:2", "--config.env.length=12", "--config.rl.iterations=1",
                  f"--workdir={tmp_path / 'on'}")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "on" / "config.json").read_text())
    assert said["from"]["address"] == f"{run}:2" and "env.length 16 -> 12" in " ".join(said["from"]["changes"])
    wrong = launch("train", f"--from={tmp_path / 'none'}", f"--workdir={tmp_path / 'x'}")
    assert wrong.returncode == 2 and "there is no run" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
