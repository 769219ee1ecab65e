import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch import command as commands

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
    ("--config.kl.coff=1", "unknown setting: 'coff'"), ("--config.kl.coef=-1", "error: kl.coef=-1.0"),
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
