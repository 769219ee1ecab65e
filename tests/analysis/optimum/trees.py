"""Random enumerable language models, and their sequences one by one."""
from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from kl_reg.analysis.optimum.enumeration import Tree


def random_tree(vocab, writers, seed, scale=1.5):
    rng = np.random.default_rng(seed)
    tables = [rng.normal(0, scale, (vocab**t, vocab)) for t in range(len(writers))]
    log_base = tuple(x - np.log(np.exp(x).sum(1, keepdims=True)) for x in tables)
    return Tree(log_base, rng.normal(size=vocab ** len(writers)), writers)


trees = st.builds(random_tree, st.just(3), st.sampled_from(["AAA", "ASA", "SAA", "AAS", "SSA"]),
                  st.integers(0, 2**31), st.sampled_from([0.3, 1.5, 4.0]))


def sequence_log_probs(policy, vocab, own=None):
    """Of all sequences in lexicographic order; only of the tokens in `own`, where it is given."""
    out = []
    for tokens in itertools.product(range(vocab), repeat=len(policy)):
        number, total = 0, 0.0
        for t, token in enumerate(tokens):
            total += policy[t][number, token] if own is None or own[t] else 0.0
            number = number * vocab + token
        out.append(total)
    return np.array(out)
