"""Members beside what `vmap` makes of them."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kl_reg.sharding.batching import over_members, write


@pytest.mark.parametrize("heads", [1, 2])
def test_members_write_their_caches_in_place(heads):
    """No scatter, for which XLA copies the cache."""
    rng = np.random.default_rng(0)
    kept, new = (jnp.float32(rng.standard_normal((3, heads, slots, 4))) for slots in (5, 1))
    over = jax.vmap(partial(write, axis=1), (0, 0, None))
    expected = np.array(kept)
    expected[:, :, 3:4] = new
    np.testing.assert_array_equal(over(kept, new, jnp.int32(3)), expected)
    assert "scatter" not in str(jax.make_jaxpr(over)(kept, new, jnp.int32(3)))


@pytest.mark.parametrize("members", [1, 3])
def test_members_are_mapped(members):
    rng = np.random.default_rng(0)
    x, y = (jnp.float32(rng.standard_normal(shape)) for shape in ((members, 2, 4), (4, 3)))
    function = lambda tree, y: {"product": tree["x"] @ y, "sum": tree["x"].sum()}  # noqa: E731
    got = over_members(function, (0, None))({"x": x}, y)
    np.testing.assert_allclose(got["product"], np.asarray(x) @ np.asarray(y), rtol=1e-5)
    np.testing.assert_allclose(got["sum"], np.asarray(x).sum((1, 2)), rtol=1e-5)


def test_one_member_is_computed_alone_but_on_a_mesh():
    """What is computed of the one has its dimension where the compiler divides it."""
    largest = lambda: max(len(equation.outvars[0].aval.shape) for equation in jax.make_jaxpr(  # noqa: E731
        over_members(jnp.sin))(jnp.ones((1, 4))).eqns if equation.primitive.name == "sin")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert largest() == 1
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert largest() == 2
