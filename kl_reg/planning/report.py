"""A plan as text and as JSON."""
from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kl_reg import storage
from kl_reg.planning import estimate
from kl_reg.planning.accelerators import GIB, Topology
from kl_reg.planning.plan import Plan, ProgramPlan, StagePlan, excess
from kl_reg.planning.search import Guess


def text_of(axes: dict[str, int]) -> str:
    """A mesh as one writes it: data=8 tensor=8."""
    return " ".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "one device"


def show(plan: Plan, name: str) -> None:
    """Prints the plan of the configuration of that name; the last line says whether it fits, and by how much."""
    chip = plan.topology.accelerator
    print(f"plan       {name} on {plan.topology.name}: {plan.topology.count} x {chip.name}, {chip.hbm / GIB:.2f} GiB")
    print(f"mesh       {text_of(plan.axes)}")
    print(f"model      {plan.parameters / 1e9:.4g} B parameters in the base")
    if plan.guessed:
        print(f"openings   {plan.guessed} tokens (env.opening_tokens): the model's tokenizer is not at hand")
    for note in plan.notes:
        print(f"note       {note}")
    for number, program in enumerate(plan.programs):
        _show_program(number, program, chip.hbm)
    print(f"\nsources    {chip.source}\nassumption {estimate.ASSUMPTION}; rewards and compilation are not counted")
    if plan.chip_hours is not None:
        hours = plan.chip_hours
        print(f"sweep      at least {hours / plan.topology.count:.3g} hours, {hours:.3g} chip-hours")
    print(_verdict(plan))


def _verdict(plan):
    over, compiles = excess(plan), all(stage.compiled for program in plan.programs for stage in program.stages)
    if plan.fits:
        return f"fits       {-over:.2f} GiB of each chip are left"
    least = "" if compiles else "at least "
    return (f"does not fit: each chip needs {least}{plan.needs / GIB:.2f} GiB, {least}{over:.2f} GiB more than the "
            f"{plan.topology.accelerator.hbm / GIB:.2f} GiB that it has")


def _show_program(number: int, program: ProgramPlan, hbm: float):
    count = len(program.members)
    print(f"\nprogram {number}, {count} member{'s' * (count > 1)}; of each device:")
    kept = program.resident
    memory = Table("parameters, frozen", "trained", "optimizer", "other state", "episodes", "KV cache")
    memory.add_row(*(f"{value / GIB:.3f} GiB" for value in (kept.frozen, kept.params, kept.optimizer, kept.other,
                                                            kept.episodes, kept.cache)))
    stages = Table("", "peak memory", "of HBM", "TFLOPs", "memory traffic", "compute", "memory", "collectives",
                   "at least")
    for stage in program.stages:
        least = "" if stage.compiled else ">= "
        times = [f"{value:.3g} s" for value in (*stage.times, stage.times.seconds)] if stage.times else ["-"] * 4
        stages.add_row(stage.name, f"{least}{stage.needs / GIB:.2f} GiB", f"{least}{stage.needs / hbm:.0%}",
                       f"{stage.flops / 1e12:.3g}", f"{stage.memory / 1e9:.4g} GB" if stage.compiled else "-", *times)
    moved = Table("collectives", "over", "times", "bytes", "seconds")
    for stage in program.stages:
        for own in stage.moved:
            moved.add_row(f"{stage.name}: {own.kind}", " ".join(own.axes), f"{own.times}", f"{own.bytes / 1e9:.4g} GB",
                          f"{own.seconds:.3g}")
    console = Console(width=max(120, Console().width))
    for table in (memory, stages, *([moved] if moved.rows else [])):
        console.print(table)
    loops = sum(len(stage.unknown) for stage in program.stages)
    if loops:
        print(f"{loops} loop(s) whose end is not known beforehand, as that of a budget's tilt, count one turn")


def show_guesses(topology: Topology, guesses: list[Guess]) -> None:
    """Meshes by rules of thumb."""
    table = Table("mesh", "needs, about", "fits", "rollout", "update")
    for own in guesses:
        table.add_row(text_of(own.axes), f"{own.needs / GIB:.2f} GiB",
                      "yes" if own.needs <= topology.accelerator.hbm else "no", f"{own.rollout.seconds:.3g} s",
                      f"{own.update.seconds:.3g} s")
    print(f"\nmeshes on {topology.name} by rules of thumb, not compiled:")
    Console(width=max(120, Console().width)).print(table)


def as_json(plan: Plan) -> dict:
    """All numbers: bytes and seconds, of one device."""
    def stage(own: StagePlan):
        moved = [row._asdict() for row in own.moved]
        times = own.times and own.times._asdict() | {"seconds": own.times.seconds}
        return own._asdict() | {"moved": moved, "times": times}

    return {"topology": plan.topology.name, "chips": plan.topology.count, "hbm": plan.topology.accelerator.hbm,
            "axes": plan.axes, "parameters": plan.parameters, "needs": plan.needs, "fits": plan.fits,
            "chip_hours": plan.chip_hours,
            "programs": [{"members": own.members, "resident": own.resident._asdict(), "iterations": own.iterations,
                          "rollouts": own.rollouts, "stages": [stage(one) for one in own.stages]}
                         for own in plan.programs]}


def write(plan: Plan, file: storage.Path) -> None:
    """As JSON."""
    storage.write_json(file, as_json(plan))
