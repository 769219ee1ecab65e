import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(command, *arguments):
    """What compiles is kept as the tests' own is."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache/jax"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run([sys.executable, "-m", f"launch.{command}", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | cache)


@pytest.fixture(scope="module")
def config(tiny_folder, tmp_path_factory):
    """One member that trains, and one that diverges in its first update."""
    file = tmp_path_factory.mktemp("configs") / "tiny.py"
    file.write_text(f"""
from kl_reg.config import default

def get_config():
    config = default()
    config.model.path, config.policy.hidden, config.reward.name = {str(tiny_folder)!r}, 4, "length"
    config.env.opening, config.env.length, config.optim.warmup = "<|start|>A: hi\\n", 16, 1
    config.rl.iterations, config.rl.episodes, config.evaluation.episodes = 2, 4, 4
    config.log.tensorboard = False
    config.sweep = [{{"kl.coef": (0.1,)}}, {{"kl.coef": (0.1,), "kl.estimator": ("k3",), "kl.placement": ("loss",),
                                             "rl.entropy_coef": (1.0,), "optim.learning_rate": (1e6,)}}]
    return config
""")
    return f"--config={file}"


def test_a_program_that_fails_is_reported_with_its_logs_end_and_stops_no_other(config, tmp_path):
    done = launch("sweep", config, f"--workdir={tmp_path}/run", "--jobs=2")
    assert done.returncode == 1, done.stderr
    assert "program 1 (member 1) failed: ValueError: member 0: " in done.stdout
    assert f"{tmp_path}/run/logs/1.txt ends with" in done.stdout and "  | ValueError: member 0: " in done.stdout
    assert "1 of 2 programs are missing: program 1 (member 1)" in done.stderr
    assert [row["member"] for row in json.loads((tmp_path / "run/summary.json").read_text())] == ["base", 0]
    assert (tmp_path / "run/report.html").is_file()
    planned = launch("sweep", config, f"--workdir={tmp_path}/run", "--dry_run")
    assert "# programs: 2, done already: 1" in planned.stdout
    assert [line.split("# ")[1] for line in planned.stdout.splitlines() if "launch.program" in line] == [
        "program 1 (member 1)"]
    shown = launch("status", tmp_path / "run", "--once")
    assert shown.returncode == 0 and "failed" in shown.stdout and "2/2" in shown.stdout and "  | " in shown.stdout


PLAN = """
import pathlib, sys
from kl_reg import runs
from kl_reg.sweeps import gather, plan, progress
from launch import status
from launch.backends import local, ray, slurm, tpu_vm
from launch.backends.options import Options
namespace = {}
exec(pathlib.Path(sys.argv[1]).read_text(), namespace)
sweep = plan.plan(namespace["get_config"](), sys.argv[2])
for backend in (local, ray, slurm, tpu_vm):
    print(*backend.describe(sweep, [0, 1], Options(zone="z", accelerator="a", runtime="r")), sep="\\n")
"""


def test_planning_takes_no_accelerator_and_writes_nothing(config, tmp_path):
    """JAX has no backend there at all."""
    done = subprocess.run([sys.executable, "-c", PLAN, config.partition("=")[2], tmp_path / "run"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"JAX_PLATFORMS": "none"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# program 1 (member 1)") == 4 and not (tmp_path / "run").exists()


def test_a_wrong_call_is_one_line(config, tmp_path):
    done = launch("sweep", config, f"--workdir={tmp_path}/run", "--jobs=2", "--nowait")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--nowait is of --backend=slurm" in done.stderr
    assert not (tmp_path / "run").exists()
