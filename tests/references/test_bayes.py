"""The oracles are numpy and scipy in float64, on the float32 inputs that the code gets, and hand computation."""
from __future__ import annotations

import itertools

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from kl_reg.kl.exact import reverse_kl, token_terms
from kl_reg.references.bayes import CUTS, mixture, pessimistic, posterior, top

MODELS, VOCAB = 4, 5
posterior_of, mixture_of, pessimistic_of = jax.jit(posterior), jax.jit(mixture), jax.jit(pessimistic)
top_of = jax.jit(top, static_argnums=2)
every_cut = pytest.mark.parametrize("cut", CUTS)
numbers = st.floats(-100, 0, width=32)
alphas = st.floats(0, 1, width=32).map(np.float32)
subsets = arrays.arrays(bool, MODELS).filter(np.any)
permutations = st.permutations(range(MODELS)).map(np.array)


def logs(x):
    """float32 logarithms; zero becomes -inf."""
    with np.errstate(divide="ignore"):
        return np.float32(np.log(x))


def normalised(shape):
    """float32 log-probabilities, -100 and -inf among them."""
    possible = arrays.arrays(bool, shape).filter(lambda x: x.any(axis=-1).all())
    return st.tuples(arrays.arrays(np.float64, shape, elements=numbers), possible).map(
        lambda pair: np.float32(log_softmax(np.where(pair[1], pair[0], -np.inf), axis=-1)))


weights, imitators, policies = normalised(MODELS), normalised((MODELS, VOCAB)), normalised(VOCAB)
full_policies = arrays.arrays(np.float64, VOCAB, elements=st.floats(-20, 20)).map(softmax)


def values(semi):
    """log nu of a Semi, in float64."""
    return np.float64(semi.log_probs) + np.float64(semi.log_mass)


def kl(log_policy, log_reference):
    r"""\sum pi log(pi / nu) in float64 log space, of a possibly unnormalised nu."""
    policy = np.exp(np.float64(log_policy))
    with np.errstate(invalid="ignore"):
        return np.where(policy > 0, policy * (np.float64(log_policy) - log_reference), 0.0).sum()


def assert_log_close(got, expected, **tolerance):
    """Equal where infinite, close elsewhere."""
    np.testing.assert_allclose(got, expected, **{"rtol": 1e-6, "atol": 2e-6} | tolerance)


def test_posterior_by_hand():
    """1/2, 1/4, 1/4 and likelihoods 1/10, 1/5, 0: 1/20 each for the first two."""
    got = posterior_of(logs([0.5, 0.25, 0.25]), logs([0.1, 0.2, 0.0]))
    np.testing.assert_allclose(np.exp(got), [0.5, 0.5, 0.0], rtol=1e-6)


@given(weights, arrays.arrays(np.float32, MODELS, elements=numbers | st.just(-np.inf)))
def test_posterior_is_bayes_rule(log_weights, log_likelihood):
    joint = np.float64(log_weights) + log_likelihood
    assume(joint.max() > -np.inf)
    assert_log_close(posterior_of(log_weights, log_likelihood), joint - logsumexp(joint))


