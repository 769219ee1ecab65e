"""Backends with stubs for what they call; real ones run in tests/integration."""
import json
import os
import sys
import time
import types

import pytest

from kl_reg.config import default
from kl_reg.sweeps import job, plan, progress
from launch.backends import local, ray, slurm, tpu_vm
from launch.backends.options import Options, check


@pytest.fixture
def sweep(tmp_path):
    """Three programs of one, two and one members."""
    sweep = plan.Sweep(tmp_path / "My run_1", default(), [[0], [1, 2], [3]])
    plan.write(sweep)
    return sweep


def await_all(started, count, seconds=120):
    end = time.monotonic() + seconds
    while len(started.over()) < count and time.monotonic() < end:
        time.sleep(0.02)
    return started.over()


@pytest.mark.parametrize("backend, options, says", [
    ("local", {"partition": "gpu"}, "--partition is of --backend=slurm, not of local"),
    ("ray", {"zone": "z"}, "--zone is of --backend=tpu_vm"), ("slurm", {"jobs": 0}, "--jobs=0 must be at least 1"),
    ("slurm", {"retries": -1, "minutes": 1}, "--retries=-1 must be at least 0"),
    ("slurm", {}, "--backend=slurm needs --minutes [(]time limit"),
    ("slurm", {"minutes": 5, "sbatch": ["--qos=low"]}, "--sbatch=--qos=low: give NAME=VALUE"),
    ("tpu_vm", {"zone": "z"}, "--backend=tpu_vm needs --accelerator .*, --runtime"),
    ("tpu_vm", {"zone": "z", "accelerator": "a", "runtime": "r", "capacity": "cheap"}, "on_demand, spot, queued")])
def test_options_that_are_wrong_or_missing_say_so(sweep, backend, options, says):
    modules = {"local": local, "slurm": slurm, "ray": ray, "tpu_vm": tpu_vm}
    with pytest.raises(ValueError, match=says):
        modules[backend].prepare(sweep, Options(**options))


def test_options_of_all_backends_are_accepted_by_each():
    for backend in ("local", "slurm", "ray", "tpu_vm"):
        check(backend, Options(jobs=2, members_per_job=1, retries=0))


# Processes of this machine


def stub(monkeypatch, script):
    """Programs run this Python, with sys.argv[1] their number and sys.argv[2] the directory."""
    monkeypatch.setattr(local, "_command", lambda sweep, number: [sys.executable, "-IS", "-c", script, str(number),
                                                                  str(sweep.workdir)])


def test_a_killed_program_starts_again_and_one_that_fails_does_not(sweep, monkeypatch):
    stub(monkeypatch, """if True:
        import os, sys
        print("attempt", flush=True)
        if sys.argv[1] == "1":
            sys.exit(4)
        if sys.argv[1] == "0" or len(open(f"{sys.argv[2]}/logs/2.txt").readlines()) < 2:
            os.kill(os.getpid(), 9)""")
    over = await_all(local.submit(sweep, [0, 1, 2], Options(retries=2)), 3)
    assert over == {0: "killed by SIGKILL", 1: "exit status 4", 2: ""}
    assert [len(sweep.log(number).read_text().splitlines()) for number in range(3)] == [3, 1, 2]
    assert progress.state(sweep, 0) == "lost"


def test_what_another_process_trains_is_left_to_it(sweep, monkeypatch):
    stub(monkeypatch, "")
    with plan.locked(sweep.workdir / "logs/1.lock", otherwise="busy"), \
            pytest.raises(BlockingIOError, match=r"program 1 \(members 1, 2\) of .* by another process"):
        local.submit(sweep, [0, 1, 2], Options())


