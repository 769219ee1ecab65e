"""Advantages and returns over groups of episodes, and the KL in the reward that goes before them."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.comparisons.comparison import Comparison, Tolerance, hyper, log_probs, mask
from kl_reg.algorithms.advantages import ADVANTAGES, normalise
from kl_reg.kl.controllers import CONTROLLERS
from kl_reg.kl.estimators import KLConfig, build
from kl_reg.kl.exact import TokenTerms

GROUPS = ((1, 2), (3, 2), (2, 5), (4, 8))
"""Groups and episodes in each."""

_FIRST = "the episode's return, at its last token here"
_MASKED, _END = "other writers' tokens are masked in verl", "the value at the end is 0"
_ROWS = "verl takes rows in any order, kl_reg groups in a row; its factor is at most 100: drawn inside"


def _scores(rng, groups, size):
    """Returns of episodes: normal, a few levels, right or wrong, all alike, or close together far from zero.

    They are equal or an eighth apart, because kl_reg's factor has a ceiling: deviations below 0.01 are no peer's.
    """
    rows = groups * size
    kind = rng.integers(5)
    if kind == 0:
        return _eighths(rng.choice([0.5, 5.0]) * rng.normal(size=rows))
    if kind == 1:
        return rng.integers(4, size=rows) / 4
    if kind == 2:
        return (rng.random(rows) < 0.3).astype(float)
    if kind == 3:
        return np.full(rows, rng.choice([0.0, 1.0, -2.5]))
    return rng.choice([-10.0, 10.0]) + _eighths(rng.normal(size=rows))


def _eighths(x):
    return np.round(8 * x) / 8


def _outcome(rng, holes=False):
    """Episodes in groups, with their return as the reward of their last token."""
    groups, size = GROUPS[rng.integers(len(GROUPS))]
    tokens = 7
    counted = mask(rng, groups * size, tokens, holes)
    last = tokens - 1 - counted[:, ::-1].argmax(1)
    reward = np.zeros(counted.shape)
    reward[np.arange(len(reward)), last] = _scores(rng, groups, size)
    return {"reward": reward, "mask": counted}, groups, size


def _grouped(x, size, *names):
    """Rows as groups [n, g, k]."""
    return [x[name].reshape(-1, size, x[name].shape[1]) for name in names]


def _estimate(reward, value, counted, discount, gae_lambda, *, name):
    """Advantages, returns and factors of groups [n, g, k]."""
    return jax.vmap(ADVANTAGES[name], (0, 0, 0, None, None))(reward, value, counted, discount, gae_lambda)


def _advantage(x, size, name, reward=None):
    """Of a name: advantages [b, k], and the size of what rounding acts on: the returns times the group's factor."""
    reward = x["reward"] if reward is None else reward
    rewards, counted = _grouped({"reward": reward, "mask": x["mask"]}, size, "reward", "mask")
    one = jnp.ones((), rewards.dtype)
    found, _, factor = _estimate(rewards, jnp.zeros_like(rewards), counted, one, one, name=name)
    scale = jnp.maximum(1, jnp.abs(reward.sum(1)).max() * jnp.maximum(1, factor.max()))
    return found.reshape(reward.shape), scale


def _trl_case(rng):
    """Several reward functions [b, n], whose sum is the return."""
    arrays, _, size = _outcome(rng)
    total = arrays["reward"].sum(1)
    first = rng.integers(-8, 9, size=total.shape) / 4       # equal returns stay equal: TRL would divide their rounding
    functions = np.stack([total] if rng.integers(2) else [total - first, first], 1)
    return {"reward": functions, "mask": arrays["mask"]}, {"group": size}


def _at_the_end(x):
    """Rewards [b, k] from those of several functions [b, n]."""
    last = x["mask"].shape[1] - 1 - x["mask"][:, ::-1].argmax(1)
    return jnp.zeros(x["mask"].shape, x["reward"].dtype).at[jnp.arange(len(last)), last].set(x["reward"].sum(1))


def _trl(x, *, group, name):
    found, scale = _advantage(x, group, name, _at_the_end(x))
    return {"advantage": found[jnp.arange(len(found)), x["mask"].argmax(1)]}, {"advantage": scale}


def _rloo_case(rng):
    arrays, settings = _trl_case(rng)
    log_prob, ref = log_probs(rng, arrays["mask"].shape, -10, 10)
    return arrays | {"log_prob": log_prob, "ref": ref, "coef": rng.choice([0.0, 0.05, 1.0])}, settings


def _penalty(x):
    zero = jnp.zeros_like(x["log_prob"])
    terms = TokenTerms(x["log_prob"], x["log_prob"] - x["ref"], zero, zero, zero)
    return jax.vmap(build(KLConfig(estimator="k1", placement="reward")).reward)(terms, zero, x["mask"])


