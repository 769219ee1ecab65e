"""Says whether a configuration fits accelerators that nobody has rented yet, and what its sweep will cost.

    python -m launch.plan --config=configs/mixtral_teacher.py --topology=v5e:8x8
    python -m launch.plan --config=configs/mixtral_teacher.py --topology=v5e:4x4 --config.policy.kind=lora --search

Rollout and update are compiled ahead of time for that many chips, on this machine and without one (TPUs need libtpu:
pip install -e '.[tpu]'); of the model only config.json is read. --search ranks other meshes than config.parallel's and
compiles the best two. The exit status is 1 where the configuration does not fit, and the last line says by how much.
Topologies: v4:2x2x1, v5e:8x8, v5p:4x4x4, v6e:4x4, 4*v5e:16x16 (four slices); h100:8, h200:8, a100:8 are estimated and
not compiled. docs/scaling.md explains what is printed.
"""
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from launch import command

os.environ["JAX_PLATFORMS"] = "cpu"                     # what is planned for is not here
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"    # which cannot read back what is for other devices

CONFIG = config_flags.DEFINE_config_file("config", None, "the experiment: a file of configs/", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "accelerator and shape: v5e:8x8, 4*v5e:16x16, h100:8")
SEARCH = flags.DEFINE_boolean("search", False, "rank other meshes and compile the best two")
JSON = flags.DEFINE_string("json", None, "also write the plan to this file")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
    sys.exit(command.guarded(argv, lambda: _plan(CONFIG.value)))


def _plan(config):
    """The exit status."""
    from kl_reg import storage
    from kl_reg.planning import accelerators, plan, report, search

    topology = accelerators.topology(TOPOLOGY.value)
    programs = plan.read(config)
    if not topology.devices:
        return _estimate(report, search, programs, topology)
    plans = []
    try:
        plans.append(plan.make(programs, config.parallel, topology))
        report.show(plans[0], config.model.path)
    except ValueError as error:
        if not SEARCH.value:
            raise
        print(f"config.parallel: {error}")
    if SEARCH.value:
        plans += _search(plan, report, search, programs, config, topology, [own.axes for own in plans])
    if not plans:
        raise ValueError(f"--search: no mesh of {topology.count} chips divides members, episodes, columns and experts")
    best = min(plans, key=lambda own: (not own.fits, own.needs if not own.fits else own.chip_hours))
    if len(plans) > 1:
        print(f"\nbest of these: {report.text_of(best.axes)}" + " fits" * best.fits + ", none fits" * (not best.fits))
    if JSON.value:
        report.write(best, storage.path(JSON.value))
    return 0 if best.fits else 1


def _estimate(report, search, programs, topology):
    guesses = search.rank(programs, topology)
    report.show_guesses(topology, guesses[:8])
    print(f"estimated: nothing compiles for {topology.accelerator.name} here")
    fits = bool(guesses) and guesses[0].needs <= topology.accelerator.hbm
    if not fits:
        print("no mesh fits" + f": the smallest needs about {guesses[0].needs / 2**30:.1f} GiB" * bool(guesses))
    return 0 if fits else 1


def _search(plan, report, search, programs, config, topology, tried):
    """Plans of the two meshes that look best, but for what was tried."""
    guesses = search.rank(programs, topology)
    report.show_guesses(topology, guesses[:8])
    found = []
    for guess in [own for own in guesses if own.axes not in tried][:2]:
        settings = config.parallel.copy_and_resolve_references()
        settings.update(guess.axes | {"slices": topology.slices})
        found.append(plan.make(programs, settings, topology))
        print()
        report.show(found[-1], config.model.path)
    return found


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
