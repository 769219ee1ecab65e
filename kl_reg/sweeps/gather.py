"""What the programs of a sweep left, as one run: the directory that report, compare and optimal read."""
from __future__ import annotations

import os

import numpy as np

from kl_reg import storage
from kl_reg.analysis.report import page
from kl_reg.episodes.metrics import pooled
from kl_reg.runs import checkpoint
from kl_reg.runs import directory as run_directory
from kl_reg.sweeps import plan
from kl_reg.training.evaluate import seeds_of
from kl_reg.training.member_groups import hyper_of


def gather(workdir: str | os.PathLike) -> storage.Path:
    """Writes config.json, members/<k>/, summary.json and the report of all programs that are done; the report's path.

    Checkpoints stay with the programs. The base's row is over the evaluations of all seeds, each that of the first
    program that has the seed.

    Raises:
        FileNotFoundError: no program is done.
        ValueError: programs were trained on different weights, rewards, environments or code.
    """
    sweep = plan.read(workdir)
    with plan.locked(sweep.workdir / "logs/gather.lock"):
        done = [number for number in range(len(sweep.programs)) if sweep.done(number)]
        if not done:
            raise FileNotFoundError(f"{workdir}: no program of the sweep has ended")
        storage.write_json(sweep.workdir / "config.json", _describe(sweep, done))
        summaries = {number: storage.read_json(sweep.folder(number) / "summary.json") for number in done}
        hypers, rows = hyper_of(sweep.config), {-1: _base(sweep, {number: own[0] for number, own in summaries.items()})}
        for number, (_, *own) in summaries.items():
            for row, member in zip(own, sweep.programs[number], strict=True):
                storage.copy_tree(sweep.folder(number) / f"members/{row['member']}",
                                  sweep.workdir / f"members/{member}")
                rows[member] = row | {"member": member, "hyper": hypers[member]}
        storage.write_json(sweep.workdir / "summary.json", [rows[member] for member in sorted(rows)])
        return page.write_report(sweep.workdir)


def _base(sweep, rows):
    """The base's row from those of the programs, by their number; writes its evaluation.npz."""
    programs = {}
    for number, row in rows.items():
        if "by_seed" not in row:
            raise ValueError(f"{sweep.folder(number)}: an earlier version evaluated it, on the same random numbers for "
                             "all seeds; remove its summary.json and run the program again, which evaluates it anew")
        for seed in row["by_seed"]:
            programs.setdefault(seed, number)
    finals, parts = {}, []
    for seed in (str(seed) for seed in seeds_of(sweep.config) if str(seed) in programs):
        finals[seed] = rows[programs[seed]]["by_seed"][seed]
        file = sweep.folder(programs[seed]) / "members/base/evaluation.npz"
        arrays = storage.read_arrays(file)
        parts.append({name: values[arrays["seeds"] == int(seed)] for name, values in arrays.items()})
    storage.write_arrays(sweep.workdir / "members/base/evaluation.npz",
                         {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return {"member": "base", "hyper": {}, "final": pooled(list(finals.values())), "by_seed": finals}


def _describe(sweep, done):
    """config.json as one process would have written it."""
    stored = {number: storage.read_json(sweep.folder(number) / "config.json") for number in done}
    first = stored[done[0]]["inputs"]
    for number in done:
        for key in ("base", "rewards", "environment", "student"):
            if stored[number]["inputs"][key] != first[key]:
                raise ValueError(f"{sweep.folder(number)} was trained with another {key} than {sweep.folder(done[0])}: "
                                 f"{stored[number]['inputs'][key]} and {first[key]}; remove one and train it again")
    groups = [[number for number, _ in group] for group in run_directory.groups(sweep.config)]
    held = {key: [_one(sweep, stored, group, key) for group in groups] for key in ("references", "functions")}
    inputs = checkpoint.Inputs(first["base"], first["rewards"], environment=first["environment"],
                               student=first["student"], **held)
    return checkpoint.describe(sweep.config, inputs, groups, stored[done[0]]["quantize"])


def _one(sweep, stored, group, key):
    """What the programs of one group depend on; nothing where none of them is done."""
    found = {number: stored[number]["inputs"][key][0] for number in stored if sweep.programs[number][0] in group}
    if len({tuple(digests) for digests in found.values()}) > 1:
        raise ValueError(f"{sweep.workdir}: programs {', '.join(map(str, found))} were trained with different {key}; "
                         "remove those that are out of date and train them again")
    return next(iter(found.values()), [])
