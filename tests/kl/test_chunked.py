"""The oracles: float64 numpy formulas for values and gradients, and plain `token_terms` under vmap."""
from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import entr, log_softmax, rel_entr

from kl_reg.kl.chunked import chunked_loss, chunked_terms
from kl_reg.kl.exact import TokenTerms, token_terms

N, V, D = 13, 40, 6
ALL = ("log_prob", "kl", "entropy", "forward_kl")


def problem(seed=0, n=N, v=V, d=D):
    """Hidden states and tables of policy and base, and actions."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(0, 1, shape) for shape in ((n, d), (v, d), (n, d), (v, d))]
    return [jnp.asarray(x, jnp.float32) for x in arrays] + [jnp.asarray(rng.integers(0, v, n), jnp.int32)]


def wide(policy, policy_table, base, base_table, action, relative, scale):
    """In float64: terms, and for each its derivative with respect to the policy's logits."""
    policy, policy_table, base, base_table = (np.float64(x) for x in (policy, policy_table, base, base_table))
    base_logits = base @ base_table.T * scale
    logits = policy @ policy_table.T * scale + (base_logits if relative else 0)
    log_policy, log_base = log_softmax(logits, axis=1), log_softmax(base_logits, axis=1)
    pi, beta, rows = np.exp(log_policy), np.exp(log_base), np.arange(len(action))
    kl, entropy = rel_entr(pi, beta).sum(1), entr(pi).sum(1)
    log_prob = log_policy[rows, action]
    terms = TokenTerms(log_prob, log_prob - log_base[rows, action], kl, entropy, rel_entr(beta, pi).sum(1))
    by_log_prob = np.eye(pi.shape[1])[action] - pi
    return terms, TokenTerms(by_log_prob, by_log_prob, pi * (log_policy - log_base - kl[:, None]),
                             -pi * (log_policy + entropy[:, None]), pi - beta)


def weights(n=N):
    """One weight a term and row: what a loss does with them."""
    return TokenTerms(*np.float32(np.random.default_rng(9).normal(0, 1, (5, n))))


@partial(jax.jit, static_argnames=("relative", "chunk", "train_table", "differentiate", "scale", "block"))
def gradients(policy, policy_table, base, base_table, action, **settings):
    """Of the weighted sum of all terms, with respect to all four float inputs; and the terms."""
    def loss(*inputs):
        terms = chunked_terms(*inputs, action, **settings)
        return sum((w * x).sum() for w, x in zip(weights(action.shape[0]), terms, strict=True)), terms

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(policy, policy_table, base, base_table)


@pytest.mark.parametrize("relative, scale, train_table, block", [
    (True, 1 / 0.7, False, None), (True, 1.0, True, 1), (False, 1.0, False, 2), (False, 1 / 0.7, True, None)])
def test_values_and_gradients_are_those_of_float64(relative, scale, train_table, block):
    inputs = problem()
    terms, by_logits = wide(*inputs, relative, scale)
    got, values = gradients(*inputs, relative=relative, chunk=5, train_table=train_table, differentiate=ALL,
                            scale=scale, block=block)
    for value, expected in zip(values, terms, strict=True):
        assert value.dtype == jnp.float32 and value.shape == (N,)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    total = sum(np.float64(w)[:, None] * x for w, x in zip(weights(), by_logits, strict=True)) * scale
    np.testing.assert_allclose(got[0], total @ np.float64(inputs[1]), rtol=1e-4, atol=2e-5)
    by_table = total.T @ np.float64(inputs[0]) if train_table else np.zeros((V, D))
    np.testing.assert_allclose(got[1], by_table, rtol=1e-4, atol=2e-5)
    for constant in got[2:]:
        np.testing.assert_array_equal(constant, 0.0)


@pytest.mark.parametrize("names, train_table", [
    (("kl",), False), (("log_prob", "kl", "kl"), False), ((), False), (("kl",), True), ((), True)])
