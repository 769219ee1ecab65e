"""Programs as tasks of a Ray cluster. The directory is on a file system that all nodes share."""
from __future__ import annotations

import os

from kl_reg import storage
from kl_reg.sweeps import job, plan
from launch.backends.options import Options, Started, check


def attempt(directory: str, workdir: str, number: int) -> None:
    """Runs a program in `directory`, in a process of its own that Ray has given its accelerators."""
    os.chdir(directory)
    job.run(workdir, number)


def prepare(sweep: plan.Sweep, options: Options) -> None:
    """Raises ValueError on options that are wrong."""
    check("ray", options)


def describe(sweep: plan.Sweep, numbers: list[int], options: Options) -> list[str]:
    """The cluster, what each task asks for, and what it runs."""
    asked = ", ".join(f"{key}={value!r}" for key, value in _resources(options).items())
    return [f"ray.init(address={options.ray_address!r}); tasks with {asked}, {options.jobs or len(numbers)} at once:",
            *(f"python -m launch.program {sweep.workdir} {number}   # {sweep.name(number)}" for number in numbers)]


def submit(sweep: plan.Sweep, numbers: list[int], options: Options) -> Started:
    """Starts them; Ray starts again what was lost with its process or its node."""
    try:
        import ray
    except ImportError:
        raise ValueError("--backend=ray needs Ray: pip install -e '.[ray]'") from None
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ray.init(address=options.ray_address, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}})
    except ConnectionError as error:
        raise ValueError(f"--backend=ray: {error}") from None
    _check_cluster(ray, options)
    task = ray.remote(**_resources(options))(attempt)
    waiting, running, ended = list(numbers), {}, {}

    def over():
        while waiting and len(running) < (options.jobs or len(numbers)):
            number = waiting.pop(0)
            job.record(sweep, number, "queued")
            running[task.remote(os.getcwd(), str(storage.absolute(sweep.workdir)), number)] = number
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0) if running else ([], [])
        for reference in ready:
            ended[running.pop(reference)] = _outcome(ray, reference)
        return dict(ended)

    def stop():
        ray.shutdown()
        return "its tasks are stopped"

    return Started(over, stop)


def _resources(options):
    """As ray.remote has them. A process runs one task, so that it leaves its accelerator free."""
    memory = options.memory_gb and options.memory_gb << 30
    named = {"num_gpus": options.gpus, "memory": memory, "accelerator_type": options.accelerator,
             "resources": options.tpus and {"TPU": options.tpus}}
    return {"num_cpus": options.cpus or 1, **{key: value for key, value in named.items() if value is not None},
            "max_retries": options.attempts - 1, "max_calls": 1}


def _check_cluster(ray, options):
    """Raises on what no node of the cluster has: Ray would wait for such a node for ever."""
    kind = options.accelerator and f"accelerator_type:{options.accelerator}"
    wanted = {"CPU": options.cpus or 1, "GPU": options.gpus or 0, "TPU": options.tpus or 0,
              "memory": (options.memory_gb or 0) << 30, **({kind: 0.001} if kind else {})}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        ray.shutdown()
        have = "; ".join(", ".join(f"{key} {value:g}" for key, value in sorted(node.items())
                                   if not key.startswith(("node:", "object_store"))) for node in nodes)
        raise ValueError("--backend=ray: no node has what a program asks for ("
                         + ", ".join(f"{name} {amount:g}" for name, amount in wanted.items() if amount)
                         + f"); the nodes have {have}")


def _outcome(ray, reference):
    """Why a task ended, or nothing."""
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return str(error.cause)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