@pytest.mark.parametrize("likelihood", [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
def test_a_token_impossible_for_all_that_count_keeps_the_weights(likelihood):
    got = posterior_of(logs([0.75, 0.25, 0.0]), logs(likelihood))
    np.testing.assert_allclose(np.exp(got), [0.75, 0.25, 0.0], rtol=1e-6)


def test_posterior_of_a_long_transcript_does_not_drift():
    """512 tokens one at a time in float32, against one sum in float64; the worst weight falls below e^-70."""
    rng = np.random.default_rng(0)
    likelihood = np.float32(rng.normal(-3, 1, (512, MODELS)) - [0.0, 0.01, 0.05, 0.2])
    start = np.full(MODELS, -np.log(MODELS), np.float32)
    got, _ = jax.lax.scan(lambda w, x: (posterior(w, x), None), start, likelihood)
    total = np.float64(likelihood).sum(axis=0)
    assert log_softmax(total).min() < -70
    np.testing.assert_allclose(got, log_softmax(total), atol=1e-3)


@given(imitators, weights)
def test_mixture_is_scipys_and_normalised(log_probs, log_weights):
    got = mixture_of(log_probs, log_weights)
    with np.errstate(divide="ignore"):
        expected = logsumexp(np.float64(log_probs), axis=0, b=np.exp(np.float64(log_weights))[:, None])
    assert_log_close(got, expected)
    assert logsumexp(np.float64(got)) == pytest.approx(0, abs=2e-6)


@pytest.fixture(scope="module")
def sequential_models():
    """log w [4] and log nu(x | h) [4 models, 3, ...] after 0, 1 and 2 symbols; many are impossible, 02 for all."""
    rng = np.random.default_rng(0)
    tables = [rng.gamma(0.5, size=shape) * (rng.random(shape) < 0.8) + 1e-3 * np.eye(3)[0]
              for shape in ((4, 3), (4, 3, 3), (4, 3, 3, 3))]
    tables[1][:, 0, 2] = 0
    return logs([0.6, 0.3, 0.099, 0.001]), [logs(x / x.sum(axis=-1, keepdims=True)) for x in tables]


def test_chain_rule_and_log_loss(sequential_models):
    """xi(x_1..x_3), the product of mixtures under the running posterior, is sum_nu w(nu) nu(x_1..x_3)."""
    prior, tables = sequential_models

    def stepwise(sequence):
        log_weights, total = jnp.asarray(prior), jnp.float32(0)
        for step, symbol in enumerate(sequence):
            log_probs = jnp.asarray(tables[step])[(slice(None), *sequence[:step])]
            total += mixture(log_probs, log_weights)[symbol]
            log_weights = posterior(log_weights, log_probs[:, symbol])
        return total

    sequences = np.array(list(itertools.product(range(3), repeat=3)))
    got = np.float64(jax.jit(jax.vmap(stepwise))(sequences))
    of_model = np.array([sum(np.float64(tables[step])[:, *s[:step + 1]] for step in range(3)) for s in sequences])
    expected = logsumexp(of_model + np.float64(prior), axis=1)
    assert np.isneginf(expected).any() and np.isneginf(of_model).any(axis=1).sum() > 10
    assert_log_close(got, expected, atol=3e-6)
    assert np.exp(got).sum() == pytest.approx(1, abs=1e-6)
    assert (-got[:, None] <= -of_model - np.float64(prior) + 1e-5).all()


@pytest.mark.parametrize("alpha, best, cumulative", [
    (1.0, "a", "a"),
    (0.8, "a", "a"),              # 0.3 < 0.8 * 0.4
    (0.45, "abc", "a"),           # 0.2 > 0.45 * 0.4 = 0.18; 0.3 < 0.45 * 0.7 = 0.315
    (0.4, "abc", "ab"),           # 0.3 > 0.4 * 0.7 = 0.28; 0.2 < 0.4 * 0.9
    (0.2, "abcd", "abc"),         # 0.1 > 0.2 * 0.4 = 0.08; 0.1 < 0.2 * 1.0
    (0.09, "abcd", "abcd"),
    (0.0, "abcd", "abcd")])
def test_cuts_by_hand(alpha, best, cumulative):
    log_weights = logs([0.2, 0.4, 0.0, 0.1, 0.3])
    for cut, expected in (("best", best), ("cumulative", cumulative)):
        members = np.array(list("ca.db"))[np.asarray(top_of(log_weights, np.float32(alpha), cut))]
        assert "".join(sorted(members)) == expected, cut


def test_ties_by_hand():
    """1/2, 1/4, 1/4: the third would fall to 1/4 < 0.3 * 1, but the second is in by 1/4 > 0.3 * 3/4."""
    log_weights = logs([0.25, 0.5, 0.25])
    assert top_of(log_weights, np.float32(0.3), "cumulative").tolist() == [True, True, True]
    assert top_of(log_weights, np.float32(0.34), "cumulative").tolist() == [False, True, False]
    assert top_of(logs([0.5, 0.5]), np.float32(1.0), "cumulative").tolist() == [True, True]


@given(weights, alphas)
def test_cuts_are_the_published_definitions(log_weights, alpha):
    """Distinct weights, away from the threshold, by sorting and summing."""
    order = np.argsort(-log_weights)
    ordered = np.exp(np.float64(log_weights[order]))
    assume((np.diff(ordered[ordered > 0]) < 0).all())
    for cut, bar in (("best", alpha * ordered[0]), ("cumulative", alpha * ordered.cumsum())):
        assume((np.abs(ordered - bar) > 1e-5 * ordered)[1:][ordered[1:] > 0].all())
        expected = np.empty(MODELS, bool)
        expected[order] = (ordered >= bar) & (ordered > 0)
        expected[order[0]] = True
        np.testing.assert_array_equal(top_of(log_weights, alpha, cut), expected)


@given(arrays.arrays(np.float32, MODELS, elements=st.sampled_from([-np.inf, -3, -2, -1, -0.5])), alphas, alphas,
       permutations)
def test_top_keeps_its_promises(log_weights, alpha, other, order):
    """On weights full of ties and zeros."""
    assume(log_weights.max() > -np.inf)
    low, high = min(alpha, other), max(alpha, other)
    sets = {cut: np.asarray(top_of(log_weights, alpha, cut)) for cut in CUTS}
    assert (sets["cumulative"] <= sets["best"]).all()
    for cut, members in sets.items():
        assert members[log_weights == log_weights.max()].all()
        assert not members[np.isneginf(log_weights)].any()
        assert (members == members[(log_weights[:, None] == log_weights).argmax(axis=1)]).all()
        assert members[log_weights >= log_weights[members].min()].all()
        np.testing.assert_array_equal(top_of(log_weights[order], alpha, cut), members[order])
        assert (np.asarray(top_of(log_weights, high, cut)) <= np.asarray(top_of(log_weights, low, cut))).all()


@every_cut
@given(weights)
def test_alpha_zero_and_one(cut, log_weights):
    positive, best = log_weights > -np.inf, log_weights == log_weights.max()
    np.testing.assert_array_equal(top_of(log_weights, np.float32(0), cut), positive)
    np.testing.assert_array_equal(top_of(log_weights, np.float32(1), cut), best)
    barely = positive & (log_weights > -80)                                     # float32's least alpha is e^-87
    assert np.asarray(top_of(log_weights, np.float32(1e-37), cut))[barely].all()


def test_unknown_cut():
    with pytest.raises(ValueError, match="cut='worst' is unknown; choose one of best, cumulative"):
        top(jnp.zeros(2), jnp.float32(0.5), "worst")


def test_pessimistic_by_hand():
    """The minimum is (0.2, 0.3, 0.1), of mass 0.6, and attains the floor; the third imitator has no say."""
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0, 0, 1]])
    semi = pessimistic_of(logs(probs), np.array([True, True, False]))
    np.testing.assert_allclose(np.exp(semi.log_probs), np.array([2, 3, 1]) / 6, rtol=1e-6)
    np.testing.assert_allclose([-semi.log_mass, semi.missing()], [np.log(1 / 0.6), 0.4], rtol=1e-6)
    assert rel_entr(np.array([2, 3, 1]) / 6, probs[:2].min(axis=0)).sum() == pytest.approx(np.log(1 / 0.6))


