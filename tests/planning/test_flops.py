import jax
import jax.numpy as jnp
import pytest

from kl_reg.planning import flops


def count(function, *shapes, turns=1):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.count(jax.jit(function).trace(*args).jaxpr.jaxpr, turns)


def test_products_are_what_xla_counts():
    function = lambda x, y: jnp.einsum("bij,bjk->bik", x, y)  # noqa: E731
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4, 5), (3, 5, 6))]
    assert count(function, (3, 4, 5), (3, 5, 6)) == 2 * 3 * 4 * 5 * 6
    assert jax.jit(function).lower(*args).compile().cost_analysis()["flops"] == 2 * 3 * 4 * 5 * 6


def test_loops_gradients_and_branches():
    product = lambda x, w: (x @ w).sum()  # noqa: E731
    one = 2 * 4 * 8 * 8
    assert count(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0], (4, 8), (8, 8)) == 7 * one
    assert count(jax.value_and_grad(product, (0, 1)), (4, 8), (8, 8)) == 3 * one
    loop = lambda x, w: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ w), (0, x))  # noqa: E731
    assert count(loop, (4, 8), (8, 8), turns=9) == 9 * one
    branch = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)  # noqa: E731
    assert count(branch, (4, 8), (8, 8)) == 2 * one


@pytest.mark.parametrize("differentiated, passes", [(None, 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_a_row_of_a_ragged_product_meets_one_matrix(differentiated, passes):
    sizes = jnp.array([2, 3, 1])
    product = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()  # noqa: E731
    function = product if differentiated is None else jax.value_and_grad(product, differentiated)
    assert count(function, (6, 4), (3, 4, 5)) == passes * 2 * 6 * 4 * 5


def test_convolutions_are_what_xla_counts():
    function = lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID")  # noqa: E731
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 8, 8), (5, 3, 3, 3))]
    assert count(function, *(x.shape for x in args)) == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert jax.jit(function).lower(*args).compile().cost_analysis()["flops"] == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
