"""The peer "trl" of `benchmarks.agreement`: TRL's functions on the cases of a file.

    python -m benchmarks.peers.trl_functions CASES ANSWERS

Losses and advantages are methods of TRL's trainers; they are called with an object that has the attributes they read,
whose log-probabilities and rewards are the case's. Runs in the environment of `trl.txt`.
"""
from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.utils import selective_log_softmax_and_entropy

from benchmarks.peers.exchange import answer


def tensor(array: np.ndarray, gradient: bool = False) -> torch.Tensor:
    """A copy of an array, which read-only bytes may hold."""
    return torch.tensor(np.array(array), requires_grad=gradient)


def derived(value: torch.Tensor, by: torch.Tensor) -> np.ndarray:
    """The gradient of a sum."""
    return torch.autograd.grad(value.sum(), by, allow_unused=True, materialize_grads=True)[0].numpy()


class _Accelerator(SimpleNamespace):
    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x


def _trainer(**settings):
    """What the trainers' methods read, with the defaults of their configurations."""
    return SimpleNamespace(**{
        "accelerator": _Accelerator(), "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list)), "beta": 0.0} | settings)


def _inputs(mask, **arrays):
    """A batch whose prompts have one token."""
    one = torch.ones(len(mask), 1, dtype=torch.long)
    return {"prompt_ids": one, "prompt_mask": one, "completion_ids": torch.ones(mask.shape, dtype=torch.long),
            "completion_mask": tensor(mask).long(), "num_items_in_batch": tensor(mask).sum(), **arrays}


def _returning(log_prob):
    return lambda *args, **kwargs: (log_prob, torch.zeros_like(log_prob), None)


def grpo_loss(log_prob, old, advantage, mask, clip, clip_high, ref=None, coef=0.0, dual_clip=None, *, loss_type, length,
              level="token", corrected=False):
    """GRPOTrainer's loss and its gradient in the log-probabilities."""
    log_prob = tensor(log_prob, gradient=True)
    if loss_type == "cispo":
        clip_high = clip_high + 1       # TRL's epsilon_high is the bound itself
    trainer = _trainer(
        _get_per_token_logps_and_entropies=_returning(log_prob), loss_type=loss_type, importance_sampling_level=level,
        epsilon_low=float(clip), epsilon_high=float(clip_high), beta=float(coef), max_completion_length=length,
        args=SimpleNamespace(delta=None if dual_clip is None else float(dual_clip), use_bias_correction_kl=corrected,
                             steps_per_generation=1))
    inputs = _inputs(mask, advantages=tensor(advantage), old_per_token_logps=tensor(old))
    if ref is not None:
        inputs["ref_per_token_logps"] = tensor(ref)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return {"loss": loss.detach().numpy(), "gradient": derived(loss, log_prob)}


def rloo_loss(log_prob, advantage, mask, *, length):
    """RLOOTrainer's gradient on-policy; it has no use for the longest episode's length."""
    del length
    log_prob = tensor(log_prob, gradient=True)
    trainer = _trainer(_get_per_token_logps_and_entropies=_returning(log_prob), epsilon_low=0.2, epsilon_high=0.2)
    old = (log_prob.detach() * tensor(mask)).sum(1)
    loss = RLOOTrainer._compute_loss(
        trainer, trainer.model, _inputs(mask, advantages=tensor(advantage), old_logps=old))
    return {"gradient": derived(loss, log_prob)}


def _scored(trainer_class, reward, mask, group, beta=0.0, log_prob=None, ref=None, **settings):
    """Advantages [b] that a trainer gives to completions with these masks, of several reward functions [b, n]."""
    lengths, names = np.array(mask).sum(1), [str(i) for i in range(reward.shape[1])]
    completions = [[1] * int(length) for length in lengths]
    reference = SimpleNamespace()
    # GRPOTrainer's generation returns eight things, RLOOTrainer's three.
    made = [[1]] * len(reward), completions, completions
    if trainer_class is GRPOTrainer:
        made = [[1]] * len(reward), completions, None, completions, None, {}, None, None

    def read(model, *args, **kwargs):
        own = ref if model is reference else log_prob
        own = np.zeros(mask.shape) if own is None else own
        return tensor(own[:, :int(lengths.max())]), None, None

    trainer = _trainer(
        _generate=lambda prompts: made, _calculate_rewards=lambda *args: tensor(reward), environment_factories=None,
        environments=None, tools=None, _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None,
        mask_truncated_completions=False, num_iterations=1, num_generations=group, reward_func_names=names,
        reward_weights=torch.ones(len(names), dtype=tensor(reward).dtype), ref_model=reference, reward_clip_range=None,
        _get_per_token_logps_and_entropies=read, _logs=defaultdict(lambda: defaultdict(list)), beta=beta,
        args=SimpleNamespace(per_device_train_batch_size=len(reward), gradient_checkpointing_kwargs=None,
                             steps_per_generation=1, gradient_accumulation_steps=1),
        _pending_extra_logs={}, _pending_metrics={}, **settings)
    trainer._logs.update(prompt=[], completion=[], advantages=[])
    trainer.model.is_gradient_checkpointing = False
    inputs = [{"prompt": "x"}] * len(reward)
    out = trainer_class._generate_and_score_completions(trainer, inputs)
    return {"advantage": out["advantages"].numpy()}


def grpo_advantage(reward, mask, *, group, scale):
    return _scored(GRPOTrainer, reward, mask, group, scale_rewards=scale,
                   multi_objective_aggregation="sum_then_normalize")


def rloo_advantage(reward, mask, log_prob, ref, coef, *, group):
    return _scored(RLOOTrainer, reward, mask, group, float(coef), log_prob, ref, normalize_advantages=False)


def divergence(logits, base, *, beta):
    """Generalised Jensen-Shannon divergence of each row, and its gradient in the first logits."""
    logits = tensor(logits, gradient=True)
    rows = GKDTrainer.generalized_jsd_loss(logits[:, None], tensor(base)[:, None], beta=beta, reduction="none")
    rows = rows.sum((1, 2))
    return {"divergence": rows.detach().numpy(), "gradient": derived(rows, logits)}


def hidden_divergence(hidden, table, base_hidden):
    """D(policy || base) of logits that are hidden states times a table, and its gradient in the hidden states."""
    hidden, table = tensor(hidden, gradient=True), tensor(table)
    rows = GKDTrainer.generalized_jsd_loss((hidden @ table.T)[:, None], (tensor(base_hidden) @ table.T)[:, None],
                                           beta=1, reduction="none").sum((1, 2))
    return {"divergence": rows.detach().numpy(), "gradient": derived(rows, hidden)}


def terms(logits, action, temperature):
    """Log-probabilities and entropies, and their gradients in the logits."""
    logits = tensor(logits, gradient=True)
    log_prob, entropy = selective_log_softmax_and_entropy(logits[:, None], tensor(action)[:, None],
                                                          temperature=float(temperature))
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0].numpy() for x in (log_prob, entropy)]
    return {"log_prob": log_prob.detach().numpy()[:, 0], "entropy": entropy.detach().numpy()[:, 0],
            "log_prob_gradient": gradients[0], "entropy_gradient": gradients[1]}


if __name__ == "__main__":
    answer({function.__name__: function for function in (
        grpo_loss, rloo_loss, grpo_advantage, rloo_advantage, divergence, hidden_divergence, terms)}, "trl", "torch")
