"""Policy losses with their reductions, the value loss, and the reductions alone; values and gradients."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparisons.comparison import Comparison, Tolerance, hyper, log_probs, logits, mask, shape
from kl_reg.algorithms import LOSSES
from kl_reg.algorithms.reductions import REDUCTIONS
from kl_reg.algorithms.value import squared_error
from kl_reg.kl.estimators import KLConfig, build
from kl_reg.kl.exact import TokenTerms, token_terms

LENGTH = 40     # the longest stream that the environment allows


def _batch(rng, *, largest=20.0, clips=(0.1, 0.2, 0.3), highs=(0.1, 0.2, 0.28, 1.0), per_token=False, **more):
    """Tokens with an advantage for each row (or for each token), and clips."""
    rows, tokens = shape(rng)
    log_prob, old = log_probs(rng, (rows, tokens), -largest, largest)
    advantage = rng.choice([0.1, 1.0, 10.0]) * rng.normal(size=(rows, tokens if per_token else 1))
    arrays = {"log_prob": log_prob, "old": old, "mask": mask(rng, rows, tokens), "clip": rng.choice(clips),
              "clip_high": rng.choice(highs), "advantage": np.broadcast_to(advantage, (rows, tokens))}
    return arrays | {name: draw(rng, arrays) for name, draw in more.items()}, {"length": LENGTH}


def _reference(rng, arrays):
    """A reference's log-probabilities, from 20 nats below the policy's to 10 above."""
    ratio = np.clip(rng.choice([0.01, 1.0, 10.0]) * rng.normal(size=arrays["log_prob"].shape), -10, 20)
    return arrays["log_prob"] - ratio


def _loss(x, *, loss, reduction, length, kl=None):
    """The reduced loss and its gradient; rounding acts on the tokens' sizes, not on what remains of their sum."""
    settings = hyper(**{name: x[name] for name in ("clip", "clip_high", "dual_clip", "truncation") if name in x})

    def reduce(each):
        return REDUCTIONS[reduction](each, x["mask"], length).mean()

    def total(log_prob):
        each = jax.vmap(LOSSES[loss], (0, 0, 0, 0, None))(log_prob, x["old"], x["advantage"], x["mask"], settings)
        if kl:
            penalty = build(KLConfig(estimator=kl, placement="loss")).loss
            zero = jnp.zeros_like(log_prob)
            terms = TokenTerms(log_prob, log_prob - x["ref"], zero, zero, zero)
            each += x["coef"] * jax.vmap(penalty)(terms, zero, jnp.exp(log_prob - x["old"]), x["mask"])
        return reduce(each), jnp.abs(each)

    (value, sizes), gradient = jax.value_and_grad(total, has_aux=True)(x["log_prob"])
    scales = {"loss": reduce(sizes)}
    if kl:
        scales["gradient"] = jnp.maximum(1, sizes * jax.grad(reduce)(sizes))
    return {"loss": value, "gradient": gradient}, scales


def _value_loss(x):
    def total(value):
        each = jax.vmap(squared_error, (0, 0, 0, None))(value, x["old"], x["returns"], x["clip"])
        return REDUCTIONS["token_mean"](each, x["mask"], 0).mean()

    value, gradient = jax.value_and_grad(total)(x["value"])
    return {"loss": value, "gradient": gradient}, {}


def _values(rng):
    rows, tokens = shape(rng)
    old, returns = rng.choice([0.1, 1.0, 30.0]) * rng.normal(size=(2, rows, tokens))
    value = old + rng.choice([0.01, 1.0]) * rng.normal(size=old.shape)
    return {"value": value, "old": old, "returns": returns, "mask": mask(rng, rows, tokens),
            "clip": rng.choice([0.05, 0.2, 1.0])}, {}


def _parts(rng):
    """Numbers of tokens, cut into parts of a batch by rows; some rows without a token."""
    rows, tokens = shape(rng)
    counted = mask(rng, rows, tokens)
    if rows > 1:
        counted[rng.integers(rows)] = False
    x = rng.choice([0.1, 1.0, 100.0]) * rng.normal(size=(rows, tokens))
    return {"x": x, "mask": counted, "parts": np.sort(rng.integers(3, size=rows))}, {"length": LENGTH}


def _reduced_parts(x, *, reduction, length):
    """Totals and weights of three parts, added up before dividing."""
    found, size = [], []
    for part in range(3):
        rows = x["parts"] == part
        counted, one = x["mask"] & rows[:, None], jnp.where(rows[:, None], x["x"], 0.0)
        found.append(REDUCTIONS[reduction](one, counted, length))
        size.append(REDUCTIONS[reduction](jnp.abs(one), counted, length).total)
    total, weight = (sum(part) for part in zip(*found, strict=True))
    weight = found[0].weight if reduction == "fixed_length" else weight         # it counts rows, which are masked here
    return {"loss": total / weight}, {"loss": sum(size) / weight}