def _rloo(x, *, group):
    penalised = jnp.where(x["mask"], _at_the_end(x) - x["coef"] * _penalty(x), 0.0)
    found, scale = _advantage(x, group, "leave_one_out", penalised)
    return {"advantage": found[jnp.arange(len(found)), x["mask"].argmax(1)]}, {"advantage": scale}


def _shuffled(rng):
    """Groups whose rows lie in any order; tokens of each have their own rewards."""
    arrays, groups, size = _outcome(rng, holes=True)
    if rng.integers(2):
        arrays["reward"] = np.where(arrays["mask"], _eighths(rng.normal(size=arrays["mask"].shape)), 0.0)
    number = np.repeat(np.arange(groups), size)
    order = rng.permutation(len(number))
    return {name: array[order] for name, array in (arrays | {"number": number}).items()}, {}, size


def _verl_case(rng):
    arrays, settings, _ = _shuffled(rng)
    return arrays, settings


def _verl(x, *, name):
    """Rows are sorted by group, their tokens put together, and both undone."""
    order = jnp.argsort(x["number"])
    size = next(size for number, size in GROUPS if number * size == len(order))
    packed, back = _pack(x["mask"][order])
    reward = jnp.take_along_axis(x["reward"][order], packed, 1)
    counted = jnp.take_along_axis(x["mask"][order], packed, 1)
    found, scale = _advantage({"mask": counted, "reward": reward}, size, name)
    return {"advantage": jnp.take_along_axis(found, back, 1)[jnp.argsort(order)]}, {"advantage": scale}


def _pack(counted):
    """Indices that put the counted tokens of each row first, and the inverse."""
    packed = jnp.argsort(~counted, axis=1, stable=True)
    return packed, jnp.argsort(packed, axis=1)


def _stream_case(rng):
    """Tokens of an agent with other writers' in between, rewards and values at the agent's."""
    rows, tokens = ((1, 2), (5, 4), (8, 33))[rng.integers(3)]
    counted = mask(rng, rows, tokens)
    counted[:, 0] = True
    reward, value = rng.choice([0.1, 1.0, 10.0]) * rng.normal(size=(2, rows, tokens))
    if rng.integers(2):
        reward *= rng.random(reward.shape) < 0.2
    counted[0, :2] = True       # a deviation needs two tokens
    return {"reward": np.where(counted, reward, 0.0), "value": value, "mask": counted,
            "discount": rng.choice([1.0, 0.99, 0.5]), "gae_lambda": rng.choice([1.0, 0.95, 0.3, 0.0])}, {}


def _verl_gae(x, *, normalised):
    packed, back = _pack(x["mask"])
    reward, value, counted = (jnp.take_along_axis(x[name], packed, 1) for name in ("reward", "value", "mask"))
    advantage, returns = (found[0] for found in _estimate(
        reward[None], value[None], counted[None], x["discount"], x["gae_lambda"], name="gae")[:2])
    size = jnp.maximum(1, jnp.abs(returns).max())
    if normalised:
        whitened, factor = normalise(advantage, counted)
        count = counted.sum().astype(advantage.dtype)
        found = {"advantage": whitened * jnp.sqrt((count - 1) / count)}
        scales = {"advantage": jnp.maximum(1, size * factor)}
    else:
        found = {"advantage": jnp.where(counted, advantage, 0.0), "returns": jnp.where(counted, returns, 0.0)}
        scales = {"advantage": size, "returns": size}
    return {name: jnp.take_along_axis(array, back, 1) for name, array in found.items()}, scales


def _returns_case(rng):
    arrays, settings = _stream_case(rng)
    return {name: arrays[name] for name in ("reward", "mask", "discount")}, settings


def _verl_returns(x):
    packed, back = _pack(x["mask"])
    reward, counted = (jnp.take_along_axis(x[name], packed, 1) for name in ("reward", "mask"))
    _, returns, _ = _estimate(reward[None], jnp.zeros_like(reward)[None], counted[None], x["discount"], x["discount"],
                              name="monte_carlo")
    return {"returns": jnp.take_along_axis(jnp.where(counted, returns[0], 0.0), back, 1)}, {}


def _one_stream(rng, names):
    tokens = int(rng.choice([1, 9, 33]))
    arrays = {"reward": rng.normal(size=tokens), "value": 3 * rng.normal(size=tokens),
              "discount": rng.choice([1.0, 0.99, 0.5]), "gae_lambda": rng.choice([1.0, 0.95, 0.3, 0.0])}
    return {name: arrays[name] for name in names}, {}


