import pathlib
import subprocess
import time

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
SLICE = ("mine", "us-x1-a")
KIND = ("v5litepod-8", "v2-alpha-tpuv5-lite")


def call(gcloud, script, *arguments, answer=""):
    return subprocess.run(["bash", SCRIPTS / f"{script}.sh", *map(str, arguments)], input=answer, text=True,
                          capture_output=True, env=gcloud.environment)


@pytest.mark.parametrize("options, made", [
    ((), "tpu-vm create mine --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --zone=us-x1-a"),
    (("--spot",),
     "tpu-vm create mine --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot --zone=us-x1-a"),
    (("--queued", "--spot"), "queued-resources create mine --node-id=mine --accelerator-type=v5litepod-8 "
     "--runtime-version=v2-alpha-tpuv5-lite --spot --zone=us-x1-a")])
def test_create_makes_what_does_not_exist_once(gcloud, options, made):
    dry = call(gcloud, "create", "--dry-run", *options, *SLICE, *KIND)
    assert dry.stdout == f"gcloud compute tpus {made}\n" and gcloud.calls() == []
    first, second = (call(gcloud, "create", *options, *SLICE, *KIND) for _ in range(2))
    assert first.returncode == second.returncode == 0, second.stderr
    assert gcloud.changes() == [made] and "mine exists" in second.stdout


@pytest.mark.parametrize("script", ["create", "status", "resume", "delete"])
def test_a_gcloud_that_fails_is_not_taken_for_a_slice_that_is_not_there(gcloud, script):
    (gcloud.folder / "fail").write_text("describe")
    done = call(gcloud, script, *SLICE, *(KIND if script in ("create", "resume") else ()))
    assert done.returncode == 1 and "quota" in done.stderr and gcloud.changes() == []


def test_a_create_that_fails_says_so(gcloud):
    (gcloud.folder / "fail").write_text("create")
    done = call(gcloud, "create", *SLICE, *KIND)
    assert done.returncode == 1 and "quota" in done.stderr


def test_resume_replaces_what_was_preempted_and_nothing_else(gcloud):
    (gcloud.folder / "queue").write_text("SUSPENDED")
    refused = call(gcloud, "create", "--queued", *SLICE, *KIND)
    assert refused.returncode == 1 and "SUSPENDED" in refused.stderr and gcloud.changes() == []
    done = call(gcloud, "resume", "--queued", "--spot", *SLICE, *KIND)
    assert done.returncode == 0, done.stderr
    deleted, created = gcloud.changes()
    assert deleted == "queued-resources delete mine --force --quiet --zone=us-x1-a"
    assert created.startswith("queued-resources create mine") and "--spot" in created
    again = call(gcloud, "resume", "--queued", "--spot", *SLICE, *KIND)
    assert again.returncode == 0 and len(gcloud.changes()) == 2


def test_setup_sends_the_commit_and_keeps_runs(gcloud):
    """pip and uv are stubs; what git archives, and what becomes of it on the worker, are real."""
    gcloud.ready()
    for name in ("pip", "python3"):
        gcloud.stub(name, f'#!/bin/sh\necho {name} "$@" >> {gcloud.folder}/installed\n')
    for path in ("kl_reg/runs/x/kept", "kl_reg/old"):
        (gcloud.home / path).parent.mkdir(parents=True, exist_ok=True)
        (gcloud.home / path).write_text("")
    done = call(gcloud, "setup", *SLICE)
    assert done.returncode == 0, done.stderr
    assert (gcloud.home / "kl_reg/runs/x/kept").is_file() and not (gcloud.home / "kl_reg/old").exists()
    assert (gcloud.home / "kl_reg/pyproject.toml").is_file()
    installed = (gcloud.folder / "installed").read_text().splitlines()
    assert installed[-1] == "python3 -m uv pip install --quiet --python .venv -e .[tpu]"
    assert all("--worker=all" in made for made in gcloud.changes())
    assert call(gcloud, "setup", *SLICE).returncode == 0
    assert (gcloud.folder / "installed").read_text().splitlines() == installed


def activate(gcloud):
    (gcloud.home / "kl_reg/.venv/bin").mkdir(parents=True)
    (gcloud.home / "kl_reg/.venv/bin/activate").write_text("")