def test_only_named_terms_have_a_derivative(names, train_table):
    """forward_kl is zero where it is not named; the other values are there all the same."""
    inputs = problem(1)
    terms, by_logits = wide(*inputs, True, 1.0)
    got, values = gradients(*inputs, relative=True, chunk=4, train_table=train_table, differentiate=names, scale=1.0)
    np.testing.assert_array_equal(values.forward_kl, 0.0)
    for value, expected in zip(values[:4], terms[:4], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    named = set(names) | ({"log_ratio"} if "log_prob" in names else set())
    total = sum((np.float64(w)[:, None] * x for name, w, x in zip(terms._fields, weights(), by_logits, strict=True)
                 if name in named), np.zeros((N, V)))
    np.testing.assert_allclose(got[0], total @ np.float64(inputs[1]), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got[1], total.T @ np.float64(inputs[0]) * train_table, rtol=1e-4, atol=2e-5)


@partial(jax.grad, has_aux=True)
def plain(policy, table, base, action):
    """The same loss with `token_terms` on all logits, differentiated automatically."""
    log_base = jax.nn.log_softmax(base @ table.T)
    terms = jax.vmap(partial(token_terms, forward=True))((base + policy) @ table.T, log_base, action)
    return sum((w * x).sum() for w, x in zip(weights(), terms, strict=True)), terms


@pytest.mark.parametrize("chunk", [1, 5, 50])
def test_the_chunk_does_not_matter(chunk):
    """13 parts, 3 parts with padding, 1 part."""
    policy, table, base, _, action = problem(2)
    expected, terms = jax.jit(plain)(policy, table, base, action)
    got, values = gradients(policy, table, base, table, action, relative=True, chunk=chunk, train_table=False,
                            differentiate=ALL, scale=1.0)
    for value, reference in zip(values, terms, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("own_table", [False, True])
def test_under_vmap_every_member_is_its_own(own_table):
    """Members differ in hidden states, and in a trained table or not; the base is shared."""
    problems = [problem(seed) for seed in (3, 4)]
    _, table, base, base_table, action = problems[0]
    policy = jnp.stack([p[0] for p in problems])
    tables = jnp.stack([p[1] for p in problems]) if own_table else table

    def one(policy, table):
        return gradients(policy, table, base, base_table, action, relative=False, chunk=4, train_table=own_table,
                         differentiate=("log_prob", "kl"), scale=1.0)

    got, values = jax.vmap(one, (0, 0 if own_table else None))(policy, tables)
    for member in range(2):
        by_each, terms = one(policy[member], tables[member] if own_table else table)
        for value, reference in zip(values, terms, strict=True):
            np.testing.assert_allclose(value[member], reference, rtol=1e-5, atol=1e-5)
        for gradient, reference in zip(got, by_each, strict=True):
            np.testing.assert_allclose(gradient[member], reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table_dtype, train_table", [
    (jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, False)])
def test_bfloat16_hidden_states(table_dtype, train_table):
    """Values are float32 and those of the rounded inputs; gradients have the dtype of what they belong to."""
    policy, table, base, base_table, action = problem(5)
    inputs = [policy.astype(jnp.bfloat16), table.astype(table_dtype), base.astype(jnp.bfloat16),
              base_table.astype(table_dtype), action]
    terms, by_logits = wide(*(x.astype(jnp.float32) for x in inputs[:4]), action, True, 1.0)
    got, values = gradients(*inputs, relative=True, chunk=8, train_table=train_table, differentiate=ALL, scale=1.0)
    for value, expected in zip(values, terms, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    total = sum(np.float64(w)[:, None] * x for w, x in zip(weights(), by_logits, strict=True))
    for gradient, of, expected in ((got[0], inputs[0], total @ np.float64(table)),
                                   (got[1], inputs[1], total.T @ np.float64(policy) * train_table)):
        assert gradient.dtype == of.dtype
        np.testing.assert_allclose(np.float64(gradient), expected, atol=0.02 * np.abs(expected).max())


def test_on_the_base_kl_and_its_derivative_are_exactly_zero():
    """Without a change of the hidden state, or for the same state and table."""
    policy, table, base, _, action = problem(6)
    for relative, hidden in ((True, jnp.zeros_like(policy)), (False, base)):
        got, terms = gradients(hidden, table, base, table, action, relative=relative, chunk=4, train_table=False,
                               differentiate=("kl",), scale=1.0)
        np.testing.assert_array_equal(terms.kl, 0.0)
        np.testing.assert_array_equal(got[0], 0.0)
        np.testing.assert_allclose(terms.log_ratio, 0.0, atol=2e-6)


def inner(jaxpr):
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in jax.core.jaxprs_in_params(equation.params):
            yield from inner(nested)


BIG = {"n": 512, "v": 3000, "d": 32}


def jaxpr_of(derivative, train_table, chunk=16):
    def loss(policy, table, base, action):
        terms = chunked_terms(policy, table, base, table, action, relative=True, chunk=chunk, train_table=train_table)
        return terms.log_prob.sum() + terms.kl.sum()

    policy, table, base, _, action = problem(**BIG)
    function = jax.grad(loss, (0, 1)) if derivative else loss
    return jax.make_jaxpr(function)(policy, table, base, action).jaxpr


@pytest.mark.parametrize("derivative, train_table", [(False, False), (True, False), (True, True)])
def test_no_array_of_all_rows_is_formed(derivative, train_table):
    largest = max(np.prod(variable.aval.shape) for equation in inner(jaxpr_of(derivative, train_table))
                  for variable in equation.outvars)
    assert largest <= max(16 * BIG["v"], BIG["v"] * BIG["d"], BIG["n"] * BIG["d"])


@pytest.mark.parametrize("derivative, train_table, expected", [
    (False, False, 2), (False, True, 2),
    (True, False, 4),                # logits twice, one for each of log_prob and kl
    (True, True, 6)])                # logits twice, forward and backward, then hidden states and table
def test_matrix_products_are_only_those_needed(derivative, train_table, expected):
    products = [e for e in inner(jaxpr_of(derivative, train_table)) if e.primitive.name == "dot_general"]
    assert len(products) == expected


@pytest.mark.parametrize("members", [1, 2])
def test_compiled_memory_is_a_few_chunks(members):
    """Value and gradient: at most 6 arrays [m, chunk, v], less than a copy of the table, and a few of [m, n, d]."""
    chunk = 8
    policy, table, base, _, action = problem(**{**BIG, "d": 64})

    def loss(policy, table, base, action):
        terms = chunked_terms(policy, table, base, table, action, relative=True, chunk=chunk)
        return terms.log_prob.sum() + terms.kl.sum()

    value_and_grad = jax.vmap(jax.value_and_grad(loss), (0, None, None, None))
    compiled = jax.jit(value_and_grad).lower(jnp.stack([policy] * members), table, base, action).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= members * (6 * 4 * chunk * BIG["v"] + 8 * policy.nbytes)
    assert temporary <= members * 4 * BIG["n"] * BIG["v"] / 4


def test_rows_may_be_sharded_over_devices():
    """Each chunk takes rows of every device: nothing but the sum of the loss is communicated."""
    policy, table, base, _, action = problem(7, 64)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def loss(policy, table, base, action):
        return chunked_terms(policy, table, base, table, action, relative=True, chunk=16).kl.mean()

    function = jax.value_and_grad(loss)
    sharded = jax.jit(function, in_shardings=(rows, whole, rows, rows))
    text = sharded.lower(policy, table, base, action).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    for got, expected in zip(sharded(policy, table, base, action), function(policy, table, base, action), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_bad_settings_are_refused():
    inputs = problem()
    with pytest.raises(ValueError, match=r"\['k3'\] is unknown; choose from log_prob, kl"):
        chunked_terms(*inputs, relative=True, chunk=4, differentiate=("kl", "k3"))
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        chunked_terms(*inputs, relative=True, chunk=0)


def token_loss(terms, given, shared):
    """Not linear in the terms, as losses with ratios are not."""
    weight, old = given
    return weight * (jnp.exp(terms.log_prob - old) + shared * terms.kl - 0.1 * terms.entropy + 0.2 * terms.forward_kl)


@pytest.mark.parametrize("relative, train_table, block, cap", [
    (True, False, None, None), (False, True, 2, None), (False, True, 1, 2.0), (True, True, 3, 3.0)])
def test_a_loss_of_each_token_is_differentiated_where_it_is_read(relative, train_table, block, cap):
    """Three of four parts of four rows, beside all logits differentiated automatically."""
    policy, table, base, base_table, action = problem(8, n=16)
    rng = np.random.default_rng(0)
    given = jnp.float32(rng.normal(size=(4, 4))), jnp.float32(rng.normal(-3, 0.1, size=(4, 4)))
    parts = lambda x: x.reshape(4, 4, *x.shape[1:])  # noqa: E731
    shape = lambda z: z if cap is None else cap * jnp.tanh(z / cap)  # noqa: E731

    def ours(policy, table, base, base_table):
        total, terms = chunked_loss(token_loss, parts(policy), table, parts(base), base_table, parts(action), given,
                                    0.7, relative=relative, block=block, train_table=train_table,
                                    forward=True, scale=1 / 0.7, cap=cap, used=jnp.int32(3))
        return 2 * total + terms.kl.sum(), terms

    def expected(policy, table):
        base_logits = shape(base @ base_table.T)
        logits = (base_logits + policy @ table.T if relative else shape(policy @ table.T)) / 0.7
        terms = jax.vmap(partial(token_terms, forward=True))(logits, jax.nn.log_softmax(base_logits / 0.7), action)
        terms = jax.tree.map(lambda x: jnp.where(jnp.arange(16) < 12, x, 0.0), terms)
        flat = jax.tree.map(lambda x: x.reshape(-1), given)
        losses = jax.vmap(partial(token_loss, shared=0.7))(terms, flat)
        return 2 * jnp.where(jnp.arange(16) < 12, losses, 0.0).sum() + jax.lax.stop_gradient(terms.kl.sum()), terms

    for function in (ours, jax.jit(ours)):
        (value, terms), got = jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True)(policy, table, base, base_table)
        (other, plain_terms), wanted = jax.value_and_grad(expected, (0, 1), has_aux=True)(policy, table)
        np.testing.assert_allclose(value, other, rtol=1e-5)
        for x, y in zip(terms, plain_terms, strict=True):
            np.testing.assert_allclose(x.reshape(-1), y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(got[1], wanted[1] * float(train_table), rtol=1e-4, atol=2e-5)
        np.testing.assert_array_equal(got[2], 0.0)
    assert ours(policy, table, base, base_table)[0] == pytest.approx(float(value), rel=1e-5)     # without a gradient


def test_members_are_what_each_is_alone():
    """Two heads on one base, in blocks; a block is sliced, and not gathered."""
    policy, table, base, _, action = problem(10, n=16)
    policies = jnp.stack([policy, 2 * policy])

    def gradient(policy):
        parts = [x.reshape(2, 8, *x.shape[1:]) for x in (policy, base, action)]
        return chunked_loss(lambda terms, given, shared: terms.log_prob * terms.kl, parts[0], table, parts[1], table,
                            parts[2], (), (), relative=True, block=4)[0]

    members = jax.vmap(jax.grad(gradient))
    for got, own in zip(members(policies), policies, strict=True):
        np.testing.assert_allclose(got, jax.grad(gradient)(own), rtol=1e-5, atol=1e-6)
    assert not any(equation.primitive.name in ("gather", "scatter") and equation.invars[0].aval.shape[-1:] == (V,)
                   and equation.invars[0].aval.size > 8 * V for equation in inner(jax.make_jaxpr(members)(policies)))


def test_the_products_of_a_loss_are_done_once():
    policy, table, base, _, action = problem(**BIG)
    parts = lambda x: x.reshape(32, 16, *x.shape[1:])  # noqa: E731

    def loss(policy, table):
        return chunked_loss(lambda terms, given, shared: terms.log_prob + terms.kl, parts(policy), table, parts(base),
                            table, parts(action), (), (), relative=False, block=4, train_table=True)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(policy, table).jaxpr
    products = [e for e in inner(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 4
    largest = max(np.prod(variable.aval.shape) for e in inner(jaxpr) for variable in e.outvars)
    assert largest <= max(16 * BIG["v"], BIG["v"] * BIG["d"])


def test_parts_that_are_not_used_are_zero():
    """Of 13 rows in 3 parts, part i has rows i, i + 3, ..."""
    inputs = problem(9)
    whole, some = (chunked_terms(*inputs, relative=False, chunk=5, used=used) for used in (None, jnp.int32(2)))
    here = np.arange(N) % 3 < 2
    for x, y in zip(whole, some, strict=True):
        np.testing.assert_array_equal(y, np.where(here, x, 0.0))
