"""The example that one reads first, against the optimum by hand."""
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import rel_entr

from examples import minimal


def first_token(nats):
    """The largest probability of beginning to be silent, 1 in 1,000 under the imitator, that costs so many nats."""
    cost = lambda p: rel_entr([p, 1 - p], [0.001, 0.999]).sum()  # noqa: E731
    return 1.0 if cost(1.0) <= nats else brentq(lambda p: cost(p) - nats, 0.001, 1.0)


@pytest.mark.parametrize("nats", [3.0, 8.0])
def test_silence_is_paid_once_and_learned_where_the_budget_covers_it(nats):
    """Behind the first token silence is certain under the imitator; talk that turns silent later is worth less."""
    best = minimal.optimum(nats)
    np.testing.assert_allclose(best, first_token(nats), atol=0.02)
    reward, kl = minimal.train(nats)
    assert reward > best - 0.06 and reward < best + 0.03
    assert kl.sum(1).max() <= nats * (1 + 1e-5)
    if nats == 8.0:
        np.testing.assert_allclose(kl.sum(1).mean(), np.log(1000), atol=0.05)
        assert kl[:, 1:].sum(1).mean() < 0.05
