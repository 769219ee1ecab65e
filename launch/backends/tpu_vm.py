"""Programs on TPU VM slices, one each: created, set up, run, fetched and deleted by the scripts of tpu_scripts/.

The slices share no file system with this machine: a program's files are sent to its slice, fetched every few minutes,
and sent again after a preemption, so that it goes on from the last checkpoint that was fetched.
"""
from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shlex
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from kl_reg import config as configs
from kl_reg import storage
from kl_reg.pretrained import folders
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import job, plan
from launch.backends.options import Options, Started, check

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
CAPACITIES = {"on_demand": (), "spot": ("--spot",), "queued": ("--queued",), "queued_spot": ("--queued", "--spot")}
GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDED", "SUSPENDING", "FAILED")

_PAUSE = 60          # seconds between two looks at a slice
_FETCH = 5           # looks between two fetches
_TRIES = 5           # of a script: ssh fails now and then, above all on a slice that has just come up


class ScriptFailed(RuntimeError):
    """A script of tpu_scripts/ failed again and again."""


def prepare(sweep: plan.Sweep, options: Options) -> None:
    """Raises ValueError on options that are wrong or missing."""
    check("tpu_vm", options, ("zone", "accelerator", "runtime"))
    storage.local(sweep.workdir, "--backend=tpu_vm, which sends files to its slices and fetches them: --workdir")
    if options.capacity is not None and options.capacity not in CAPACITIES:
        raise ValueError(f"--capacity={options.capacity} is unknown; choose one of {', '.join(CAPACITIES)}")
    for file in _needs(sweep)[1]:
        if pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise ValueError(f"--backend=tpu_vm: {file} is to be sent to the slices, so give its path from the "
                             "checkout")


def describe(sweep: plan.Sweep, numbers: list[int], options: Options) -> list[str]:
    """The scripts that would be called for each program, and the calls of gcloud that they would make."""
    out = []
    for number in numbers:
        scripts = _Slice(sweep, number, options)
        out += ["", f"# {sweep.name(number)}"]
        for call in (scripts.create(), scripts.setup(), *scripts.send(), scripts.run(), scripts.status(),
                     scripts.fetch(), *([] if options.keep else [scripts.delete()])):
            dry = subprocess.run(["bash", SCRIPTS / call[0], "--dry-run", *call[1:]], capture_output=True, text=True)
            if dry.returncode:
                raise ValueError(f"--backend=tpu_vm: {dry.stderr.strip()}")
            out += [f"bash tpu_scripts/{shlex.join(call)}", *(f"    {line}" for line in dry.stdout.splitlines())]
    return out


def submit(sweep: plan.Sweep, numbers: list[int], options: Options) -> Started:
    """Brings the slices up, `jobs` at a time, and follows each until its program is over."""
    stopped = threading.Event()
    pool = ThreadPoolExecutor(min(options.jobs or len(numbers), len(numbers)))
    slices = {number: _Slice(sweep, number, options) for number in numbers}
    for number in numbers:
        job.record(sweep, number, "queued")
    futures = {number: pool.submit(_follow, slices[number], options, stopped) for number in numbers}

    def stop():
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        own = [f"bash tpu_scripts/delete.sh {slices[number].name} {options.zone}" for number, future in futures.items()
               if future.running()]
        return "its slices stay, and what runs on them: " + "; ".join(own) if own else "no slice is left"

    return Started(lambda: {number: future.result() for number, future in futures.items()
                            if future.done() and not future.cancelled()}, stop)