def test_missing_mass_of_imitators_that_nearly_agree():
    near = np.array([[0.25, 0.75], [0.25 + 1e-4, 0.75 - 1e-4]])
    assert float(pessimistic_of(logs(near), np.ones(2, bool)).missing()) == pytest.approx(1e-4, abs=3e-7)


@given(imitators, subsets)
def test_pessimistic_is_the_minimum(log_probs, members):
    semi = pessimistic_of(log_probs, members)
    lowest = np.float64(log_probs[members]).min(axis=0)
    assert_log_close(values(semi), lowest)
    assert logsumexp(np.float64(semi.log_probs)) == pytest.approx(0, abs=1e-6)
    assert semi.log_mass <= 0 and 0 <= semi.missing() <= 1
    np.testing.assert_allclose(semi.missing(), 1 - np.exp(lowest).sum(), atol=1e-6)


@given(imitators, subsets, policies)
def test_a_member_is_never_overestimated(log_probs, members, log_policy):
    """nu_alpha <= mu, hence D(pi || nu_alpha) >= D(pi || mu), for every member mu and every pi."""
    log_nu = values(pessimistic_of(log_probs, members))
    for mu in log_probs[members]:
        assert (log_nu <= mu + 3e-5).all()
        assert kl(log_policy, log_nu) >= kl(log_policy, mu) - 3e-5


