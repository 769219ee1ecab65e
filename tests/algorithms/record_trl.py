"""Records in trl.json what TRL's own trainers make of a small batch, for test_trl.py to compare with.

    python tests/algorithms/record_trl.py        # with trl==1.16.0 installed

Two groups of three completions go through TRL's `_generate_and_score_completions` and `_compute_loss`; only generation,
the reward function and the model's log-probabilities are replaced by the numbers below.
"""
import collections
import json
import pathlib
import types

import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

GROUP, LENGTH = 3, 5                                      # completions of a prompt; tokens that one may have at most
LENGTHS = [4, 2, 3, 1, 4, 4]
REWARDS = [1.0, -0.5, 0.7, 2.0, 2.0, 0.5]
GRPO = {"loss_type": "grpo", "importance_sampling_level": "token", "scale_rewards": "group", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "delta": None}
CASES = {"grpo": {}, "batch": {"scale_rewards": "batch"}, "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
         "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
         "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
         "cispo": {"loss_type": "cispo", "epsilon_high": 1.2}, "two_sided": {"delta": 1.6}}


def log_probs():
    """Of the sampling and the new policy, [6, 4]; their ratios are on both sides of every clip."""
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(6, 4, generator=generator, dtype=torch.float64) - 0.1
    return old, old + 0.4 * torch.randn(6, 4, generator=generator, dtype=torch.float64)


def recorded(trainer, **settings):
    """A trainer of that class without a model, in evaluation (training adds factors for accumulated gradients)."""
    old, new = log_probs()

    class Recorded(trainer):
        def __init__(self):
            self.model = types.SimpleNamespace(training=False, is_gradient_checkpointing=False)
            one = types.SimpleNamespace(device="cpu", process_index=0, num_processes=1, gather=lambda x: x,
                                        reduce=lambda x, reduction: x)
            self.accelerator, self._tokenizer = one, types.SimpleNamespace(pad_token_id=0)
            self.args = types.SimpleNamespace(
                per_device_eval_batch_size=6, gradient_checkpointing_kwargs=None, steps_per_generation=2,
                gradient_accumulation_steps=1, delta=settings.get("delta"))
            self._metrics = {"eval": collections.defaultdict(list)}
            self._logs = collections.defaultdict(list, rewards=collections.defaultdict(list))
            self._pending_extra_logs, self._pending_metrics = {}, {}
            self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = None
            self.mask_truncated_completions = self.use_vllm = self.aux_loss_enabled = False
            self._entropy_bonus_enabled = self.normalize_advantages = self.reward_clip_range = False
            self.num_iterations, self.num_generations_eval, self.max_completion_length = 1, GROUP, LENGTH
            self.top_entropy_quantile, self.beta, self.off_policy_mask_threshold = 1.0, 0.0, None
            self.multi_objective_aggregation = "sum_then_normalize"
            self.reward_funcs, self.reward_func_names, self.reward_weights = [None], ["reward"], torch.ones(1)
            vars(self).update(settings)
            self.new = new.clone().requires_grad_()

        def _generate(self, prompts):
            ids = [[1] * length for length in LENGTHS]
            texts = [""] * 6
            return (([[1]] * 6, ids, texts) if trainer is RLOOTrainer else
                    ([[1]] * 6, ids, None, texts, None, {}, None, None))

        def _calculate_rewards(self, *args):
            return torch.tensor(REWARDS, dtype=torch.float64)[:, None]

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return (self.new if torch.is_grad_enabled() else old), torch.zeros_like(old), None

    return Recorded()


def record():
    """All cases, as written to the file."""
    old, new = log_probs()
    out = {"group": GROUP, "length": LENGTH, "lengths": LENGTHS, "rewards": REWARDS, "old": old.tolist(),
           "new": new.tolist(), "cases": {}}
    for name, case in CASES.items():
        trainer = recorded(GRPOTrainer, **GRPO | case)
        inputs = trainer._generate_and_score_completions([{"prompt": ""}] * 6)
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        out["cases"][name] = GRPO | case | {"advantages": inputs["advantages"].tolist(), "loss": loss.item(),
                                            "gradient": trainer.new.grad.tolist()}
    rloo = recorded(RLOOTrainer)._generate_and_score_completions([{"prompt": ""}] * 6)
    out["leave_one_out"] = rloo["advantages"].tolist()
    return out


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("trl.json").write_text(json.dumps(record()) + "\n")
