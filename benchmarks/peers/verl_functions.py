"""The peer "verl" of `benchmarks.agreement`: functions of verl's `core_algos` on the cases of a file.

    python -m benchmarks.peers.verl_functions CASES ANSWERS

verl's packages import ray, transformers and an inference engine, of which its functions use nothing: `_stand_ins` puts
empty modules in their place. Runs in the environment of `verl.txt`.
"""
from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from benchmarks.peers.exchange import answer


class ActorConfig:
    """In place of verl's settings of an actor, which need a GPU stack: those that its losses read."""

    def __init__(self, clip, clip_high, dual_clip=1e30, batch=None, rollout_correction=None):
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high = float(clip), float(clip), float(clip_high)
        self.clip_ratio_c, self.global_batch_info = float(dual_clip), batch or {}
        self.policy_loss = {"rollout_correction": rollout_correction}

    def get(self, name, default=None):
        return getattr(self, name, default)


class DataProto(SimpleNamespace):
    """In place of verl's batches."""

    @classmethod
    def from_dict(cls, tensors):
        return cls(batch=tensors)


def _stand_ins():
    """Modules in place of those that `core_algos` imports and its functions do not use."""
    root = importlib.util.find_spec("verl").submodule_search_locations[0]

    def module(name, folder=None, **contents):
        made = sys.modules[name] = ModuleType(name)
        made.__path__ = [] if folder is None else [root + folder]
        made.__dict__.update(contents)

    module("verl", "")
    module("verl.utils", "/utils")
    module("verl.protocol", DataProto=DataProto)
    module("verl.workers")
    module("verl.workers.config", ActorConfig=ActorConfig)
    module("verl.workers.config.actor", PolicyLossConfig=dict)
    module("tensordict", TensorDict=dict)
    module("transformers", PreTrainedTokenizer=object)
    from verl.utils import groupwise
    sys.modules["verl.utils"].__dict__.update(as_torch_index=groupwise.as_torch_index,
                                              group_mean_std=groupwise.group_mean_std)


_stand_ins()

from verl.trainer.ppo import core_algos  # noqa: E402 - behind the modules that it imports
from verl.utils import torch_functional  # noqa: E402


def tensor(array: np.ndarray, gradient: bool = False) -> torch.Tensor:
    """A copy of an array, which read-only bytes may hold."""
    return torch.tensor(np.array(array), requires_grad=gradient)


def derived(value: torch.Tensor, by: torch.Tensor) -> np.ndarray:
    """The gradient of a sum."""
    return torch.autograd.grad(value.sum(), by, allow_unused=True, materialize_grads=True)[0].numpy()


def policy_loss(log_prob, old, advantage, mask, clip, clip_high, dual_clip=1e30, truncation=None, *, loss, mode,
                length):
    """A policy loss of verl's registry and its gradient in the log-probabilities."""
    log_prob = tensor(log_prob, gradient=True)
    mask = tensor(mask).to(log_prob.dtype)
    correction = None if truncation is None else {
        "loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": float(truncation)}
    batch = {"global_batch_size": len(mask), "loss_scale_factor": length} if mode == "seq-mean-token-sum-norm" else {}
    config = ActorConfig(clip, clip_high, dual_clip, batch, correction)
    value, _ = core_algos.get_policy_loss_fn(loss)(tensor(old), log_prob, tensor(advantage), mask, mode, config)
    return {"loss": value.detach().numpy(), "gradient": derived(value, log_prob)}


def value_loss(value, old, returns, mask, clip):
    value = tensor(value, gradient=True)
    loss, _ = core_algos.compute_value_loss(value, tensor(returns), tensor(old), tensor(mask).to(value.dtype),
                                            float(clip))
    return {"loss": loss.detach().numpy(), "gradient": derived(loss, value)}


def reduction(x, mask, parts, *, mode, length):
    """`agg_loss` of parts of a batch, whose sizes of the whole batch are given, added up."""
    x, mask, total = tensor(x), tensor(mask).to(tensor(x).dtype), 0.0
    batch = {"global_batch_size": int((mask.sum(1) > 0).sum())}
    if mode == "seq-mean-token-sum-norm":
        batch = {"global_batch_size": len(x), "loss_scale_factor": length}
    if mode == "token-mean":
        batch = {"batch_num_tokens": mask.sum()}
    for part in np.unique(parts):
        own = tensor(parts == part)
        total += core_algos.agg_loss(x[own], mask[own], mode, **batch)
    return {"loss": total.numpy()}


def kl(log_prob, ref, *, name, exchanged=False):
    """`kl_penalty` of each token and its gradient; `exchanged`: of the two roles, weighted by their ratio."""
    log_prob, ref = tensor(log_prob, gradient=True), tensor(ref)
    if exchanged:
        each = torch.exp(ref - log_prob) * core_algos.kl_penalty(ref, log_prob, name)
    else:
        each = core_algos.kl_penalty(log_prob, ref, name)
    return {"kl": each.detach().numpy(), "gradient": derived(each, log_prob)}


def kl_rewards(reward, log_prob, ref, coef):
    return {"reward": core_algos.compute_rewards(*map(tensor, (reward, log_prob, ref)), float(coef)).numpy()}


def group_advantage(reward, mask, number, *, name, **settings):
    """An advantage of verl's registry that compares groups of rows, which may lie in any order."""
    advantage, _ = core_algos.get_adv_estimator_fn(name)(
        tensor(reward), tensor(mask).to(tensor(reward).dtype), index=np.array(number), **settings)
    return {"advantage": advantage.numpy()}


def gae(reward, value, mask, discount, gae_lambda, *, whitened):
    """Advantages as verl has them, or returns and what they are above the values."""
    mask = tensor(mask).to(tensor(reward).dtype)
    advantage, returns = core_algos.compute_gae_advantage_return(
        tensor(reward), tensor(value), mask, float(discount), float(gae_lambda))
    if whitened:
        return {"advantage": (advantage * mask).numpy()}
    return {"advantage": ((returns - tensor(value)) * mask).numpy(), "returns": (returns * mask).numpy()}


def returns(reward, mask, discount):
    """Returns of REINFORCE++."""
    found = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        tensor(reward), tensor(mask).to(tensor(reward).dtype), SimpleNamespace(gamma=float(discount)))
    return {"returns": found[1].numpy()}


def controller(kl, coef, target, horizon, *, episodes):
    """Coefficients of the adaptive controller after each update."""
    adaptive = core_algos.AdaptiveKLController(float(coef), float(target), float(horizon))
    values = []
    for one in kl:
        adaptive.update(float(one), episodes)
        values.append(adaptive.value)
    return {"coefficient": np.array(values)}


def terms(logits, action):
    """Log-probabilities and entropies, and their gradients in the logits."""
    logits = tensor(logits, gradient=True)
    log_prob = torch_functional.logprobs_from_logits_naive(logits, tensor(action))
    entropy = torch_functional.entropy_from_logits(logits)
    return {"log_prob": log_prob.detach().numpy(), "entropy": entropy.detach().numpy(),
            "log_prob_gradient": derived(log_prob, logits), "entropy_gradient": derived(entropy, logits)}


if __name__ == "__main__":
    answer({function.__name__: function for function in (
        policy_loss, value_loss, reduction, kl, kl_rewards, group_advantage, gae, returns, controller, terms)},
        "verl", "torch")