def _stream(x):
    """rlax's losses are of one stream of which every token counts."""
    return {name: value[None] if value.ndim else value for name, value in x.items()}


def _clipped_stream(x):
    count = len(x["log_prob"])
    rows = _stream(x | {"clip_high": x["clip"], "mask": jnp.ones(count, bool)})
    found, scales = _loss(rows, loss="ppo_clip", reduction="token_mean", length=count)
    return {"loss": found["loss"], "gradient": found["gradient"][0]}, scales


def _one_stream(rng):
    tokens = int(rng.choice([1, 9, 33]))
    log_prob, old = log_probs(rng, (tokens,), -20, 20)
    return {"log_prob": log_prob, "old": old, "advantage": rng.normal(size=tokens), "clip": rng.choice([0.1, 0.3])}, {}


def _logit_stream(rng):
    tokens, vocabulary = int(rng.choice([1, 9, 33])), 12
    return {"logits": logits(rng, tokens, vocabulary), "action": rng.integers(vocabulary, size=tokens),
            "advantage": rng.normal(size=tokens), "weight": rng.uniform(0.05, 2, tokens)}, {}


def _policy_gradient(x):
    """`reinforce` with the old policy from which the weights come, of logits."""
    log_base = jnp.zeros_like(x["logits"])

    def total(logits):
        log_prob = jax.vmap(token_terms)(logits, log_base, x["action"]).log_prob
        old = jax.lax.stop_gradient(log_prob) - jnp.log(x["weight"])
        each = LOSSES["reinforce"](log_prob, old, x["advantage"], jnp.ones(len(log_prob), bool),
                                   hyper(truncation=jnp.inf))
        return each.mean(), jnp.abs(each).mean()

    (value, size), gradient = jax.value_and_grad(total, has_aux=True)(x["logits"])
    return {"loss": value, "gradient": gradient}, {"loss": size}


def _on_policy(rng):
    arrays, settings = _batch(rng)
    return {"log_prob": arrays["log_prob"], "mask": arrays["mask"], "advantage": arrays["advantage"][:, 0]}, settings


def _on_policy_loss(x, *, length):
    """The sum over tokens, the mean over episodes."""
    full = jnp.broadcast_to(x["advantage"][:, None], x["mask"].shape)
    found, _ = _loss(x | {"old": x["log_prob"], "advantage": full, "truncation": jnp.inf}, loss="reinforce",
                     reduction="fixed_length", length=length)
    return {"gradient": found["gradient"] * length}, {}


def _plain_value_loss(x):
    rows = _stream(x | {"old": x["value"], "clip": jnp.asarray(jnp.inf), "mask": jnp.ones(len(x["value"]), bool)})
    found, _ = _value_loss(rows)
    return {"loss": found["loss"], "gradient": found["gradient"][0]}, {}


def _value_stream(rng):
    tokens = int(rng.choice([1, 9, 33]))
    return {"value": 3 * rng.normal(size=tokens), "returns": 3 * rng.normal(size=tokens)}, {}


def _cispo(rng, **how):
    """Weights have no lower bound: a clip of 1."""
    return _batch(rng, clips=(1.0,), highs=(0.28, 4.0), **how)


def _trl(rule, loss, reduction, draw, mapping="", **given):
    return Comparison("policy loss", "trl", f"TRL GRPOTrainer, {rule}", f"{loss}, {reduction}", mapping, "grpo_loss",
                      draw, partial(_loss, loss=loss, reduction=reduction), given)


def _trl_kl(rule, kl, reduction, draw, mapping="", **given):
    return Comparison("KL estimator", "trl", f"TRL GRPOTrainer, {rule}", f"ppo_clip with {kl} in the loss", mapping,
                      "grpo_loss", draw, partial(_loss, loss="ppo_clip", reduction=reduction, kl=kl), given,
                      Tolerance(1e-7, 1e-4))    # k3's series near 0 is cut; weighted, e^20 cancels in its gradient


def _coef(rng, arrays):
    return rng.choice([0.01, 0.1, 1.0])


_TRL_CLIP = partial(_batch, largest=40.0, per_token=True)
_WITH_KL = partial(_batch, ref=_reference, coef=_coef)
_GSPO = partial(_batch, clips=(3e-4, 0.1), highs=(4e-4, 0.2))
_CLAMPED = "verl clamps log-ratios to +-20: drawn inside"

