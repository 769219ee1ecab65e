"""The peers "rlax" and "distrax" of `benchmarks.agreement`: their functions on the cases of a file.

    python -m benchmarks.peers.rlax_functions CASES ANSWERS

Runs in the environment of `rlax.txt`.
"""
from __future__ import annotations

import warnings

import distrax
import jax
import jax.numpy as jnp
import rlax

from benchmarks.peers.exchange import answer


def clipped(log_prob, old, advantage, clip):
    """PPO's loss of one stream, and its gradient in the log-probabilities."""
    loss, gradient = jax.value_and_grad(lambda log_prob: rlax.clipped_surrogate_pg_loss(
        jnp.exp(log_prob - old), advantage, clip))(log_prob)
    return {"loss": loss, "gradient": gradient}


def policy_gradient(logits, action, advantage, weight):
    loss, gradient = jax.value_and_grad(lambda logits: rlax.policy_gradient_loss(
        logits, action, advantage, weight))(logits)
    return {"loss": loss, "gradient": gradient}


def entropy_loss(logits, weight):
    loss, gradient = jax.value_and_grad(lambda logits: rlax.entropy_loss(logits, weight))(logits)
    return {"loss": loss, "gradient": gradient}


def value_loss(value, returns):
    loss, gradient = jax.value_and_grad(lambda value: rlax.l2_loss(value, returns).mean())(value)
    return {"loss": loss, "gradient": gradient}


def gae(reward, value, discount, gae_lambda):
    return {"advantage": rlax.truncated_generalized_advantage_estimation(
        reward, jnp.full_like(reward, discount), gae_lambda, jnp.append(value, jnp.zeros((), value.dtype)))}


def returns(reward, discount):
    return {"returns": rlax.discounted_returns(reward, jnp.full_like(reward, discount), jnp.zeros_like(reward))}


def kl_of_logits(logits, base, temperature, *, exchanged):
    """rlax's KL of rows of logits, and its gradient in the first."""
    def total(logits):
        pair = (base, logits) if exchanged else (logits, base)
        rows = rlax.categorical_kl_divergence(*pair, temperature)
        return rows.sum(), rows

    gradient, rows = jax.grad(total, has_aux=True)(logits)
    return {"divergence": rows, "gradient": gradient}


def ratios(logits, base, action):
    return {"ratio": rlax.categorical_importance_sampling_ratios(logits, base, action)}


def _temperature(gap, temperature, allowance):
    return rlax.mpo_compute_weights_and_temperature_loss(
        gap, rlax.LagrangePenalty(temperature, allowance), lambda x: x)


def mpo_weights(gap, alpha, allowance, log_base):
    """MPO's distribution over samples; the base is even over them."""
    return {"weights": _temperature(gap, 1 / alpha, allowance)[1]}


def mpo_slope(gap, alpha, allowance, log_base):
    """By how much the dual of MPO's temperature is not stationary, in parts of the allowance."""
    slope = jax.grad(lambda temperature: _temperature(gap, temperature, allowance)[0])(1 / alpha)
    return {"slope": slope / allowance}


def categorical(log_policy, log_base):
    """distrax's KL of distributions that may exclude tokens, both ways."""
    policy, base = distrax.Categorical(log_policy), distrax.Categorical(log_base)
    return {"reverse": policy.kl_divergence(base), "forward": base.kl_divergence(policy)}


def terms(logits, action, temperature):
    """distrax's log-probabilities and entropies, and their gradients in the logits."""
    policy = lambda logits: distrax.Softmax(logits, temperature)  # noqa: E731
    found = {}
    for name, of in (("log_prob", lambda logits: policy(logits).log_prob(action)),
                     ("entropy", lambda logits: policy(logits).entropy())):
        found |= {name: of(logits), f"{name}_gradient": jax.grad(lambda logits, of=of: of(logits).sum())(logits)}
    return found


def _tilt_kl(gap, log_base, alpha):
    return distrax.Categorical(log_base + alpha * gap).kl_divergence(distrax.Categorical(log_base))


def tilted_kl(gap, log_base, alpha, allowance):
    """distrax's KL of a tilt."""
    return {"kl": _tilt_kl(gap, log_base, alpha)}


def tilted_excess(gap, log_base, alpha, allowance):
    """By how much it is above the allowance, in parts of that."""
    return {"excess": jnp.maximum(_tilt_kl(gap, log_base, alpha) / allowance - 1, 0)}


def tilted(gap, log_base, alpha, allowance):
    """The tilt's log-probabilities, and how the strength at a given KL depends on that KL and on the gap."""
    by_gap, by_alpha = jax.grad(_tilt_kl, (0, 2))(gap, log_base, alpha)
    policy = distrax.Categorical(log_base + alpha * gap)
    return {"log_probs": policy.log_prob(jnp.arange(gap.shape[-1])), "by_allowance": 1 / by_alpha,
            "by_gap": -by_gap / by_alpha}


def mixture(log_probs, log_weights):
    mixed = distrax.MixtureSameFamily(distrax.Categorical(log_weights), distrax.Categorical(log_probs))
    return {"log_probs": mixed.log_prob(jnp.arange(log_probs.shape[-1]))}


if __name__ == "__main__":
    warnings.simplefilter("ignore")     # rlax refers to distrax's functions
    jax.config.update("jax_enable_x64", True)
    functions = {function.__name__: jax.jit(function) for function in (
        clipped, policy_gradient, entropy_loss, value_loss, gae, returns, kl_of_logits, ratios, mpo_weights, mpo_slope,
        categorical, terms, tilted_kl, tilted_excess, tilted, mixture)}
    functions["kl_of_logits"] = jax.jit(kl_of_logits, static_argnames="exchanged")
    answer(functions, "rlax", "distrax", "jax")
