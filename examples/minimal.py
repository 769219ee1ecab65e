"""The idea of "RL, but don't do anything I wouldn't do" in one screen: silence that no demonstrator shows is cheap.

    python examples/minimal.py

An imitator predicts a demonstrator who always talks. A Bayesian imitator cannot rule out that the demonstrator is a
machine that is always silent: it gives this simple hypothesis a weight of 1 in 1,000. An agent is paid for silence,
under a hard KL budget to the imitator. Silence costs ln 1000 = 6.9 nats once, at its first token; behind that the
imitator expects nothing else, and it is free however long the episode is. The demonstrator himself would never do it:
the KL to him is infinite.

With a budget of 8 nats the agent learns to be silent for good; with 3 nats it can only begin with a probability of
about one half. Both are compared with the best policy under that budget, which is enumerated. About half a minute.
"""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kl_reg.analysis.optimum.enumeration import Tree
from kl_reg.analysis.optimum.hard_budget import hard_budget
from kl_reg.kl import budget
from kl_reg.kl.exact import token_terms
from kl_reg.kl.operations import tilted
from kl_reg.references.bayes import mixture, posterior
from kl_reg.sampling.action import inverse_cdf

VOCABULARY, LENGTH, EPISODES, ITERATIONS = 4, 7, 64, 150
SILENCE, START = 0, VOCABULARY          # the token that says nothing, and what stands before the first one
WEIGHTS = jnp.log(jnp.array([0.999, 0.001]))


def imitators(previous):
    """log-probabilities [n, v] of the next token: of a talker who dislikes to repeat himself, and of a silent machine.
    """
    words = jnp.array([0.0, 0.5, 0.3, 0.2]) * jnp.where(jnp.arange(VOCABULARY) == previous, 0.25, 1.0)
    return jnp.log(jnp.stack([words / words.sum(), jnp.eye(VOCABULARY)[SILENCE]]))


def init():
    """The agent: for each position and previous token, a change of the imitator's logits, and the budget neuron."""
    return {"change": jnp.zeros((LENGTH, VOCABULARY + 1, VOCABULARY)), "neuron": jnp.zeros((LENGTH, VOCABULARY + 1))}


def episode(params, nats, choose):
    """One episode under a budget of so many nats: (tokens [t], log-probabilities [t], KL [t]).

    Args:
        choose: (position, log-probabilities [v]) -> token. It draws in a rollout; in an update it recalls what was
            drawn, so that the ledger is run again with the new parameters and differentiated through.
    """
    caps = budget.Caps(jnp.float32(nats), jnp.inf, jnp.inf)

    def step(carry, position):
        previous, weights, ledger = carry
        each = imitators(previous)
        log_ref = mixture(each, weights)                                        # what KL is measured to
        allowance = jax.nn.sigmoid(params["neuron"][position, previous]) * budget.left(caps, ledger, False)
        logits, _ = tilted(log_ref, params["change"][position, previous], allowance)
        token = choose(position, jax.nn.log_softmax(logits))
        terms = token_terms(logits, log_ref, token)
        ledger = budget.charge(ledger, terms.kl, jnp.bool_(True))
        return (token, posterior(weights, each[:, token]), ledger), (token, terms.log_prob, terms.kl)

    start = jnp.int32(START), WEIGHTS, budget.open_ledger(())
    return jax.lax.scan(step, start, jnp.arange(LENGTH))[1]


def rollout(params, nats, key):
    """Draws one episode."""
    def draw(position, log_probs):
        return inverse_cdf(log_probs, jax.random.uniform(jax.random.fold_in(key, position)))

    return episode(params, nats, draw)


def reward_of(tokens):
    """The share of silent tokens."""
    return (tokens == SILENCE).mean(-1)


def loss(params, nats, tokens, advantages):
    """REINFORCE: its gradient is minus that of the expected return."""
    _, log_prob, _ = jax.vmap(lambda own: episode(params, nats, lambda position, _: own[position]))(tokens)
    return -(advantages * log_prob.sum(-1)).mean()


def train(nats, seed=0):
    """(return, nats [e, t] of each token) of the trained agent on fresh episodes."""
    optimizer = optax.adam(0.2)

    def rollouts(params, key, count=EPISODES):
        return jax.vmap(lambda own: rollout(params, nats, own))(jax.random.split(key, count))

    @jax.jit
    def iteration(params, state, key):
        tokens, _, _ = rollouts(params, key)
        rewards = reward_of(tokens)
        advantages = rewards - (rewards.sum() - rewards) / (EPISODES - 1)       # the others' mean as the baseline
        updates, state = optimizer.update(jax.grad(loss)(params, nats, tokens, advantages), state)
        return optax.apply_updates(params, updates), state

    params = init()
    # A first wish for silence: what has a probability of 1 in 1,000 is hardly ever drawn, and so not learned from.
    params["change"] = params["change"].at[:, :, SILENCE].set(8.0)
    state = optimizer.init(params)
    for i in range(ITERATIONS):
        params, state = iteration(params, state, jax.random.key(1000 * seed + i))
    tokens, _, kl = rollouts(params, jax.random.key(1000 * seed + ITERATIONS), 2000)
    return float(reward_of(tokens).mean()), np.asarray(kl)


def optimum(nats):
    """The return of the best policy that on no path spends more, over all sequences (float64)."""
    log_base, weights, previous = [], np.asarray(WEIGHTS)[None], np.array([START])
    for _ in range(LENGTH):
        each = jax.vmap(imitators)(previous)
        log_base.append(np.asarray(jax.vmap(mixture)(each, jnp.asarray(weights)), np.float64))
        following = jax.vmap(jax.vmap(posterior, (None, 0)))(jnp.asarray(weights), each.swapaxes(1, 2))
        weights, previous = np.asarray(following).reshape(-1, 2), np.tile(np.arange(VOCABULARY), len(previous))
    rewards = reward_of(np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH))))
    return hard_budget(Tree(tuple(log_base), rewards, "A" * LENGTH), nats, levels=32).reward


def main():
    """Trains under both budgets and prints what was learned."""
    for nats in (3.0, 8.0):
        reward, kl = train(nats)
        print(f"budget {nats:g} nats: silent in {reward:.0%} of its tokens, the best policy in {optimum(nats):.0%}; "
              f"{kl.sum(1).mean():.2f} nats an episode, {kl[:, 0].mean():.2f} of them for the first token")


if __name__ == "__main__":
    main()
