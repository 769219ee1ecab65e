"""The peer of `benchmarks.decode`: PyTorch's sampling, the `generate` of transformers.

    python -m benchmarks.peers.torch_generate SETTINGS.json

SETTINGS.json holds what `work.settings_of` gives, "dtype" and "torch_compile" (a static cache, for which `generate`
compiles on a GPU). Attention is torch's SDPA; every sequence has its own copy of its prompt; nothing ends early,
because the model has no end of sequence. Runs in the environment of `trl.txt`.
"""
from __future__ import annotations

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.stepping import Told


@torch.inference_mode()
def main(settings: dict) -> None:
    """Samples until nobody asks for more."""
    told, gpu = Told(), settings["backend"] == "gpu"
    torch.set_float32_matmul_precision("high" if gpu else "highest")       # TF32 is what JAX does by default, too
    device = torch.device("cuda" if gpu else "cpu")
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]),
                                                 attn_implementation="sdpa").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    prompts = torch.tensor([tokenizer.encode(said, add_special_tokens=False) for said in settings["prompts"]])
    ids = prompts.repeat(-(-settings["sequences"] // len(prompts)), 1)[:settings["sequences"]].to(device)
    how = {"max_new_tokens": settings["generated"], "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
           "cache_implementation": "static" if settings["torch_compile"] else None}
    told.ready("torch", "transformers", **({} if gpu else {"threads": torch.get_num_threads()}))
    while told.wait():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how).cpu()
        told.clock.mark("rollout")
        told.done(out.numel(), None)


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
