"""What every family shares: features of the last layers (against torch), padding, the cached path, adapters."""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kl_reg.models import decoder
from kl_reg.models.layers import store
from kl_reg.pretrained import weights

LENGTH = 10
START = jnp.array([0, 3, 7])


@pytest.fixture(scope="module")
def torch_model():
    """A Llama in which every weight is random, norms included."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=40, max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-3))
    model.eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(0.3 * torch.randn_like(weight) + (weight.ndim == 1))
    return model


@pytest.fixture(scope="module")
def model(torch_model, tmp_path_factory, tiny_tokenizer):
    """Ours, loaded from what torch's saved."""
    folder = tmp_path_factory.mktemp("llama")
    torch_model.save_pretrained(folder)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    return weights.load(str(folder))


@pytest.fixture(scope="module")
def tokens():
    """Random tokens [3, LENGTH], those before START included."""
    return jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 96)


@partial(jax.jit, static_argnums=(0, 4))
def forward(config, params, tokens, start, features=0, adapter=None):
    return decoder.forward(config, params, tokens, start, features, adapter)


@partial(jax.jit, static_argnums=(0, 4, 5))
def prefill(config, params, tokens, start, slots, features=0, adapter=None):
    return decoder.prefill(config, params, tokens, start, slots, features, adapter)


@partial(jax.jit, static_argnums=(0, 6))
def decode(config, params, token, start, index, cache, features=0, adapter=None):
    return decoder.decode(config, params, token, start, index, cache, features, adapter)


def test_padding_is_never_looked_at(model, tokens):
    other = jnp.where(jnp.arange(LENGTH)[None] < START[:, None], (tokens + 1) % 96, tokens)
    here, there = (forward(model.config, model.params, x, START).last for x in (tokens, other))
    for row in range(3):
        np.testing.assert_array_equal(here[row, START[row]:], there[row, START[row]:])


@pytest.mark.parametrize("count", [1, 3])
def test_features_are_the_normed_outputs_of_the_last_layers(torch_model, model, tokens, count):
    ours = forward(model.config, model.params, tokens, START, count)
    assert ours.features.shape == (3, LENGTH, 32 * count)
    np.testing.assert_array_equal(ours.features[..., -32:], ours.last)
    for row, row_tokens, start in zip(ours.features, tokens, START, strict=True):
        inputs = torch.tensor(np.array(row_tokens[start:]))[None]
        states = torch_model(inputs, output_hidden_states=True).hidden_states       # the last of them is normed already
        theirs = [*map(torch_model.model.norm, states[-count:-1]), states[-1]]
        np.testing.assert_allclose(row[start:], torch.cat(theirs, -1)[0].numpy(), atol=1e-4)


def test_no_features_are_returned_unasked(model, tokens):
    assert forward(model.config, model.params, tokens, START).features.shape == (3, LENGTH, 0)


@pytest.mark.parametrize(("prompt", "start"), [(1, [0, 0, 0]), (8, [7, 0, 3])])
def test_prefill_and_decode_say_what_forward_says(model, tokens, prompt, start):
    start = jnp.array(start)
    whole = forward(model.config, model.params, tokens, start, 2)
    first, cache = prefill(model.config, model.params, tokens[:, :prompt], start, LENGTH + 2, 2)
    steps = [jax.tree.map(lambda x, i=i: x[:, i], first) for i in range(prompt)]
    for i in range(prompt, LENGTH):
        step, cache = decode(model.config, model.params, tokens[:, i], start, jnp.int32(i), cache, 2)
        steps.append(step)
    for i, step in enumerate(steps):
        real = np.array(start) <= i
        np.testing.assert_allclose(step.last[real], whole.last[real, i], atol=1e-4)
        np.testing.assert_allclose(step.features[real], whole.features[real, i], atol=1e-4)


def test_an_untied_model_has_an_unembedding_of_its_own(tiny_shapes):
    shapes = lambda tied: jax.eval_shape(  # noqa: E731
        partial(decoder.init, dataclasses.replace(tiny_shapes, tied=tied)), jax.random.key(0))
    assert shapes(False).pop("unembed").shape == (300, 16)
    assert "unembed" not in shapes(True)


MEMBERS, RANK = 2, 3
MATRICES = {"query": (16, 32), "key": (16, 16), "value": (16, 16), "out": (32, 16), "gate": (16, 32), "up": (16, 32),
            "down": (32, 16)}