def test_a_command_runs_on_its_own_and_only_once(gcloud):
    gcloud.ready()
    activate(gcloud)
    assert call(gcloud, "status", *SLICE).stdout == "READY none\n"
    command = ("--", "bash", "-c", "echo said it 'twice  so'; while [ ! -e go ]; do sleep 0.05; done; exit 3")
    assert call(gcloud, "run", *SLICE, *command).returncode == 0
    assert call(gcloud, "status", *SLICE).stdout == "READY running\n"
    second = call(gcloud, "run", *SLICE, "--", "touch", "second")
    assert second.returncode == 0 and "runs already" in second.stdout
    assert call(gcloud, "logs", "--lines=1", *SLICE).stdout == "said it twice  so\n"
    (gcloud.home / "kl_reg/go").write_text("")
    assert eventually(lambda: call(gcloud, "status", *SLICE).stdout == "READY 3\n")
    assert not (gcloud.home / "kl_reg/second").exists()
    assert call(gcloud, "run", *SLICE, "--", "touch", "second").returncode == 0
    assert eventually((gcloud.home / "kl_reg/second").exists)


def eventually(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_files_go_there_and_come_back(gcloud, tmp_path):
    gcloud.ready()
    here, back = tmp_path / "run here", tmp_path / "back"
    for path in ("sweep.json", "programs/0/checkpoints/2/x", "programs/1/x", "logs/0.lock"):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(path)
    assert call(gcloud, "send", *SLICE, here, "runs/a b", "sweep.json", "programs/0", "logs").returncode == 0
    there = gcloud.home / "kl_reg/runs/a b"
    assert sorted(str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()) == [
        "programs/0/checkpoints/2/x", "sweep.json"]
    for path in ("programs/0/checkpoints/4/x", "programs/0/checkpoints/6.orbax-checkpoint-tmp-1/x"):
        (there / path).parent.mkdir()
        (there / path).write_text(path)
    done = call(gcloud, "fetch", *SLICE, "runs/a b", back, "programs/0", "not there")
    assert done.returncode == 0, done.stderr
    assert sorted(str(file.relative_to(back)) for file in back.rglob("*") if file.is_file()) == [
        "programs/0/checkpoints/2/x", "programs/0/checkpoints/4/x"]


def test_delete_needs_the_typed_name(gcloud):
    gcloud.ready()
    for answer in ("yes\n", ""):
        done = call(gcloud, "delete", *SLICE, answer=answer)
        assert done.returncode == 1 and "not deleted" in done.stderr and gcloud.changes() == []
    done = call(gcloud, "delete", *SLICE, answer="mine\n")
    assert done.returncode == 0 and gcloud.changes() == ["tpu-vm delete mine --quiet --zone=us-x1-a"]
    again = call(gcloud, "delete", *SLICE)
    assert again.returncode == 0 and "there is no mine" in again.stdout and len(gcloud.changes()) == 1


def test_a_queued_resource_is_deleted_with_its_vm(gcloud):
    gcloud.ready()
    (gcloud.folder / "queue").write_text("ACTIVE")
    assert call(gcloud, "delete", "--yes", *SLICE).returncode == 0
    assert gcloud.changes() == ["queued-resources delete mine --force --quiet --zone=us-x1-a"]


@pytest.mark.parametrize("script, more", [("create", KIND), ("resume", KIND), ("setup", ()), ("run", ("--", "ls")),
                                          ("logs", ()), ("status", ()), ("send", (".", "x")), ("fetch", ("x", ".")),
                                          ("delete", ())])
def test_a_dry_run_calls_nothing_and_help_explains(gcloud, script, more):
    dry = call(gcloud, script, "--dry-run", *SLICE, *more)
    assert dry.returncode == 0, dry.stderr
    shown = [line for line in dry.stdout.splitlines() if not line.startswith("#")]
    assert shown and all(line.startswith("gcloud compute tpus ") and "mine" in line for line in shown)
    assert gcloud.calls() == []
    told = call(gcloud, script, "--help")
    assert told.returncode == 0 and told.stdout.startswith(f"usage: {script}.sh [--dry-run] ")


@pytest.mark.parametrize("script, arguments, says", [
    ("create", (*SLICE, "v5litepod-8"), "RUNTIME"), ("create", (*SLICE, *KIND, "more"), "unexpected more"),
    ("create", (*SLICE, *KIND, "--cheap"), "unknown option --cheap"), ("status", ("mine",), "usage"),
    ("status", ("Mine", "z"), "NAME 'Mine'"), ("run", SLICE, "COMMAND is missing"), ("send", (*SLICE, "."), "TARGET"),
    ("logs", (*SLICE, "--lines=all"), "--lines=all"), ("delete", (*SLICE, "now"), "unexpected now")])
def test_a_wrong_call_says_so(gcloud, script, arguments, says):
    done = call(gcloud, script, *arguments)
    assert done.returncode == 2 and says in done.stderr and gcloud.calls() == []