def _stream(x, *, name, wanted):
    reward = x["reward"][None, None]
    value = x["value"][None, None] if "value" in x else jnp.zeros_like(reward)
    advantage, returns, _ = _estimate(reward, value, jnp.ones(reward.shape, bool), x["discount"],
                                      x.get("gae_lambda", x["discount"]), name=name)
    return {wanted: {"advantage": advantage, "returns": returns}[wanted][0, 0]}, {}


def _rewards_case(rng):
    rows, tokens = 5, 4
    log_prob, ref = log_probs(rng, (rows, tokens), -30, 30)
    return {"reward": rng.normal(size=(rows, tokens)), "log_prob": log_prob, "ref": ref,
            "coef": rng.choice([0.01, 0.1, 1.0])}, {}


def _rewards(x):
    penalty = _penalty(x | {"mask": jnp.ones(x["reward"].shape, bool)})
    return {"reward": x["reward"] - x["coef"] * penalty}, {}


def _controller_case(rng):
    target = rng.choice([0.1, 6.0, 50.0])
    return {"kl": target * np.exp(0.3 * rng.normal(size=20)), "coef": rng.choice([1e-3, 0.2, 3.0]), "target": target,
            "horizon": rng.choice([200.0, 10_000.0])}, {"episodes": int(rng.choice([8, 256]))}


def _controller(x, *, episodes):
    settings = hyper(kl_coef=x["coef"], kl_target=x["target"], kl_horizon=x["horizon"])
    controller = CONTROLLERS["adaptive"](1, episodes)

    def step(state, kl):
        new = controller.update(state, kl, settings)
        return new, controller.read(new, settings)

    start = jax.tree.map(lambda x: jnp.asarray(x, settings.kl_coef.dtype), controller.init(settings))
    return {"coefficient": jax.lax.scan(step, start, x["kl"])[1]}, {}


_ADVANTAGE = partial(Comparison, "advantage")
_TRL = partial(_ADVANTAGE, "trl")
_VERL = partial(_ADVANTAGE, "verl")
_RLAX = partial(_ADVANTAGE, "rlax")


def _verl_group(name, ours, mapping=_ROWS, tolerance=None, **given):
    return _VERL(f"verl {name}" + "".join(f", {key}={value}" for key, value in given.items()), ours, mapping,
                 "group_advantage", _verl_case, partial(_verl, name=ours), {"name": name, **given},
                 tolerance or Tolerance())


COMPARISONS = (
    _TRL("TRL GRPOTrainer, scale_rewards=group", "group", _FIRST + "; n / (n - 1) is float32 in TRL", "grpo_advantage",
         _trl_case, partial(_trl, name="group"), {"scale": "group"}, Tolerance(1e-7)),
    _TRL("TRL GRPOTrainer, scale_rewards=none", "group_mean", _FIRST, "grpo_advantage", _trl_case,
         partial(_trl, name="group_mean"), {"scale": "none"}),
    _TRL("TRL RLOOTrainer, beta", "leave_one_out with k1 in the reward", _FIRST, "rloo_advantage", _rloo_case, _rloo),
    _verl_group("grpo", "group", epsilon=1e-4),
    _verl_group("grpo", "group_mean", norm_adv_by_std_in_grpo=False),
    _verl_group("grpo_vectorized", "group", _ROWS + "; verl computes in float32", Tolerance(2e-5), epsilon=1e-4),
    _verl_group("rloo", "leave_one_out"),
    _verl_group("rloo_vectorized", "leave_one_out"),
    _VERL("verl gae, returns and returns - values", "gae", _MASKED, "gae", _stream_case,
          partial(_verl_gae, normalised=False), {"whitened": False}),
    _VERL("verl gae, advantages", "gae, normalised",
          "verl's variance is over N - 1 and has 1e-8 added, our deviation over N and 1e-6", "gae", _stream_case,
          partial(_verl_gae, normalised=True), {"whitened": True}, Tolerance(1e-4, 1e-4)),
    _VERL("verl reinforce_plus_plus, returns", "monte_carlo, returns", _MASKED, "returns", _returns_case,
          _verl_returns),
    _VERL("verl compute_rewards", "k1 in the reward", "", "kl_rewards", _rewards_case, _rewards),
    Comparison("controller", "verl", "verl AdaptiveKLController", "adaptive", "verl has no bounds: drawn inside",
               "controller", _controller_case, _controller),
    _RLAX("rlax truncated_generalized_advantage_estimation", "gae", _END, "gae",
          partial(_one_stream, names=("reward", "value", "discount", "gae_lambda")),
          partial(_stream, name="gae", wanted="advantage")),
    _RLAX("rlax discounted_returns", "monte_carlo, returns", _END, "returns",
          partial(_one_stream, names=("reward", "discount")), partial(_stream, name="monte_carlo", wanted="returns")))
