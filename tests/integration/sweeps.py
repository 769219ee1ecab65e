"""A sweep of four members on a real scheduler, one of them killed on the way: called by slurm.sh and ray.sh.

    python tests/integration/sweeps.py slurm|ray WORK

The same sweep as processes of this machine, that nobody disturbs, is the oracle: every parameter must be the same, bit
for bit, also of the member that was killed, which must have gone on from its checkpoint. WORK keeps that run, so that a
second scheduler is held against it, too.
"""
from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import plan, progress

KILLED, WARNED, ITERATIONS = 2, 3, 8
LIMIT = 600     # seconds

BACKENDS = {"slurm": ["--backend=slurm", "--minutes=30", "--cpus=1", "--memory_gb=3", "--sbatch=comment=tiny"],
            "ray": ["--backend=ray", "--cpus=1"]}


def main(backend: str, work: pathlib.Path):
    work.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")        # all members are one program
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    common = ["--config=tests/integration/experiment.py", "--members_per_job=1", "--jobs=2"]
    sweep(*common, "--backend=local", f"--workdir={work / 'local'}")
    call = [*common, *BACKENDS[backend], f"--workdir={work / backend}"]
    printed = sweep(*call, "--dry_run")
    assert not (work / backend).exists(), "a dry run wrote something"
    running = subprocess.Popen([sys.executable, "-m", "launch.sweep", *call])
    try:
        kill(backend, work / backend, running)
        assert running.wait(LIMIT) == 0, f"launch.sweep ended with {running.returncode}"
    finally:
        running.kill()
    if backend == "slurm":
        submitted(printed, work / backend)
    stopped = (KILLED, WARNED) if backend == "slurm" else (KILLED,)
    for member in stopped:
        resumed(work / backend, member)
    check(work / backend, work / "local")
    again = sweep(*call)
    assert "programs: 4, done already: 4" in again and "running" not in again, again
    print(f"{backend}: 4 members trained, {' and '.join(map(str, stopped))} killed on the way and resumed; parameters, "
          "evaluations and fingerprint are those of the undisturbed run")


def sweep(*arguments) -> str:
    done = subprocess.run([sys.executable, "-m", "launch.sweep", *arguments], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    assert done.returncode == 0, f"launch.sweep {' '.join(arguments)} ended with {done.returncode}"
    return done.stdout


def kill(backend, workdir, running):
    """One without a word; on Slurm another as preemption announces it, with the signal that submitit waits for."""
    await_checkpoint(workdir, KILLED, running)
    if backend == "slurm":
        subprocess.run(["scontrol", "requeue", job_of(workdir, KILLED)], check=True)
        await_checkpoint(workdir, WARNED, running)
        subprocess.run(["scancel", "--signal=USR2", job_of(workdir, WARNED)], check=True)
    else:
        os.kill(progress.recorded(plan.read(workdir), KILLED)["pid"], signal.SIGKILL)
    print(f"killed member {KILLED}", flush=True)


def await_checkpoint(workdir, member, running):
    end = time.monotonic() + LIMIT
    while 1 not in run_directory.iterations(workdir / f"programs/{member}"):
        assert running.poll() is None, "launch.sweep ended before there was anything to kill"
        assert time.monotonic() < end, f"no checkpoint after {LIMIT} seconds"
        time.sleep(0.1)


def job_of(workdir, member):
    return json.loads((workdir / "logs/slurm/jobs.json").read_text())[str(member)]


def submitted(printed, workdir):
    """What the dry run said is what sbatch got."""
    (script,) = (workdir / "logs/slurm").glob("*_submission.sh")
    wanted, given = (set(re.findall(r"^#SBATCH .*$", text, re.MULTILINE)) for text in (printed, script.read_text()))
    assert wanted and wanted <= given, wanted - given


def resumed(workdir, member):
    log = (workdir / f"logs/{member}.txt").read_text()
    begun = re.findall(rf"already trained for (\d+) of {ITERATIONS} iterations", log)
    assert len(begun) == 1 and 1 <= int(begun[0]) < ITERATIONS, f"member {member} did not go on on the way:\n{log}"


def check(workdir, oracle):
    for ours, theirs in zip(run_directory.load(workdir), run_directory.load(oracle), strict=True):
        assert ours.iteration == theirs.iteration == ITERATIONS
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    for name in ("config.json", "summary.json"):
        assert json.loads((workdir / name).read_text()) == json.loads((oracle / name).read_text()), name
    for member in range(4):
        lines = (workdir / f"members/{member}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == list(range(ITERATIONS)), f"member {member}"
    assert (workdir / "report.html").is_file()


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]).absolute())