def test_no_more_run_at_once_than_asked_for_each_on_gpus_of_its_own(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    stub(monkeypatch, """if True:
        import os, sys, time
        began = time.monotonic()
        time.sleep(0.3)
        print(began, time.monotonic(), os.environ["CUDA_VISIBLE_DEVICES"])""")
    options = Options(jobs=2, gpus=2)
    local.prepare(sweep, options)
    await_all(local.submit(sweep, [0, 1, 2], options), 3)
    times = [sweep.log(number).read_text().split() for number in range(3)]
    moments = sorted([(float(began), 1) for began, _, _ in times] + [(float(ended), -1) for _, ended, _ in times])
    running = [sum(change for _, change in moments[:i + 1]) for i in range(len(moments))]
    assert max(running) == 2
    assert {gpus for _, _, gpus in times} == {"4,5", "6,7"}
    with pytest.raises(ValueError, match="3 programs at once need 6 GPUs; there are 4"):
        local.prepare(sweep, Options(gpus=2))


def test_stopping_ends_the_processes_and_starts_no_other(sweep, monkeypatch):
    stub(monkeypatch, "import time; print('began', flush=True); time.sleep(60)")
    started = local.submit(sweep, [0, 1, 2], Options(jobs=1))
    end = time.monotonic() + 120
    while not (sweep.log(0).is_file() and sweep.log(0).read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    assert "stopped" in started.stop()
    assert time.monotonic() < end and not sweep.log(1).exists() and not sweep.log(2).exists()


# Slurm


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stubs: sbatch keeps what it was given, and squeue lists what the file `queue` does."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (tmp_path / "queue").write_text("")
    for name, text in (("srun", ""), ("squeue", f"cat {tmp_path}/queue"),
                       ("sbatch", f'cp "$1" {tmp_path}/submitted; echo "$1" >> {tmp_path}/calls; '
                                  f'echo Submitted batch job 7$(wc -l < {tmp_path}/calls)')):
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return tmp_path


def test_the_dry_run_says_what_sbatch_gets(sweep, cluster):
    options = Options(minutes=90, gpus=2, cpus=4, memory_gb=16, partition="big", account="kl", jobs=2,
                      sbatch=["qos=low", "exclusive"])
    said = slurm.describe(sweep, [0, 1, 2], options)
    assert [line for line in said if line.startswith("#")] == [
        "#SBATCH --account=kl", "#SBATCH --array=0-2%2", "#SBATCH --cpus-per-task=4", "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=2", "#SBATCH --job-name=kl_reg-My run_1", "#SBATCH --mem=16GB",
        "#SBATCH --partition=big", "#SBATCH --qos=low", "#SBATCH --requeue", "#SBATCH --time=90"]
    assert said[-2] == f"1: python -m launch.program {sweep.workdir} 1   # program 1 (members 1, 2)"
    slurm.submit(sweep, [0, 1, 2], options)
    given = (cluster / "submitted").read_text().replace("'", "").splitlines()
    assert {line for line in said if line.startswith("#")} <= set(given)


def test_what_is_in_the_queue_is_not_submitted_again(sweep, cluster):
    started = slurm.submit(sweep, [0, 1, 2], Options(minutes=5))
    assert json.loads((sweep.workdir / "logs/slurm/jobs.json").read_text()) == {"0": "71_0", "1": "71_1", "2": "71_2"}
    assert progress.state(sweep, 2) == "queued"
    (cluster / "queue").write_text("71_1\n33\n")
    assert started.over() == {0: "", 2: ""} and "scancel 71" in started.stop()
    again = slurm.submit(sweep, [1, 2], Options(minutes=5))
    assert json.loads((sweep.workdir / "logs/slurm/jobs.json").read_text()) == {"0": "71_0", "1": "71_1", "2": "72"}
    assert len((cluster / "calls").read_text().splitlines()) == 2 and again.over() == {2: ""}
    slurm.submit(sweep, [1], Options(minutes=5))
    assert len((cluster / "calls").read_text().splitlines()) == 2


def test_a_controller_that_does_not_answer_has_ended_no_job(sweep, cluster):
    started = slurm.submit(sweep, [0], Options(minutes=5))
    (cluster / "bin/squeue").write_text("#!/bin/sh\necho slurm_load_jobs error: timed out >&2\nexit 1\n")
    assert started.over() == {}
    with pytest.raises(ValueError, match="slurm_load_jobs error: timed out"):
        slurm.submit(sweep, [0], Options(minutes=5))


def test_without_slurm_it_says_so(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="srun.*--dry_run prints"):
        slurm.submit(sweep, [0], Options(minutes=5))


def test_a_preempted_job_runs_the_same_again(sweep, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(job, "run", lambda workdir, number: ran.append((workdir, number, os.getcwd())))
    monkeypatch.chdir(tmp_path)
    attempt = slurm.Attempt(str(sweep.workdir))
    attempt(str(sweep.workdir), 1)
    again = attempt.checkpoint(str(sweep.workdir), 1)
    again.function(*again.args, **again.kwargs)
    assert ran == [(str(sweep.workdir), 1, str(sweep.workdir))] * 2


# Ray


def test_what_a_task_asks_for(sweep):
    said = ray.describe(sweep, [0, 2], Options(gpus=1, cpus=8, memory_gb=2, tpus=4, accelerator="A100", retries=5))
    assert said[0] == ("ray.init(address=None); tasks with num_cpus=8, num_gpus=1, memory=2147483648, "
                       "accelerator_type='A100', resources={'TPU': 4}, max_retries=5, max_calls=1, 2 at once:")
    assert said[2] == f"python -m launch.program {sweep.workdir} 2   # program 2 (member 3)"


@pytest.mark.parametrize("options, says", [(Options(gpus=2), "GPU 2"), (Options(cpus=9), "CPU 9"),
                                           (Options(accelerator="H100"), "accelerator_type:H100")])
def test_what_no_node_has_is_refused(options, says):
    """Two nodes that have enough between them, but neither by itself."""
    down = []
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "node:1": 1.0}},
             {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}},
             {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    cluster = types.SimpleNamespace(nodes=lambda: nodes, shutdown=lambda: down.append(True))
    with pytest.raises(ValueError, match=f"no node has .*{says}.*; the nodes have CPU 8, GPU 1; CPU 8, GPU 1"):
        ray._check_cluster(cluster, options)
    assert down
    ray._check_cluster(cluster, Options(gpus=1, cpus=8))


# TPU VMs


TPU = Options(zone="us-x1-a", accelerator="v5litepod-8", runtime="v2-alpha-tpuv5-lite", capacity="queued_spot", jobs=1)

PROGRAM = """#!/bin/bash
# stands for `python -m launch.program`: saves a checkpoint, waits to be taken away, and ends when it was resumed
shift 2; cd $1; mkdir -p programs/$2/checkpoints logs
if [ -e programs/$2/checkpoints/1 ]; then touch programs/$2/summary.json; echo resumed >> logs/$2.txt; exit 0; fi
touch programs/$2/checkpoints/1; echo began >> logs/$2.txt; while [ -e programs/$2/checkpoints/1 ]; do sleep 0.1; done
"""


@pytest.fixture
def pod(gcloud, monkeypatch):
    """setup.sh's own installation is left out, and nothing waits long."""
    gcloud.stub("pip", "#!/bin/sh\n")
    gcloud.stub("python3", '#!/bin/sh\nif [ "$3" = venv ]; then mkdir -p .venv/bin; touch .venv/bin/activate; fi\n')
    gcloud.stub("python", PROGRAM)
    for name, value in gcloud.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tpu_vm, "_PAUSE", 0.05)
    monkeypatch.setattr(tpu_vm, "_FETCH", 1)
    return gcloud


