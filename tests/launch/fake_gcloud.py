"""A gcloud that knows one slice, whose worker is a folder of this machine: the commands for it run there.

In $FAKE: `calls`, what it was called with, each on a line; `vm` and `queue`, states of the slice and of its queued
resource, if they are there (of several words each look takes one, but for the last); `home`, the worker; `fail`, verbs
that fail, a word for each time; `preempt`, after how many looks at its command the slice is taken away.
"""
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
VM, QUEUE, HOME = FAKE / "vm", FAKE / "queue", FAKE / "home"


def main(kind, verb, *rest):
    with open(FAKE / "calls", "a") as calls:
        print(shlex.join(["gcloud", *sys.argv[1:]]).replace("\n", " "), file=calls)
    failing = (FAKE / "fail").read_text().split() if (FAKE / "fail").exists() else []
    if verb in failing:
        failing.remove(verb)
        (FAKE / "fail").write_text("\n".join(failing))
        sys.exit("ERROR: the quota is exhausted")
    options = dict(word[2:].split("=", 1) for word in rest if word.startswith("--") and "=" in word)
    words = [word for word in rest if not word.startswith("--")]
    {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[verb](
        QUEUE if kind == "queued-resources" else VM, words, options, rest)


def create(file, words, options, rest):
    if file.exists():
        sys.exit("ERROR: ALREADY_EXISTS")
    if file == VM:
        up()
    else:
        file.write_text("WAITING_FOR_RESOURCES\nACTIVE")


def up():
    HOME.mkdir()
    VM.write_text("READY")


def describe(file, words, options, rest):
    if not file.exists():
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'x' was not found")
    now, *later = file.read_text().split()
    if later:
        file.write_text("\n".join(later))
    elif file == QUEUE and now == "ACTIVE" and not VM.exists():
        up()
    print(now)


def delete(file, words, options, rest):
    if not file.exists():
        sys.exit("ERROR: NOT_FOUND")
    if "--quiet" not in rest:
        sys.exit("ERROR: it asks a person")
    for part in (file, VM):
        part.unlink(missing_ok=True)
    shutil.rmtree(HOME, ignore_errors=True)


def ssh(file, words, options, rest):
    if "cat run.exit" in options["command"] and (FAKE / "preempt").exists():
        left = int((FAKE / "preempt").read_text()) - 1
        (FAKE / "preempt").write_text(str(left))
        if left == 0:
            (FAKE / "preempt").unlink()
            QUEUE.write_text("SUSPENDED")
            VM.unlink()
            shutil.rmtree(HOME)
            sys.exit("ERROR: the connection is lost")
    done = subprocess.run(["bash", "-c", options["command"]], cwd=HOME, env=os.environ | {"HOME": str(HOME)})
    sys.exit(done.returncode)


def scp(file, words, options, rest):
    source, target = (HOME / word.partition(":")[2] if ":" in word else pathlib.Path(word) for word in words)
    shutil.copy(source, target)


main(*sys.argv[3:])
