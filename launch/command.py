"""What the training commands share: flags, one-line errors, the closing lines, and where compilations are kept."""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import re
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

flags.disclaim_key_flags()     # --help of a command lists them as its own

_BEGAN = time.monotonic()


def keep_compilations() -> None:
    """Has JAX keep what it compiles in $XDG_CACHE_HOME/kl_reg/xla, ~/.cache/kl_reg/xla by default, unless another place
    was chosen. Variables and not jax.config, because JAX is imported later, and for the processes that are started."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "kl_reg/xla"))


keep_compilations()


class Parser(argparse.ArgumentParser):
    """Of the commands without --config. What it refuses is a ValueError, for `guarded`."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"python -m launch.{name}", description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ValueError(message)


def text(value: str) -> str:
    r"""A text from the command line, in which \n is a line break."""
    return value.replace("\\n", "\n")


def check_whole(args: argparse.Namespace, **lowest: int) -> None:
    """Raises on an option that is given and no whole number from its lowest to 2^31 - 1."""
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**31:
            raise ValueError(f"--{name} {value} must be a whole number from {low} to 2^31 - 1")


def accept_encodings() -> None:
    """Has standard output write ? for the characters that its encoding lacks, as ± in ASCII, where it would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def parse(argv):
    """absl's flag parser; an unknown setting or a missing file of --config is one line and exit status 2. With --from
    and no --config it is that run's."""
    accept_encodings()
    argv = [re.sub("^(--?config=)(~.*)", lambda found: found[1] + os.path.expanduser(found[2]), word) for word in argv]
    argv = _with_config(argv)
    if "--help" in argv:
        app.usage(shorthelp=True, writeto_stdout=True)      # by itself absl ends it with 1
        if "from" in flags.FLAGS:       # the configuration is an experiment's
            from kl_reg import settings

            with contextlib.suppress(BrokenPipeError):      # `--help | head`
                print("\n" + settings.told(), flush=True)
                sys.exit(0)
            os._exit(0)
        sys.exit(0)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        while isinstance(error, Exception):     # ConfigDict wraps one in the other
            error = error.args[0]
        _fail("; ".join(_strange(argv)) or f"unknown setting: {error}")
    except (OSError, TypeError) as error:
        _fail(error)


def _with_config(argv):
    """The command line with the configuration of the run that it starts from, if it has none of its own."""
    given = "\n".join(argv)
    start = re.search(r"^--?from[=\n](.+)$", given, re.MULTILINE)
    if start is None or re.search(r"^--?config([=\n]|$)", given, re.MULTILINE):
        return argv
    from launch import parent

    try:
        parent.get_config(start[1])     # config_flags would only say later what is wrong
    except (OSError, ValueError) as error:
        _fail(error)
    return [*argv[:1], f"--config={parent.__file__}:{start[1]}", *argv[1:]]


def _strange(argv):
    """A sentence about each setting of the command line that there is not."""
    from kl_reg.settings import SETTINGS, unknown

    names = [found[1] for word in argv if (found := re.match(r"--?(?:no)?config\.([\w.]+)", word))]
    return [unknown(name) for name in names if name not in SETTINGS]


def _fail(error):
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def define():
    """--config and --workdir; --hosts, which `run` reads."""
    config = config_flags.DEFINE_config_file("config", None, "the experiment: a file of configs/", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "where everything is written, a directory or gs://bucket/folder; an "
                                  "earlier run there is resumed")
    flags.DEFINE_string("hosts", None, "where several processes run this command together: auto, slurm, tpu, "
                        "kubernetes or mpi, or ADDRESS:PORT,COUNT,INDEX of this process; all see the workdir (default: "
                        "the variable KL_REG_HOSTS, or one process)")
    flags.DEFINE_string("from", None, "another run, RUN or RUN:MEMBER, whose final state this one starts from, and, "
                        "without --config, whose settings; --config.rl.iterations are then those behind it")
    flags.mark_flags_as_required(["config", "workdir"])
    return config, workdir


def guarded(argv, function):
    """function(); what the user can mend is one line and exit status 2."""
    accept_encodings()
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        _fail(f"unexpected arguments {argv[1:]}")
    try:
        return function()
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


def run(argv, config, workdir: str) -> None:
    """Trains and prints the summary."""
    import kl_reg
    from kl_reg.sharding import multihost

    guarded(argv, lambda: multihost.join(flags.FLAGS.hosts))
    result = guarded(argv, lambda: kl_reg.train(config, workdir=workdir, began=_BEGAN,
                                                  start=flags.FLAGS["from"].value))
    if multihost.writes():
        print_summary(result.summary, result.workdir, result.report, result.tokens_per_second)


def print_summary(summary, workdir, report, tokens_per_second=None) -> None:
    """A line a member, and where everything is."""
    _print_table(summary)
    print()
    if tokens_per_second is not None:
        print(f"speed   {tokens_per_second:.0f} tokens per second: rollout, reward and update, median iteration")
    print(f"run     {workdir}\nreport  {report}")


def _print_table(summary):
    hyper = list(summary[-1]["hyper"])
    table = Table("member", *hyper, "return", "KL, nats/episode", "teacher silent", "student silent")
    for row in summary:
        final = row["final"]
        measured = ["–" if final[name] is None else f"{final[name]:.2f} ± {final[f'{name}_se'] or 0:.2f}"
                    for name in ("return", "kl/nats_per_episode")]
        silent = [final[f"{who}/silent_rate"] for who in ("teacher", "student")]
        table.add_row(str(row["member"]), *(str(row["hyper"].get(key, "")) for key in hyper), *measured,
                      *("–" if rate is None else f"{rate:.1%}" for rate in silent))
    Console(width=max(100, Console().width)).print(table)