def test_a_preempted_slice_is_replaced_and_goes_on_from_what_was_fetched(sweep, pod):
    (pod.folder / "preempt").write_text("4")
    over = await_all(tpu_vm.submit(sweep, [1], TPU), 1)
    assert over == {1: ""}, (sweep.workdir / "logs/1.slice.txt").read_text()
    assert sweep.log(1).read_text() == "began\nresumed\n" and sweep.done(1)
    verbs = [call.split()[0] + " " + call.split()[1] for call in pod.changes()]
    assert verbs.count("queued-resources create") == 2 and verbs.count("queued-resources delete") == 2
    assert verbs[-1] == "queued-resources delete" and not (sweep.workdir / "logs/1.slice.json").exists()


def test_its_dry_run_prints_every_call(sweep, pod):
    said = tpu_vm.describe(sweep, [0, 1], TPU)
    scripts = [line.split()[1].removeprefix("tpu_scripts/") for line in said if line.startswith("bash ")]
    assert scripts == ["create.sh", "setup.sh", "send.sh", "run.sh", "status.sh", "fetch.sh", "delete.sh"] * 2
    created = [line.strip() for line in said if "queued-resources create" in line]
    assert created == [f"gcloud compute tpus queued-resources create {name} --node-id={name} --accelerator-type="
                       "v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite --spot --zone=us-x1-a"
                       for name in ("kl-reg-my-run-1-0", "kl-reg-my-run-1-1")]
    assert pod.calls() == [] and not list(sweep.workdir.glob("logs/*"))


def test_a_slice_gets_the_models_that_the_experiment_names(sweep, pod, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    config = sweep.config.copy_and_resolve_references()
    config.model.path, config.reference.paths = "smollm2", ("models/mine", "org/of-the-hub")
    needy = sweep._replace(config=config)
    said = tpu_vm.describe(needy, [0], TPU)
    assert "bash tpu_scripts/send.sh kl-reg-my-run-1-0 us-x1-a . . models/mine" in said
    assert ("bash tpu_scripts/run.sh kl-reg-my-run-1-0 us-x1-a -- bash -c 'python -m launch.fetch smollm2 && "
            "python -m launch.program runs/kl-reg-my-run-1-0 0'") in said
    config.reward.path = str(tmp_path / "models/mine")
    with pytest.raises(ValueError, match="models/mine is to be sent to the slices, so give its path from the checkout"):
        tpu_vm.prepare(needy, TPU)


def test_a_slice_of_somebody_else_is_left_alone(sweep, pod):
    pod.ready()
    over = await_all(tpu_vm.submit(sweep, [1], TPU), 1)
    assert "kl-reg-my-run-1-1 in us-x1-a already, which is not this sweep's" in over[1]
    assert all("cat run.exit" in call for call in pod.changes())            # it was looked at


def test_a_script_that_fails_again_and_again_ends_its_program(sweep, pod):
    (pod.folder / "fail").write_text("create " * 5)
    over = await_all(tpu_vm.submit(sweep, [1], TPU), 1)
    assert "create.sh ends with 1: ERROR: the quota is exhausted" in over[1] and "delete.sh kl-reg-my" in over[1]
    (pod.folder / "fail").write_text("create create")
    (sweep.folder(1) / "checkpoints").mkdir(parents=True)
    (sweep.folder(1) / "checkpoints/1").write_text("")
    assert await_all(tpu_vm.submit(sweep, [1], TPU), 1) == {1: ""}
    assert sweep.log(1).read_text() == "resumed\n"
