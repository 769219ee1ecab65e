"""KL estimators, exact divergences, entropies and log-probabilities, and tilts; values and gradients."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparisons.comparison import Comparison, Tolerance, log_probs, log_softmax, logits, near
from kl_reg.kl.chunked import chunked_terms
from kl_reg.kl.divergences import DIVERGENCES
from kl_reg.kl.estimators import KLConfig, build
from kl_reg.kl.exact import TokenTerms, token_terms
from kl_reg.kl.operations import tilt
from kl_reg.references.bayes import mixture

VOCABULARIES = (2, 7, 65)
ROWS = 5


def _ratios(rng, low, high):
    log_prob, ref = log_probs(rng, (ROWS, 8), low, high)
    return {"log_prob": log_prob, "ref": ref}, {}


def _estimator(x, *, estimator, direction="reverse", gradient_of=None):
    """The estimate of each token and the gradient of the penalty in the loss."""
    def each(log_prob, name):
        kl = build(KLConfig(estimator=name, direction=direction, placement="loss", allow_biased=True))
        zero = jnp.zeros_like(log_prob)
        terms = TokenTerms(log_prob, log_prob - x["ref"], zero, zero, zero)
        return kl.loss(terms, zero, jnp.ones_like(zero), jnp.ones(zero.shape, bool))

    gradient = jax.grad(lambda log_prob: each(log_prob, gradient_of or estimator).sum())(x["log_prob"])
    return {"kl": each(x["log_prob"], estimator), "gradient": gradient}, {}


def _pair(rng):
    base = logits(rng, ROWS, rng.choice(VOCABULARIES))
    return {"logits": near(rng, base), "base": base}, {}


def _pair_at_temperature(rng):
    return _pair(rng)[0] | {"temperature": rng.choice([0.5, 1.0, 2.0])}, {}


def _divergence(x, *, name):
    """Of normalised distributions, and its gradient in the logits of the first."""
    temperature = x.get("temperature", 1.0)
    log_base = jax.nn.log_softmax(x["base"] / temperature)

    def rows(logits):
        scaled = logits / temperature
        if name == "jensen_shannon":
            return jax.vmap(DIVERGENCES[name])(jax.nn.log_softmax(scaled), log_base)
        terms = jax.vmap(partial(token_terms, forward=True))(scaled, log_base, jnp.zeros(len(logits), int))
        return terms.kl if name == "kl" else terms.forward_kl

    return {"divergence": rows(x["logits"]), "gradient": jax.grad(lambda logits: rows(logits).sum())(x["logits"])}, {}


def _hidden(rng):
    """Hidden states of a policy and its base, and their unembedding."""
    table, base = rng.normal(size=(rng.choice(VOCABULARIES), 6)), rng.normal(size=(ROWS, 6))
    return {"hidden": near(rng, base), "table": table, "base_hidden": base}, {}


def _chunked(x):
    def rows(hidden):
        return chunked_terms(hidden, x["table"], x["base_hidden"], x["table"], jnp.zeros(ROWS, int), relative=False,
                             chunk=2, differentiate=("kl",)).kl

    return {"divergence": rows(x["hidden"]), "gradient": jax.grad(lambda hidden: rows(hidden).sum())(x["hidden"])}, {}


def _drawn(rng, temperature=True):
    vocabulary = rng.choice(VOCABULARIES)
    arrays = {"logits": logits(rng, ROWS, vocabulary), "action": rng.integers(vocabulary, size=ROWS)}
    return arrays | ({"temperature": rng.choice([0.5, 1.0, 2.0])} if temperature else {}), {}


def _terms(x):
    temperature = x.get("temperature", 1.0)
    flat, found = jnp.zeros_like(x["logits"]), {}
    for name in ("log_prob", "entropy"):
        def of(logits, name=name):
            return getattr(jax.vmap(token_terms)(logits / temperature, flat, x["action"]), name)
        found |= {name: of(x["logits"]), f"{name}_gradient": jax.grad(lambda z, of=of: of(z).sum())(x["logits"])}
    return found, {}


def _entropy_case(rng):
    arrays, _ = _drawn(rng)
    return {"logits": arrays["logits"], "weight": rng.uniform(0, 2, ROWS)}, {}


def _entropy_loss(x):
    def loss(logits):
        terms = jax.vmap(token_terms)(logits, jnp.zeros_like(logits), jnp.zeros(len(logits), int))
        return -(terms.entropy * x["weight"]).mean()

    return {"loss": loss(x["logits"]), "gradient": jax.grad(loss)(x["logits"])}, {}


def _ratio_case(rng):
    arrays, _ = _pair(rng)
    return arrays | {"action": rng.integers(arrays["base"].shape[1], size=ROWS)}, {}


def _ratio(x):
    log_base = jax.nn.log_softmax(x["base"])
    return {"ratio": jnp.exp(jax.vmap(token_terms)(x["logits"], log_base, x["action"]).log_ratio)}, {}


def _partial_pair(rng):
    """Distributions that exclude tokens, each others of its own."""
    arrays, _ = _pair(rng)
    out = {}
    for name, x in zip(("log_policy", "log_base"), arrays.values(), strict=True):
        x = np.where(rng.random(x.shape) < rng.choice([0.0, 0.3]), -np.inf, x)
        x[:, 0] = arrays["base"][:, 0]
        out[name] = log_softmax(x)
    return out, {}


def _both_ways(x):
    return {ours: jax.vmap(DIVERGENCES[name])(x["log_policy"], x["log_base"])
            for ours, name in (("reverse", "kl"), ("forward", "forward_kl"))}, {}


def _solved(rng, even=False, dtype="float64"):
    """A proposal's distance from the base, an allowance that binds, and the strength that kl_reg finds for it."""
    vocabulary = rng.choice(VOCABULARIES)
    log_base = log_softmax(np.zeros(vocabulary) if even else logits(rng, vocabulary))
    gap = rng.choice([1.0, 4.0]) * rng.normal(size=vocabulary)
    log_policy = log_softmax(log_base + rng.uniform(0.02, 0.98) * gap)
    allowance = (np.exp(log_policy) * (log_policy - log_base)).sum()
    gap, allowance, log_base = (np.asarray(x, dtype) for x in (gap, allowance, log_base))
    alpha = np.asarray(_solve(*map(jnp.asarray, (gap, allowance, log_base))))
    return {"gap": gap, "allowance": allowance, "log_base": log_base, "alpha": alpha}, {}


