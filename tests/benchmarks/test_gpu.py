"""What runs on an accelerator, rehearsed at tiny sizes on the CPU."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PARTS = ("rl_step", "decode", "budget_step", "attention", "sweep_cost", "quantized_decode")


def run(folder, python=sys.executable):
    env = os.environ | {"PYTHON": str(python)}
    return subprocess.run(["bash", SCRIPT, "--rehearse", folder], env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_gives_a_table_and_a_json_that_names_the_device(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        assert json.loads((tmp_path / f"{part}.json").read_text())["machine"]["device"] == "cpu"
        assert "| --- |" in (tmp_path / f"{part}.md").read_text() and f"-- {part}: " in done.stdout
    assert "FAILED" not in done.stdout and "-- tests: " in done.stdout


def test_a_part_without_a_result_is_named_and_the_others_go_on(tmp_path):
    """A Python in which only what asks for the device works."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo cpu && exit 0\necho "no module" >&2\nexit 3\n')
    python.chmod(0o755)
    done = run(tmp_path / "results", python)
    assert done.returncode == 1
    for part in ("tests", *PARTS):
        assert f"FAILED: {part}, exit status 3" in done.stdout
    assert "no module" in done.stderr