@given(imitators, st.integers(0, MODELS - 1))
def test_one_member_is_itself(log_probs, only):
    semi = pessimistic_of(log_probs, np.arange(MODELS) == only)
    assert_log_close(semi.log_probs, log_probs[only])
    assert float(semi.missing()) == pytest.approx(0, abs=1e-6)


@given(imitators, subsets, subsets)
def test_more_members_ask_for_more_help(log_probs, members, more):
    few, many = pessimistic_of(log_probs, members), pessimistic_of(log_probs, members | more)
    assert (values(many) <= values(few) + 3e-5).all()
    assert many.missing() >= few.missing() - 1e-6


@given(imitators, subsets, permutations)
def test_order_and_outsiders_do_not_matter(log_probs, members, order):
    semi = pessimistic_of(log_probs, members)
    outsiders = np.where(members[:, None], log_probs, np.float32(np.nan))
    for other in (pessimistic_of(log_probs[order], members[order]), pessimistic_of(outsiders, members)):
        jax.tree.map(np.testing.assert_array_equal, other, semi)


@given(imitators, subsets, full_policies)
def test_floor_and_k3(log_probs, members, policy):
    """D(pi || nu) = D(pi || nu / mass) + floor; k3 lacks the missing mass in the mean, and is right with it added."""
    semi = pessimistic_of(log_probs, members)
    lowest = np.float64(log_probs[members]).min(axis=0)
    policy = np.where(np.isneginf(lowest), 0, policy)
    assume(policy.sum() > 0)
    policy /= policy.sum()
    whole = rel_entr(policy, np.exp(lowest)).sum()
    of_shape = float(reverse_kl(jnp.asarray(logs(policy)), semi.log_probs))
    np.testing.assert_allclose(of_shape - semi.log_mass, whole, rtol=1e-5, atol=1e-5)
    assert whole >= -float(semi.log_mass) - 1e-5
    drawn = policy > 0
    log_ratio = np.log(policy[drawn]) - values(semi)[drawn]
    k3 = np.exp(-log_ratio) - 1 + log_ratio
    unseen = np.exp(lowest[~drawn]).sum()                                      # where pi underflows, k3 sees nothing
    np.testing.assert_allclose((policy[drawn] * k3).sum(), whole - float(semi.missing()) - unseen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("members", [[True, True], [False, False]])
def test_members_that_exclude_each_other_ask_with_certainty(members):
    semi = pessimistic_of(logs([[0.5, 0.5, 0], [0, 0, 1]]), np.array(members))
    np.testing.assert_allclose(semi.log_probs, -np.log(3) * np.ones(3), rtol=1e-6)
    assert (values(semi) == -np.inf).all() and semi.missing() == 1


@every_cut
@pytest.mark.parametrize("far", [[0, -100, -100], [0, -np.inf, -np.inf], [-np.inf, 0, -np.inf], [-np.inf, -100, 0]])
def test_extremes_leave_values_and_gradients_finite(cut, far):
    """A policy's KL to references built inside the differentiated function, from log-probabilities of -100 and -inf."""
    log_probs = jnp.asarray(np.float32([log_softmax(far), [0, -100, -np.inf], log_softmax([-100, 0, -100])]))

    def terms(logits):
        log_weights = posterior(jnp.asarray(logs([0.5, 0.5, 0.0])), log_probs[:, 0])
        semi = pessimistic(log_probs, top(log_weights, jnp.float32(0.0), cut))
        xi = mixture(log_probs, log_weights)
        both = [token_terms(jnp.where(log_ref > -jnp.inf, logits, -jnp.inf), log_ref, log_ref.argmax())
                for log_ref in (xi, semi.log_probs)]
        return jnp.stack([jnp.stack(x) for x in both]), jnp.exp(semi.log_probs).sum()

    logits = jnp.float32([1.0, -2.0, 0.5])
    got, total = terms(logits)
    assert jnp.isfinite(got).all() and total == pytest.approx(1, abs=1e-6)
    assert jnp.isfinite(jax.jacobian(lambda x: terms(x)[0])(logits)).all()
