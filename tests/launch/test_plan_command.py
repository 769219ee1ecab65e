"""`launch.plan` for devices that are not there; TPUs are compiled for where libtpu is installed."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS")
"""What tests set for themselves."""

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed: pip install -e '.[tpu]' compiles for TPUs")


def launch(*arguments):
    env = {key: value for key, value in os.environ.items() if key not in WITHOUT_TESTS}
    return subprocess.run([sys.executable, "-m", "launch.plan", *map(str, arguments)], cwd=ROOT, text=True, env=env,
                          capture_output=True)


CONFIG = """
from kl_reg.config import default


def get_config():
    config = default()
    config.model.path, config.policy.hidden = {folder!r}, 4
    config.env.opening, config.env.length, config.kl.coef = "<|start|>A: hi\\n", 12, 0.1
    config.rl.episodes, config.rl.iterations, config.evaluation.episodes = 8, 3, 16
    return config
"""


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """One member on a tiny model."""
    file = tmp_path_factory.mktemp("configs") / "small.py"
    file.write_text(CONFIG.format(folder=str(tiny_folder)))
    return [f"--config={file}"]


def large(tmp_path):
    """A folder with nothing but the config.json of a Llama of 30 billion parameters in three layers."""
    folder = tmp_path / "large"
    folder.mkdir()
    settings = dict(model_type="llama", vocab_size=512, hidden_size=32768, num_hidden_layers=3, num_attention_heads=256,
                    num_key_value_heads=8, intermediate_size=65536, max_position_embeddings=128)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_help_explains_itself():
    done = launch("--help")
    assert done.returncode == 0 and "python -m launch.plan" in done.stdout and "--topology=v5e:8x8" in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (["--topology=v9:2x2"], "error: --topology=v9:2x2: give an accelerator and its shape"),
    (["--topology=h100:8", "--config.model.path=no/where/at"], "error: model.path='no/where/at': no such folder"),
    (["--topology=h100:8", "--config.env.length=0"], "error: env.length=0")])
def test_a_wrong_call_is_one_line(small, arguments, says):
    done = launch(*small, *arguments)
    assert done.returncode == 2 and done.stderr.strip().startswith(says) and done.stderr.count("\n") == 1


def test_gpus_are_estimated_and_said_to_be(small, tmp_path):
    done = launch(*small, "--topology=h100:4")
    assert done.returncode == 0 and "not compiled" in done.stdout and "data=4" in done.stdout, done.stderr
    done = launch(*small, "--topology=h100:1", f"--config.model.path={large(tmp_path)}")
    assert done.returncode == 1 and "no mesh fits: the smallest needs about 1" in done.stdout


@needs_libtpu
def test_a_small_program_fits_and_one_line_says_what_it_costs(small, tmp_path):
    done = launch(*small, "--topology=v5e:2x2", "--config.parallel.data=2", "--config.parallel.tensor=2",
                  f"--json={tmp_path}/plan.json")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("fits "), done.stdout + done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["chips"] == 4 and plan["axes"]["data"] == plan["axes"]["tensor"] == 2
    first = plan["programs"][0]
    rollout, update = first["stages"]
    kinds = {(row["kind"], tuple(row["axes"])) for row in rollout["moved"]}
    assert ("all-reduce", ("tensor",)) in kinds and not any("data" in axes for _, axes in kinds)
    assert any("data" in row["axes"] for row in update["moved"])        # gradients are added up
    seconds = [stage["times"]["seconds"] for stage in (rollout, update)]
    total = sum(own["iterations"] * sum(stage["times"]["seconds"] for stage in own["stages"])
                + own["rollouts"] * own["stages"][0]["times"]["seconds"] for own in plan["programs"])
    assert plan["chip_hours"] == pytest.approx(total * 4 / 3600) and min(seconds) > 0
    # Of each member a float32 of every parameter, and Adam's two; all of it on every device.
    assert first["resident"]["optimizer"] == pytest.approx(2 * first["resident"]["params"], rel=0.01)


@needs_libtpu
def test_what_does_not_fit_exits_with_1_and_says_by_how_much(small, tmp_path):
    done = launch(*small, "--topology=v5e:2x2", f"--config.model.path={large(tmp_path)}", "--config.parallel.tensor=4")
    assert done.returncode == 1, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("does not fit: each chip needs at least") and "more than the 15.75 GiB that it has" in last


@needs_libtpu
@pytest.mark.parametrize("arguments, says", [
    (["--topology=v5e:3x3"], "libtpu knows no such shape of v5e"),
    (["--topology=v5e:2x2", "--config.parallel.tensor=3"], "error: parallel.tensor=3: there are 4 devices"),
    (["--topology=2*v5e:2x2", "--config.parallel.data=8"], "parallel.slices=1: 2*v5e:2x2 has 2"),
    (["--topology=v5e:2x2", "--config.parallel.expert=4"], "parallel.expert=4 must divide the model's experts")])
def test_a_mesh_that_does_not_divide_is_one_line(small, arguments, says):
    done = launch(*small, *arguments)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