_solve = jax.jit(tilt)


def _allowed(x):
    """The peer's KL at kl_reg's strength is to be the allowance, and no more."""
    return {"kl": x["allowance"]}, {"kl": x["allowance"]}


def _not_above(x):
    return {"excess": jnp.zeros_like(x["allowance"])}, {}


def _tilt(x):
    by_gap, by_allowance = jax.grad(tilt, (0, 1))(x["gap"], x["allowance"], x["log_base"])
    found = {"log_probs": jax.nn.log_softmax(x["log_base"] + x["alpha"] * x["gap"]), "by_allowance": by_allowance,
             "by_gap": by_gap}
    return found, {"by_gap": jnp.maximum(1, jnp.abs(by_gap).max())}


def _weights(x):
    return {"weights": jax.nn.softmax(x["alpha"] * x["gap"])}, {}


def _stationary(x):
    return {"slope": jnp.zeros_like(x["alpha"])}, {}


def _models(rng):
    vocabulary, models = rng.choice(VOCABULARIES), int(rng.integers(1, 5))
    return {"log_probs": log_softmax(logits(rng, models, vocabulary)),
            "log_weights": log_softmax(3 * rng.normal(size=models))}, {}


def _mixture(x):
    return {"log_probs": mixture(x["log_probs"], x["log_weights"])}, {}


def _verl_kl(name, ours, low=-20.0, high=20.0, mapping="", gradient_of=None, **how):
    exchanged = "direction" in how
    theirs = f"verl kl_penalty, {name}" + ", roles exchanged" * exchanged
    draw = partial(_ratios, low=low, high=high)
    evaluate = partial(_estimator, estimator=ours.split(",")[0], gradient_of=gradient_of, **how)
    return Comparison("KL estimator", "verl", theirs, ours, mapping, "kl", draw, evaluate,
                      {"name": name, "exchanged": exchanged}, _SERIES if "k3" in name else Tolerance())


_K3 = "verl clamps log-ratios to +-20 and k3 to 10: drawn inside"
_FORWARD = "exchanged and times the ratio of the roles, as the forward direction has it"
_SERIES = Tolerance(1e-7)       # near 0 kl_reg's series are cut after a few powers, which is enough for float32
_SOLVED = Tolerance(3e-4)       # of the allowance: the solver stops 1e-4 below it, and leaves room for rounding

