"""The mixture of experts: against torch's router, and against one that computes every expert for every token."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from kl_reg.models.experts import Experts

EXPERTS, CHOSEN, WIDTH, INNER, TOKENS, MEMBERS = 5, 2, 8, 6, 12, 3
LAYER = Experts(INNER, EXPERTS, CHOSEN, "silu", jnp.float32)


def random_params(seed):
    shapes = jax.eval_shape(LAYER.init, jax.random.key(0), jnp.zeros((1, WIDTH)))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), shapes)


def random_x(*shape):
    return jnp.asarray(np.random.default_rng(9).standard_normal((*shape, WIDTH)), jnp.float32)


@jax.jit
def sparse(params, x):
    return LAYER.apply({"params": params}, x)


def dense(params, x):
    """All experts of all tokens x [n, d], those not chosen times zero."""
    likes = jax.nn.softmax(x @ params["router"]["kernel"])
    kept = jnp.where(likes >= jnp.sort(likes)[:, -CHOSEN][:, None], likes, 0.0)
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, params["gate"])) * jnp.einsum("nd,edf->enf", x, params["up"])
    return jnp.einsum("enf,efd,ne->nd", hidden, params["down"], kept / kept.sum(-1, keepdims=True))


def test_experts_and_their_weights_are_those_of_torch():
    """Expert e answers 1 in dimension e, whatever it is asked, so the output is the weight of each expert."""
    rng, layer = np.random.default_rng(0), Experts(1, EXPERTS, CHOSEN, "relu", jnp.float32)
    x = np.concatenate([np.ones((TOKENS, 1)), rng.standard_normal((TOKENS, WIDTH - 1))], axis=1).astype(np.float32)
    kernel = rng.standard_normal((WIDTH, EXPERTS)).astype(np.float32)
    one = jnp.zeros((EXPERTS, WIDTH, 1)).at[:, 0].set(1.0)
    answer = jnp.eye(EXPERTS, WIDTH)[:, None]
    ours = layer.apply({"params": {"router": {"kernel": kernel}, "gate": one, "up": one, "down": answer}}, x)
    router = MixtralTopKRouter(transformers.MixtralConfig(
        hidden_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN)).requires_grad_(False)
    router.weight.copy_(torch.tensor(kernel.T))
    _, scores, chosen = router(torch.tensor(x))
    theirs = np.zeros((TOKENS, WIDTH), np.float32)
    np.put_along_axis(theirs, chosen.numpy(), scores.numpy(), axis=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert len(np.unique(np.sort(chosen.numpy()), axis=0)) > 5      # of the 10 pairs


@pytest.mark.parametrize("favourite", [None, 0, 3])
def test_no_token_is_dropped_however_many_choose_an_expert(favourite):
    params, x = random_params(1), random_x(TOKENS).at[:, 0].set(1.0)
    if favourite is not None:
        params["router"]["kernel"] = params["router"]["kernel"].at[0, favourite].set(50.0)
    np.testing.assert_allclose(sparse(params, x), dense(params, x), rtol=1e-4, atol=1e-4)


def test_where_all_experts_are_liked_alike_each_token_still_goes_to_some():
    params, x = random_params(1), random_x(TOKENS)
    params["router"]["kernel"] = jnp.zeros((WIDTH, EXPERTS))
    for name in ("gate", "up", "down"):
        params[name] = jnp.broadcast_to(params[name][0], params[name].shape)
    only = {name: params[name][0] for name in ("gate", "up", "down")}
    expected = (jax.nn.silu(x @ only["gate"]) * (x @ only["up"])) @ only["down"]
    np.testing.assert_allclose(sparse(params, x), expected, rtol=1e-4, atol=1e-4)


def gradients(layer, params, x, cotangent):
    return jax.grad(lambda params, x: (layer(params, x) * cotangent).sum(), argnums=(0, 1))(params, x)


@pytest.mark.parametrize("members", [None, "activations", "activations and parameters"])
def test_gradients_are_those_of_the_dense_layer(members):
    if members is None:
        wrap, x, params = lambda layer: layer, random_x(TOKENS), random_params(2)
    elif members == "activations":
        wrap, x, params = partial(jax.vmap, in_axes=(None, 0)), random_x(MEMBERS, TOKENS), random_params(2)
    else:
        wrap, x = jax.vmap, random_x(MEMBERS, TOKENS)
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(random_params, range(MEMBERS)))
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(x.shape), jnp.float32)
    ours, theirs = (jax.jit(partial(gradients, wrap(layer)))(params, x, cotangent) for layer in (sparse, dense))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_gradients_of_each_member_are_its_own():
    """vmap of grad: a shared layer, and gradients that are not summed over the members."""
    params, x = random_params(2), random_x(MEMBERS, TOKENS)
    cotangent = jnp.ones_like(x)
    ours, theirs = (jax.jit(jax.vmap(partial(gradients, layer), in_axes=(None, 0, 0)))(params, x, cotangent)
                    for layer in (sparse, dense))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.shape[0] == MEMBERS
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