TRL = (
    _trl("loss_type=grpo", "ppo_clip", "sequence_mean", _TRL_CLIP, loss_type="grpo"),
    _trl("loss_type=bnpo", "ppo_clip", "token_mean", _TRL_CLIP, loss_type="bnpo"),
    _trl("loss_type=dapo", "ppo_clip", "token_mean", _TRL_CLIP, loss_type="dapo"),
    _trl("loss_type=dr_grpo", "ppo_clip", "fixed_length", _TRL_CLIP, "max_completion_length is env.length",
         loss_type="dr_grpo"),
    _trl("loss_type=grpo, delta", "dual_clip", "sequence_mean",
         partial(_TRL_CLIP, dual_clip=lambda rng, arrays: rng.uniform(2.5, 10)),
         "delta is rl.dual_clip, above 1 + clip_high", loss_type="grpo"),
    _trl("loss_type=cispo", "cispo", "token_mean", partial(_cispo, largest=40.0, per_token=True),
         "epsilon_high is 1 + clip_high; no lower bound is clip 1", loss_type="cispo"),
    _trl("importance_sampling_level=sequence", "gspo", "sequence_mean", partial(_GSPO, largest=40.0), loss_type="grpo",
         level="sequence"),
    _trl_kl("loss_type=grpo, beta", "k3", "sequence_mean", _WITH_KL, loss_type="grpo"),
    _trl_kl("loss_type=dapo, beta, use_bias_correction_kl", "k3_weighted", "token_mean",
            partial(_WITH_KL, largest=10.0), "both ratios at once: log-ratios within 10", loss_type="dapo",
            corrected=True),
    Comparison("policy loss", "trl", "TRL RLOOTrainer, on-policy", "reinforce, fixed_length, on-policy",
               "TRL sums over an episode's tokens: times env.length", "rloo_loss", _on_policy, _on_policy_loss))

_MODES = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum-norm": "fixed_length"}
_ROUNDED = Tolerance(float64=1e-7)      # verl adds 1e-8 to numbers of tokens


def _verl(loss, ours, mode, mapping, draw, name=None):
    return Comparison("policy loss", "verl", f"verl {loss}, {mode}", f"{ours}, {_MODES[mode]}", mapping, "policy_loss",
                      draw, partial(_loss, loss=ours, reduction=_MODES[mode]),
                      {"loss": name or loss, "mode": mode}, _ROUNDED if mode == "seq-mean-token-mean" else Tolerance())


VERL = (
    *(_verl("vanilla", "ppo_clip", mode, _CLAMPED + "; clip_ratio_c out of reach", partial(_batch, per_token=True))
      for mode in _MODES),
    *(_verl("vanilla", "dual_clip", mode, _CLAMPED + "; clip_ratio_c is rl.dual_clip", partial(
        _batch, per_token=True, dual_clip=lambda rng, arrays: rng.uniform(1.1, 10))) for mode in _MODES),
    *(_verl("gspo", "gspo", mode, "verl clamps an episode's log-ratio to 10: drawn inside",
            partial(_GSPO, largest=9.5)) for mode in _MODES),
    *(_verl("cispo", "cispo", mode, _CLAMPED, partial(_cispo, per_token=True)) for mode in _MODES),
    *(_verl("bypass_mode, loss_type=reinforce", "reinforce", mode,
            "rollout_is_threshold is rl.truncation; " + _CLAMPED,
            partial(_batch, per_token=True, truncation=lambda rng, arrays: rng.choice([1.0, 2.0, 5.0])),
            "bypass_mode") for mode in _MODES),
    Comparison("value loss", "verl", "verl compute_value_loss", "squared_error, token_mean", "", "value_loss", _values,
               _value_loss),
    *(Comparison("reduction", "verl", f"verl agg_loss, {mode}", f"{ours} of three parts",
                 "the sizes of the whole batch are given to verl", "reduction", _parts,
                 partial(_reduced_parts, reduction=ours), {"mode": mode}, _ROUNDED)
      for mode, ours in _MODES.items()))

RLAX = (
    Comparison("policy loss", "rlax", "rlax clipped_surrogate_pg_loss", "ppo_clip, token_mean",
               "rlax takes the ratio, one epsilon and one stream without a mask", "clipped", _one_stream,
               _clipped_stream),
    Comparison("policy loss", "rlax", "rlax policy_gradient_loss", "reinforce of logits",
               "w_t is the ratio, not truncated", "policy_gradient", _logit_stream, _policy_gradient),
    Comparison("value loss", "rlax", "rlax l2_loss", "squared_error, not clipped", "", "value_loss", _value_stream,
               _plain_value_loss))

COMPARISONS = (*TRL, *VERL, *RLAX)