ESTIMATORS = (
    _verl_kl("k1", "k1"), _verl_kl("k2", "k2"), _verl_kl("abs", "absolute"),
    _verl_kl("k3", "k3", -2.4, 10.0, _K3),
    _verl_kl("k3+", "k3, gradient of k2", -2.4, 10.0, _K3, gradient_of="k2"),
    _verl_kl("k1", "k1, forward", -10.0, 10.0, _FORWARD, direction="forward"),
    _verl_kl("k2", "k2, forward", -10.0, 10.0, _FORWARD, direction="forward"),
    _verl_kl("abs", "absolute, forward", -10.0, 10.0, _FORWARD, direction="forward"),
    _verl_kl("k3", "k3, forward", -10.0, 2.4, _FORWARD + "; " + _K3, direction="forward"))

DIVERGENCE = (
    *(Comparison("divergence", "trl", f"TRL generalized_jsd_loss, beta={beta}", name, "beta " + meant, "divergence",
                 _pair, partial(_divergence, name=name), {"beta": beta}, _SERIES)
      for beta, name, meant in ((1, "kl", "1 is reverse KL"), (0, "forward_kl", "0 is forward KL"),
                                (0.5, "jensen_shannon", "0.5 is Jensen-Shannon"))),
    Comparison("divergence", "trl", "TRL generalized_jsd_loss, beta=1", "kl of hidden states by chunks",
               "TRL gets the logits; kl_reg's are float32", "hidden_divergence", _hidden, _chunked,
               precisions=("float32",)),
    *(Comparison("divergence", "rlax", "rlax categorical_kl_divergence" + ", exchanged" * exchanged, name, "",
                 "kl_of_logits", _pair_at_temperature, partial(_divergence, name=name), {"exchanged": exchanged},
                 _SERIES) for name, exchanged in (("kl", False), ("forward_kl", True))),
    Comparison("divergence", "rlax", "distrax Categorical.kl_divergence", "kl and forward_kl, tokens excluded", "",
               "categorical", _partial_pair, _both_ways, tolerance=_SERIES))

_TERMS = partial(Comparison, "log-probability, entropy")
TERMS = (
    _TERMS("trl", "TRL selective_log_softmax_and_entropy", "token_terms", "", "terms", _drawn, _terms),
    _TERMS("verl", "verl logprobs_from_logits_naive, entropy_from_logits", "token_terms", "", "terms",
           partial(_drawn, temperature=False), _terms),
    _TERMS("rlax", "distrax Softmax, log_prob and entropy", "token_terms", "", "terms", _drawn, _terms),
    _TERMS("rlax", "rlax entropy_loss", "token_terms", "", "entropy_loss", _entropy_case, _entropy_loss),
    _TERMS("rlax", "rlax categorical_importance_sampling_ratios", "token_terms", "", "ratios", _ratio_case, _ratio),
    _TERMS("rlax", "distrax MixtureSameFamily.log_prob", "reference mixture", "", "mixture", _models, _mixture))

_SINGLE = partial(_solved, dtype="float32")
_DOUBLE = ("float64",)
TILTS = (
    Comparison("tilt", "rlax", "distrax kl_divergence at our strength", "the allowance", "relative to the allowance",
               "tilted_kl", _SINGLE, _allowed, tolerance=_SOLVED, precisions=_DOUBLE),
    Comparison("tilt", "rlax", "distrax kl_divergence above the allowance", "0", "relative to the allowance",
               "tilted_excess", _SINGLE, _not_above, tolerance=Tolerance(1e-5), precisions=_DOUBLE),
    Comparison("tilt", "rlax", "distrax kl_divergence, its derivatives", "tilt, its derivatives",
               "by the implicit function theorem", "tilted", _solved, _tilt, tolerance=Tolerance(1e-7),
               precisions=_DOUBLE),
    Comparison("tilt", "rlax", "rlax mpo_compute_weights_and_temperature_loss, weights", "the tilt of an even base",
               "MPO's temperature is 1 / strength, its epsilon the allowance", "mpo_weights",
               partial(_solved, even=True), _weights),
    Comparison("tilt", "rlax", "rlax mpo_compute_weights_and_temperature_loss, slope", "0 at our strength",
               "the temperature's dual is stationary; relative to the allowance", "mpo_slope",
               partial(_solved, even=True, dtype="float32"), _stationary, tolerance=_SOLVED, precisions=_DOUBLE))

COMPARISONS = (*ESTIMATORS, *DIVERGENCE, *TERMS, *TILTS)
