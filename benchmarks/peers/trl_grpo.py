"""The peer "trl" of `benchmarks.rl_step`: steps of TRL's GRPOTrainer.

    python -m benchmarks.peers.trl_grpo SETTINGS.json

SETTINGS.json holds what `work.settings_of` gives. Generation is transformers' `generate` with its KV cache, attention
torch's SDPA; gradients are not checkpointed, and a GPU multiplies in TF32, as JAX does by default. The end of sequence
is a token that the model does not have: nothing ends early, and no logits need to be suppressed. "reward" includes the
reference's log-probabilities. Runs in the environment of `trl.txt`.
"""
from __future__ import annotations

import json
import pathlib
import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.stepping import Told

_STEPS = 10**6      # more than anybody asks for


def _mark(told, phase):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    told.clock.mark(phase)


class _Steps(TrainerCallback):
    """Each step begins when it is wanted."""

    def __init__(self, told):
        self.told, self.norm, self.tokens = told, None, 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.norm = model.model.norm.weight.detach().clone()
        if not self.told.wait():
            sys.exit()

    def on_step_end(self, args, state, control, model, **kwargs):
        _mark(self.told, "update")
        self.told.done(self.tokens, (model.model.norm.weight - self.norm).abs().max().item())


class _Trainer(GRPOTrainer):
    """Marks where the reward and the update begin."""

    steps: _Steps

    def watch(self, steps):
        self.steps, generate = steps, self.model.generate

        def marked(*args, **kwargs):
            out = generate(*args, **kwargs)
            _mark(steps.told, "rollout")
            return out

        self.model.generate = marked
        self.add_callback(steps)

    def compute_loss(self, model, inputs, *args, **kwargs):
        _mark(self.steps.told, "reward")
        self.steps.tokens = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(settings: dict) -> None:
    """Steps until nobody asks for more."""
    told = Told()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.add_special_tokens({"eos_token": "<|never|>", "pad_token": "<|never|>"})

    def reward(completion_ids, **kwargs):
        return [sum(ids) / len(ids) / settings["vocabulary"] for ids in completion_ids]

    rows, count = settings["sequences"], settings["sequences"] // settings["group"]
    gpu = settings["backend"] == "gpu"
    config = GRPOConfig(
        output_dir=settings["scratch"], model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        beta=settings["kl_coef"], learning_rate=settings["learning_rate"], lr_scheduler_type="constant",
        max_grad_norm=1.0, loss_type="grpo", per_device_train_batch_size=rows, num_generations=settings["group"],
        max_completion_length=settings["generated"], temperature=1.0, num_iterations=1, steps_per_generation=1,
        max_steps=_STEPS, gradient_checkpointing=False, bf16=False, use_cpu=not gpu, tf32=gpu or None,
        torch_compile=settings["torch_compile"], save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False)
    prompts = settings["prompts"]
    data = Dataset.from_dict({"prompt": [prompts[i % len(prompts)] for i in range(64 * count)]})
    trainer = _Trainer(settings["model"], reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.watch(_Steps(told))
    told.ready("trl", "torch", "transformers", **({} if gpu else {"threads": torch.get_num_threads()}))
    trainer.train()


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
