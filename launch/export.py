"""Writes a member of a run as a folder that other libraries load.

    python -m launch.export runs/quickstart:3 --out=exports/quickstart-3
    python -m launch.export runs/quickstart:3@40 --out=exports/early            # or --step=40
    python -m launch.export runs/lora:0 --adapter --out=exports/lora            # PEFT's format
    python -m launch.export runs/budget:0 --proposal --out=exports/proposal

Members with policy.kind "full" and "lora" become a folder for transformers, "head" one with a loader of its own for
torch and transformers; README.md in it is a model card. docs/export.md says more.
"""
from __future__ import annotations

import sys

from launch import command


def main(argv=None):
    command.guarded(["export"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = command.Parser("export", __doc__)
    parser.add_argument("run", metavar="RUN[:MEMBER][@ITERATION]", help="a run with one member needs no MEMBER; the "
                        "last checkpoint is the default")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--step", type=int, metavar="ITERATION", help="another way to say @ITERATION")
    parser.add_argument("--adapter", action="store_true", help="of a lora: a PEFT adapter (default: merged weights)")
    parser.add_argument("--with-base", action="store_true", help="of an adapter or a head: a copy of the base in "
                        "DIR/base (default: only where other libraries could not load the base from where it lies)")
    parser.add_argument("--proposal", action="store_true", help="of a member with a hard budget: its proposal, which "
                        "no budget holds")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: the run's model.dtype)")
    args = parser.parse_args(argv)
    from kl_reg import storage
    from kl_reg.export.member import export

    done = export(args.run, storage.local(args.out, "--out"), args.step, adapter=args.adapter, with_base=args.with_base,
                  proposal=args.proposal, dtype=args.dtype)
    base = f"base   {done.folder / 'base'}: {done.base}\n" * bool(done.base)
    print(f"{done.snippet}\n{done.kind:6} {done.folder}\n{base}card   {done.folder / 'README.md'}")


if __name__ == "__main__":
    main()
