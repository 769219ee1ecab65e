import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "tpu_scripts/tpu.sh"


@pytest.fixture
def gcloud(tmp_path):
    """A fake gcloud that records its calls; `describe` finds nothing."""
    fake = tmp_path / "gcloud"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$4" != describe ]\n')
    fake.chmod(0o755)

    def call(*arguments, answer=""):
        done = subprocess.run(["bash", SCRIPT, *arguments], input=answer, text=True, capture_output=True,
                              env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, calls

    return call


def test_create_asks_first_whether_it_exists(gcloud):
    done, calls = gcloud("create", "mine", "us-x1-a", "v5litepod-1", "v2-alpha-tpuv5-lite", "--spot")
    assert done.returncode == 0
    assert calls == ["compute tpus tpu-vm describe mine --zone=us-x1-a",
                     "compute tpus tpu-vm create mine --accelerator-type=v5litepod-1 --version=v2-alpha-tpuv5-lite "
                     "--spot --zone=us-x1-a"]


def test_a_dry_run_calls_nothing(gcloud):
    done, calls = gcloud("--dry-run", "delete", "mine", "us-x1-a")
    assert calls == [] and "tpu-vm delete mine --quiet --zone=us-x1-a" in done.stdout


def test_setup_sends_the_commit_alone(gcloud):
    done, calls = gcloud("setup", "mine", "us-x1-a")
    assert done.returncode == 0, done.stderr
    assert [call.split()[3] for call in calls] == ["scp", "ssh"] and "mine:kl_reg.tar" in calls[0]
    assert "rm -rf kl_reg && tar xf kl_reg.tar" in calls[1]


def test_delete_needs_the_typed_name(gcloud):
    done, calls = gcloud("delete", "mine", "us-x1-a", answer="yes\n")
    assert done.returncode == 1 and calls == []
    done, calls = gcloud("delete", "mine", "us-x1-a", answer="mine\n")
    assert done.returncode == 0 and calls == ["compute tpus tpu-vm delete mine --quiet --zone=us-x1-a"]


@pytest.mark.parametrize("arguments", [
    ("create", "mine", "z", "v5litepod-1"), ("run", "mine", "z"), ("fly", "mine", "z"), ("status",)])
def test_a_wrong_call_says_so(gcloud, arguments):
    done, calls = gcloud(*arguments)
    assert done.returncode == 2 and done.stderr and calls == []