class _Slice:
    """The scripts' calls for one program, and what is on record of its slice."""

    def __init__(self, sweep, number, options):
        self.sweep, self.number, self.options = sweep, number, options
        words = re.sub(r"[^a-z0-9]+", "-", sweep.workdir.absolute().name.lower()).strip("-")
        self.name = f"kl-reg-{words[:40]}-{number}".replace("--", "-")
        self.target, self._file = f"runs/{self.name}", sweep.workdir / f"logs/{number}.slice.json"

    @property
    def mine(self):
        """What is on record: {} where this sweep has no such slice; "sent": whether the program's files are on it."""
        return json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}

    def note(self, **facts):
        storage.write_json(self._file, {"name": self.name, "zone": self.options.zone, **facts})

    def forget(self):
        self._file.unlink()

    def create(self, script="create.sh"):
        return self._call(script, *CAPACITIES[self.options.capacity or "queued"], after=(
            self.options.accelerator, self.options.runtime))

    def resume(self):
        return self.create("resume.sh")

    def setup(self):
        return self._call("setup.sh")

    def send(self):
        own = [f"programs/{self.number}"] if self.sweep.folder(self.number).exists() else []
        own += [f"logs/{self.number}.txt"] if self.sweep.log(self.number).exists() else []
        files = _needs(self.sweep)[1]
        return [self._call("send.sh", after=(self.sweep.workdir, self.target, "sweep.json", *own)),
                *([self._call("send.sh", after=(".", ".", *files))] if files else [])]

    def run(self):
        packaged = [f"python -m launch.fetch {name}" for name in _needs(self.sweep)[0]]
        program = f"python -m launch.program {self.target} {self.number}"
        command = ["bash", "-c", " && ".join([*packaged, program])] if packaged else shlex.split(program)
        return self._call("run.sh", after=("--", *command))

    def status(self):
        return self._call("status.sh")

    def fetch(self):
        return self._call("fetch.sh", after=(self.target, self.sweep.workdir, f"programs/{self.number}",
                                             f"logs/{self.number}.json", f"logs/{self.number}.txt"))

    def delete(self):
        return self._call("delete.sh", "--yes")

    def _call(self, script, *options, after=()):
        return [script, *options, self.name, self.options.zone, *map(str, after)]

    def do(self, call, tries=_TRIES):
        """Calls a script, what it says goes to a log; its last line."""
        with open(self.sweep.workdir / f"logs/{self.number}.slice.txt", "a", encoding="utf-8") as log:
            for i in range(tries):
                done = subprocess.run(["bash", SCRIPTS / call[0], *call[1:]], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                print(f"{time.strftime('%H:%M:%S')} {shlex.join(call)}\n{done.stdout}", file=log, flush=True)
                if done.returncode == 0:
                    return (done.stdout.splitlines() or [""])[-1]
                time.sleep(_PAUSE * (i + 1 < tries))
        raise ScriptFailed(f"{call[0]} ends with {done.returncode}: {' '.join(done.stdout.split())[-200:]} "
                           f"({log.name})")


def _needs(sweep):
    """Packaged models that a slice has to fetch, and files and folders that it has to be sent."""
    packaged, files = {}, {}
    for member in configs.members(sweep.config):
        own = configs.override(sweep.config, member)
        for path in (own.model.path, own.env.student_model, own.env.openings, own.reward.path, *own.reference.paths):
            if not path or not storage.is_local(path):      # slices read a store by themselves
                continue
            address = run_directory.parse(path)
            if path in folders.PACKAGED:
                packaged[path] = None
            elif address:
                files[str(address.workdir)] = None
            elif (file := storage.path(path)).exists():
                files[str(file)] = None
    return list(packaged), list(files)


def _follow(own, options, stopped):
    """Until the program is over; why it did not end by itself, or nothing."""
    try:
        return _lead(own, options, stopped)
    except (ScriptFailed, OSError) as error:
        return f"{error}; its slice may be left: bash tpu_scripts/delete.sh {own.name} {options.zone}"


def _lead(own, options, stopped):
    """Looks at the slice and does what is next, whatever came before: so a second call finds its way, too."""
    lost, looks = 0, 0
    while not stopped.is_set():
        state, ran = _look(own)
        if state != "ABSENT" and not own.mine:
            return f"there is a {own.name} in {options.zone} already, which is not this sweep's"
        if state == "ABSENT" or state in GONE:
            lost += bool(own.mine)
            if lost == options.attempts:
                return f"its slice was lost {lost} times, and is {state}"
            own.note()
            job.record(own.sweep, own.number, "queued")
            own.do(own.create() if state == "ABSENT" else own.resume())
        elif state == "READY" and ran == "none":
            _start(own)
        elif state == "READY" and ran == "running":
            looks += 1
            if looks % _FETCH == 0:
                with contextlib.suppress(ScriptFailed):         # there will be another time
                    own.do(own.fetch(), tries=1)
        elif state == "READY":
            return _finish(own, options, ran)
        stopped.wait(_PAUSE)
    return "stopped"


def _look(own):
    words = own.do(own.status()).split()
    if len(words) != 2:
        raise ScriptFailed(f"status.sh says {' '.join(words)!r}")
    return words


def _start(own):
    """What is on the slice is newer than what was fetched of it: that is sent to a new one only."""
    own.do(own.setup())
    if "sent" not in own.mine:
        for call in own.send():
            own.do(call)
        own.note(sent=True)
    own.do(own.run())


def _finish(own, options, ran):
    own.do(own.fetch())
    if not options.keep:
        own.do(own.delete())
        own.forget()
    return "" if ran == "0" else f"exit status {ran}"