@pytest.mark.parametrize("names", [tuple(MATRICES), ("value", "down")], ids=["all matrices", "two"])
def test_an_adapter_says_what_each_member_alone_says_with_merged_matrices(tiny_shapes, tiny_params, tokens, names):
    rng = np.random.default_rng(3)
    adapter = {name: {part: 0.2 * rng.standard_normal((tiny_shapes.layers, MEMBERS, *shape)).astype(np.float32)
                      for part, shape in (("a", (MATRICES[name][0], RANK)), ("b", (RANK, MATRICES[name][1])))}
               for name in names}
    rows, start = jnp.concatenate([tokens, tokens]), jnp.concatenate([START, START])
    whole = forward(tiny_shapes, tiny_params, rows, start, adapter=adapter).last
    first, cache = prefill(tiny_shapes, tiny_params, rows[:, :8], start, LENGTH, adapter=adapter)
    steps = [first.last]
    for i in (8, 9):
        step, cache = decode(tiny_shapes, tiny_params, rows[:, i], start, jnp.int32(i), cache, adapter=adapter)
        steps.append(step.last[:, None])
    cached, base = np.concatenate(steps, axis=1), forward(tiny_shapes, tiny_params, tokens, START).last
    for member in range(MEMBERS):
        layers = dict(tiny_params["layers"])
        for name in names:
            change = adapter[name]["a"][:, member] @ adapter[name]["b"][:, member]
            layers[name] = {"kernel": layers[name]["kernel"] + change}
        alone = forward(tiny_shapes, tiny_params | {"layers": layers}, tokens, START).last
        for row, begin in enumerate(START):
            for ours in (whole, cached):
                np.testing.assert_allclose(ours[3 * member + row, begin:], alone[row, begin:], atol=5e-5)
            assert np.abs(alone[row, begin:] - base[row, begin:]).max() > 0.1


@pytest.mark.parametrize("group", [2, 3])
def test_rows_with_the_same_prompt_read_it_once(model, tokens, group):
    """A prompt of 4 tokens, one row with padding, and `group` different continuations of each."""
    prompt, own = tokens[:2, :4], jax.random.randint(jax.random.key(7), (2 * group, 6), 0, 96)
    start = jnp.array([0, 2])
    rows, starts = jnp.concatenate([jnp.repeat(prompt, group, axis=0), own], axis=1), jnp.repeat(start, group)
    whole = forward(model.config, model.params, rows, starts, 2)
    shared = jax.jit(partial(decoder.forward, model.config, features=2, group=group, shared=4))(
        model.params, rows, starts)
    first, cache = jax.jit(partial(decoder.prefill, model.config, slots=10, features=2, group=group))(
        model.params, prompt, start)
    assert cache[0].prompt_key.values.shape[0] == 2 and cache[0].key.values.shape[0] == 2 * group
    parts = decoder.apart(model.params)
    for i in range(4, 10):
        step, cache = decode(model.config, parts, rows[:, i], starts, jnp.int32(i), cache, 2)
        np.testing.assert_allclose(step.features, whole.features[:, i], atol=1e-4)
    for row, begin in enumerate(starts):
        np.testing.assert_allclose(shared.features[row, begin:], whole.features[row, begin:], atol=1e-4)
        np.testing.assert_allclose(first.last[row // group, begin:], whole.last[row, begin:4], atol=1e-4)


@pytest.mark.parametrize("members", [0, MEMBERS], ids=["one model", "an adapter of two members"])
def test_a_prompt_that_is_chosen_again_is_read_once(tiny_shapes, tiny_params, tokens, members):
    """Two prompts, of which each member has three, beside the same prompts row by row."""
    rng, adapter = np.random.default_rng(3), None
    if members:
        adapter = {"down": {part: 0.2 * rng.standard_normal((tiny_shapes.layers, members, *shape)).astype(np.float32)
                            for part, shape in (("a", (32, RANK)), ("b", (RANK, 16)))}}
    prompts, start, chosen = tokens[:2], START[:2], jnp.array([1, 0, 1, 0, 0, 1])

    def read(tokens, start, chosen):
        return decoder.prefill(tiny_shapes, tiny_params, tokens, start, LENGTH + 2, 2, adapter, 2, chosen=chosen)

    once, each = jax.jit(read), jax.jit(partial(read, chosen=None))
    got, expected = once(prompts, start, chosen), each(prompts[chosen], start[chosen])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, expected)
    work = [run.lower(*args).cost_analysis()["flops"] for run, args in (
        (once, (prompts, start, chosen)), (each, (prompts[chosen], start[chosen])))]
    assert work[0] < 0.8 * work[1]


@pytest.mark.parametrize("cache_dtype, part", [("", 1e-5), ("bfloat16", 0.02), ("int8", 0.04)])
def test_shorter_caches_are_nearly_as_good(model, tokens, cache_dtype, part):
    """The error of 10 tokens' hidden states, of unit scale, behind a prompt of 8."""
    config = dataclasses.replace(model.config, cache=cache_dtype)
    whole = forward(model.config, model.params, tokens, START).last
    _, cache = prefill(config, model.params, tokens[:, :8], START, LENGTH)
    assert cache[0].key.values.dtype == jnp.dtype(cache_dtype or "float32") and cache[0].value.values.shape[2] == 2
    for i in (8, 9):
        step, cache = decode(config, model.params, tokens[:, i], START, jnp.int32(i), cache)
        error = np.abs(step.last - whole[:, i]).max() / np.abs(whole[:, i]).max()
        assert error < part
        assert error > part / 1e3 or not cache_dtype           # it is another cache


def test_int8_is_within_half_a_step_of_each_heads_largest_entry():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    kept = store(jnp.asarray(x), "int8")
    assert kept.values.dtype == jnp.int8
    back = kept.values * np.asarray(kept.scale)[..., None]
    assert np.all(np.abs(back - x) <= np.abs(x).max(-1, keepdims=True) / 127 / 2 * 1.001)
    assert store(jnp.zeros((1, 1, 1, 8)), "int8").values.sum() == 0
